"""What a comparison measures on text that nobody was trained on: the store against the teacher, and every model.

Letters: L sequence length, N rows measured, V vocabulary. T is the temperature.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

import logitstore
from logitstore_trainer.bench.fidelity import estimate, row_divergences
from logitstore_trainer.evaluate import evaluate_student
from logitstore_trainer.progress import Progress

TEMPERATURES = (1.0, 2.0)
KEPT = ("store", "fp16")


@torch.no_grad()
def fidelity(
    store: logitstore.LogitStore, teacher: PreTrainedModel, *, max_rows: int | None = None
) -> dict[str, dict[str, float | None]]:
    """{"store" | "fp16": {"kl_t1", "kl_t1_se", "kl_t2", "kl_t2_se"}}: KL(teacher || what is kept) in nats a row, with
    its standard error over sequences, over the store's first present rows (about max_rows of them). "fp16": had all V
    logits been kept in fp16. The teacher runs again, its whole logits are the truth."""
    sums: dict[tuple[str, float], list[float]] = {(name, t): [] for name in KEPT for t in TEMPERATURES}
    rows: list[int] = []
    total = min(store.n_present_rows, max_rows or store.n_present_rows)
    with Progress(total=total, desc="compare store and teacher", unit="rows") as shown:
        for sample in store:
            present = np.flatnonzero(sample.targets.present)
            if len(present) == 0:
                continue
            input_ids = torch.from_numpy(sample.input_ids.astype(np.int64)).to(teacher.device)
            logits_LV = teacher(input_ids=input_ids[None], use_cache=False).logits[0, :, : store.spec.vocab_size]
            logits_NV = logits_LV[torch.from_numpy(present).to(teacher.device)].float().cpu()
            for (name, temperature), per_sequence in sums.items():
                logq_NV = _kept_logprobs(name, sample, present, logits_NV, temperature)
                per_sequence.append(float(row_divergences(logits_NV, logq_NV, temperature=temperature).kl.sum()))
            rows.append(len(present))
            shown.update(len(present))
            if sum(rows) >= total:
                break
    return {name: _named(name, sums, rows) for name in KEPT}


def held_out_metrics(
    model: PreTrainedModel, teacher: PreTrainedModel, store: logitstore.LogitStore, *, batch_size: int
) -> dict[str, Any]:
    """The Evaluation of a model on a store's samples, as JSON: loss, exact KL to the live teacher, top-1 agreement."""
    return asdict(evaluate_student(model, store, teacher_model=teacher, batch_size=batch_size))


def _kept_logprobs(
    name: str, sample: logitstore.Sample, rows: NDArray[np.int64], logits_NV: torch.Tensor, temperature: float
) -> NDArray[np.float32]:
    """ln q at T [N, V] of the sample's rows, as the store or fp16 logits stand for it."""
    if name == "store":
        return sample.targets.dense_logprobs(temperature)[rows]
    return (logits_NV.half().float() / temperature).log_softmax(dim=1).numpy()


def _named(name: str, sums: dict[tuple[str, float], list[float]], rows: Sequence[int]) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for temperature in TEMPERATURES:
        mean, se = estimate(sums[name, temperature], rows)
        values |= {f"kl_t{temperature:.0f}": mean, f"kl_t{temperature:.0f}_se": se}
    return values
