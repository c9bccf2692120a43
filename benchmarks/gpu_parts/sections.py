"""The sections of the suite in their order, with their budgets of time.

GB/s and shares of the copy bandwidth count by hand what a loss must move: each logit read once, each gradient written
once, and the teacher's 5 bytes an entry; whatever it really moves. Letters: N rows, D width, V vocabulary, r
coefficients. T is the temperature.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from gpu_parts import rivals
from gpu_parts.check_workers import run_workers
from gpu_parts.checks import check_jobs, n_first_checks
from gpu_parts.goals import add_goals
from gpu_parts.inputs import (
    ALPHA,
    Inputs,
    edge_rows,
    normal,
    relative_error,
    some_rows,
    truth,
    value_and_gradient,
    with_random_tail,
)
from gpu_parts.log import Job, NotMeasured, RowLog, run_section
from gpu_parts.timing import interleaved_ms, peak_extra_bytes, quantiles
from logitstore_kernels import TeacherBatch, distillation_loss, fused_linear_distillation_loss, topk_with_tail
from torch import Tensor

TEMPERATURES = (1.0, 2.0, 1.5)
MAX_GRADIENT_ERROR = 1e-2  # of bfloat16, relative to float64; above it something is wrong, whatever the goal is
OURS, OURS_NEW, CE_ONLY = "ours, in place", "ours", "ours, cross-entropy alone, in place"


class Sizes:
    """(N, V) of the grids, the rows of the comparison with PyTorch, (N, D, V) of heads, ranks, and calls timed."""

    def __init__(self, *, dry: bool) -> None:
        rows, vocabularies = ((8192, 4096, 16384), (128_256, 151_936, 32_000)) if not dry else ((3,), (272,))
        self.grid = [(n, v) for v in vocabularies for n in rows]
        self.plain = [(rows[0], v) for v in vocabularies]
        self.heads = [(4096, 4096, 128_256), (8192, 1024, 128_256)] if not dry else [(5, 8, 272)]
        self.dense = (8192, 128_256) if not dry else (3, 208)
        self.ranks = (128, 256, 576) if not dry else (16,)
        self.copy_bytes = 2 << 30 if not dry else 1 << 20
        self.rounds = 15 if not dry else 1


def run_all(log: RowLog, *, dry: bool) -> None:
    """Every section: ceilings, checks, losses from logits, from a head, with a dense tail, the reduction, the goals."""
    sizes = Sizes(dry=dry)
    slack = 20 if dry else 1  # whoever interprets shares a busy machine, and wants every line run
    run_section(log, "ceilings", slack * 20, [Job({"what": what}, lambda call=call: call(log, sizes))
                                      for what, call in (("copy", _copy), ("matrix product", _gemm))])  # fmt: skip
    run_section(log, "check", slack * 60, check_jobs(log, dry=dry)[: n_first_checks(dry=dry)])
    run_workers(log, 1 if dry else max(1, min(8, (os.cpu_count() or 2) // 2)), slack * 100, dry=dry)
    bench = Bench(log, sizes)
    grid = [({"n_rows": n, "vocab_size": v, "temperature": T}) for n, v in sizes.grid for T in TEMPERATURES]
    run_section(log, "logits in", slack * 110, [Job(what, lambda what=what: bench.logits_in(**what)) for what in grid])
    plain = [({"n_rows": n, "vocab_size": v, "temperature": T}) for n, v in sizes.plain for T in TEMPERATURES]
    run_section(log, "beside PyTorch", slack * 80, [Job(what, lambda what=what: bench.beside_pytorch(dry=dry, **what))
                                            for what in plain])  # fmt: skip
    run_section(log, "through a head", slack * 40, [Job({"n_rows": n, "width": d, "vocab_size": v},
                                                lambda n=n, d=d, v=v: bench.through_a_head(n, d, v))
                                            for n, d, v in sizes.heads])  # fmt: skip
    n, v = sizes.dense
    dense = [({"n_rows": n, "vocab_size": v, "rank": r, "temperature": T}) for r in sizes.ranks for T in (1.0, 2.0)]
    run_section(
        log, "dense tail", slack * 30, [Job(what, lambda what=what: bench.dense_tail(**what)) for what in dense]
    )
    top_k = [Job({"n_rows": n, "vocab_size": v}, lambda n=n, v=v: bench.top_k(n, v)) for n, v in sizes.plain]
    run_section(log, "top-k with tail", slack * 15, top_k)
    add_goals(log)


def run_checks(log: RowLog, part: int, n_parts: int, *, dry: bool) -> None:
    """One worker's part of the checks that are not the first."""
    run_section(log, "check", float("inf"), check_jobs(log, dry=dry)[n_first_checks(dry=dry) :][part - 1 :: n_parts])


def _copy(log: RowLog, sizes: Sizes) -> None:
    """Bytes a second of one tensor copied onto another, read and written."""
    source, target = (torch.ones(sizes.copy_bytes // 2, dtype=torch.bfloat16, device=log.device) for _ in range(2))
    times = interleaved_ms({"copy": lambda: target.copy_(source)}, lambda: None, log.device, rounds=sizes.rounds)
    found = quantiles(times["copy"])
    n_bytes = 2 * source.nbytes
    log.add("ceilings", {"what": "copy"}, "measured", bytes=n_bytes, gb_per_s=n_bytes / found["p50_ms"] / 1e6, **found)


def _gemm(log: RowLog, sizes: Sizes) -> None:
    """Floating-point operations a second of a bfloat16 product of random matrices as wide as a head."""
    n, d, v = sizes.heads[0]
    generator = torch.Generator(log.device).manual_seed(0)
    a, b = normal(n, d, torch.bfloat16, generator), normal(v, d, torch.bfloat16, generator)
    out = torch.empty(n, v, dtype=torch.bfloat16, device=log.device)
    calls = {"gemm": lambda: torch.mm(a, b.T, out=out)}
    found = quantiles(interleaved_ms(calls, lambda: None, log.device, rounds=sizes.rounds)["gemm"])
    log.add("ceilings", {"what": "matrix product", "n_rows": n, "width": d, "vocab_size": v}, "measured",
            tflop_per_s=2 * n * d * v / found["p50_ms"] / 1e9, **found)  # fmt: skip


@lru_cache(maxsize=1)
def _inputs(n_rows: int, vocab_size: int, device: torch.device) -> Inputs:
    """One size at a time: temperatures of one size share it."""
    return Inputs.seeded(n_rows, vocab_size, torch.bfloat16, device)


class Bench:
    """The measurements of a run."""

    def __init__(self, log: RowLog, sizes: Sizes) -> None:
        self.log, self.sizes, self.device = log, sizes, log.device
        copy = [row for row in log.rows if row.get("what") == "copy" and row["status"] == "measured"]
        self.copy_gb_per_s = copy[0]["gb_per_s"] if copy else None

    def inputs(self, n_rows: int, vocab_size: int) -> Inputs:
        return _inputs(n_rows, vocab_size, self.device)

    def logits_in(self, n_rows: int, vocab_size: int, temperature: float) -> None:
        """Ours in place, not in place and with hard labels alone, beside what reads the same logits."""
        inputs = self.inputs(n_rows, vocab_size)
        z = inputs.logits_NV
        calls = {
            OURS: lambda: ours(inputs, z, temperature, inplace=True),
            OURS_NEW: lambda: ours(inputs, z, temperature),
            CE_ONLY: lambda: ours(inputs, z, temperature, alpha=0.0, inplace=True),
            "Liger cross-entropy": lambda: value_and_gradient(rivals.liger_cross_entropy, z, inputs, temperature),
            "Liger JSD": lambda: value_and_gradient(rivals.liger_jsd, z, inputs, temperature),
            "seed loop": lambda: value_and_gradient(rivals.seed_loop, z, inputs, temperature),
        }
        what = {"n_rows": n_rows, "vocab_size": vocab_size, "temperature": temperature, "dtype": "bfloat16"}
        checks = {name: lambda got, a=a: gradient_error(inputs, temperature, got, alpha=a)
                  for name, a in ((OURS, ALPHA), (OURS_NEW, ALPHA), (CE_ONLY, 0.0))}  # fmt: skip
        self.group("logits in", what | {"tail": "bucket"}, calls, checks, inputs)

    def beside_pytorch(self, n_rows: int, vocab_size: int, temperature: float, *, dry: bool) -> None:
        """The same loss by PyTorch, eager and compiled."""
        inputs = self.inputs(n_rows, vocab_size)
        z, compiled = inputs.logits_NV, rivals.compiled_pytorch(dry=dry)
        calls = {
            OURS: lambda: ours(inputs, z, temperature, inplace=True),
            "eager": lambda: value_and_gradient(rivals.plain_pytorch, z, inputs, temperature),
            "compiled": lambda: value_and_gradient(compiled, z, inputs, temperature),
        }
        what = {"n_rows": n_rows, "vocab_size": vocab_size, "temperature": temperature, "dtype": "bfloat16"}
        checks = {name: lambda got: gradient_error(inputs, temperature, got) for name in calls}
        self.group("beside PyTorch", what | {"tail": "bucket"}, calls, checks, inputs)

    def dense_tail(self, n_rows: int, vocab_size: int, rank: int, temperature: float) -> None:
        """A tail with a shape beside the bucket tail, the same batch."""
        inputs = self.inputs(n_rows, vocab_size)
        dense = replace(inputs, teacher=with_random_tail(inputs.teacher, rank, torch.bfloat16))
        z = inputs.logits_NV
        what = {
            "n_rows": n_rows,
            "vocab_size": vocab_size,
            "temperature": temperature,
            "dtype": "bfloat16",
            "rank": rank,
        }
        calls = {
            "dense": lambda: ours(dense, z, temperature, tail="dense", inplace=True),
            "bucket": lambda: ours(inputs, z, temperature, inplace=True),
        }
        checks = {
            "dense": lambda got: gradient_error(dense, temperature, got, tail="dense"),
            "bucket": lambda got: gradient_error(inputs, temperature, got),
        }
        self.group("dense tail", what, calls, checks, inputs)

    def top_k(self, n_rows: int, vocab_size: int) -> None:
        """The reduction of a teacher's logits, beside torch.topk alone."""
        teacher_NV = self.inputs(n_rows, vocab_size).teacher_logits_NV
        calls = {"ours": lambda: topk_with_tail(teacher_NV, 64), "torch.topk alone": lambda: teacher_NV.topk(64, dim=1)}
        what = {"n_rows": n_rows, "vocab_size": vocab_size, "dtype": "bfloat16", "k": 64}
        self.group("top-k with tail", what, calls, {}, None, n_bytes=teacher_NV.nbytes + n_rows * (64 * 8 + 8))

    def through_a_head(self, n_rows: int, width: int, vocab_size: int) -> None:
        """From hidden states and the head, gradients of both, beside the three matrix products alone."""
        _inputs.cache_clear()
        generator = torch.Generator(self.device).manual_seed(0)
        hidden_ND = normal(n_rows, width, torch.bfloat16, generator).mul_(width**-0.5).requires_grad_()
        weight_VD = normal(vocab_size, width, torch.bfloat16, generator).div_(3).requires_grad_()
        inputs = Inputs.seeded(n_rows, vocab_size, torch.bfloat16, self.device)
        products = three_products(hidden_ND.detach(), weight_VD.detach(), inputs.drawn_NV)
        labels_N, teacher = inputs.labels_N, inputs.teacher
        theirs = tuple(x.detach() for x in (hidden_ND.flip(0), weight_VD))
        leaves = (hidden_ND, weight_VD)
        calls: dict[str, Callable[[], Any]] = {"three products": products}
        for T in TEMPERATURES[:2]:
            calls[f"ours, T = {T:g}"] = lambda T=T: gradients_of(
                fused_linear_distillation_loss, leaves, teacher, labels_N, temperature=T, alpha=ALPHA
            )
        calls["Liger fused linear cross-entropy"] = lambda: gradients_of(
            rivals.liger_linear_cross_entropy, leaves, labels_N
        )
        calls["Liger fused linear JSD"] = lambda: gradients_of(rivals.liger_linear_jsd, leaves, theirs)
        what = {"n_rows": n_rows, "width": width, "vocab_size": vocab_size, "dtype": "bfloat16", "tail": "bucket"}
        checks = {f"ours, T = {T:g}": lambda got, T=T: {
            "gradient_error": hidden_gradient_error(leaves, teacher, labels_N, T, got[0])}
            for T in TEMPERATURES[:2]}  # fmt: skip
        self.group("through a head", what, calls, checks, None, rounds=min(self.sizes.rounds, 8))

    def group(
        self,
        section: str,
        what: dict[str, Any],
        calls: dict[str, Callable[[], Any]],
        checks: dict[str, Callable[[Any], dict[str, float]]],
        inputs: Inputs | None,
        *,
        n_bytes: int | None = None,
        rounds: int | None = None,
    ) -> None:
        """Every call once, checked and with its memory counted; those that came through, timed in turn."""
        restore = inputs.restore if inputs is not None else lambda: None
        if inputs is not None:
            n_bytes = 2 * inputs.drawn_NV.nbytes + 5 * inputs.teacher.ids_NK.numel()
        ready = {}
        for name, call in calls.items():
            found = self.log.attempt(
                section,
                what | {"loss": name},
                lambda: self.once(call, checks.get(name), restore),  # noqa: B023
            )
            if found is not None:
                ready[name] = found
        times = interleaved_ms({name: calls[name] for name in ready}, restore, self.device,
                               rounds=rounds or self.sizes.rounds)  # fmt: skip
        for name, found in ready.items():
            values = quantiles(times[name]) | found
            if n_bytes is not None:
                gb_per_s = n_bytes / values["p50_ms"] / 1e6
                values |= {"bytes": n_bytes, "gb_per_s": gb_per_s}
                values["share_of_copy"] = gb_per_s / self.copy_gb_per_s if self.copy_gb_per_s else None
            self.log.add(section, what | {"loss": name}, "measured", **values)

    def once(self, call: Callable[[], Any], check: Callable[[Any], dict] | None, restore: Callable) -> dict[str, Any]:
        """extra_peak_bytes of a second call (the first compiles) and what the check finds; raises where it fails."""
        restore()
        got = call()
        found = check(got) if check is not None else {}
        if not found.get("gradient_error", 0.0) <= MAX_GRADIENT_ERROR:
            raise NotMeasured("wrong", f"gradients are off by {found['gradient_error']:.3g} of their size", **found)
        del got
        restore()
        return found | {"extra_peak_bytes": peak_extra_bytes(call, self.device)}


def ours(
    inputs: Inputs, logits_NV: Tensor, temperature: float, *, alpha: float = ALPHA, tail: str = "bucket",
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return value_and_gradient(
        distillation_loss, logits_NV, inputs.teacher, inputs.labels_N, temperature, alpha, tail, inplace=inplace
    )


def gradient_error(
    inputs: Inputs, temperature: float, got: tuple[Tensor, Tensor], *, alpha: float = ALPHA, tail: str = "bucket"
) -> dict[str, float]:
    """Relative error of the gradient's first and last 8 rows against float64; got is a mean's over all rows."""
    n_rows = len(inputs.labels_N)
    rows = edge_rows(n_rows).to(inputs.labels_N.device)
    few = (some_rows(inputs.teacher, rows), inputs.labels_N[rows], temperature, alpha, tail)
    _, exact = truth(inputs.drawn_NV[rows], torch.float64, *few)
    return {"gradient_error": relative_error(got[1][rows].double() * n_rows, exact)}


def gradients_of(loss_function: Callable[..., Tensor], leaves: tuple[Tensor, Tensor], *args, **kwargs) -> tuple:
    return torch.autograd.grad(loss_function(*leaves, *args, **kwargs), leaves)


def hidden_gradient_error(
    leaves: tuple[Tensor, Tensor], teacher: TeacherBatch, labels_N: Tensor, temperature: float, got_ND: Tensor
) -> float:
    """Relative error of the first and last 8 rows of the hidden states' gradient against float64."""
    hidden_ND, weight_VD = (leaf.detach() for leaf in leaves)
    n_rows = len(hidden_ND)
    rows = edge_rows(n_rows).to(hidden_ND.device)
    # Logits are rounded to bfloat16 as a Linear's are; what is asked is what the loss adds to that.
    logits_NV = hidden_ND[rows] @ weight_VD.T
    _, exact_NV = truth(
        logits_NV, torch.float64, some_rows(teacher, rows), labels_N[rows], temperature, ALPHA, "bucket"
    )
    return relative_error(got_ND[rows].double() * n_rows, exact_NV @ weight_VD.double())


def three_products(hidden_ND: Tensor, weight_VD: Tensor, gradient_NV: Tensor) -> Callable[[], None]:
    """The matrix products that a head's forward and backward need, into tensors that are there already."""
    logits_NV = torch.empty_like(gradient_NV)
    grad_hidden_ND, grad_weight_VD = torch.empty_like(hidden_ND), torch.empty_like(weight_VD)

    def run() -> None:
        torch.mm(hidden_ND, weight_VD.T, out=logits_NV)
        torch.mm(gradient_NV, weight_VD, out=grad_hidden_ND)
        torch.mm(gradient_NV.T, hidden_ND, out=grad_weight_VD)

    return run
