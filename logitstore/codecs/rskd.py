"""The rskd codec: a number of draws with replacement, as token ids and how often each was drawn.

Random Sampling Knowledge Distillation (Anshumann et al., ACL 2025) at tau = 1, the baseline that `varopt` is measured
against. 50 draws leave about 12 different tokens on a language model's rows. Before zstd an entry takes its id and one
byte; one byte a row says how many entries there are. It gives up what varopt is for: at equal entries its weights
vary more, because likely tokens are drawn too instead of being kept exactly.

Letters: R rows, E entries.
"""

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
    require_int,
    taken_counts,
)
from logitstore.codecs.sampled import MAX_SEED, SampledCodec, sampled_targets
from logitstore.errors import CorruptionError, SpecMismatchError
from logitstore.id_planes import decode_ids, encode_ids, id_bytes
from logitstore.planes import offsets_of, rank_major_order
from logitstore.row_input import GivenSamples, checked_input_ids
from logitstore.sampling import SampledRows, multinomial_sample
from logitstore.targets import StoredSamples, TeacherTargets

_COUNT_ERROR = 1e-3  # of a weight times the draws from a whole number


@dataclass(frozen=True)
class RSKDCodec(SampledCodec):
    """Keeps the distinct tokens of `draws` draws (1 to 255), unbiased: see sampling.multinomial_sample.

    seed: 0 to 2^63 - 1. Raises ValueError for anything else.
    """

    codec_id: ClassVar[int] = 4

    vocab_size: int
    draws: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab_size", require_int("vocab_size", self.vocab_size, 1, MAX_VOCAB_SIZE))
        object.__setattr__(self, "draws", require_int("draws", self.draws, 1, 255))
        object.__setattr__(self, "seed", require_int("seed", self.seed, 0, MAX_SEED))

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as JSON values; make_codec(**config) makes the codec again."""
        return {"name": "rskd", "vocab_size": self.vocab_size, "draws": self.draws, "seed": self.seed}

    @property
    def n_uniforms(self) -> int:
        return self.draws

    @property
    def max_entries(self) -> int:
        return self.draws

    @property
    def max_row_bytes(self) -> int:
        """Bytes of a full row: its count, and an id and a count for each draw."""
        return 1 + min(self.draws, self.vocab_size) * (id_bytes(self.vocab_size) + 1)

    def encode(self, targets: TeacherTargets, input_ids: Any) -> bytes:
        """One blob of these rows.

        Raises ValueError where targets and input_ids do not belong together, CorruptionError where targets break
        an invariant, SpecMismatchError for another vocabulary or rows that are not of so many draws.
        """
        tokens = checked_input_ids(input_ids, self.vocab_size)
        check_targets(self, targets, tokens, max_entries=self.draws)
        times_E, broken = self._times_drawn(targets.logps, targets.counts)
        if broken is not None:
            raise SpecMismatchError(f"row {broken} of the targets is not one of {self.draws} draws")
        order = rank_major_order(targets.counts)
        header = expected_header(self, tokens, n_present=int(targets.present.sum()), n_entries=len(targets.ids))
        planes = [targets.counts.astype(np.uint8).tobytes(), times_E[order].astype(np.uint8).tobytes()]
        return pack_blob(header, [*planes, *encode_ids(targets.ids, order, self.vocab_size)])

    def decode(self, blob: bytes | memoryview, input_ids: Any) -> TeacherTargets:
        """The targets that were encoded for this text. Raises FormatError, CorruptionError or SpecMismatchError."""
        tokens = checked_input_ids(input_ids, self.vocab_size)
        header, planes = opened_blob(self, blob, tokens)
        counts = taken_counts(planes, header, "u1", max_entries=self.draws)
        order = rank_major_order(counts)
        times_E = np.empty(header.n_entries, np.int64)
        times_E[order] = planes.take("u1", header.n_entries)
        ids = decode_ids(planes, order, self.vocab_size)
        planes.finish()
        broken = np.flatnonzero(_row_sums(times_E, counts) != np.where(counts > 0, self.draws, 0))
        if len(broken) or np.any(times_E == 0):
            raise CorruptionError(f"a row's counts do not add up to {self.draws} draws, or one of them is 0")
        targets = self._targets(tokens, counts, ids, times_E)
        targets.validate()
        return targets

    def _sample(self, p_NV: NDArray[np.float64], uniforms_NU: NDArray[np.float64]) -> SampledRows:
        return multinomial_sample(p_NV, uniforms_NU)

    def _targets_of(self, given: GivenSamples, tokens: NDArray[np.int32], keep: NDArray[np.bool_]) -> TeacherTargets:
        with_exact = np.flatnonzero(given.n_exact)
        if len(with_exact):
            raise ValueError(f"row {with_exact[0]} of the given rows has exact entries, and rskd has none")
        entry_NK = given.ids >= 0
        counts = np.zeros(len(keep), np.int64)
        counts[keep] = entry_NK.sum(axis=1)
        times_E, broken = self._times_drawn(given.logweights[entry_NK], counts)
        if broken is not None:
            raise ValueError(f"row {broken} has weights that are not multiples of 1/{self.draws}, which sum to 1")
        return self._targets(tokens, counts, given.ids[entry_NK].astype(np.int32), times_E)

    def _times_drawn(
        self, logweights_E: NDArray[np.float32], counts: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], int | None]:
        """How often each entry was drawn, and the first row for which these weights do not say so."""
        exact_E = np.exp(logweights_E.astype(np.float64)) * self.draws
        times_E = np.rint(exact_E).astype(np.int64)
        off_E = (np.abs(exact_E - times_E) > _COUNT_ERROR) | (times_E < 1)
        off_R = (_row_sums(off_E, counts) > 0) | (_row_sums(times_E, counts) != np.where(counts > 0, self.draws, 0))
        broken = np.flatnonzero(off_R)
        return times_E, int(broken[0]) if len(broken) else None

    def _targets(
        self, tokens: NDArray[np.int32], counts: NDArray[np.int64], ids: NDArray[np.int32], times_E: NDArray[np.int64]
    ) -> TeacherTargets:
        logweights_E = np.log(times_E / self.draws).astype(np.float32)
        samples = StoredSamples(n_exact=np.zeros(len(counts), np.int64))
        return sampled_targets(tokens, offsets_of(counts), ids, logweights_E, samples, vocab_size=self.vocab_size)


def _row_sums(values_E: NDArray, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums of ragged integers over their rows [R]; 0 for a row without entries."""
    running_E = np.concatenate([[0], np.cumsum(values_E, dtype=np.int64)])
    offsets = offsets_of(counts)
    return running_E[offsets[1:]] - running_E[offsets[:-1]]
