"""Compiles the variants of the kernels that a call can reach, for sm_90 without a GPU, and reads their SASS.

A script, run in a process of its own (python compile_gate.py quick | all [PART/PARTS]): Triton decides at import
between compiler and interpreter, and the tests beside it use the interpreter. Prints one JSON row a variant with what
the assembler says of it (registers, stack) and what its SASS holds (local loads, 128-bit global loads).

Vocabularies that Triton compiles alike (all multiples of 16 above a tile) are one row, which names them all.
"""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from logitstore_kernels.loss_terms import LossTerms
from logitstore_kernels.triton_dense import dense_rows_kernel, finish_rows_kernel, mark_rows_kernel
from logitstore_kernels.triton_dense_launch import BLOCK_OPTIONS, ROW_OPTIONS, ROW_TILE, dense_variant_of
from logitstore_kernels.triton_launch import variant_of
from logitstore_kernels.triton_loss import distillation_loss_kernel
from logitstore_kernels.triton_topk import fits_topk, topk_constants, topk_options, topk_with_tail_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

VOCABULARIES = (32_000, 49_152, 128_256, 151_936, 262_144)
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TEMPERATURES = (1.0, 2.0, 1.5)
TAILS = ("bucket", "uniform", "renormalised", "dropped", "sampled")
K = 64
FLOATS = ("table", "scale", "offset", "logmass", "half", "upstream", "loss", "kl", "ce", "head", "row_numbers", "coefs")
POINTERS = {"ids_ptr": "*i32", "scratch_ptr": "*i32", "labels_ptr": "*i64", "counted_ptr": "*u8"} | {
    f"{name}_ptr": "*fp32" for name in (*FLOATS, "logps", "mass")
}
INTEGERS = ("k", "n_rows", "vocab_size", "n_columns", "n_slots", "n_coefs", "logits_stride", "work_stride")
KERNELS = {
    kernel.fn.__name__: kernel
    for kernel in (
        distillation_loss_kernel,
        mark_rows_kernel,
        dense_rows_kernel,
        finish_rows_kernel,
        topk_with_tail_kernel,
    )
}


@dataclass(frozen=True)
class Build:
    """One kernel to compile: its compile-time arguments, the dtypes of the logits and of a dense tail's basis, and
    whether row strides and the vocabulary are multiples of 16."""

    kernel: str
    variant: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, int], ...]
    dtype: str
    basis: str = "none"
    even_rows: bool = True
    even_vocabulary: bool = True


def build(
    terms: LossTerms, dtype: str, vocab_size: int, *, gradient: str, head: str, k: int = K, even_rows: bool = True
) -> Build:
    even_vocabulary = vocab_size % 16 == 0
    variant = variant_of(
        terms, vocab_size=vocab_size, element_bytes=ELEMENT_BYTES[dtype], n_slots=k, gradient=gradient != "none",
        in_place=gradient == "in place", codes=head != "floats", numbers=head == "codes and numbers",
        even=even_rows and even_vocabulary,
    )  # fmt: skip
    arguments, options = tuple(dataclasses.asdict(variant).items()), tuple(variant.options.items())
    return Build(
        "distillation_loss_kernel", arguments, options, dtype, even_rows=even_rows, even_vocabulary=even_vocabulary
    )


def dense_builds(
    terms: LossTerms, dtype: str, basis: str, vocab_size: int, *, gradient: str, precision: str = "tf32x3"
) -> Iterator[Build]:
    """The three kernels of a dense tail with 128 coefficients."""
    even = vocab_size % 16 == 0
    variant = dense_variant_of(
        terms, n_slots=K, n_coefs=128, gradient=gradient != "none", in_place=gradient == "in place", codes=True,
        numbers=True, even=even, precision=precision,
    )  # fmt: skip
    for kernel in (mark_rows_kernel, dense_rows_kernel, finish_rows_kernel):
        arguments = variant.of(kernel)
        options = BLOCK_OPTIONS
        if kernel is not dense_rows_kernel:
            arguments, options = arguments | ROW_TILE, ROW_OPTIONS
        yield Build(
            kernel.fn.__name__, tuple(arguments.items()), tuple(options.items()), dtype,
            "none" if kernel is mark_rows_kernel else basis, even, even,
        )  # fmt: skip


def topk_build(dtype: str, vocab_size: int, k: int) -> Build:
    constants = topk_constants(vocab_size, k, TORCH_DTYPES[dtype])
    arguments, options = tuple(constants.items()), tuple(topk_options(constants).items())
    even = vocab_size % 16 == 0
    return Build("topk_with_tail_kernel", arguments, options, dtype, "none", even, even)


def all_topk_builds() -> Iterator[tuple[int, Build]]:
    for vocab_size, dtype in itertools.product((*VOCABULARIES, 50_257, 1000), ELEMENT_BYTES):
        for k in (1, 64, 127, most_topk_entries(vocab_size)):
            yield vocab_size, topk_build(dtype, vocab_size, k)


def most_topk_entries(vocab_size: int) -> int:
    """The largest k that the dispatcher gives to the kernel."""
    return max(k for k in range(1, min(vocab_size, 4096)) if fits_topk(vocab_size, k))


def terms_that_differ() -> Iterator[LossTerms]:
    """Both terms, the KL alone and the cross-entropy alone, at every kind of temperature, for every tail."""
    for tail, temperature in itertools.product(TAILS, TEMPERATURES):
        if tail != "sampled" or temperature == 1:
            yield LossTerms(temperature, 0.7, tail, True, True)
            yield LossTerms(temperature, 1.0, tail, True, False)
    yield LossTerms(1.0, 0.0, "bucket", False, True)


def all_builds() -> Iterator[tuple[int, Build]]:
    """(vocabulary, build) of every vocabulary x dtype x T x tail, and of every option in place."""
    for vocab_size, dtype, terms in itertools.product(VOCABULARIES, ELEMENT_BYTES, terms_that_differ()):
        for gradient in ("in place", "new", "none"):
            yield vocab_size, build(terms, dtype, vocab_size, gradient=gradient, head="codes and numbers")
        for softcap, smoothing in ((30.0, 0.0), (None, 0.1), (30.0, 0.1)):
            extra = dataclasses.replace(terms, softcap=softcap, label_smoothing=smoothing)
            yield vocab_size, build(extra, dtype, vocab_size, gradient="in place", head="codes and numbers")
        for head in ("codes", "floats"):
            yield vocab_size, build(terms, dtype, vocab_size, gradient="in place", head=head)
        for k in (1, 256):
            yield vocab_size, build(terms, dtype, vocab_size, gradient="in place", head="codes and numbers", k=k)
    for dtype, terms in itertools.product(ELEMENT_BYTES, terms_that_differ()):
        for vocab_size, even_rows in ((50_257, False), (50_257, True)):
            yield (
                vocab_size,
                build(terms, dtype, vocab_size, gradient="in place", head="codes and numbers", even_rows=even_rows),
            )
    yield from all_dense_builds()
    yield from all_topk_builds()


def all_dense_builds() -> Iterator[tuple[int, Build]]:
    """Every vocabulary x dtype x T of a dense tail, both terms and the KL alone, and every option at one vocabulary."""
    both = [LossTerms(temperature, 0.7, "dense", True, True) for temperature in TEMPERATURES]
    terms_of_all = [*both, *(dataclasses.replace(terms, alpha=1.0, ce_wanted=False) for terms in both)]
    for vocab_size, dtype, basis, terms in itertools.product(VOCABULARIES, ELEMENT_BYTES, ELEMENT_BYTES, terms_of_all):
        for item in dense_builds(terms, dtype, basis, vocab_size, gradient="in place"):
            yield vocab_size, item
    for dtype, terms in itertools.product(ELEMENT_BYTES, terms_of_all):
        capped = dataclasses.replace(terms, softcap=30.0)
        for item in itertools.chain(
            dense_builds(capped, dtype, "bf16", 128_256, gradient="in place"),
            dense_builds(terms, dtype, "bf16", 128_256, gradient="new"),
            dense_builds(terms, dtype, "bf16", 128_256, gradient="none"),
            dense_builds(terms, dtype, "fp32", 128_256, gradient="in place", precision="tf32"),
        ):
            yield 128_256, item
        for item in dense_builds(terms, dtype, "bf16", 50_257, gradient="in place"):
            yield 50_257, item


def quick_builds() -> Iterator[tuple[int, Build]]:
    """A part of the same: every tail and kind of temperature in place, and one of each other thing."""
    both = [terms for terms in terms_that_differ() if terms.kl_wanted and terms.ce_wanted]
    for terms, dtype in zip(both, itertools.cycle(("bf16", "fp32", "fp16"))):
        yield 128_256, build(terms, dtype, 128_256, gradient="in place", head="codes and numbers")
    most = LossTerms(1.5, 0.7, "uniform", True, True, 0.1, 1e-4, 30.0)
    yield 151_936, build(most, "fp32", 151_936, gradient="in place", head="codes and numbers")
    yield 262_144, build(both[2], "bf16", 262_144, gradient="new", head="floats")
    yield 32_000, build(both[1], "bf16", 32_000, gradient="none", head="codes")
    yield 49_152, build(LossTerms(1.0, 0.0, "bucket", False, True), "bf16", 49_152, gradient="in place", head="codes")
    yield 50_257, build(both[0], "bf16", 50_257, gradient="in place", head="codes", even_rows=False)
    dense = LossTerms(1.5, 0.7, "dense", True, True, softcap=30.0)
    for item in dense_builds(dense, "bf16", "fp32", 128_256, gradient="in place"):
        yield 128_256, item
    for dtype, vocab_size, k in (("bf16", 128_256, 64), ("fp32", 151_936, 127), ("fp32", 32_000, 511)):
        yield vocab_size, topk_build(dtype, vocab_size, k)


def compiled(item: Build) -> dict[str, int]:
    """What the assembler and the SASS say: registers, stack_bytes, local_loads, wide_loads, wide_stores."""
    kernel, constants = KERNELS[item.kernel], dict(item.variant)
    pointers = POINTERS | {
        "logits_ptr": f"*{item.dtype}",
        "work_ptr": f"*{item.dtype}",
        "values_ptr": "*u8" if constants.get("CODES") else "*fp32",
        "basis_ptr": f"*{item.basis}",
        "bias_ptr": f"*{item.basis}",
    }
    even = {"logits_stride": item.even_rows, "work_stride": item.even_rows, "vocab_size": item.even_vocabulary,
            "n_columns": item.even_rows, "n_coefs": True}  # fmt: skip
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = pointers.get(name, "i32" if name in INTEGERS else "fp32")
        if name in pointers or even.get(name, False):
            attributes[(position,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options=dict(item.options),
    )
    return read_cubin(built.asm["cubin"])


def read_cubin(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    return {
        "registers": registers,
        "stack_bytes": stack,
        "local_loads": len(re.findall(r"\bLDL\b", sass)),
        "wide_loads": len(re.findall(r"\bLDG\.[\w.]*128\b", sass)),
        "wide_stores": len(re.findall(r"\bSTG\.[\w.]*128\b", sass)),
    }


def main(which: str, part: str = "1/1") -> None:
    vocabularies: dict[Build, set[int]] = {}
    for vocab_size, item in {"quick": quick_builds, "all": all_builds}[which]():
        vocabularies.setdefault(item, set()).add(vocab_size)
    number, n_parts = map(int, part.split("/"))
    for item, vocab_sizes in list(vocabularies.items())[number - 1 :: n_parts]:
        row = {"vocab_sizes": sorted(vocab_sizes), **dataclasses.asdict(item), "variant": dict(item.variant)}
        row |= compiled(item)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
