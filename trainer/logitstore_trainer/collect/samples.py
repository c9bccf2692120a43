"""The samples of a collection in order, from where it stopped on, each with its place in the data set."""

import itertools
from collections.abc import Callable, Iterator, Sequence

from logitstore.units import RowRange
from logitstore.writer import Acknowledged
from logitstore_trainer.collect.prompts import Dataset
from logitstore_trainer.collect.rows import Row
from logitstore_trainer.collect.source_settings import SourceSettings
from logitstore_trainer.collect.tokenise import Counts, TokenisedSample, Tokeniser

# prompts as token ids, their rows in the data set, most new tokens -> completions as token ids
Complete = Callable[[Sequence[Sequence[int]], Sequence[int], int], list[list[int]]]


def remaining_samples(
    dataset: Dataset,
    tokeniser: Tokeniser,
    settings: SourceSettings,
    complete: Complete,
    *,
    part: RowRange,
    done: Acknowledged,
    counts: Counts,
) -> Iterator[TokenisedSample]:
    """Yields what is still to be collected of `part` behind its `done` samples. Mutates `counts`, which counts from
    there on.

    A text may give several samples, so it goes on with the row of the last one and passes over those it has.
    `complete` is called for rows that are a prompt alone.
    """
    n_tokens = done.n_tokens
    if part.max_tokens is not None and n_tokens >= part.max_tokens:
        return
    start = max(done.last_source_row, part.first_row)
    to_skip = done.n_of_last_row + (part.n_skipped if start == part.first_row else 0)
    rows = dataset.rows(start)
    if settings.generate is not None and to_skip:
        next(rows)  # that prompt has its completion in the store
        to_skip = 0
    if part.end_row is not None:
        rows = itertools.takewhile(lambda row: row.source_row < part.end_row, rows)
    for sample in samples_of_rows(rows, tokeniser, settings, complete, counts):
        if to_skip:
            to_skip -= 1
            continue
        yield sample
        n_tokens += len(sample.input_ids)
        if part.max_tokens is not None and n_tokens >= part.max_tokens:
            return


def samples_of_rows(
    rows: Iterator[Row], tokeniser: Tokeniser, settings: SourceSettings, complete: Complete, counts: Counts
) -> Iterator[TokenisedSample]:
    """The samples of these rows, in order; prompts alone are completed, a batch at a time. Mutates `counts`."""
    if settings.generate is None:
        return tokeniser.samples(rows, counts)
    return _completed(rows, tokeniser, settings, complete, counts)


def _completed(
    rows: Iterator[Row], tokeniser: Tokeniser, settings: SourceSettings, complete: Complete, counts: Counts
) -> Iterator[TokenisedSample]:
    """Yields prompt rows with completions that the teacher writes, a batch at a time.

    A prompt that leaves less than settings.generate tokens of the window is completed alone, up to the window's end.
    """
    assert settings.generate is not None
    prompts = _fitting_prompts(rows, tokeniser, counts)
    while batch := list(itertools.islice(prompts, settings.batch_size)):
        room = [min(settings.generate, tokeniser.max_length - len(prompt_ids)) for _, prompt_ids in batch]
        together = [i for i, n in enumerate(room) if n == settings.generate]
        completions: dict[int, list[int]] = {}
        for group in [together, *([i] for i in range(len(batch)) if i not in together)]:
            if group:
                written = complete(
                    [batch[i][1] for i in group], [batch[i][0].source_row for i in group], room[group[0]]
                )
                completions |= zip(group, written, strict=True)
        for i, (row, prompt_ids) in enumerate(batch):
            for sample in tokeniser.completed(row, prompt_ids, completions[i], counts):
                counts.add(sample)
                yield sample


def _fitting_prompts(rows: Iterator[Row], tokeniser: Tokeniser, counts: Counts) -> Iterator[tuple[Row, list[int]]]:
    for row in rows:
        counts.rows += 1
        prompt_ids = tokeniser.prompt_ids(row.columns["prompt"])
        if len(prompt_ids) < tokeniser.max_length:
            yield row, prompt_ids
        else:
            counts.prompt_too_long += 1
