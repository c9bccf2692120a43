"""The codecs that `plan` picks for budgets of bytes, and what they are compared with: the same heads, tails uniform.

Everything is fitted once, on four of five samples of the fitting file; the fifth ones decide which configuration a
budget gets. No measured row is looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import logitstore
from logitstore.fit_codec import fitted_on_rows
from logitstore.tail_fit import TailFitSettings
from logitstore.tail_model import TailModel
from logitstore.tail_rows import TailRows
from logitstore_trainer.bench.logits_file import LogitsFile
from logitstore_trainer.plan.plan import Goal, candidates, fitted_tail, held_out_samples, measured_codec, spread_samples
from logitstore_trainer.progress import Progress

LEAST_ROWS = 2000  # fewer cannot tell a good tail from a bad one
DECIDING_ROWS, QUICK_DECIDING_ROWS = 4080, 1020
QUICK_FITTED_ROWS, QUICK_ROWS_SEEN = 40_000, 200_000


@dataclass(frozen=True)
class Planned:
    """codec: the one of least KL (T = 1 and T = 2 added) among those of at most `budget` bytes a token; None for the
    same head with a uniform tail. deciding: what was measured of it on the deciding rows, None for the latter."""

    codec: Any
    budget: float | None
    deciding: dict[str, Any] | None


@dataclass(frozen=True, eq=False)
class FittedSample:
    """Rows that were fitted on, the tail model fitted to them, and the samples that decide."""

    rows: TailRows
    tail: TailModel
    deciding: Sequence[Any]


def fitted_sample(file: LogitsFile, samples: Sequence[int], *, quick: bool) -> FittedSample:
    """Reads and fits; quick: on fewer rows."""
    chosen = list(samples)
    if quick:
        total = int((file.sample_lengths[chosen] - 1).sum())
        chosen = chosen[:: max(1, total // QUICK_FITTED_ROWS)]
    settings = TailFitSettings(rows_seen=QUICK_ROWS_SEEN) if quick else TailFitSettings()
    held_out = held_out_samples(chosen)
    rows, tail = fitted_tail(file, [number for number in chosen if number not in held_out], settings)
    deciding = spread_samples(file, sorted(held_out), QUICK_DECIDING_ROWS if quick else DECIDING_ROWS)
    return FittedSample(rows, tail, deciding)


def planned_codecs(sample: FittedSample, budgets: Sequence[float]) -> Iterator[Planned]:
    """One codec for each budget that some configuration keeps to, then the same heads with uniform tails."""
    codecs = list(candidates(sample.rows, sample.tail))
    results = []
    with Progress(total=len(codecs), desc="choose for the budgets", unit="codecs") as display:
        for codec in codecs:
            results.append(measured_codec(codec, sample.deciding, (1.0, 2.0)))
            display.update()
    heads: dict[tuple[Any, ...], Any] = {}
    for budget in budgets:
        best = Goal(max_bytes_per_token=budget, max_kl=None).chosen(results)
        if best is None:
            continue
        codec = codecs[results.index(best)]
        yield Planned(codec, budget, best)
        if codec.tail == "predicted":
            heads.setdefault((codec.head, codec.head_step, codec.k, codec.min_prob), codec)
    for head, head_step, k, min_prob in heads:
        options = {"head": head, "head_step": head_step, "k": k, "min_prob": min_prob}
        uniform = logitstore.make_codec("topk", vocab_size=sample.tail.vocab_size, **options)
        yield Planned(fitted_on_rows(uniform, sample.rows), None, None)
