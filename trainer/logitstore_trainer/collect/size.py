"""How large a collection will be, before it starts: tokens, bytes, shards.

A data set of at most COUNTED_ROWS rows is tokenised whole and counted; of a larger one SAMPLED_ROWS rows, spread
evenly, are tokenised and the rest is extrapolated. The number of shards hangs on nothing but this, and is fixed before
the first token.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from logitstore_trainer.collect.prompts import Dataset
from logitstore_trainer.collect.rows import Row
from logitstore_trainer.collect.source_settings import SourceSettings
from logitstore_trainer.collect.tokenise import Counts, Tokeniser
from logitstore_trainer.progress import progress

COUNTED_ROWS = 20_000
SAMPLED_ROWS = 2_000
SHARD_BYTES = 384 << 20


@dataclass(frozen=True)
class PlannedSize:
    """Estimates, exact where `is_exact`: rows of the data set that are read, samples, tokens, rows to store."""

    n_dataset_rows: int
    n_samples: int
    n_tokens: int
    n_stored_rows: int
    is_exact: bool

    def shard_samples(self, bytes_a_row: int) -> int | None:
        """Samples a shard, None where one file holds everything. bytes_a_row: of a stored row before compression."""
        raw_bytes = self.n_stored_rows * bytes_a_row + self.n_tokens * 5 + self.n_samples * 100
        if raw_bytes <= SHARD_BYTES:
            return None
        return math.ceil(self.n_samples / math.ceil(raw_bytes / SHARD_BYTES))


def planned_size(dataset: Dataset, tokeniser: Tokeniser, settings: SourceSettings) -> PlannedSize:
    """The size of this collection. Raises ValueError where no row gives a sample."""
    counts = Counts()
    n_prompts = 0
    rows, n_counted = _spread_rows(dataset)
    for row in rows:
        if settings.generate is None:
            for _ in tokeniser.samples([row], counts):
                pass
        else:
            counts.tokens += min(
                len(tokeniser.prompt_ids(row.columns["prompt"])) + settings.generate, tokeniser.max_length
            )
            counts.learned_tokens += settings.generate
            n_prompts += 1
    counts.samples += n_prompts
    if not counts.samples:
        remedy = "raise --max-length" if counts.prompt_too_long else "there is nothing to learn in them"
        raise ValueError(f"{dataset.path}: no row gives a sample ({counts.summary()}); {remedy}")
    scale = dataset.n_rows / n_counted
    if settings.max_tokens is not None:
        scale = min(scale, settings.max_tokens / counts.tokens)
    stored_rows = counts.tokens - counts.samples if settings.keep_prompt else counts.learned_tokens
    return PlannedSize(
        n_dataset_rows=min(dataset.n_rows, math.ceil(n_counted * scale)),
        n_samples=math.ceil(counts.samples * scale),
        n_tokens=round(counts.tokens * scale),
        n_stored_rows=round(stored_rows * scale),
        is_exact=n_counted == dataset.n_rows and settings.generate is None and settings.max_tokens is None,
    )


def _spread_rows(dataset: Dataset) -> tuple[Iterator[Row], int]:
    """All rows, or SAMPLED_ROWS of a large data set spread evenly over it, and how many they are."""
    if dataset.n_rows <= COUNTED_ROWS:
        rows, count = dataset.rows(), dataset.n_rows
    else:
        chosen = np.linspace(0, dataset.n_rows - 1, SAMPLED_ROWS).astype(int)
        rows, count = (next(dataset.rows(int(start))) for start in chosen), SAMPLED_ROWS
    return progress(rows, total=count, desc="counting tokens", unit="rows"), count
