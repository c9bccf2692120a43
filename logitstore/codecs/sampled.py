"""What the codecs that sample have in common: from logits, or from samples that were drawn elsewhere, to targets.

A sampled row is a few tokens with weights whose expectation is the teacher's distribution: the gradient of a loss that
is linear in the weights is unbiased, which that of a truncated distribution is not. They give up every temperature
but 1, and the noise is drawn once: a student that passes over one store many times sees the same sample every time
(collect again with another seed, or keep more).

Letters: L sequence length, N rows given, K entries given, U uniforms a row, V vocabulary.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from logitstore.codec_tables import CodecTables
from logitstore.logits_source import CHUNK_BYTES, iter_logit_chunks
from logitstore.row_input import GivenSamples, check_logit_rows, checked_input_ids, checked_keep_mask, checked_samples
from logitstore.sampling import SampledRows, probabilities, row_uniforms
from logitstore.targets import StoredSamples, TeacherTargets

# a chunk of float32 logits this large becomes float64 probabilities, their order and their cumulative sum: 7 times it
_SAMPLED_CHUNK_BYTES = CHUNK_BYTES // 8
MAX_SEED = (1 << 63) - 1


class SampledCodec(ABC):
    """Base of the codecs that sample; subclasses are frozen dataclasses with vocab_size and seed among their fields."""

    tail: ClassVar[str] = "sampled"
    tables_sha256: ClassVar[None] = None
    tables: ClassVar[None] = None
    vocab_size: int
    seed: int

    @property
    @abstractmethod
    def n_uniforms(self) -> int:
        """U: uniforms that a row takes."""

    @property
    @abstractmethod
    def max_entries(self) -> int:
        """Entries of a row at most."""

    @abstractmethod
    def _sample(self, p_NV: NDArray[np.float64], uniforms_NU: NDArray[np.float64]) -> SampledRows: ...

    @abstractmethod
    def _targets_of(self, given: GivenSamples, tokens: NDArray[np.int32], keep: NDArray[np.bool_]) -> TeacherTargets:
        """The targets of checked samples, quantised."""

    def calibrated(
        self, samples: Iterable[tuple[Any, Any, Any]], on_progress: Any = None, cache: Any = None
    ) -> "SampledCodec":
        """The codec itself: nothing of it is fitted."""
        return self

    def with_tables(self, tables: CodecTables) -> NoReturn:
        """Raises ValueError: it names no tables."""
        raise ValueError(f"{type(self).__name__} has nothing that is fitted, and no tables")

    def targets_from_logits(self, logits: Any, input_ids: Any, keep_mask: Any = None) -> TeacherTargets:
        """A sample of softmax(logits), a function of logits, seed and text: decode(encode(targets)) equals it bit for
        bit.

        logits [L, W >= V]: numpy array, torch tensor of any float dtype and device, or FactoredLogits; read in
        chunks of 8 MiB. input_ids [L]. keep_mask [L-1] bool: True where row t (the distribution for token t + 1) is
        to be stored; the others are absent, and change nothing for the rows beside them.
        Raises ValueError for shapes that do not fit, ids outside the vocabulary and logits that are no distribution.
        """
        tokens = checked_input_ids(input_ids, self.vocab_size)
        keep = checked_keep_mask(keep_mask, len(tokens))
        check_logit_rows(logits, len(tokens))
        rows = np.flatnonzero(keep)
        samples = self.sample_rows(logits, rows, self.uniforms(tokens)[rows])
        return self.targets_from_samples(*samples, input_ids=tokens, keep_mask=keep)

    def uniforms(self, input_ids: Any) -> NDArray[np.float64]:
        """The uniforms [L - 1, U] of this seed and text, one row for each row of its targets; see sampling.py."""
        return row_uniforms(self.seed, checked_input_ids(input_ids, self.vocab_size), self.n_uniforms)

    def sample_rows(self, logits: Any, rows: NDArray[np.int64], uniforms_NU: NDArray[np.float64]) -> SampledRows:
        """The samples of logits[rows], N rows, each drawn with its uniforms.

        logits [L, W >= V] as in targets_from_logits. Raises ValueError for logits that are no distribution.
        """
        start = 0
        parts = [self._sample(np.zeros((0, self.vocab_size)), uniforms_NU[:0])]
        chunks = iter_logit_chunks(logits, rows, vocab_size=self.vocab_size, chunk_bytes=_SAMPLED_CHUNK_BYTES)
        for chunk_NV in chunks:
            parts.append(self._sample(probabilities(chunk_NV), uniforms_NU[start : start + len(chunk_NV)]))
            start += len(chunk_NV)
        return SampledRows(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def targets_from_samples(
        self, ids: Any, logweights: Any, n_exact: Any = None, *, input_ids: Any, keep_mask: Any = None
    ) -> TeacherTargets:
        """The same from rows that were drawn elsewhere, as sample_rows returns them, for all L - 1 rows or for those
        that keep_mask keeps.

        ids [N, K] with pads -1; logweights [N, K], ln of the weights, descending, which sum to 1 in a row; n_exact
        [N]: how many entries, first in the row, hold their token's own probability (None: no entry does).
        Raises ValueError for shapes that do not fit, ids outside the vocabulary, or rows that this codec cannot hold.
        """
        tokens = checked_input_ids(input_ids, self.vocab_size)
        keep = checked_keep_mask(keep_mask, len(tokens))
        given = checked_samples(
            ids, logweights, n_exact, keep_mask=keep, vocab_size=self.vocab_size, max_entries=self.max_entries
        )
        return self._targets_of(given, tokens, keep)

    def targets_from_topk(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ValueError: the most probable tokens are no sample."""
        raise ValueError(
            f"{type(self).__name__} keeps samples, which cannot be drawn from the top k alone; use "
            "targets_from_logits, or targets_from_samples for what was drawn elsewhere"
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the codec to a folder, for logitstore.load_codec."""
        from logitstore.codecs.registry import save_codec

        save_codec(self, folder)


def sampled_targets(
    tokens: NDArray[np.int32],
    offsets: NDArray[np.int64],
    ids: NDArray[np.int32],
    logweights: NDArray[np.float32],
    samples: StoredSamples,
    *,
    vocab_size: int,
) -> TeacherTargets:
    """Targets of sampled rows: no tail where a row is present, NaN where it is absent."""
    no_tail_R = np.where(np.diff(offsets) > 0, -np.inf, np.nan).astype(np.float32)
    return TeacherTargets(
        offsets=offsets,
        ids=ids,
        logps=logweights,
        tail_logmass=no_tail_R,
        tail_logmoment_half=no_tail_R.copy(),
        vocab_size=vocab_size,
        input_ids=tokens,
        samples=samples,
    )
