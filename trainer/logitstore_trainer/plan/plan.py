"""Which codec for a goal: configurations fitted on one part of a sample and measured on another that no fit has seen.

The tail model is fitted once and serves every configuration, in fewer coefficients where its corrections are coarse
(tail_rank.default_rank); what is fitted for each are lists, symbol tables and the tables of corrections. Nothing is
chosen on rows that are reported elsewhere: they are the planner's own.

Letters: R rows, V vocabulary. T is the temperature.
"""

import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

import logitstore
from logitstore.codecs.topk import LEAST_PREDICTED_VOCAB, TopKCodec
from logitstore.fit_cache import FitCache
from logitstore.fit_codec import counted, fit_tail, fitted_on_rows, fitted_steps, targets_of_rows
from logitstore.logits_source import full_logits
from logitstore.tail_fit import TailFitSettings
from logitstore.tail_model import TailModel
from logitstore.tail_rank import FEW, default_rank, with_rank
from logitstore.tail_rows import TailRows, tail_rows
from logitstore_trainer.bench.fidelity import Estimate, estimate, row_divergences
from logitstore_trainer.plan.goal import Goal
from logitstore_trainer.plan.sample import JoinedSample, PlanSample, SampleRows, TextsOf
from logitstore_trainer.progress import Progress, StageProgress

PLAN_FILE = "plan.json"
MEASURED_ROWS, SIZED_ROWS = 1020, 20_000
HELD_OUT_EVERY = 5
UNFITTED = tuple({"k": k} for k in (8, 16, 32, 64))
RESIDUAL = tuple({"head": "log", "head_step": 0.5, "k": 64, "min_prob": p} for p in (0.01, 0.0025))
_TAIL_STEPS: dict[tuple[float, float], tuple[float | None, ...]] = {  # by (min_prob, head_step)
    (0.02, 1.0): (None,),
    (0.01, 1.0): (None,),
    (0.01, 0.5): (None, 0.18, 0.16, 0.14, 0.12),
    (0.005, 0.5): (
        None, 0.15, 0.135, 0.12, 0.1, 0.09, 0.085, 0.08, 0.07, 0.0625, 0.0585, 0.055, 0.05, 0.045, 0.0415, 0.0385,
    ),
    (0.0025, 0.5): (None, 0.06, 0.03),
}  # fmt: skip
PREDICTED = tuple(
    {"head": "log", "head_step": step, "k": 64, "min_prob": p, "tail": "predicted", "tail_step": tail_step}
    for (p, step), tail_steps in _TAIL_STEPS.items()
    for tail_step in tail_steps
)


@dataclass(frozen=True, eq=False)
class Planned:
    """results: a row for each configuration, as measured_codec gives it, with "frontier". chosen, codec: the row that
    the goal takes and its codec, None where no configuration reaches the goal. rows_fitted, rows_measured: of the
    teacher. texts_measured: whose rows these are. seconds: what the plan took."""

    results: list[dict[str, Any]]
    chosen: dict[str, Any] | None
    codec: TopKCodec | None
    rows_fitted: int
    rows_measured: int
    texts_measured: int
    seconds: float


def make_plan(
    sample: PlanSample,
    goal: Goal,
    *,
    choose_on: Sequence[PlanSample] = (),
    n_rows: int = MEASURED_ROWS,
    seed: int = 0,
    cache: FitCache | None = None,
) -> Planned:
    """Fits, measures on n_rows rows that it has not fitted on, and chooses; choose_on as in `prepare`.

    Shows progress; prints nothing else. Raises ValueError for a sample of one text, or n_rows below 1.
    """
    start_s = time.perf_counter()
    settings = TailFitSettings(seed=seed)
    prepared = prepare(sample, choose_on=choose_on, n_rows=n_rows, settings=settings, cache=cache)
    results: list[dict[str, Any]] = []
    best: TopKCodec | None = None
    for codec, result in measured_candidates(prepared, goal.temperatures):
        results.append(result)
        if goal.chosen(results) is result:
            best = codec  # the others are dropped: tables take up to hundreds of MB
    for codec, result in between_candidates(prepared, results, goal):
        results.append(result)
        best = codec if goal.chosen(results) is result else best
    mark_frontier(results, goal)
    return Planned(
        results=results,
        chosen=goal.chosen(results),
        codec=best,
        rows_fitted=prepared.rows.n_rows,
        rows_measured=prepared.n_measured_rows,
        texts_measured=len(prepared.measured),
        seconds=time.perf_counter() - start_s,
    )


@dataclass(frozen=True, eq=False)
class Prepared:
    """rows, tail: what every configuration is fitted to, the tail in all coefficients. measured: texts that KL is
    measured on. sized: the rows that bytes are counted on; these are many more, for counting is cheap. None of either
    is fitted on. sized_kinds [S]: of which kind each text of sized is; bytes differ more between kinds than within one,
    and there are as many of each."""

    rows: TailRows
    tail: TailModel
    measured: Sequence[SampleRows]
    n_measured_rows: int
    sized: TailRows
    sized_kinds: NDArray[np.int64]

    def tail_for(self, tail_step: float | None) -> TailModel:
        """The tail model of codecs of this tail_step."""
        return self.tail if default_rank(tail_step) is None else self._tail_of_few

    @functools.cached_property
    def _tail_of_few(self) -> TailModel:
        return with_rank(self.tail, self.rows, min(FEW, self.tail.rank))


def prepare(
    sample: PlanSample,
    *,
    choose_on: Sequence[PlanSample] = (),
    n_rows: int,
    n_sized_rows: int = SIZED_ROWS,
    settings: TailFitSettings | None = None,
    cache: FitCache | None = None,
) -> Prepared:
    """Reads the sample and fits the tail model to it. Codecs are measured on the samples of choose_on, as many rows of
    each; where there are none on every fifth text, which is then not fitted on. n_rows: that KL is measured on;
    n_sized_rows: that bytes are counted on. Raises ValueError as make_plan does."""
    if n_rows < 1:
        raise ValueError(f"--rows must be at least 1, got {n_rows}")
    if sample.vocab_size < LEAST_PREDICTED_VOCAB:
        raise ValueError(
            f"{sample.name} has a vocabulary of {sample.vocab_size} tokens, a plan is for {LEAST_PREDICTED_VOCAB} or "
            f"more; keep them all: logitstore collect --codec topk --set k={sample.vocab_size}"
        )
    n_texts = len(sample.row_counts)
    if choose_on:
        joined = JoinedSample([*choose_on, sample])
        kinds = [joined.numbers_of(which) for which in range(len(choose_on))]
        fitting = TextsOf(sample, range(n_texts))
    elif n_texts < 2:
        raise ValueError(f"{sample.name} gives one text; a plan fits on some and measures on others")
    else:
        every = min(HELD_OUT_EVERY, n_texts)
        joined, kinds = JoinedSample([sample]), [range(every - 1, n_texts, every)]
        fitting = TextsOf(sample, [i for i in range(n_texts) if i not in kinds[0]])
    counts = joined.row_counts
    measured, sized = (
        [_spread_numbers(counts, kind, most // len(kinds)) for kind in kinds] for most in (n_rows, n_sized_rows)
    )
    rows, tail = fitted_tail(fitting, settings or TailFitSettings(), cache)
    measured_texts = TextsOf(joined, list(chain(*measured)))
    return Prepared(
        rows=rows,
        tail=tail,
        measured=list(measured_texts),
        n_measured_rows=measured_texts.n_rows,
        sized=tail_rows(TextsOf(joined, list(chain(*sized))), sample.vocab_size),
        sized_kinds=np.repeat(np.arange(len(kinds)), [np.count_nonzero(counts[kind]) for kind in sized]),
    )


def measured_candidates(
    prepared: Prepared, temperatures: Sequence[float]
) -> Iterator[tuple[TopKCodec, dict[str, Any]]]:
    """Each configuration, fitted, with its row of results; shows progress."""
    total = len(UNFITTED) + len(RESIDUAL) + len(PREDICTED)
    with Progress(total=total, desc="measure", unit="codecs") as display:
        for codec in candidates(prepared):
            yield codec, measured_codec(codec, prepared, temperatures)
            display.update()


def between_candidates(
    prepared: Prepared, results: Sequence[dict[str, Any]], goal: Goal
) -> Iterator[tuple[TopKCodec, dict[str, Any]]]:
    """One more configuration, fitted, with its row of results, where a step between two of them should suit the goal
    better than either; shows progress."""
    options = goal.between(results)
    if options is None:
        return
    with Progress(total=1, desc="measure a step between", unit="codecs") as display:
        head, step = _codec(len(prepared.rows.lm_head), {**options, "tail_step": None}), options["tail_step"]
        for codec in fitted_steps(head, prepared.rows, prepared.tail_for(step), [step]):
            yield codec, measured_codec(codec, prepared, goal.temperatures)
            display.update()


def fitted_tail(texts: TextsOf, settings: TailFitSettings, cache: FitCache | None) -> tuple[TailRows, TailModel]:
    """The rows of these texts, and the tail model fitted to them or found in the cache."""
    with StageProgress() as display:
        rows = tail_rows(texts, texts.sample.vocab_size, on_rows=counted(display, "rows", texts.n_rows))
        return rows, fit_tail(rows, settings, on_progress=display, cache=cache)


def candidates(prepared: Prepared) -> Iterator[TopKCodec]:
    """Every configuration, fitted where it has something to fit."""
    rows, vocab_size = prepared.rows, len(prepared.rows.lm_head)
    for options in UNFITTED:
        yield _codec(vocab_size, options)
    for options in RESIDUAL:
        yield fitted_on_rows(_codec(vocab_size, options), rows)
    for (head, _), group in groupby(PREDICTED, key=_head_and_rank):
        steps = [options["tail_step"] for options in group]
        yield from fitted_steps(_codec(vocab_size, head), rows, prepared.tail_for(steps[0]), steps)


def _head_and_rank(options: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    return {**options, "tail_step": None}, default_rank(options["tail_step"])


def _codec(vocab_size: int, options: dict[str, Any]) -> TopKCodec:
    return logitstore.make_codec("topk", vocab_size=vocab_size, **{**options, "k": min(options["k"], vocab_size)})


def _spread_numbers(row_counts: NDArray[np.int64], held_out: Sequence[int], n_rows: int) -> list[int]:
    """Texts of about n_rows rows together, one at least, spread over those that are held out."""
    chosen, total = [], 0
    step = max(1, int(float(row_counts[list(held_out)].sum()) / max(n_rows, 1)))
    for number in held_out[::step]:
        chosen.append(number)
        total += int(row_counts[number])
        if total >= n_rows:
            break
    return chosen


def measured_codec(codec: TopKCodec, prepared: Prepared, temperatures: Sequence[float]) -> dict[str, Any]:
    """A row of results: config, tail_rank (coefficients of a predicted tail, else None), bytes_per_token with its
    standard error over texts, table_bytes, entries a row, kl and kl_se by temperature."""
    blob_bytes, rows_sized, n_entries = [], [], 0
    for targets in targets_of_rows(codec, prepared.sized):
        blob_bytes.append(len(codec.encode(targets, targets.input_ids)))
        rows_sized.append(int(targets.present.sum()))
        n_entries += len(targets.ids)
    size = _estimate_by_kind(np.array(blob_bytes), np.array(rows_sized), prepared.sized_kinds)
    kls = {f"{temperature:g}": kl for temperature, kl in _divergences(codec, prepared.measured, temperatures).items()}
    config = {name: value for name, value in codec.config.items() if name not in ("name", "vocab_size", "tables")}
    return {
        "config": config,
        "tail_rank": codec.tail_rank,
        "bytes_per_token": size.mean,
        "bytes_per_token_se": size.se,
        "table_bytes": len(codec.tables.file_bytes) if codec.tables is not None else 0,
        "entries": n_entries / sum(rows_sized),
        "kl": {name: kl.mean for name, kl in kls.items()},
        "kl_se": {name: kl.se for name, kl in kls.items()},
    }


def _estimate_by_kind(sums_S: NDArray[np.int64], rows_S: NDArray[np.int64], kinds_S: NDArray[np.int64]) -> Estimate:
    """The mean over all rows; its standard error over the texts of each kind, None where a kind has one text."""
    variance = 0.0
    for kind in np.unique(kinds_S):
        of_kind = kinds_S == kind
        error = estimate(sums_S[of_kind], rows_S[of_kind]).se
        if error is None:
            return Estimate(estimate(sums_S, rows_S).mean, None)
        variance += (error * rows_S[of_kind].sum() / rows_S.sum()) ** 2
    return Estimate(estimate(sums_S, rows_S).mean, math.sqrt(variance))


def _divergences(
    codec: TopKCodec, samples: Sequence[SampleRows], temperatures: Sequence[float]
) -> dict[float, Estimate]:
    """KL(teacher || what is read back), mean over rows, at each temperature."""
    n_rows: list[int] = []
    sums: dict[float, list[float]] = {temperature: [] for temperature in temperatures}
    for sample in samples:
        blob = codec.encode(codec.targets_from_logits(*sample), sample.input_ids)
        decoded = codec.decode(blob, sample.input_ids)
        present, kept_logits = decoded.present, full_logits(sample.kept_logits, codec.vocab_size)
        n_rows.append(int(present.sum()))
        for temperature, sums_at in sums.items():
            dense = decoded.dense_logprobs(temperature)[present]
            sums_at.append(float(row_divergences(kept_logits, dense, temperature=temperature).kl.sum()))
    return {temperature: estimate(sums_at, n_rows) for temperature, sums_at in sums.items()}


def mark_frontier(results: Sequence[dict[str, Any]], goal: Goal) -> None:
    """Adds "frontier" to each row: True where no other has both fewer bytes and less KL."""
    for row in results:
        row["frontier"] = not any(
            other["bytes_per_token"] <= row["bytes_per_token"] and goal.loss(other) < goal.loss(row)
            for other in results
            if other is not row
        )
