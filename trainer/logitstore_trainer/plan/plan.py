"""Which codec for a goal: configurations fitted on one part of a sample and measured on another that no fit has seen.

The tail model is fitted once and serves every configuration; what is fitted for each are lists, symbol tables and the
tables of corrections. Nothing is chosen on rows that are reported elsewhere: they are the planner's own.

Letters: R rows, V vocabulary. T is the temperature.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import logitstore
from logitstore.codecs.topk import TopKCodec
from logitstore.fit_codec import fit_tail, fitted_on_rows
from logitstore.tail_fit import TailFitSettings
from logitstore.tail_model import TailModel
from logitstore.tail_rows import TailRows, tail_rows
from logitstore_trainer.bench.environment import environment, output_folder, write_json
from logitstore_trainer.bench.fidelity import estimate, row_divergences
from logitstore_trainer.bench.logits_file import LogitsFile
from logitstore_trainer.plan.page import plan_table, recommendation_text, write_page
from logitstore_trainer.progress import Progress
from logitstore_trainer.report import format_table

HELD_OUT_EVERY = 5
UNFITTED = tuple({"k": k} for k in (8, 16, 32, 64))
RESIDUAL = tuple({"head": "log", "head_step": 0.5, "k": 64, "min_prob": p} for p in (0.01, 0.0025))
PREDICTED = tuple(
    {"head": "log", "head_step": step, "k": 64, "min_prob": p, "tail": "predicted", "tail_step": tail_step}
    for p, step, tail_step in (
        (0.02, 1.0, None),
        (0.01, 1.0, None),
        (0.01, 0.5, None),
        (0.005, 0.5, None),
        (0.0025, 0.5, None),
        (0.01, 0.5, 0.18),
        (0.005, 0.5, 0.18),
        (0.01, 0.5, 0.13),
        (0.005, 0.5, 0.13),
        (0.0025, 0.5, 0.13),
        (0.01, 0.5, 0.1),
        (0.005, 0.5, 0.1),
        (0.01, 0.5, 0.08),
        (0.005, 0.5, 0.08),
        (0.005, 0.5, 0.065),
        (0.0025, 0.5, 0.055),
        (0.0025, 0.5, 0.045),
    )
)


@dataclass(frozen=True)
class Goal:
    """At most max_bytes_per_token bytes, or at most max_kl nats: one of the two. temperature: at which KL counts, None
    for T = 1 and T = 2 together (max_kl: T = 1). tokens: how many will be stored. Raises ValueError for others."""

    max_bytes_per_token: float | None
    max_kl: float | None
    temperature: float | None = None
    tokens: float = 1e9

    def __post_init__(self) -> None:
        if (self.max_bytes_per_token is None) == (self.max_kl is None):
            raise ValueError("a goal is either --max-bytes-per-token or --max-kl")
        for name in ("max_bytes_per_token", "max_kl", "temperature", "tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {value}")

    @property
    def temperatures(self) -> tuple[float, ...]:
        """At which KL is measured: 1, 2 and the goal's own."""
        return tuple(sorted({1.0, 2.0, *([self.temperature] if self.temperature else [])}))

    def loss(self, row: dict[str, Any]) -> float:
        """The KL that counts, in nats, of a measured configuration."""
        if self.temperature is not None:
            return row["kl"][f"{self.temperature:g}"]
        return row["kl"]["1"] if self.max_kl is not None else row["kl"]["1"] + row["kl"]["2"]

    def chosen(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """The best of the configurations that keep to the goal, None where none does."""
        if self.max_kl is not None:
            fitting = [row for row in rows if self.loss(row) <= self.max_kl]
            return min(fitting, key=lambda row: row["bytes_per_token"], default=None)
        fitting = [row for row in rows if row["bytes_per_token"] <= self.max_bytes_per_token]
        return min(fitting, key=self.loss, default=None)


def plan(logits: Path, goal: Goal, *, n_rows: int = 1020, seed: int = 0, out: Path | None = None) -> int:
    """Fits, measures, prints and, where there is a folder, writes; returns the exit code."""
    if n_rows < 1:
        raise ValueError(f"--rows must be at least 1, got {n_rows}")
    start_s = time.perf_counter()
    sample = LogitsFile(logits)
    if len(sample) < 2:
        raise ValueError(f"{logits} holds one sample; a plan fits on some and measures on others")
    folder = output_folder(out) if out is not None else None
    held_out = held_out_samples(range(len(sample)))
    measured = spread_samples(sample, sorted(held_out), n_rows)
    rows, tail = fitted_tail(
        sample, [number for number in range(len(sample)) if number not in held_out], TailFitSettings(seed=seed)
    )
    results = []
    codecs: list[TopKCodec] = []
    with Progress(total=len(UNFITTED) + len(RESIDUAL) + len(PREDICTED), desc="measure", unit="codecs") as display:
        for codec in candidates(rows, tail):
            results.append(measured_codec(codec, measured, goal.temperatures))
            codecs.append(codec)
            display.update()
    best = goal.chosen(results)
    mark_frontier(results, goal)
    facts = environment(
        logits=str(logits.name),
        rows_fitted=rows.n_rows,
        rows_measured=sum(len(item.input_ids) - 1 for item in measured),
        seconds=time.perf_counter() - start_s,
    )
    print(format_table(*plan_table(results, goal)))
    print(recommendation_text(results, best, goal, folder))
    if folder is not None:
        write_json(folder / "plan.json", {"goal": vars(goal), "results": results, "chosen": best, "facts": facts})
        report = write_page(folder / "report.html", results, best, goal, facts)
        if best is not None:
            codecs[results.index(best)].save(folder)
        print(f"report: {report}")
    return 0 if best is not None else 1


def held_out_samples(numbers: Sequence[int]) -> set[int]:
    """Every fifth of these samples, the last one at least: those that decide and are not fitted on."""
    return set(numbers[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]) or set(numbers[-1:])


def fitted_tail(sample: LogitsFile, numbers: Sequence[int], settings: TailFitSettings) -> tuple[TailRows, TailModel]:
    """The rows of these samples, and the tail model fitted to them."""
    total = int(sum(sample.sample_lengths[i] - 1 for i in numbers))
    with Progress(total=total, desc="read the sample", unit="rows") as display:
        rows = tail_rows(_Samples(sample, numbers), sample.vocab_size, on_rows=display.update)
    with _StepProgress() as display:
        return rows, fit_tail(rows, settings, display.on_step)


class _StepProgress(contextlib.ExitStack):
    """Shows the steps of a fit, whose number is known with the first."""

    _display: Progress | None = None

    def on_step(self, step: int, steps: int, loss: float) -> None:
        if self._display is None:
            self._display = self.enter_context(Progress(total=steps, desc="fit the tail model", unit="steps"))
        self._display.update()


@dataclass(frozen=True, eq=False)
class _Samples:
    file: LogitsFile
    numbers: Sequence[int]

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        for number in self.numbers:
            sample = self.file[number]
            yield sample.logits, sample.input_ids, None


def candidates(rows: TailRows, tail: TailModel) -> Iterator[TopKCodec]:
    """Every configuration, fitted where it has something to fit."""
    vocab_size = len(rows.lm_head)
    for options in UNFITTED:
        yield logitstore.make_codec("topk", vocab_size=vocab_size, **{**options, "k": min(options["k"], vocab_size)})
    for options in (*RESIDUAL, *PREDICTED):
        options = {**options, "k": min(options["k"], vocab_size)}
        yield fitted_on_rows(logitstore.make_codec("topk", vocab_size=vocab_size, **options), rows, tail)


def spread_samples(sample: LogitsFile, held_out: Sequence[int], n_rows: int) -> list[Any]:
    """Samples of n_rows rows together, spread over those that are held out."""
    chosen, total = [], 0
    step = max(1, int(len(held_out) * float(np.mean(sample.sample_lengths)) / n_rows))  # spread over the file
    for number in held_out[::step]:
        chosen.append(sample[number])
        total += len(chosen[-1].input_ids) - 1
        if total >= n_rows:
            break
    return chosen


def measured_codec(codec: TopKCodec, samples: Sequence[Any], temperatures: Sequence[float]) -> dict[str, Any]:
    """A codec on these samples: config, bytes_per_token, table_bytes, entries a row, kl and kl_se by temperature."""
    n_bytes, n_rows, n_entries = 0, [], 0
    kl_sums: dict[float, list[float]] = {temperature: [] for temperature in temperatures}
    for sample in samples:
        targets = codec.targets_from_logits(sample.logits, sample.input_ids)
        blob = codec.encode(targets, sample.input_ids)
        decoded = codec.decode(blob, sample.input_ids)
        n_bytes += len(blob)
        n_rows.append(decoded.n_rows)
        n_entries += len(decoded.ids)
        for temperature, sums in kl_sums.items():
            dense = decoded.dense_logprobs(temperature)
            sums.append(float(row_divergences(sample.logits, dense, temperature=temperature).kl.sum()))
    kls = {f"{temperature:g}": estimate(sums, n_rows) for temperature, sums in kl_sums.items()}
    config = {name: value for name, value in codec.config.items() if name not in ("name", "vocab_size", "tables")}
    return {
        "config": config,
        "bytes_per_token": n_bytes / sum(n_rows),
        "table_bytes": len(codec.tables.file_bytes) if codec.tables is not None else 0,
        "entries": n_entries / sum(n_rows),
        "kl": {name: kl.mean for name, kl in kls.items()},
        "kl_se": {name: kl.se for name, kl in kls.items()},
    }


def mark_frontier(results: Sequence[dict[str, Any]], goal: Goal) -> None:
    """Adds "frontier" to each row: True where no other has both fewer bytes and less KL."""
    for row in results:
        row["frontier"] = not any(
            other["bytes_per_token"] <= row["bytes_per_token"] and goal.loss(other) < goal.loss(row)
            for other in results
            if other is not row
        )
