"""Cuts the rows of a data set into units of work for several processes, the same whatever their number.

At most MAX_UNITS, so that shares stay even for some hundred processes; of at least MIN_UNIT_ROWS rows, a few batches,
since a unit's last batch is seldom full.
"""

import math

from logitstore.units import RowRange
from logitstore.writer import Acknowledged
from logitstore_trainer.collect.samples import remaining_samples
from logitstore_trainer.collect.size import PlannedSize
from logitstore_trainer.collect.source import Source
from logitstore_trainer.collect.tokenise import Counts
from logitstore_trainer.progress import progress

MAX_UNITS = 1024
MIN_UNIT_ROWS = 32


def unit_ranges(source: Source, size: PlannedSize, done: Acknowledged) -> list[RowRange]:
    """The units of what is to be collected behind the `done` samples of one process.

    With max_tokens the texts are tokenised to find where it stops. Raises ValueError for that together with generate,
    where the teacher's own words decide it.
    """
    settings = source.settings
    if settings.max_tokens is not None and settings.generate is not None:
        raise ValueError(
            "--max-tokens with --generate does not go with several ranks, since what the teacher writes decides where "
            "it stops; cut the data set instead"
        )
    unit_rows = max(MIN_UNIT_ROWS, math.ceil(size.n_dataset_rows / MAX_UNITS))
    first, n_skipped = max(done.last_source_row, 0), done.n_of_last_row
    if settings.generate is not None and n_skipped:
        first, n_skipped = first + 1, 0  # a prompt has one completion
    if settings.max_tokens is not None:
        return _ranges_up_to(settings.max_tokens, source, size, done, unit_rows)
    starts = range(first, source.dataset.n_rows, unit_rows)
    ranges = [RowRange(start, min(start + unit_rows, source.dataset.n_rows)) for start in starts]
    return [part._replace(n_skipped=n_skipped if i == 0 else 0) for i, part in enumerate(ranges)]


def _ranges_up_to(
    max_tokens: int, source: Source, size: PlannedSize, done: Acknowledged, unit_rows: int
) -> list[RowRange]:
    """Units up to the sample that makes max_tokens tokens, of which the last alone has a limit."""
    whole = RowRange(max_tokens=max_tokens)
    samples = remaining_samples(
        source.dataset, source.tokeniser, source.settings, source.complete, part=whole, done=done, counts=Counts()
    )
    first, n_skipped = max(done.last_source_row, 0), done.n_of_last_row
    ranges: list[RowRange] = []
    n_tokens = n_before_unit = done.n_tokens
    for sample in progress(samples, total=size.n_samples, desc="finding where --max-tokens stops", unit="samples"):
        if not ranges or sample.source_row >= ranges[-1].first_row + unit_rows:
            start = sample.source_row if ranges else first
            ranges.append(RowRange(start, n_skipped=0 if ranges else n_skipped))
            n_before_unit = n_tokens
        n_tokens += len(sample.input_ids)
    ends = [part.first_row for part in ranges[1:]] + [source.dataset.n_rows]
    ranges = [part._replace(end_row=end) for part, end in zip(ranges, ends, strict=True)]
    if ranges:
        ranges[-1] = ranges[-1]._replace(max_tokens=max_tokens - n_before_unit)
    return ranges
