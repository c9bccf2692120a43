"""The top-k codec: the most probable tokens of a row with quantised log-probs, and two moments of the tail.

With tail "residual" it gives up where in the tail the rest of the mass lies: read back, the tail is uniform. With
"predicted" a tail model says where, from what is stored anyway, and with a tail_step what the prediction leaves over is
coded too. The mass itself is kept at T = 1 and T = 2. How many tokens a row keeps is fixed (k), or follows from the
row: those with p >= min_prob, or the first ones that hold a mass of top_p, k at most.

Fitted by `calibrate` (layout 2), ids are ranks in candidate lists and every number is entropy coded.
Unfitted (layout 1), k = 64 and int8 take k * (2 + 1) bytes before zstd for a vocabulary up to 65,536, k * (3 + 1)
above, plus 4 for the moments and 4 for an int8 row's scale and offset.

Letters: L sequence length, R rows, N rows given, K entries given, V vocabulary.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.codec_tables import CodecTables
from logitstore.codecs import flat_layout, ranked_layout
from logitstore.codecs.checks import (
    MAX_VOCAB_SIZE,
    check_rows,
    check_targets,
    expected_header,
    opened_blob,
    require_int,
    require_sha256,
    require_tables,
)
from logitstore.codecs.flat_layout import StoredRows, decode_flat, encode_flat
from logitstore.codecs.ranked_layout import canonical_ids, decode_ranked, encode_ranked
from logitstore.errors import SpecMismatchError
from logitstore.fit_cache import FitCache
from logitstore.head_rows import decoded_head, head_on_grid, quantised_head
from logitstore.head_values import HeadFormat, QuantisedHead
from logitstore.head_values import head_format as named_head_format
from logitstore.logits_source import iter_logit_chunks
from logitstore.planes import offsets_of
from logitstore.row_input import check_logit_rows, checked_input_ids, checked_keep_mask, checked_rows
from logitstore.selection import Selection, selected
from logitstore.tail_moments import COARSE, FINE, MomentGrid, decode_moments, encode_moments
from logitstore.targets import TeacherTargets
from logitstore.topk import topk_with_tail

LEAST_PREDICTED_VOCAB = 18  # a fit asks what differs in tails behind 16 entries, and of one token nothing does


@dataclass(frozen=True)
class TopKCodec:
    """Keeps k entries a row at most (fewer where fewer tokens have a probability), and the tail's mass at T = 1 and 2.

    head: "int8", "fp8", "fp16", "log" or "sqrtp", how log-probs are stored; head_step: the step of "log" (nats) or
    "sqrtp" (of sqrt(p)), None for the default. tail: "residual" or "predicted"; tail_step: of the corrections of a
    predicted tail, in units in which a step of s costs s^2 / 24 nats of KL a direction, None for no corrections.
    min_prob, top_p: see Selection. tables_sha256: hash of the tables that a fitted codec codes with, None for an
    unfitted one; tables: these, where they are at hand. Raises ValueError for anything else, SpecMismatchError for
    tables of another vocabulary.
    """

    vocab_size: int
    k: int = 64
    head: str = "int8"
    tail: str = "residual"
    head_step: float | None = None
    min_prob: float | None = None
    top_p: float | None = None
    tail_step: float | None = None
    tables_sha256: str | None = None
    tables: CodecTables | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab_size", require_int("vocab_size", self.vocab_size, 1, MAX_VOCAB_SIZE))
        object.__setattr__(self, "k", require_int("k", self.k, 1, 65535))
        if self.tail not in ("residual", "predicted"):
            raise ValueError(f"tail must be 'residual' or 'predicted', got {self.tail!r}")
        if self.tail == "predicted" and self.vocab_size < LEAST_PREDICTED_VOCAB:
            raise ValueError(
                f"tail 'predicted' needs a vocabulary of {LEAST_PREDICTED_VOCAB} tokens or more, "
                f"got {self.vocab_size}; keep every token instead"
            )
        if self.tail_step is not None:
            object.__setattr__(self, "tail_step", _checked_tail_step(self.tail_step, self.tail))
        _ = self.head_format, self._selection
        require_sha256("tables", self.tables_sha256)
        if self.tables is not None and self.tables.sha256 != self.tables_sha256:
            raise ValueError(f"tables have SHA-256 {self.tables.sha256}, the codec names {self.tables_sha256}")
        if self.tables is not None and self.tables.lists.vocab_size != self.vocab_size:
            raise SpecMismatchError(
                f"tables are for a vocabulary of {self.tables.lists.vocab_size}, the codec has {self.vocab_size}"
            )

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as JSON values; make_codec(**config) makes the codec again."""
        config = {"name": "topk", "vocab_size": self.vocab_size, "k": self.k, "head": self.head, "tail": self.tail}
        options = {name: getattr(self, name) for name in ("head_step", "min_prob", "top_p", "tail_step")}
        options["tables"] = self.tables_sha256
        return config | {name: value for name, value in options.items() if value is not None}

    @property
    def value_table(self) -> NDArray[np.float32] | None:
        """logp = scale * value_table[code] + offset, float32 [256]; None where the head has two bytes an entry."""
        return self.head_format.table

    @property
    def head_format(self) -> HeadFormat:
        """How log-probs are stored."""
        return named_head_format(self.head, self.head_step)

    @property
    def _selection(self) -> Selection:
        return Selection(self.k, self.min_prob, self.top_p)

    @property
    def _grid(self) -> MomentGrid:
        return FINE if self.tables_sha256 is None else COARSE

    @property
    def is_fitted(self) -> bool:
        """True where it codes with fitted tables, at hand or not; a predicted tail cannot do without."""
        return self.tables_sha256 is not None

    @property
    def tail_rank(self) -> int | None:
        """Coefficients of a predicted tail (tail_rank.py), None for another tail or without its tables."""
        return self.tables.tail.rank if self.tables is not None and self.tables.tail is not None else None

    @property
    def codec_id(self) -> int:
        """1 unfitted, 2 fitted: the number in the header of its blobs."""
        return flat_layout.CODEC_ID if self.tables_sha256 is None else ranked_layout.CODEC_ID

    @property
    def max_row_bytes(self) -> int:
        """Bytes of its largest row before compression."""
        if self.tables_sha256 is None:
            return flat_layout.max_row_bytes(self.vocab_size, self.k, self.head_format)
        corrections = None if self.tables is None else self.tables.corrections
        return ranked_layout.max_row_bytes(self.vocab_size, self.k, 0 if corrections is None else corrections.width)

    def calibrated(
        self,
        samples: Iterable[tuple[Any, Any, Any]],
        on_progress: Callable[[str, int, int | None], Any] | None = None,
        cache: FitCache | None = None,
    ) -> "TopKCodec":
        """This codec fitted to a re-iterable of samples (logits [L, V], input_ids [L], keep_mask [L-1] or None);
        on_progress and cache as in logitstore.calibrate.

        A tail model that it has already is kept.
        """
        from logitstore.fit_codec import fitted_on_samples

        return fitted_on_samples(self, samples, on_progress, cache)

    def unfitted(self) -> "TopKCodec":
        """The codec of the same head without anything that is fitted; its tail is uniform."""
        return replace(self, tail="residual", tail_step=None, tables_sha256=None, tables=None)

    def refitted(self, tables: CodecTables) -> "TopKCodec":
        """This codec with these tables in place of those that it names, if it names any."""
        return replace(self, tables_sha256=None, tables=None).with_tables(tables)

    def with_tables(self, tables: CodecTables) -> "TopKCodec":
        """This codec with these tables. Raises ValueError for others than it names, if it names any, SpecMismatchError
        for tables without the tail model that it needs, or with corrections of another tail_step."""
        if self.tail == "predicted" and tables.tail is None:
            raise SpecMismatchError("codec predicts its tail, its tables hold no tail model")
        tables_step = None if tables.corrections is None else tables.corrections.step
        if self.tail_step != tables_step:
            raise SpecMismatchError(f"codec has tail_step {self.tail_step}, its tables are for tail_step {tables_step}")
        return replace(self, tables_sha256=self.tables_sha256 or tables.sha256, tables=tables)

    def targets_from_logits(self, logits: Any, input_ids: Any, keep_mask: Any = None) -> TeacherTargets:
        """What this codec keeps of softmax(logits), quantised: decode(encode(targets)) equals it bit for bit.

        logits [L, W >= V]: numpy array, torch tensor of any float dtype and device, or FactoredLogits; read in
        chunks of 64 MiB. input_ids [L]. keep_mask [L-1] bool: True where row t (the distribution for token t + 1) is
        to be stored; the others are absent. The last row of logits has no label and is dropped.
        Raises ValueError for shapes that do not fit, ids outside the vocabulary and logits that are no distribution.
        """
        tokens = checked_input_ids(input_ids, self.vocab_size)
        keep = checked_keep_mask(keep_mask, len(tokens))
        check_logit_rows(logits, len(tokens))
        chunks = iter_logit_chunks(logits, np.flatnonzero(keep), vocab_size=self.vocab_size)
        no_rows = topk_with_tail(np.zeros((0, self.vocab_size), np.float32), self.k)
        parts = [no_rows, *(topk_with_tail(chunk_NV, self.k) for chunk_NV in chunks)]
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        coefs = None
        if self._codes_corrections:
            coefs = require_tables(self).predictor.teacher_coefs(logits, np.flatnonzero(keep))
        return self.targets_from_topk(*columns, input_ids=tokens, keep_mask=keep, teacher_coefs=coefs)

    def targets_from_topk(
        self,
        ids: Any,
        logps: Any,
        tail_logmass: Any,
        tail_logmoment_half: Any,
        input_ids: Any,
        keep_mask: Any = None,
        teacher_coefs: Any = None,
    ) -> TeacherTargets:
        """The same from what logitstore_kernels.topk_with_tail returns: ids [N, K >= k], logps [N, K] descending,
        moments [N], for all L - 1 rows or for those that keep_mask keeps. Pads have id -1.

        Entries that the codec does not keep, those of a probability that float32 does not hold (below e^-87) and
        those too improbable for the head format are left to the tail. teacher_coefs [kept rows, r]: what
        tables.predictor.teacher_coefs says of the logits, for a codec with a tail_step. Raises ValueError for shapes
        that do not fit, ids outside the vocabulary, a row without entries or missing teacher_coefs, SpecMismatchError
        for a predicted tail that was not fitted.
        """
        tokens = checked_input_ids(input_ids, self.vocab_size)
        keep = checked_keep_mask(keep_mask, len(tokens))
        rows = checked_rows(
            ids,
            logps,
            tail_logmass,
            tail_logmoment_half,
            keep_mask=keep,
            vocab_size=self.vocab_size,
            compiled=self.is_fitted,
        )
        rows = selected(rows, self._selection, self.head_format)
        entry_NK = rows.ids >= 0
        counts = np.zeros(len(keep), np.int64)
        counts[keep] = entry_NK.sum(axis=1)
        offsets = offsets_of(counts)
        moment_codes = encode_moments(rows.tail_logmass, rows.tail_logmoment_half, self._grid)
        moments = self._moments(moment_codes, counts > 0)
        head = quantised_head(self.head_format, rows.logps[entry_NK], offsets, moments[0])
        kept = rows.ids[entry_NK].astype(np.int32)
        if self.tables_sha256 is not None:
            stored = StoredRows(offsets, kept, head.codes, moment_codes, None, None)
            kept = canonical_ids(require_tables(self).lists, stored, tokens)
        targets = self._targets(tokens, offsets, kept, head, moments)
        return self._with_corrections(targets, teacher_coefs) if self._codes_corrections else targets

    @property
    def _codes_corrections(self) -> bool:
        return self.tail_step is not None

    def _with_corrections(self, targets: TeacherTargets, teacher_coefs: Any) -> TeacherTargets:
        """The targets with quantised corrections towards teacher_coefs [kept rows, r]."""
        tables, present = require_tables(self), targets.present
        shape = (int(present.sum()), tables.predictor.model.rank)
        if teacher_coefs is None or np.shape(teacher_coefs) != shape:
            raise ValueError(
                f"a codec with a tail_step needs teacher_coefs {shape} of tables.predictor.teacher_coefs, "
                f"got {None if teacher_coefs is None else np.shape(teacher_coefs)}"
            )
        coefs_Rr = np.zeros((targets.n_rows, shape[1]), np.float32)
        coefs_Rr[present] = teacher_coefs
        (predicted_Rr,) = tables.predictor.predicted([targets])
        moments_P = targets.tail_logmass[present], targets.tail_logmoment_half[present]
        steps = self._correction_steps((coefs_Rr - predicted_Rr)[present], encode_moments(*moments_P, COARSE))
        corrections = self._corrections(steps, encode_moments(*moments_P, COARSE), present)
        return replace(targets, corrections=corrections, teacher_coefs=coefs_Rr)

    def _correction_steps(
        self, errors_Pr: NDArray[np.float32], moment_codes: tuple[NDArray[np.uint16], NDArray[np.uint16]]
    ) -> NDArray[np.int32]:
        corrections = require_tables(self).corrections
        assert corrections is not None
        return corrections.quantised(errors_Pr, ranked_layout.moment_classes(moment_codes))

    def _corrections(
        self,
        steps: NDArray[np.int32],
        moment_codes: tuple[NDArray[np.uint16], NDArray[np.uint16]],
        present: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        tables = require_tables(self).corrections
        assert tables is not None
        corrections_Rr = np.zeros((len(present), tables.width), np.float32)
        corrections_Rr[present] = tables.corrections(steps, ranked_layout.moment_classes(moment_codes))
        return corrections_Rr

    def encode(self, targets: TeacherTargets, input_ids: Any) -> bytes:
        """One blob of these rows. Values that are not on this codec's grid yet are quantised.

        Raises ValueError where targets and input_ids do not belong together, CorruptionError where targets break
        an invariant, SpecMismatchError for another vocabulary, samples, more than k entries in a row, or tables not at
        hand.
        """
        tokens = checked_input_ids(input_ids, self.vocab_size)
        check_targets(self, targets, tokens, max_entries=self.k)
        rows, header = self.stored_rows(targets), expected_header(self, tokens)
        if self.tables_sha256 is None:
            return encode_flat(header, self.head_format, rows)
        return encode_ranked(header, self.head_format, require_tables(self), tokens, rows)

    def stored_rows(self, targets: TeacherTargets) -> StoredRows:
        """The numbers that encode writes of targets that it takes. Raises SpecMismatchError where corrections lack."""
        present = targets.present
        moments_P = targets.tail_logmass[present], targets.tail_logmoment_half[present]
        moment_codes = encode_moments(*moments_P, self._grid)
        head = head_on_grid(self.head_format, targets, self._moments(moment_codes, present)[0])
        steps = None
        if self._codes_corrections:
            if targets.corrections is None:
                raise SpecMismatchError("codec has a tail_step, the targets no corrections; make them with this codec")
            steps = self._correction_steps(targets.corrections[present], moment_codes)
        return StoredRows(targets.offsets, targets.ids, head.codes, moment_codes, head.scale, head.offset, steps)

    def decode(self, blob: bytes | memoryview, input_ids: Any) -> TeacherTargets:
        """The targets that were encoded for this text.

        Raises FormatError, CorruptionError, or SpecMismatchError (another codec's blob, or tables not at hand).
        """
        tokens = checked_input_ids(input_ids, self.vocab_size)
        header, planes = opened_blob(self, blob, tokens)
        if self.tables_sha256 is None:
            rows = decode_flat(header, planes, self.head_format, k=self.k)
        else:
            rows = decode_ranked(header, planes, self.head_format, require_tables(self), tokens, k=self.k)
        moments = self._moments(rows.moment_codes, np.diff(rows.offsets) > 0)
        head = decoded_head(self.head_format, rows.codes, rows.offsets, moments[0], rows.scale, rows.offset)
        targets = self._targets(tokens, rows.offsets, rows.ids, head, moments)
        check_rows(self, targets)
        if rows.correction_steps is not None:
            present = targets.present
            corrections = self._corrections(rows.correction_steps, rows.moment_codes, present)
            targets = replace(targets, corrections=corrections)
        return targets

    def _moments(
        self, moment_codes: tuple[NDArray[np.uint16], NDArray[np.uint16]], present: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Log-mass and half moment of all rows [R], NaN in absent ones, from the codes of the present ones."""
        moments_P = decode_moments(*moment_codes, self._grid)
        if present.all():
            return moments_P
        moments_R = np.full((2, len(present)), np.nan, np.float32)
        moments_R[:, present] = moments_P
        return moments_R[0], moments_R[1]

    def _targets(
        self,
        tokens: NDArray[np.int32],
        offsets: NDArray[np.int64],
        ids: NDArray[np.int32],
        head: QuantisedHead,
        moments: tuple[NDArray[np.float32], NDArray[np.float32]],
    ) -> TeacherTargets:
        return TeacherTargets(
            offsets=offsets,
            ids=ids,
            logps=head.logps,
            tail_logmass=moments[0],
            tail_logmoment_half=moments[1],
            vocab_size=self.vocab_size,
            input_ids=tokens,
            codes=head.codes if self.head_format.code_bytes == 1 else None,
            code_scale=head.scale,
            code_offset=head.offset,
            tail_model=require_tables(self).predictor if self.tail == "predicted" else None,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the codec to a folder, for logitstore.load_codec."""
        from logitstore.codecs.registry import save_codec

        save_codec(self, folder)


def _checked_tail_step(step: Any, tail: str) -> float:
    if tail != "predicted":
        raise ValueError(f"tail_step is for tail 'predicted', got tail {tail!r}")
    if not isinstance(step, int | float) or isinstance(step, bool) or not 0.01 <= step <= 10:
        raise ValueError(f"tail_step must be a number from 0.01 to 10, or None, got {step!r}")
    return float(step)
