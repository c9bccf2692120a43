"""What the students of student_quality.py are trained on: the stores, and the loss of each arm.

An arm is a way to keep the teacher: its store is written from the teacher's rows by the library, read, collated and
decoded as any training would. The full teacher is rebuilt from its hidden states, and DistillKit's rows are what its
own compressor gives back, the missing mass spread evenly; both as dense distributions in plain PyTorch.

Letters: S sequences of a batch, L length, N = S * (L - 1) rows, V vocabulary, D width. T is the temperature.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from logitstore_trainer import DistillationLoss, collate
from logitstore_trainer.bench.budgets import planned_codecs, prepared
from logitstore_trainer.bench.logits_file import LogitsFile
from logitstore_trainer.bench.readings import missing_mass_uniform
from logitstore_trainer.bench.rivals import DISTILLKIT_OPTIONS, DistillKit
from logitstore_trainer.progress import Progress

import logitstore
from logitstore.fit_cache import FitCache, default_cache_folder

BUDGETS = (16.0, 24.0, 40.0)
FULL_BYTES_PER_LOGIT = 2
KINDS = ("gsm8k", "instructions", "documentation")


@dataclass(frozen=True)
class Arm:
    """name, and the store that it reads, by the name of its codec (None: full or DistillKit); tail: how the loss reads
    the store's tail, None for what suits it; temperature of the loss."""

    name: str
    codec: str | None
    tail: str | None = None
    temperature: float = 1.0
    is_labels: bool = False


ARMS = (
    Arm("labels", "top 16", is_labels=True),
    Arm("full logits", None),
    Arm("24 bytes", "24 bytes"),
    Arm("16 bytes", "16 bytes"),
    Arm("40 bytes", "40 bytes"),
    Arm("RS-KD, 50 draws", "RS-KD"),
    Arm("top 16, bucket", "top 16", "bucket"),
    Arm("top 16, uniform", "top 16", "uniform"),
    Arm("top 16, renormalised", "top 16", "renormalised"),
    Arm("DistillKit", None),
    Arm("full logits", None, temperature=2.0),
    Arm("24 bytes", "24 bytes", temperature=2.0),
    Arm("DistillKit", None, temperature=2.0),
)

LossOfBatch = Callable[[torch.Tensor, list[int]], torch.Tensor]  # logits [S, L, V], numbers of the sequences


def loss_of_arm(arm: Arm, rows: LogitsFile, stores: Path) -> tuple[LossOfBatch, float]:
    """(the arm's loss, mean over rows; bytes a token of what it reads)."""
    if arm.codec is None:
        targets: Callable[[Any, float], torch.Tensor] = _full_logits
        size: float = FULL_BYTES_PER_LOGIT * rows.vocab_size
        if arm.name == "DistillKit":
            rival = _DistillKitRows(rows.vocab_size)
            targets, size = rival, rival.bytes_per_row(rows[0])

        def dense_loss(logits_SLV: torch.Tensor, numbers: list[int]) -> torch.Tensor:
            samples = [rows[number] for number in numbers]
            with torch.no_grad():
                logp_NV = torch.cat([targets(sample, arm.temperature) for sample in samples])
            logq_NV = (logits_SLV[:, :-1].flatten(0, 1) / arm.temperature).log_softmax(-1)
            kl = torch.nn.functional.kl_div(logq_NV, logp_NV, reduction="sum", log_target=True)
            return arm.temperature**2 * kl / len(logp_NV)

        return dense_loss, size
    path = stores / f"{arm.codec}.parquet"
    store = logitstore.open(path)
    alpha = 0.0 if arm.is_labels else 1.0
    loss_of = DistillationLoss(store, temperature=arm.temperature, alpha=alpha, tail=arm.tail)

    def stored_loss(logits_SLV: torch.Tensor, numbers: list[int]) -> torch.Tensor:
        return loss_of(logits_SLV, collate([store[number] for number in numbers]))

    sizes = json.loads((stores / "bytes_per_token.json").read_text())
    return stored_loss, 0.0 if arm.is_labels else sizes[arm.codec]


def _full_logits(sample: Any, temperature: float) -> torch.Tensor:
    hidden, head = sample.logits.hidden, sample.logits.lm_head
    return (hidden[:-1].float() @ head.float().T / temperature).log_softmax(-1)


class _DistillKitRows:
    """ln q_T [L - 1, V] of a sample through DistillKit's recommended configuration."""

    def __init__(self, vocab_size: int) -> None:
        self._rival = DistillKit("recommended", vocab_size, DISTILLKIT_OPTIONS["recommended"])
        self._vocab_size = vocab_size

    def bytes_per_row(self, sample: Any) -> float:
        return self._rival.bytes_per_row(sample)

    def __call__(self, sample: Any, temperature: float) -> torch.Tensor:
        ids_RK, logps_RK = self._rival.entries(sample)
        return torch.from_numpy(missing_mass_uniform(ids_RK, logps_RK, self._vocab_size, temperature))


def write_stores(rows_folder: Path, stores: Path, arms: Sequence[Arm]) -> None:
    """Writes the stores of these arms that are not there yet; plans the codecs of the budgets where it takes one."""
    stores.mkdir(parents=True, exist_ok=True)
    sizes_path = stores / "bytes_per_token.json"
    sizes = json.loads(sizes_path.read_text()) if sizes_path.is_file() else {}
    rows = LogitsFile(rows_folder / "train.safetensors")
    missing = {arm.codec for arm in arms if arm.codec is not None} - set(sizes)
    for name, codec in _codecs(rows_folder, rows.vocab_size, missing):
        sizes[name] = _write_store(stores / f"{name}.parquet", codec, rows, name)
        partial = sizes_path.with_suffix(".partial")
        partial.write_text(json.dumps(sizes))
        partial.rename(sizes_path)


def _codecs(rows_folder: Path, vocab_size: int, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    plain = {
        "top 16": {"name": "topk", "k": 16, "head": "fp16"},
        "RS-KD": {"name": "rskd", "draws": 50},
    }
    for name, options in plain.items():
        if name in names:
            yield name, logitstore.make_codec(vocab_size=vocab_size, **options)
    budgets = {f"{budget:g} bytes": budget for budget in BUDGETS}
    if budgets.keys().isdisjoint(names):
        return
    fit = LogitsFile(rows_folder / "fit.safetensors")
    choose_on = [LogitsFile(rows_folder / f"choose-{kind}.safetensors") for kind in KINDS]
    sample = prepared(fit, range(len(fit)), choose_on, quick=False, cache=FitCache(default_cache_folder(), print))
    codecs = {planned.budget: planned.codec for planned in planned_codecs(sample, BUDGETS)}
    for name, budget in budgets.items():
        if name not in names:
            continue
        if budget not in codecs:
            raise ValueError(f"no configuration of the plan keeps to {name} a token")
        yield name, codecs[budget]


def _write_store(path: Path, codec: Any, rows: LogitsFile, name: str) -> float:
    """Writes the rows; returns bytes a token of the blobs. What a killed run left goes first."""
    for left in path.parent.glob(f"{path.name}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    n_rows = 0
    with (
        logitstore.create(path, logitstore.StoreSpec(codec=codec, vocab_size=rows.vocab_size)) as writer,
        Progress(total=len(rows), desc=f"store, {name}", unit="sequences") as display,
    ):
        for number in range(len(rows)):
            sample = rows[number]
            targets = codec.targets_from_logits(sample.logits, sample.input_ids)
            writer.append(number, sample.input_ids, targets)
            n_rows += targets.n_rows
            display.update()
    return writer.blob_bytes_appended / n_rows


def batches(n_sequences: int, batch_size: int, n_steps: int, seed: int) -> Sequence[list[int]]:
    """The numbers of the sequences of every step: the same for every arm of a seed, pass after pass, shuffled.

    The first half of the sequences is one kind of text, the second the other; every step has as much of either.
    """
    generator = torch.Generator().manual_seed(seed)
    half = n_sequences // 2
    order: list[int] = []
    while len(order) < batch_size * n_steps:
        halves = [torch.randperm(half, generator=generator) + first for first in (0, half)]
        order += torch.stack(halves, dim=1).flatten().tolist()
    return [order[step * batch_size : (step + 1) * batch_size] for step in range(n_steps)]
