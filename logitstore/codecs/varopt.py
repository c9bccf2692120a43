"""The varopt codec: a few tokens a row, the likely ones exactly and a threshold sample of the others.

How many tokens a row keeps is fixed (k), or follows from the row: as many as it takes for no drawn token to weigh more
than max_weight, which spends on flat rows what peaked rows do not need.
Stored are ids, the log-probs of the h exact entries in a head format, h, and the mass of the other tokens in 2 bytes.
The weight that all drawn entries share follows from it: mass / (entries - h). Before zstd a row takes
k * id bytes + h * value bytes + 5.

The head is fp16 unless asked otherwise. Rounding is the one thing here that does not average out over rows, and tests
hold its square beside the variance of the sampling: fp16 is below 1e-5 of it, fp8 (1/16 of log p) is not negligible,
and int8 saves less than a twentieth of the bytes, because half a dozen values hardly pay for a scale and an offset.

With a fixed k it gives up evenness over rows: k entries of a flat row vary more than the 50 entries that `rskd` spends
on such a row. With max_weight w a row varies by w * (mass that was not kept exactly) at most.

Letters: R rows, P present rows, E entries, H exact entries of all rows together.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from logitstore.blob import pack_blob
from logitstore.codecs.checks import (
    MAX_VOCAB_SIZE,
    check_targets,
    expected_header,
    opened_blob,
    require_fraction,
    require_int,
    taken_counts,
)
from logitstore.codecs.sampled import MAX_SEED, SampledCodec, sampled_targets
from logitstore.errors import CorruptionError
from logitstore.head_rows import decoded_head
from logitstore.head_values import HEAD_FORMATS, HeadFormat
from logitstore.id_planes import decode_ids, encode_ids, id_bytes
from logitstore.planes import (
    PlaneReader,
    byte_planes,
    delta_along_rank,
    offsets_of,
    rank_major_order,
    undo_delta_along_rank,
)
from logitstore.row_input import GivenSamples, checked_input_ids
from logitstore.sampling import SampledRows, varopt_sample
from logitstore.tail_moments import NO_TAIL, decode_logmass, encode_logmass
from logitstore.targets import StoredSamples, TeacherTargets
from logitstore.temperature import segment_logsumexp, shifted_head


@dataclass(frozen=True)
class VarOptCodec(SampledCodec):
    """Keeps k entries a row (fewer where fewer tokens have a probability), unbiased: see sampling.varopt_sample.

    max_weight: a row keeps every token with p >= max_weight exactly and as many of the others as it takes for none to
    weigh more, k entries at most. k: 12 if None; with max_weight ceil(1 / max_weight), which no row exceeds. head:
    "int8", "fp8" or "fp16", how the log-probs of the exact entries are stored. seed: 0 to 2^63 - 1.
    Raises ValueError for anything else.
    """

    codec_id: ClassVar[int] = 3

    vocab_size: int
    k: int | None = None
    head: str = "fp16"
    seed: int = 0
    max_weight: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab_size", require_int("vocab_size", self.vocab_size, 1, MAX_VOCAB_SIZE))
        require_fraction("max_weight", self.max_weight)
        default_k = 12 if self.max_weight is None else math.ceil(1 / self.max_weight)
        k = default_k if self.k is None else self.k
        object.__setattr__(self, "k", require_int("k", k, 1, 65535))
        object.__setattr__(self, "seed", require_int("seed", self.seed, 0, MAX_SEED))
        if self.head not in HEAD_FORMATS:
            raise ValueError(f"head must be one of {', '.join(HEAD_FORMATS)}, got {self.head!r}")

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as JSON values; make_codec(**config) makes the codec again."""
        config = {"name": "varopt", "vocab_size": self.vocab_size, "k": self.k, "head": self.head, "seed": self.seed}
        return config if self.max_weight is None else {**config, "max_weight": self.max_weight}

    @property
    def n_uniforms(self) -> int:
        return 1

    @property
    def max_entries(self) -> int:
        return self.k

    @property
    def max_row_bytes(self) -> int:
        """Bytes of a full row: two counts, the tail, scale and offset, and k entries."""
        entry_bytes = id_bytes(self.vocab_size) + self._format.code_bytes
        return 2 + self._count_bytes + 2 + 4 + min(self.k, self.vocab_size) * entry_bytes

    @property
    def _count_bytes(self) -> int:
        return 1 if self.k < 1 << 8 else 2

    @property
    def _format(self) -> HeadFormat:
        return HEAD_FORMATS[self.head]

    def encode(self, targets: TeacherTargets, input_ids: Any) -> bytes:
        """One blob of these rows. Weights that are not on this codec's grid yet are quantised.

        Raises ValueError where targets and input_ids do not belong together, CorruptionError where targets break
        an invariant, SpecMismatchError for another vocabulary, targets that are not sampled or more than k entries.
        """
        tokens = checked_input_ids(input_ids, self.vocab_size)
        check_targets(self, targets, tokens, max_entries=self.k)
        samples, counts = self._on_grid(targets), targets.counts
        present, has_exact = counts > 0, samples.n_exact > 0
        header = expected_header(self, tokens, n_present=int(present.sum()), n_entries=len(targets.ids))
        planes = [counts.astype("<u2").tobytes()]
        planes += byte_planes(samples.n_exact[present], self._count_bytes)
        planes += byte_planes(samples.tail_codes[present], 2)
        if samples.scale is not None and samples.offset is not None:
            planes += [numbers[has_exact].astype("<f2").tobytes() for numbers in (samples.scale, samples.offset)]
        planes += encode_ids(targets.ids, rank_major_order(counts), self.vocab_size)
        delta_H = delta_along_rank(samples.codes, offsets_of(samples.n_exact))
        planes += byte_planes(delta_H[rank_major_order(samples.n_exact)], self._format.code_bytes)
        return pack_blob(header, planes)

    def decode(self, blob: bytes | memoryview, input_ids: Any) -> TeacherTargets:
        """The targets that were encoded for this text. Raises FormatError, CorruptionError or SpecMismatchError."""
        tokens = checked_input_ids(input_ids, self.vocab_size)
        header, planes = opened_blob(self, blob, tokens)
        counts = taken_counts(planes, header, "<u2", max_entries=self.k)
        present = counts > 0
        n_exact, tail_codes = np.zeros(len(counts), np.int64), np.full(len(counts), NO_TAIL, np.uint16)
        n_exact[present] = planes.take_planes(self._count_bytes, header.n_present, np.int64)
        tail_codes[present] = planes.take_planes(2, header.n_present, np.uint16)
        broken = np.flatnonzero((n_exact > counts) | ((n_exact == counts) != (tail_codes == NO_TAIL)))
        if len(broken):
            raise CorruptionError(
                f"row {broken[0]} has {n_exact[broken[0]]} exact of {counts[broken[0]]} entries and a tail code of "
                f"{tail_codes[broken[0]]}; {NO_TAIL} goes with exact entries alone"
            )
        scale, offset = self._taken_scale_offset(planes, n_exact > 0)
        ids = decode_ids(planes, rank_major_order(counts), self.vocab_size)
        delta_H = np.empty(n_exact.sum(), self._format.code_type)
        delta_H[rank_major_order(n_exact)] = planes.take_planes(
            self._format.code_bytes, len(delta_H), self._format.code_type
        )
        planes.finish()
        codes = undo_delta_along_rank(delta_H, offsets_of(n_exact))
        targets = self._targets(tokens, counts, ids, StoredSamples(n_exact, codes, scale, offset, tail_codes))
        targets.validate()
        return targets

    def _sample(self, p_NV: NDArray[np.float64], uniforms_NU: NDArray[np.float64]) -> SampledRows:
        return varopt_sample(p_NV, self.k, uniforms_NU[:, 0], max_weight=self.max_weight)

    def _targets_of(self, given: GivenSamples, tokens: NDArray[np.int32], keep: NDArray[np.bool_]) -> TeacherTargets:
        entry_NK = given.ids >= 0
        counts, n_exact = (np.zeros(len(keep), np.int64) for _ in range(2))
        counts[keep], n_exact[keep] = entry_NK.sum(axis=1), given.n_exact
        samples = self._quantised(given.logweights[entry_NK], counts, n_exact)
        return self._targets(tokens, counts, given.ids[entry_NK].astype(np.int32), samples)

    def _quantised(
        self, logweights_E: NDArray[np.float32], counts: NDArray[np.int64], n_exact: NDArray[np.int64]
    ) -> StoredSamples:
        exact_E = _is_exact(counts, n_exact)
        head = self._format.quantise(logweights_E[exact_E], offsets_of(n_exact))
        drawn_R = segment_logsumexp(logweights_E[~exact_E].astype(np.float64), offsets_of(counts - n_exact))
        return StoredSamples(n_exact, head.codes, head.scale, head.offset, encode_logmass(drawn_R))

    def _on_grid(self, targets: TeacherTargets) -> StoredSamples:
        """The codes that the targets carry where they are this format's and give these weights, else new ones."""
        samples, head = targets.samples, self._format
        is_ours = samples.codes is not None and samples.codes.dtype == head.code_type
        is_ours = is_ours and (samples.scale is not None) == head.has_row_scale
        if is_ours and np.array_equal(self._logweights(samples, targets.counts), targets.logps):
            return samples
        return self._quantised(targets.logps, targets.counts, samples.n_exact)

    def _targets(
        self, tokens: NDArray[np.int32], counts: NDArray[np.int64], ids: NDArray[np.int32], samples: StoredSamples
    ) -> TeacherTargets:
        logweights_E = self._logweights(samples, counts)
        return sampled_targets(tokens, offsets_of(counts), ids, logweights_E, samples, vocab_size=self.vocab_size)

    def _logweights(self, samples: StoredSamples, counts: NDArray[np.int64]) -> NDArray[np.float32]:
        """ln of the weights [E] that these codes stand for; a row's sum to 1.

        The exact entries are moved together to a mass of 1 - tail mass, the drawn ones share the tail's mass. An
        exact entry is never below a drawn one, and is held there where the rounding of its code would have it so.
        """
        n_exact = samples.n_exact
        n_drawn = counts - n_exact
        tail_logmass = decode_logmass(samples.tail_codes)
        threshold_R = np.where(n_drawn > 0, tail_logmass - np.log(np.maximum(n_drawn, 1)), -np.inf)
        offsets_H = offsets_of(n_exact)
        head = decoded_head(self._format, samples.codes, offsets_H, tail_logmass, samples.scale, samples.offset)
        head_H = shifted_head(head.logps, offsets_H, tail_logmass)
        logweights_E = np.repeat(threshold_R, counts)
        logweights_E[_is_exact(counts, n_exact)] = np.maximum(head_H, np.repeat(threshold_R, n_exact))
        logweights_E -= np.repeat(segment_logsumexp(logweights_E, offsets_of(counts)), counts)
        return logweights_E.astype(np.float32)

    def _taken_scale_offset(
        self, planes: PlaneReader, has_exact: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        if not self._format.has_row_scale:
            return None, None
        numbers_R = np.zeros((2, len(has_exact)), np.float32)
        for numbers in numbers_R:
            numbers[has_exact] = planes.take("<f2", int(has_exact.sum()))
        return numbers_R[0], numbers_R[1]


def _is_exact(counts: NDArray[np.int64], n_exact: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True [E] for the first n_exact entries of each row."""
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(starts, counts) < np.repeat(n_exact, counts)
