"""The codecs that `plan` picks for budgets of bytes, and what they are compared with: the same heads, tails uniform.

Everything is fitted once. Which configuration a budget gets is decided on files of other text, where there are some,
else on every fifth sample of the fitting file, which is then not fitted on. No measured row is looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import logitstore
from logitstore.codecs.topk import TopKCodec
from logitstore.fit_cache import FitCache
from logitstore.fit_codec import fitted_on_rows
from logitstore.tail_fit import TailFitSettings
from logitstore_trainer.bench.logits_file import LogitsFile
from logitstore_trainer.plan.goal import Goal
from logitstore_trainer.plan.plan import Prepared, between_candidates, measured_candidates, prepare
from logitstore_trainer.plan.sample import SampleRows

LEAST_ROWS = 2000  # fewer cannot tell a good tail from a bad one
DECIDING_ROWS, QUICK_DECIDING_ROWS, QUICK_SIZED_ROWS = 1020, 510, 4080
QUICK_FITTED_ROWS, QUICK_ROWS_SEEN = 40_000, 200_000


@dataclass(frozen=True)
class Planned:
    """codec: the one of least KL (T = 1 and T = 2 added) among those of at most `budget` bytes a token; budget None for
    the same head with a uniform tail."""

    codec: TopKCodec
    budget: float | None


@dataclass(frozen=True, eq=False)
class _SomeTexts:
    """These samples of a file, as a plan's sample."""

    file: LogitsFile
    numbers: Sequence[int]

    @property
    def name(self) -> str:
        return self.file.path.name

    @property
    def vocab_size(self) -> int:
        return self.file.vocab_size

    @property
    def row_counts(self) -> NDArray[np.int64]:
        return self.file.sample_lengths[list(self.numbers)] - 1

    def __getitem__(self, number: int, /) -> SampleRows:
        sample = self.file[self.numbers[number]]
        return SampleRows(sample.logits, sample.input_ids, None)


def prepared(
    file: LogitsFile,
    samples: Sequence[int],
    choose_on: Sequence[LogitsFile] = (),
    *,
    quick: bool,
    cache: FitCache | None = None,
) -> Prepared:
    """Reads and fits, or finds the fit in the cache; quick: on fewer rows, spread over the samples."""
    others = [_SomeTexts(other, range(len(other))) for other in choose_on]
    if not quick:
        return prepare(_SomeTexts(file, samples), choose_on=others, n_rows=DECIDING_ROWS, cache=cache)
    total = int((file.sample_lengths[list(samples)] - 1).sum())
    some = _SomeTexts(file, samples[:: max(1, total // QUICK_FITTED_ROWS)])
    settings = TailFitSettings(rows_seen=QUICK_ROWS_SEEN)
    return prepare(
        some,
        choose_on=others,
        n_rows=QUICK_DECIDING_ROWS,
        n_sized_rows=QUICK_SIZED_ROWS,
        settings=settings,
        cache=cache,
    )


def planned_codecs(sample: Prepared, budgets: Sequence[float]) -> Iterator[Planned]:
    """One codec for each budget that some configuration keeps to, then the same heads with uniform tails."""
    goals = {budget: Goal(budget, None) for budget in budgets}
    results: list[dict[str, Any]] = []
    best: dict[float, TopKCodec] = {}
    for codec, result in measured_candidates(sample, (1.0, 2.0)):
        results.append(result)
        best |= {budget: codec for budget, goal in goals.items() if goal.chosen(results) is result}
    for budget, goal in goals.items():
        own = list(results)
        for codec, result in between_candidates(sample, own, goal):
            own.append(result)
            best |= {budget: codec} if goal.chosen(own) is result else {}
    heads: dict[tuple[Any, ...], None] = {}
    for budget, codec in sorted(best.items()):
        yield Planned(codec, budget)
        if codec.tail == "predicted":
            heads[codec.head, codec.head_step, codec.k, codec.min_prob] = None
    for head, head_step, k, min_prob in heads:
        options = {"head": head, "head_step": head_step, "k": k, "min_prob": min_prob}
        uniform = logitstore.make_codec("topk", vocab_size=sample.tail.vocab_size, **options)
        yield Planned(fitted_on_rows(uniform, sample.rows), None)
