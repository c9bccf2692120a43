"""The top-k codec: the k most probable tokens of a row with quantised log-probs, and two moments of the tail.

It gives up where in the tail the rest of the mass lies: read back, the tail is uniform. The mass itself is kept, to
2e-7 nats, at T = 1 and T = 2. Bytes a token before zstd: k * (2 + value bytes) for a vocabulary up to 65,536 and
k * (3 + value bytes) above, plus 4 for the moments and 4 for an int8 row's scale and offset.

Planes are laid out rank by rank (all rows' first entries, then all second ones ...), ids by bytes, values as
differences along the rank, which lets zstd see that neighbouring ranks have neighbouring values.

Letters: L sequence length, R rows, E entries, N rows given, K entries given, V vocabulary.
"""

import operator
import os
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.blob import BlobHeader, check_header, input_ids_crc32, pack_blob, unpack_blob
from logitstore.errors import CorruptionError, SpecMismatchError
from logitstore.fingerprint import canonical_json
from logitstore.head_values import HEAD_FORMATS, HeadFormat, QuantisedHead, decode_one_byte
from logitstore.logits_source import iter_logit_chunks
from logitstore.planes import (
    PlaneReader,
    byte_planes,
    delta_along_rank,
    rank_major_order,
    undo_delta_along_rank,
)
from logitstore.row_input import checked_input_ids, checked_keep_mask, checked_rows, moved_to_tail
from logitstore.tail_moments import decode_moments, encode_moments
from logitstore.targets import TeacherTargets
from logitstore.topk import topk_with_tail

CODEC_ID = 1
MAX_VOCAB_SIZE = 1 << 24


@dataclass(frozen=True)
class TopKCodec:
    """Keeps k entries a row (fewer where fewer tokens have a probability), and the tail's mass at T = 1 and T = 2.

    head: "int8", "fp8" or "fp16", how log-probs are stored; tail: "residual". Raises ValueError for anything else.
    """

    vocab_size: int
    k: int = 64
    head: str = "int8"
    tail: str = "residual"

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab_size", _checked_int("vocab_size", self.vocab_size, 1, MAX_VOCAB_SIZE))
        object.__setattr__(self, "k", _checked_int("k", self.k, 1, 65535))
        if self.head not in HEAD_FORMATS:
            raise ValueError(f"head must be one of {', '.join(HEAD_FORMATS)}, got {self.head!r}")
        if self.tail != "residual":
            raise ValueError(f"tail must be 'residual' in this version, got {self.tail!r}")

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as JSON values; make_codec(**config) makes the codec again."""
        return {"name": "topk", "vocab_size": self.vocab_size, "k": self.k, "head": self.head, "tail": self.tail}

    @property
    def value_table(self) -> NDArray[np.float32] | None:
        """logp = scale * value_table[code] + offset, float32 [256]; None where the head has two bytes an entry."""
        return self._format.table

    @property
    def _format(self) -> HeadFormat:
        return HEAD_FORMATS[self.head]

    def calibrated(self, logits: Any, input_ids: Any, keep_mask: Any = None) -> "TopKCodec":
        """The codec itself: nothing of it is fitted."""
        return self

    def targets_from_logits(self, logits: Any, input_ids: Any, keep_mask: Any = None) -> TeacherTargets:
        """What this codec keeps of softmax(logits), quantised: decode(encode(targets)) equals it bit for bit.

        logits [L, W >= V]: numpy array, torch tensor of any float dtype and device, or FactoredLogits; read in
        chunks of 64 MiB. input_ids [L]. keep_mask [L-1] bool: True where row t (the distribution for token t + 1) is
        to be stored; the others are absent. The last row of logits has no label and is dropped.
        Raises ValueError for shapes that do not fit, ids outside the vocabulary and logits that are no distribution.
        """
        tokens = checked_input_ids(input_ids, self.vocab_size)
        keep = checked_keep_mask(keep_mask, len(tokens))
        if hasattr(logits, "shape") and logits.shape[0] != len(tokens):
            raise ValueError(f"{logits.shape[0]} rows of logits for {len(tokens)} tokens, expected as many")
        chunks = iter_logit_chunks(logits, np.flatnonzero(keep), vocab_size=self.vocab_size)
        no_rows = topk_with_tail(np.zeros((0, self.vocab_size), np.float32), self.k)
        parts = [no_rows, *(topk_with_tail(chunk_NV, self.k) for chunk_NV in chunks)]
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return self.targets_from_topk(*columns, input_ids=tokens, keep_mask=keep)

    def targets_from_topk(
        self,
        ids: Any,
        logps: Any,
        tail_logmass: Any,
        tail_logmoment_half: Any,
        input_ids: Any,
        keep_mask: Any = None,
    ) -> TeacherTargets:
        """The same from what logitstore_kernels.topk_with_tail returns: ids [N, K >= k], logps [N, K] descending,
        moments [N], for all L - 1 rows or for those that keep_mask keeps. Pads have id -1.

        Entries beyond the k-th, and entries of a probability that float32 does not hold (below e^-87), are left to
        the tail. Raises ValueError for shapes that do not fit, ids outside the vocabulary or a row without entries.
        """
        tokens = checked_input_ids(input_ids, self.vocab_size)
        keep = checked_keep_mask(keep_mask, len(tokens))
        rows = checked_rows(ids, logps, tail_logmass, tail_logmoment_half, keep_mask=keep, vocab_size=self.vocab_size)
        rows = moved_to_tail(rows, self.k)
        entry_NK = rows.ids >= 0
        counts = np.zeros(len(keep), np.int64)
        counts[keep] = entry_NK.sum(axis=1)
        offsets = offsets_of(counts)
        odds_codes, excess_codes = encode_moments(rows.tail_logmass, rows.tail_logmoment_half)
        return self._targets(
            tokens,
            offsets,
            rows.ids[entry_NK].astype(np.int32),
            self._format.quantise(rows.logps[entry_NK], offsets),
            decode_moments(odds_codes, excess_codes),
        )

    def encode(self, targets: TeacherTargets, input_ids: Any) -> bytes:
        """One blob of these rows. Values that are not on this codec's grid yet are quantised.

        Raises ValueError where targets and input_ids do not belong together, CorruptionError where targets break
        an invariant, SpecMismatchError for another vocabulary or more than k entries in a row.
        """
        tokens = checked_input_ids(input_ids, self.vocab_size)
        self._check_targets(targets, tokens)
        counts = targets.counts
        present = counts > 0
        order = rank_major_order(counts)
        header = replace(self._expected_header(tokens), n_present=int(present.sum()), n_entries=len(targets.ids))
        head = self._on_grid(targets)
        moments = encode_moments(targets.tail_logmass[present], targets.tail_logmoment_half[present])
        planes = [counts.astype("<u2").tobytes(), *(codes.astype("<u2").tobytes() for codes in moments)]
        if head.scale is not None and head.offset is not None:
            planes += [numbers[present].astype("<f2").tobytes() for numbers in (head.scale, head.offset)]
        planes += byte_planes(targets.ids[order], self._id_bytes)
        planes += byte_planes(delta_along_rank(head.codes, targets.offsets)[order], self._format.code_bytes)
        return pack_blob(header, planes)

    def decode(self, blob: bytes | memoryview, input_ids: Any) -> TeacherTargets:
        """The targets that were encoded for this text. Raises FormatError, CorruptionError or SpecMismatchError."""
        tokens = checked_input_ids(input_ids, self.vocab_size)
        n_rows = max(len(tokens) - 1, 0)
        header, payload = unpack_blob(blob, max_payload_bytes=n_rows * self._max_row_bytes)
        check_header(header, self._expected_header(tokens))
        planes = PlaneReader(payload)
        counts = planes.take("<u2", n_rows).astype(np.int64)
        if counts.sum() != header.n_entries or np.count_nonzero(counts) != header.n_present:
            raise CorruptionError(f"row counts add up to {counts.sum()} entries, the header says {header.n_entries}")
        if counts.max(initial=0) > self.k:
            raise CorruptionError(f"a row has {counts.max()} entries, the codec keeps {self.k} at most")
        moments = decode_moments(planes.take("<u2", header.n_present), planes.take("<u2", header.n_present))
        scale_offset = None
        if self._format.has_row_scale:
            scale_offset = [planes.take("<f2", header.n_present).astype(np.float32) for _ in range(2)]
        order, offsets = rank_major_order(counts), offsets_of(counts)
        ids = np.empty(header.n_entries, np.int32)
        ids[order] = planes.take_planes(self._id_bytes, header.n_entries, np.int32)
        code_type = np.uint8 if self._format.code_bytes == 1 else np.uint16
        delta = np.empty(header.n_entries, code_type)
        delta[order] = planes.take_planes(self._format.code_bytes, header.n_entries, code_type)
        planes.finish()
        head = self._head(undo_delta_along_rank(delta, offsets), counts, scale_offset)
        targets = self._targets(tokens, offsets, ids, head, moments)
        targets.validate()
        return targets

    @property
    def _id_bytes(self) -> int:
        return 1 if self.vocab_size <= 1 << 8 else 2 if self.vocab_size <= 1 << 16 else 3

    @property
    def _max_row_bytes(self) -> int:
        """Bytes of a full row: its count, two moments, scale and offset, and k entries."""
        return 2 + 4 + 4 + self.k * (self._id_bytes + self._format.code_bytes)

    def _expected_header(self, tokens: NDArray[np.int32]) -> BlobHeader:
        return BlobHeader(
            codec_id=CODEC_ID,
            n_rows=max(len(tokens) - 1, 0),
            n_present=0,
            n_entries=0,
            vocab_size=self.vocab_size,
            input_ids_crc32=input_ids_crc32(tokens),
            config_crc32=zlib.crc32(canonical_json(self.config).encode()),
        )

    def _check_targets(self, targets: TeacherTargets, tokens: NDArray[np.int32]) -> None:
        if targets.vocab_size != self.vocab_size:
            raise SpecMismatchError(f"targets have a vocabulary of {targets.vocab_size}, the codec {self.vocab_size}")
        if not np.array_equal(tokens, targets.input_ids):
            raise ValueError("input_ids are not the ones that the targets were made with")
        targets.validate()
        most = int(targets.counts.max(initial=0))
        if most > self.k:
            raise SpecMismatchError(f"a row of the targets has {most} entries, the codec keeps {self.k}")

    def _on_grid(self, targets: TeacherTargets) -> QuantisedHead:
        """The targets' own codes where they are this format's codes, else their log-probs quantised."""
        codes, scale, offset = targets.codes, targets.code_scale, targets.code_offset
        if codes is not None and self._format.table is not None and (scale is not None) == self._format.has_row_scale:
            head = self._head_of_rows(codes, targets.counts, scale, offset)
            if np.array_equal(head.logps, targets.logps):
                return head
        return self._format.quantise(targets.logps, targets.offsets)

    def _head(
        self, codes: NDArray, counts: NDArray[np.int64], scale_offset: list[NDArray[np.float32]] | None
    ) -> QuantisedHead:
        """What codes stand for, the scale and offset being given for the present rows only."""
        if self._format.table is None:
            return QuantisedHead(codes.view(np.float16).astype(np.float32), codes, None, None)
        if scale_offset is None:
            return self._head_of_rows(codes, counts, None, None)
        scale_R, offset_R = (np.zeros(len(counts), np.float32) for _ in range(2))
        scale_R[counts > 0], offset_R[counts > 0] = scale_offset
        return self._head_of_rows(codes, counts, scale_R, offset_R)

    def _head_of_rows(
        self,
        codes: NDArray[np.uint8],
        counts: NDArray[np.int64],
        scale_R: NDArray[np.float32] | None,
        offset_R: NDArray[np.float32] | None,
    ) -> QuantisedHead:
        assert self._format.table is not None
        scale_E, offset_E = (None if a is None else np.repeat(a, counts) for a in (scale_R, offset_R))
        return QuantisedHead(decode_one_byte(codes, self._format.table, scale_E, offset_E), codes, scale_R, offset_R)

    def _targets(
        self,
        tokens: NDArray[np.int32],
        offsets: NDArray[np.int64],
        ids: NDArray[np.int32],
        head: QuantisedHead,
        present_moments: tuple[NDArray[np.float32], NDArray[np.float32]],
    ) -> TeacherTargets:
        moments_R = np.full((2, len(offsets) - 1), np.nan, np.float32)
        moments_R[:, np.diff(offsets) > 0] = present_moments
        return TeacherTargets(
            offsets=offsets,
            ids=ids,
            logps=head.logps,
            tail_logmass=moments_R[0],
            tail_logmoment_half=moments_R[1],
            vocab_size=self.vocab_size,
            input_ids=tokens,
            codes=head.codes if self._format.code_bytes == 1 else None,
            code_scale=head.scale,
            code_offset=head.offset,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the codec to a folder, for logitstore.load_codec."""
        from logitstore.codecs.registry import save_codec

        save_codec(self, folder)


def offsets_of(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row boundaries [R+1] of ragged entries, from the entries of each row [R]."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _checked_int(name: str, value: Any, least: int, most: int) -> int:
    """The value as an int, whatever integer type it has (numpy's are no JSON); a bool is none."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most:,}, got {value!r}")
    return number
