"""How the Triton loss is launched: which variant of the kernel a call needs, its tile, warps and scratch memory.

The variant is a function of the call's terms and dtypes alone, never of values, so that every one that can be reached
can be listed and compiled ahead of time (tests/kernels/compile_gate.py). No variant is tuned by timing: an in-place
kernel that is run again for a measurement would destroy its own input.

Letters: N rows, K entries kept, V vocabulary, W columns (W >= V).
"""

import dataclasses
import warnings
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from logitstore_kernels.loss_terms import LossTerms
from logitstore_kernels.teacher_batch import TeacherBatch
from logitstore_kernels.triton_loss import distillation_loss_kernel

MAX_SLOTS = 2048
# The largest tiles of which no variant needs a stack (tests/kernels/compile_gate.py); half of it for what also sums the
# logits or caps them, and half for what addresses them one by one: both keep more of a tile in registers.
_TILE_BYTES = 16_384
_MAX_WARPS = 8
# Of a thread: two programs of 8 warps fill a processor's 65,536. Said aloud, because the assembler otherwise gives up a
# register or two to a stack in order to fit more programs.
_MAX_REGISTERS = 128
# Scratch rows of a call without a gradient: enough programs to fill an accelerator, few enough to stay in its cache.
_PROGRAMS_PER_PROCESSOR = 2


class PackedTeacher(NamedTuple):
    """The tensors of a TeacherBatch that the kernels read, None where the batch has none or they are not needed."""

    ids_NK: Tensor
    values_NK: Tensor
    table_256: Tensor | None
    scale_N: Tensor | None
    offset_N: Tensor | None
    tail_logmass_N: Tensor
    tail_logmoment_half_N: Tensor | None
    coefs_Nr: Tensor | None = None
    basis_Vr: Tensor | None = None
    bias_V: Tensor | None = None

    @property
    def entries(self) -> tuple[Tensor | None, ...]:
        """All but the dense tail."""
        return self[:7]


def packed(teacher: TeacherBatch, *, with_dense_tail: bool = False) -> PackedTeacher:
    """The tensors of a batch, each of them once: samples have no moments to be read."""
    values = teacher.code_values
    tensors = (teacher.ids_NK, teacher.values_NK, *((None,) * 3 if values is None else vars(values).values()),
               teacher.tail_logmass_N, None if teacher.is_sampled else teacher.tail_logmoment_half_N)  # fmt: skip
    return PackedTeacher(*tensors, *(vars(teacher.dense_tail).values() if with_dense_tail else ()))


@dataclass(frozen=True)
class Variant:
    """The compile-time arguments of the kernel, by its own names; see there."""

    TAIL: str
    KL: bool
    CE: bool
    TWO: bool
    SQUARE: bool
    AT_ONE: bool
    GRADIENT: bool
    IN_PLACE: bool
    SOFTCAP: bool
    SMOOTHING: bool
    CODES: bool
    NUMBERS: bool
    SLOTS: int
    BLOCK: int

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told besides: so many warps that a thread holds at least 8 elements of a tile."""
        return {"num_warps": max(1, min(self.BLOCK // (32 * 8), _MAX_WARPS)), "maxnreg": _MAX_REGISTERS}

    @property
    def needs_scratch(self) -> bool:
        """Whether rows are masked where no gradient row is there to mask them in."""
        return not self.GRADIENT and self.KL and self.TAIL in ("bucket", "uniform")


def variant_of(
    terms: LossTerms,
    *,
    vocab_size: int,
    element_bytes: int,
    n_slots: int,
    gradient: bool,
    in_place: bool,
    codes: bool,
    numbers: bool,
    even: bool,
    block: int | None = None,
) -> Variant:
    """The variant that computes `terms`.

    even: whether the row stride and the vocabulary are multiples of 16, so that accesses are wide.
    block: another tile than the one for this vocabulary, a power of 2.
    """
    two = terms.kl_wanted and terms.ce_wanted and terms.temperature != 1
    smoothing = terms.ce_wanted and terms.label_smoothing > 0
    sums_logits = smoothing or (terms.kl_wanted and terms.tail == "uniform")
    tile_bytes = _TILE_BYTES // (2 if sums_logits or terms.softcap is not None else 1) // (1 if even else 2)
    return Variant(
        TAIL=terms.tail if terms.kl_wanted else "dropped",
        KL=terms.kl_wanted,
        CE=terms.ce_wanted,
        TWO=two,
        SQUARE=two and terms.temperature == 2,
        AT_ONE=terms.temperature == 1 or not terms.kl_wanted,
        GRADIENT=gradient,
        IN_PLACE=in_place,
        SOFTCAP=terms.softcap is not None,
        SMOOTHING=smoothing,
        CODES=codes and terms.kl_wanted,
        NUMBERS=numbers and terms.kl_wanted,
        SLOTS=triton.next_power_of_2(max(n_slots, 1)) if terms.kl_wanted else 1,
        BLOCK=block or min(tile_bytes // element_bytes, max(128, triton.next_power_of_2(vocab_size))),
    )


class LossOutputs(NamedTuple):
    """float32 [N] each, 0 in rows that do not count."""

    loss_N: Tensor
    kl_N: Tensor
    ce_N: Tensor


def launch(
    logits_NW: Tensor,
    gradient_NW: Tensor | None,
    teacher: PackedTeacher,
    labels_N: Tensor,
    counted_N: Tensor,
    upstream_N: Tensor,
    terms: LossTerms,
    *,
    vocab_size: int,
    block: int | None = None,
) -> LossOutputs:
    """The values of all rows; mutates gradient_NW, where it is given, to their gradient * upstream_N.

    logits_NW: [N, W] with unit column stride, 16 or 32 bits a number; left as it is unless gradient_NW is that tensor.
    block: another tile than the one for this vocabulary.
    """
    n_rows, n_columns = logits_NW.shape
    outputs = LossOutputs(*(logits_NW.new_empty(n_rows, dtype=torch.float32) for _ in range(3)))
    if n_rows == 0:
        return outputs
    in_place = gradient_NW is not None and gradient_NW.data_ptr() == logits_NW.data_ptr()
    variant = variant_of(
        terms, vocab_size=vocab_size, element_bytes=logits_NW.element_size(), n_slots=teacher.ids_NK.shape[1],
        gradient=gradient_NW is not None, in_place=in_place, codes=teacher.table_256 is not None,
        numbers=teacher.scale_N is not None, even=logits_NW.stride(0) % 16 == vocab_size % 16 == 0, block=block,
    )  # fmt: skip
    n_programs, work = n_rows, gradient_NW
    if gradient_NW is None:
        work = logits_NW
        if variant.needs_scratch:
            n_programs = min(n_rows, _n_processors(logits_NW.device) * _PROGRAMS_PER_PROCESSOR)
            work = logits_NW.new_empty(n_programs, n_columns)
    say_odd_rows(logits_NW)
    teacher = PackedTeacher(*(None if tensor is None else tensor.contiguous() for tensor in teacher))
    labels_N, counted_N, upstream_N = (tensor.contiguous() for tensor in (labels_N, counted_N, upstream_N))
    unused = labels_N
    distillation_loss_kernel[(n_programs,)](
        logits_NW, work, teacher.ids_NK, teacher.values_NK,
        *(unused if tensor is None else tensor for tensor in teacher.entries[2:]),
        labels_N, counted_N, upstream_N, *outputs, n_rows, vocab_size, n_columns,
        teacher.ids_NK.shape[1], logits_NW.stride(0), work.stride(0), 1.0 / _used_temperature(terms),
        terms.temperature, terms.alpha, terms.label_smoothing, terms.z_loss, terms.softcap or 0.0,
        **dataclasses.asdict(variant), **variant.options,
    )  # fmt: skip
    return outputs


def _used_temperature(terms: LossTerms) -> float:
    return terms.temperature if terms.kl_wanted else 1.0


@cache
def _n_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def say_odd_rows(logits_NW: Tensor) -> None:
    """Warns once for each stride of rows that Triton cannot read 128 bits at a time."""
    if logits_NW.stride(0) % 16 or logits_NW.data_ptr() % 16:
        _warn_of_odd_rows(logits_NW.stride(0))


@cache
def _warn_of_odd_rows(stride: int) -> None:
    warnings.warn(
        f"logits rows are {stride} elements apart, which is no multiple of 16, or begin between two multiples of 16 "
        "bytes: they are read an element at a time; pad the head's output to a multiple of 64 columns",
        stacklevel=3,
    )
