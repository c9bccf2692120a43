"""What a plan is made on: rows of a teacher, one text at a time, from a file or from the teacher itself.

Letters: S texts, L tokens of one, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from logitstore import FactoredLogits
from logitstore.errors import SpecMismatchError
from logitstore_trainer.bench.logits_file import LogitsFile


class SampleRows(NamedTuple):
    """logits [L, V]: array, tensor or FactoredLogits; input_ids [L]; keep_mask [L-1] bool, None where all are kept."""

    logits: Any
    input_ids: NDArray[np.int32]
    keep_mask: NDArray[np.bool_] | None

    @property
    def kept_logits(self) -> Any:
        """The logits of the kept rows alone, [n, V] in the same form."""
        keep = np.arange(len(self.input_ids) - 1) if self.keep_mask is None else np.flatnonzero(self.keep_mask)
        if isinstance(self.logits, FactoredLogits):
            return replace(self.logits, hidden=self.logits.hidden[keep])
        return self.logits[keep]


class PlanSample(Protocol):
    """name: in words, for the report. row_counts [S] int64: rows that are kept of each text."""

    name: str

    @property
    def vocab_size(self) -> int: ...

    @property
    def row_counts(self) -> NDArray[np.int64]: ...

    def __getitem__(self, number: int, /) -> SampleRows: ...


@dataclass(frozen=True, eq=False)
class TextsOf:
    """These texts of a sample, as often as they are asked for: what a fit reads."""

    sample: PlanSample
    numbers: Sequence[int]

    def __iter__(self) -> Iterator[SampleRows]:
        for number in self.numbers:
            yield self.sample[number]

    @property
    def n_rows(self) -> int:
        return int(self.sample.row_counts[list(self.numbers)].sum())


class JoinedSample:
    """Several samples of one teacher as one, their texts in order. Raises SpecMismatchError for two vocabularies."""

    def __init__(self, samples: Sequence[PlanSample]) -> None:
        self._samples = samples
        self.name = ", ".join(sample.name for sample in samples)
        first = samples[0]
        for other in samples[1:]:
            if other.vocab_size != first.vocab_size:
                raise SpecMismatchError(
                    f"{other.name} has a vocabulary of {other.vocab_size}, {first.name} of {first.vocab_size}; "
                    "a plan is made for one teacher"
                )
        self._starts = np.cumsum([0, *(len(sample.row_counts) for sample in samples)])

    @property
    def vocab_size(self) -> int:
        return self._samples[0].vocab_size

    @cached_property
    def row_counts(self) -> NDArray[np.int64]:
        return np.concatenate([sample.row_counts for sample in self._samples])

    def __getitem__(self, number: int, /) -> SampleRows:
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._samples[which][number - int(self._starts[which])]

    def numbers_of(self, which: int) -> range:
        """The texts here of the sample with this index."""
        return range(int(self._starts[which]), int(self._starts[which + 1]))


class FileSample:
    """A file of logits as a sample. Raises FileNotFoundError or FormatError for one that cannot be read."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file = LogitsFile(path)

    @property
    def vocab_size(self) -> int:
        return self._file.vocab_size

    @cached_property
    def row_counts(self) -> NDArray[np.int64]:
        return self._file.sample_lengths - 1

    def __getitem__(self, number: int, /) -> SampleRows:
        text = self._file[number]
        return SampleRows(text.logits, text.input_ids, None)
