"""TeacherBatch: the teacher's compressed next-token distributions of one batch, as the tensors that the losses read.

A row holds the teacher's K most probable tokens with their log-probs at T = 1 and, of all other tokens together (the
tail), the log-mass and one more log-moment, to which logits that give the tail a shape can be added (dense_tail.py); or
K tokens that were sampled, with the logs of their weights. Log-probs may be one-byte codes (code_values.py): with the
id a slot then takes 5 bytes. Shapes, dtypes and devices are checked once, here, without reading a value on an
accelerator. Values are checked where that costs no synchronisation, on a CPU; the search for repeated ids is skipped
above 2**20 entries (10 ms), because whoever wrote so large a batch to a store has had it checked there.

Letters: B batch, L length, N rows (one per predicted token), K entries kept, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from logitstore_kernels.code_values import CodeValues
from logitstore_kernels.dense_tail import DenseTail
from logitstore_kernels.tensor_checks import check_tensor, refuse_rows

_ID_DTYPES = (torch.int32, torch.int64)
_MAX_ENTRIES_SEARCHED_FOR_REPEATS = 2**20


@dataclass(frozen=True, eq=False)
class TeacherBatch:
    """N teacher distributions over vocab_size tokens; row i belongs to the same next token as logits row i.

    ids_NK: int32 or int64 in [0, V), no id twice in a row, -1 in pads. A row of nothing but pads is absent: it
        counts in no loss.
    values_NK: float32 (float64 is kept as it is), ln p at T = 1 in nats, or uint8 codes of it; anything in pads. What
        they stand for is logprobs_NK.
    tail_logmass_N: same dtype (float32 beside codes), ln of the summed probability of all tokens that are not entries;
        -inf if there is none, NaN allowed in absent rows.
    tail_logmoment_half_N: ln of the summed sqrt(p) of the same tokens, or None, with which only T = 1 is possible for
        the tails "bucket", "uniform", "dropped" and "dense".
    is_sampled: True where values_NK are ln of the weights of samples, at T = 1 alone; made by from_samples.
    dense_tail: logits that give the tail a shape, for tail="dense", or None; added by with_dense_tail.
    code_values: what the codes stand for; None where values_NK are floats.

    Raises TypeError / ValueError for a wrong dtype, shape, device or vocab_size. Prefer the constructors from_topk,
    from_codes, from_samples and from_collated, which check values too.
    """

    ids_NK: Tensor
    values_NK: Tensor
    tail_logmass_N: Tensor
    tail_logmoment_half_N: Tensor | None
    vocab_size: int
    is_sampled: bool = False
    dense_tail: DenseTail | None = None
    code_values: CodeValues | None = None

    def __post_init__(self) -> None:
        if isinstance(self.vocab_size, bool) or not isinstance(self.vocab_size, int):
            raise TypeError(f"vocab_size must be an int, got {type(self.vocab_size).__name__}")
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}")
        check_tensor("ids_NK", self.ids_NK, n_axes=2, dtypes=_ID_DTYPES)
        n_rows, k = self.ids_NK.shape
        if k > self.vocab_size:
            raise ValueError(
                f"ids_NK has {k} entries a row, more than vocab_size={self.vocab_size}; ids are unique in a row"
            )
        values_name, value_dtypes = "logprobs_NK", (torch.float32, torch.float64)
        if self.code_values is not None:
            values_name, value_dtypes = "codes_NK", (torch.uint8,)
        check_tensor(values_name, self.values_NK, n_axes=2, dtypes=value_dtypes)
        device = self.ids_NK.device
        moment_dtype = torch.float32 if self.code_values is not None else self.values_NK.dtype
        tensors = {
            values_name: (self.values_NK, (n_rows, k), value_dtypes),
            "tail_logmass_N": (self.tail_logmass_N, (n_rows,), (moment_dtype,)),
        }
        if self.tail_logmoment_half_N is not None:
            tensors["tail_logmoment_half_N"] = (self.tail_logmoment_half_N, (n_rows,), (moment_dtype,))
        for name, (value, shape, dtypes) in tensors.items():
            check_tensor(name, value, n_axes=len(shape), dtypes=dtypes)
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape} to go with ids_NK, got {tuple(value.shape)}")
            if value.device != device:
                raise ValueError(
                    f"{name} is on {value.device} but ids_NK is on {device}; move the whole batch with .to(device)"
                )
        if self.dense_tail is not None:
            self.dense_tail.check_against(n_rows=n_rows, vocab_size=self.vocab_size, device=device)
        if self.code_values is not None:
            self.code_values.check_against(n_rows=n_rows, device=device)

    @classmethod
    def from_topk(
        cls,
        ids_NK: Tensor,
        logprobs_NK: Tensor,
        tail_logmass_N: Tensor,
        tail_logmoment_half_N: Tensor | None = None,
        *,
        vocab_size: int,
    ) -> "TeacherBatch":
        """The batch of these entries and tail moments, as topk_with_tail returns them (fields as in the class).

        Floats below 32 bits are widened to float32. With K = V and no half moment, a row without a tail gets -inf (its
        tail is empty at every T) and any other row NaN. Raises TypeError / ValueError as the class does, and on a CPU
        also ValueError for an id outside [-1, V), an id twice in a row, NaN, or a tail mass above 1.
        """
        for name, value in (("ids_NK", ids_NK), ("logprobs_NK", logprobs_NK), ("tail_logmass_N", tail_logmass_N)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        dtype = torch.float64 if logprobs_NK.dtype == torch.float64 else torch.float32
        mass_N, half_N = _widen(tail_logmass_N, dtype), tail_logmoment_half_N
        if half_N is not None:
            half_N = _widen(half_N, dtype)
        elif ids_NK.dim() == 2 and ids_NK.shape[1] == vocab_size:
            half_N = torch.where(mass_N == -math.inf, mass_N, math.nan)
        ids_NK, logprobs_NK = _one_column_at_least(ids_NK, logprobs_NK)
        teacher = cls(ids_NK, _widen(logprobs_NK, dtype), mass_N, half_N, vocab_size)
        if ids_NK.device.type == "cpu":
            _check_values(teacher)
        return teacher

    @classmethod
    def from_codes(
        cls,
        ids_NK: Tensor,
        codes_NK: Tensor,
        value_table_256: Tensor,
        *,
        scale_N: Tensor | None = None,
        offset_N: Tensor | None = None,
        tail_logmass_N: Tensor,
        tail_logmoment_half_N: Tensor | None,
        vocab_size: int,
    ) -> "TeacherBatch":
        """The batch of these entries, ln p = scale_N * value_table_256[codes_NK] + offset_N; 5 bytes a slot.

        codes_NK: uint8, anything in pads. value_table_256: [256]; scale_N and offset_N: [N], together or not at all;
        all three and the moments of any float dtype, kept as float32. Everything else, and what is raised, as in
        from_topk.
        """
        named = {"ids_NK": ids_NK, "codes_NK": codes_NK, "value_table_256": value_table_256, "scale_N": scale_N,
                 "offset_N": offset_N, "tail_logmass_N": tail_logmass_N,
                 "tail_logmoment_half_N": tail_logmoment_half_N}  # fmt: skip
        for name, value in named.items():
            may_be_none = name in ("scale_N", "offset_N", "tail_logmoment_half_N")
            if not isinstance(value, Tensor) and not (value is None and may_be_none):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        table_256, scale_N, offset_N, mass_N, half_N = (
            None if value is None else _widen(value, torch.float32)
            for value in (value_table_256, scale_N, offset_N, tail_logmass_N, tail_logmoment_half_N)
        )
        if half_N is None and ids_NK.dim() == 2 and ids_NK.shape[1] == vocab_size:
            half_N = torch.where(mass_N == -math.inf, mass_N, math.nan)
        ids_NK, codes_NK = _one_column_at_least(ids_NK, codes_NK)
        values = CodeValues(table_256, scale_N, offset_N)
        teacher = cls(ids_NK, codes_NK, mass_N, half_N, vocab_size, code_values=values)
        if ids_NK.device.type == "cpu":
            _check_values(teacher)
        return teacher

    @classmethod
    def from_samples(cls, ids_NK: Tensor, logweights_NK: Tensor, *, vocab_size: int) -> "TeacherBatch":
        """The batch of these weighted samples, for tail="sampled": token ids_NK[i, j] has weight e^logweights_NK[i, j].

        ids_NK as in the class; logweights_NK in nats, any float dtype (those below 32 bits are widened), finite or
        -inf, anything in pads. Weights are taken as they are: a row's need not sum to 1, as those of importance
        weights do not. Raises TypeError / ValueError as the class does, and on a CPU also ValueError for an id outside
        [-1, V), an id twice in a row, or a log-weight that is NaN or +inf.
        """
        for name, value in (("ids_NK", ids_NK), ("logweights_NK", logweights_NK)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if not logweights_NK.is_floating_point():
            raise TypeError(f"logweights_NK must be of a float dtype, got {logweights_NK.dtype}")
        ids_NK, logweights_NK = _one_column_at_least(ids_NK, logweights_NK)
        logweights_NK = logweights_NK.to(torch.float64 if logweights_NK.dtype == torch.float64 else torch.float32)
        no_tail_N = logweights_NK.new_full(ids_NK.shape[:1], -math.inf)
        teacher = cls(ids_NK, logweights_NK, no_tail_N, no_tail_N, vocab_size, is_sampled=True)
        if ids_NK.device.type == "cpu":
            _check_values(teacher)
            infinite_N = ((ids_NK >= 0) & (logweights_NK == math.inf)).any(dim=1)
            refuse_rows(infinite_N, "a log-weight of +inf", logweights_NK)
        return teacher

    @classmethod
    def from_collated(
        cls, batch: Mapping[str, Tensor], *, vocab_size: int, value_table: Tensor | None = None
    ) -> "TeacherBatch":
        """The batch of N = B * L rows in the teacher_* tensors of a collated dict; row b * L + t speaks of token t + 1.

        batch: teacher_ids [B, L, K], teacher_tail_logmass [B, L] and, optionally, teacher_tail_logmoment_half [B, L];
        beside them teacher_logprobs [B, L, K], or teacher_codes [B, L, K] with or without teacher_code_scale and
        teacher_code_offset [B, L]. value_table: [256], what the codes stand for; a batch of log-probs takes none.
        Raises ValueError for a missing tensor, for codes without a table and a table without codes, and whatever
        from_topk and from_codes raise.
        """
        values_key = "teacher_codes" if "teacher_codes" in batch else "teacher_logprobs"
        keys = ("teacher_ids", values_key, "teacher_tail_logmass")
        missing = [key for key in keys if key not in batch]
        if missing:
            raise ValueError(
                f"the batch lacks {', '.join(missing)} (it has {', '.join(sorted(batch)) or 'nothing'}); "
                "logitstore_trainer.collate makes such a batch"
            )
        holds_codes = values_key == "teacher_codes"
        if value_table is not None and not holds_codes:
            raise ValueError("value_table is for one-byte codes, but the batch holds teacher_logprobs; leave it out")
        if value_table is None and holds_codes:
            raise ValueError(
                "the batch holds teacher_codes, whose meaning is the codec's: pass value_table=codec.value_table "
                "as a tensor, or let logitstore_trainer.TeacherDecoder make the batch"
            )
        ids_BLK, values_BLK, mass_BL = (batch[key] for key in keys)
        if ids_BLK.dim() != 3:
            raise ValueError(f"teacher_ids must be [B, L, K], got shape {tuple(ids_BLK.shape)}")
        half_N, scale_N, offset_N = (
            batch[key].flatten() if key in batch else None
            for key in ("teacher_tail_logmoment_half", "teacher_code_scale", "teacher_code_offset")
        )
        ids_NK, values_NK, mass_N = ids_BLK.flatten(0, 1), values_BLK.flatten(0, 1), mass_BL.flatten()
        if not holds_codes:
            return cls.from_topk(ids_NK, values_NK, mass_N, half_N, vocab_size=vocab_size)
        return cls.from_codes(
            ids_NK, values_NK, value_table, scale_N=scale_N, offset_N=offset_N, tail_logmass_N=mass_N,
            tail_logmoment_half_N=half_N, vocab_size=vocab_size,
        )  # fmt: skip

    @property
    def n_rows(self) -> int:
        return self.ids_NK.shape[0]

    @property
    def device(self) -> torch.device:
        return self.ids_NK.device

    @property
    def logprobs_NK(self) -> Tensor:
        """ln p at T = 1 of each entry [N, K], float32 or float64, anything in pads; decoded anew where it is codes."""
        return self.values_NK if self.code_values is None else self.code_values.logprobs(self.values_NK)

    @property
    def present_N(self) -> Tensor:
        """[N] bool, True where the row has at least one entry."""
        if self.ids_NK.shape[1] == 0:
            return self.ids_NK.new_zeros(self.n_rows, dtype=torch.bool)
        return self.ids_NK.amax(dim=1) >= 0  # no mask of [N, K] on the way

    @property
    def n_tail_N(self) -> Tensor:
        """[N] int64, the number of tokens that are not entries: V less the row's entries."""
        return self.vocab_size - (self.ids_NK >= 0).sum(dim=1)

    @property
    def gather_ids_NK(self) -> Tensor:
        """ids as int64, fit for gather and scatter: a pad is an id of its own row, and 0 in an absent row."""
        ids_NK = self.ids_NK.long()
        return torch.where(ids_NK >= 0, ids_NK, ids_NK.amax(dim=1, keepdim=True).clamp(min=0))

    def with_dense_tail(self, coefs_Nr: Tensor, basis_Vr: Tensor, bias_V: Tensor) -> "TeacherBatch":
        """This batch with a tail of that shape, for tail="dense": ln p = basis_Vr @ coefs + bias_V + a constant a row.

        Only tokens of the tail are meant; their mass stays that of the moments, and every other tail= works as before.
        coefs_Nr: [N, r] float32 or float64, r at most 1024; anything in rows that are absent or have no tail mass.
        basis_Vr, bias_V: [V, r] and [V], float16, bfloat16, float32 or float64; converted to the dtype that the loss
            computes in. Shared, not copied: the same tensors serve every batch.

        Raises TypeError / ValueError for wrong dtypes, shapes and devices, for a batch of samples, and on a CPU for
        coefficients that are not finite.
        """
        if self.is_sampled:
            raise ValueError("a batch of weighted samples has no tail; with_dense_tail is for batches of top-k entries")
        tail = DenseTail(coefs_Nr, basis_Vr, bias_V)
        teacher = dataclasses.replace(self, dense_tail=tail)
        if self.device.type == "cpu":
            has_tail_N = self.present_N & (self.tail_logmass_N > -math.inf)
            infinite_N = has_tail_N & ~coefs_Nr.isfinite().all(dim=1)
            refuse_rows(infinite_N, "tail coefficients that are not finite", coefs_Nr)
        return teacher

    def uniform_moment(self) -> "TeacherBatch":
        """This batch with the half moment of a uniform tail, (ln n + tail log-mass) / 2 for n tail tokens.

        Makes T != 1 possible where only the mass is known, by assuming on purpose what a flat tail would give; a real
        tail is peaked and has less than that at T > 1. Replaces a half moment that is there.
        """
        log_n_N = self.n_tail_N.to(self.tail_logmass_N.dtype).log()
        return dataclasses.replace(self, tail_logmoment_half_N=0.5 * (log_n_N + self.tail_logmass_N))

    def rows(self, rows: slice) -> "TeacherBatch":
        """The batch of these rows; its tensors are views."""
        dense, values, half_N = self.dense_tail, self.code_values, self.tail_logmoment_half_N
        if values is not None and values.scale_N is not None:
            values = dataclasses.replace(values, scale_N=values.scale_N[rows], offset_N=values.offset_N[rows])
        return dataclasses.replace(
            self,
            ids_NK=self.ids_NK[rows],
            values_NK=self.values_NK[rows],
            tail_logmass_N=self.tail_logmass_N[rows],
            tail_logmoment_half_N=None if half_N is None else half_N[rows],
            dense_tail=None if dense is None else dataclasses.replace(dense, coefs_Nr=dense.coefs_Nr[rows]),
            code_values=values,
        )

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "TeacherBatch":
        """This batch with every tensor on `device`."""
        movable = ("ids_NK", "values_NK", "tail_logmass_N", "tail_logmoment_half_N", "dense_tail", "code_values")
        parts = {name: getattr(self, name) for name in movable}
        return dataclasses.replace(
            self,
            **{name: None if x is None else x.to(device, non_blocking=non_blocking) for name, x in parts.items()},
        )


def _one_column_at_least(ids_NK: Tensor, values_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of no entries at all as rows of one pad, so that no reduction meets an axis of length 0."""
    if ids_NK.dim() != 2 or ids_NK.shape[1] != 0:
        return ids_NK, values_NK
    n_rows = ids_NK.shape[0]
    return ids_NK.new_full((n_rows, 1), -1), values_NK.new_zeros((n_rows, 1))


def _widen(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _check_values(teacher: TeacherBatch) -> None:
    """Raise ValueError for values that describe no distribution; reads every value, so for CPU tensors only."""
    ids_NK, vocab_size, present_N = teacher.ids_NK, teacher.vocab_size, teacher.present_N
    mass_N, half_N = teacher.tail_logmass_N, teacher.tail_logmoment_half_N
    bad_id_N = ((ids_NK < -1) | (ids_NK >= vocab_size)).any(dim=1)
    refuse_rows(bad_id_N, f"ids outside [0, {vocab_size}) that are not the pad -1", ids_NK)
    logprobs_NK = teacher.logprobs_NK
    refuse_rows(((ids_NK >= 0) & logprobs_NK.isnan()).any(dim=1), "NaN log-probs", logprobs_NK)
    refuse_rows(present_N & ~(mass_N <= 0), "a tail log-mass that is not at most 0 (a mass of 1)", mass_N)
    no_room_N = present_N & (teacher.n_tail_N == 0) & (mass_N > -math.inf)
    refuse_rows(no_room_N, f"all {vocab_size} tokens as entries, yet a tail log-mass that is not -inf", mass_N)
    # With K = V and no half moment given, NaN stands for "unknown"; everywhere else it is a fault.
    if half_N is not None and ids_NK.shape[1] < vocab_size:
        refuse_rows(present_N & half_N.isnan(), "entries, yet no tail log-moment at 1/T = 1/2", half_N)
    if ids_NK.numel() <= _MAX_ENTRIES_SEARCHED_FOR_REPEATS:
        sorted_NK = ids_NK.sort(dim=1).values
        repeated_NK = (sorted_NK[:, 1:] == sorted_NK[:, :-1]) & (sorted_NK[:, 1:] >= 0)
        refuse_rows(repeated_NK.any(dim=1), "an id more than once; ids are unique in a row", ids_NK)
