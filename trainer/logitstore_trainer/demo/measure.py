"""What the demo measures on text that nobody was trained on: the store against the teacher, and every model.

Letters: L sequence length, V vocabulary. T is the temperature.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

import logitstore
from logitstore_trainer.bench.fidelity import estimate, row_divergences
from logitstore_trainer.evaluate import evaluate_student
from logitstore_trainer.progress import progress

TEMPERATURES = (1.0, 2.0)
_BATCH_SIZE = 16

Reconstruction = Callable[[logitstore.Sample, torch.Tensor, float], NDArray[np.float32]]


def from_store(sample: logitstore.Sample, logits_LV: torch.Tensor, temperature: float) -> NDArray[np.float32]:
    """ln q at T of a sample's rows [L - 1, V], as the store stands for it."""
    return sample.targets.dense_logprobs(temperature)


def from_fp16(sample: logitstore.Sample, logits_LV: torch.Tensor, temperature: float) -> NDArray[np.float32]:
    """ln q at T of the same rows, had all V logits been kept in fp16."""
    return (logits_LV[:-1].half().float() / temperature).log_softmax(dim=1).numpy()


@torch.no_grad()
def fidelity(store: logitstore.LogitStore, teacher: PreTrainedModel) -> dict[str, dict[str, float | None]]:
    """{"store" | "fp16": {"kl_t1", "kl_t1_se", "kl_t2", "kl_t2_se"}}: KL(teacher || what is kept) in nats a row, with
    its standard error over sequences. The teacher runs again, its whole logits are the truth."""
    reconstructions: dict[str, Reconstruction] = {"store": from_store, "fp16": from_fp16}
    sums: dict[tuple[str, float], list[float]] = {(name, t): [] for name in reconstructions for t in TEMPERATURES}
    rows: list[int] = []
    for i in progress(range(len(store)), total=len(store), desc="compare store and teacher", unit="samples"):
        sample = store[i]
        input_ids = torch.from_numpy(sample.input_ids.astype(np.int64))
        logits_LV = teacher(input_ids=input_ids[None], use_cache=False).logits[0, :, : store.spec.vocab_size]
        present = sample.targets.present
        rows.append(int(present.sum()))
        for (name, temperature), per_sequence in sums.items():
            logq = reconstructions[name](sample, logits_LV, temperature)
            kl = row_divergences(logits_LV, logq, temperature=temperature).kl
            per_sequence.append(float(kl[present].sum()))
    return {name: _named(name, sums, rows) for name in reconstructions}


def held_out_metrics(model: PreTrainedModel, teacher: PreTrainedModel, store: logitstore.LogitStore) -> dict[str, Any]:
    """The Evaluation of a model on a store's samples, as JSON: loss, exact KL to the live teacher, top-1 agreement."""
    evaluation = evaluate_student(model, store, teacher_model=teacher, batch_size=_BATCH_SIZE)
    return asdict(evaluation)


def _named(name: str, sums: dict[tuple[str, float], list[float]], rows: Sequence[int]) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for temperature in TEMPERATURES:
        mean, se = estimate(sums[name, temperature], rows)
        values |= {f"kl_t{temperature:.0f}": mean, f"kl_t{temperature:.0f}_se": se}
    return values
