"""The checks that precede every measurement: values and gradients on the device against the float64 reference.

The budget is that of the tests: twice the error of plain PyTorch in the same dtype (plus a few float32 roundings).
Sizes are small in rows and wide enough for whole tiles beside a masked one, so that the variants that are checked are
those of large vocabularies.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gpu_parts.inputs import Inputs, coded_teacher, normal, truth, value_and_gradient, with_random_tail
from gpu_parts.log import Job, NotMeasured, RowLog
from logitstore_kernels import (
    TeacherBatch,
    distillation_loss,
    fused_linear_distillation_loss,
    topk_with_tail,
)
from logitstore_kernels.dispatch import why_not_the_kernel
from logitstore_kernels.loss_terms import LossTerms
from torch import Tensor

TAILS = ("bucket", "uniform", "renormalised", "dropped", "sampled", "dense")
TEMPERATURES = (1.0, 2.0, 1.5)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRADIENTS = ("in place", "new", "none")
HEADS = ("codes and numbers", "codes", "floats")
_FLOOR = 3e-6


@dataclass(frozen=True)
class Variant:
    """What a call can ask for that makes another kernel."""

    tail: str
    temperature: float
    dtype: torch.dtype
    alpha: float = 0.7
    gradient: str = "in place"
    head: str = "codes and numbers"
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    k: int = 64
    vocab_size: int = 20_016
    columns: int = 20_016

    def what(self) -> dict[str, object]:
        return vars(self) | {"dtype": str(self.dtype).removeprefix("torch.")}


def variants() -> list[Variant]:
    """Every reachable variant once, those that are measured first."""
    found = [Variant("bucket", T, torch.bfloat16, gradient=g) for T in TEMPERATURES for g in ("in place", "new")]
    found += [Variant("bucket", 1.0, torch.bfloat16, alpha=0.0), Variant("dense", 1.0, torch.bfloat16)]
    return list(dict.fromkeys([*found, *_all_variants()]))


def dry_variants() -> list[Variant]:
    """One of every kind, for the interpreter."""
    few = [Variant(tail, 1.0 if tail == "sampled" else T, dtype, gradient=g, head=h) for tail, T, dtype, g, h in zip(
        TAILS, itertools.cycle(TEMPERATURES), itertools.cycle(DTYPES), itertools.cycle(GRADIENTS),
        itertools.cycle(HEADS), strict=False)]  # fmt: skip
    few += [Variant("bucket", 2.0, torch.float32, softcap=9.0, label_smoothing=0.1, z_loss=1e-3, columns=20_019)]
    return [_narrow(variant) for variant in few]


def _narrow(variant: Variant) -> Variant:
    width = 208 if variant.tail == "dense" else 1040
    return Variant(**vars(variant) | {"vocab_size": width, "columns": width + variant.columns - 20_016, "k": 8})


def _all_variants() -> Iterator[Variant]:
    for tail, T, dtype in itertools.product(TAILS, TEMPERATURES, DTYPES):
        if tail == "sampled" and T != 1:
            continue
        yield from (Variant(tail, T, dtype, gradient=gradient) for gradient in GRADIENTS)
        yield Variant(tail, T, dtype, alpha=1.0)
        yield Variant(tail, T, dtype, softcap=9.0)
        if tail != "dense":
            yield Variant(tail, T, dtype, softcap=9.0, label_smoothing=0.1, z_loss=1e-3)
            yield Variant(tail, T, dtype, label_smoothing=0.1)
        yield from (Variant(tail, T, dtype, head=head) for head in HEADS[1:] if tail != "sampled")
        yield Variant(tail, T, dtype, k=1)
        yield Variant(tail, T, dtype, vocab_size=20_003, columns=20_003)
    yield from (Variant("bucket", 1.0, dtype, alpha=0.0, gradient=g) for dtype in DTYPES for g in GRADIENTS)


def check_jobs(log: RowLog, *, dry: bool) -> list[Job]:
    """One job a variant, and one each for what is not a variant of the loss."""
    found = dry_variants() if dry else variants()
    jobs = [Job(v.what(), lambda v=v: _check(log, v.what(), lambda: check_variant(v, log.device))) for v in found]
    others = {"topk_with_tail": check_topk, "fused linear": check_linear, "CUDA graph": check_graph}
    extra = [Job({"check": name}, lambda name=name, call=call: _check(log, {"check": name}, lambda: call(log.device)))
             for name, call in others.items()]  # fmt: skip
    return [*jobs[:8], *extra, *jobs[8:]]


def n_first_checks(*, dry: bool) -> int:
    """How many of the jobs come before all others, in the process of the suite: what is measured, and the extras."""
    return 8 if dry else 11


def _check(log: RowLog, what: dict[str, object], call) -> None:
    log.add("check", what, "checked", **call())


def check_variant(variant: Variant, device: torch.device) -> dict[str, float]:
    """The errors of one variant; raises NotMeasured("wrong") where they are above the budget."""
    logits_NW, teacher, labels_N = _problem(variant, device)
    extra = {name: getattr(variant, name) for name in ("label_smoothing", "z_loss", "softcap")}
    wanted = variant.alpha > 0, variant.alpha < 1
    refusal = why_not_the_kernel(
        logits_NW, teacher, LossTerms(variant.temperature, variant.alpha, variant.tail, *wanted, **extra)
    )
    if refusal is not None:
        raise NotMeasured("wrong", f"the kernel does not take it: {refusal}")
    args = (teacher, labels_N, variant.temperature, variant.alpha, variant.tail)
    exact_N, exact_gradient = truth(logits_NW, torch.float64, *args, **extra)
    plain_N, plain_gradient = truth(logits_NW, logits_NW.dtype, *args, **extra)
    if variant.gradient == "none":
        with torch.no_grad():
            loss_N = distillation_loss(logits_NW, *args, reduction="none", **extra)
        return {"value_error": within_budget("value", loss_N, plain_N, exact_N)}
    leaf = logits_NW.clone().requires_grad_()
    options = {"reduction": "sum", "inplace": variant.gradient == "in place", **extra}
    loss, gradient = value_and_gradient(distillation_loss, leaf, *args, **options)
    if (gradient[-1] != 0).any():
        raise NotMeasured("wrong", "an ignored row has a gradient that is not 0")
    return {
        "value_error": within_budget("value", loss, plain_N.sum(), exact_N.sum()),
        "gradient_error": within_budget("gradient", gradient, plain_gradient, exact_gradient),
    }


def _problem(variant: Variant, device: torch.device) -> tuple[Tensor, TeacherBatch, Tensor]:
    """5 rows (3 by the interpreter), of which the last is ignored."""
    n_rows = 3 if device.type == "cpu" else 5
    generator = torch.Generator(device).manual_seed(1)
    logits_NW = normal(n_rows, variant.columns, variant.dtype, generator)
    teacher_NV = normal(n_rows, variant.vocab_size, torch.float32, generator)
    labels_N = torch.randint(variant.vocab_size, (n_rows,), generator=generator, device=device)
    labels_N[-1] = -100
    if variant.tail == "sampled":
        kept = topk_with_tail(teacher_NV, variant.k)
        return logits_NW, TeacherBatch.from_samples(*kept[:2], vocab_size=variant.vocab_size), labels_N
    teacher = coded_teacher(teacher_NV, variant.k, numbers=variant.head == "codes and numbers")
    if variant.head == "floats":
        teacher = TeacherBatch.from_topk(*topk_with_tail(teacher_NV, variant.k), vocab_size=variant.vocab_size)
    if variant.tail == "dense":
        teacher = with_random_tail(teacher, 16 if device.type == "cpu" else 128, torch.bfloat16)
    return logits_NW, teacher, labels_N


def within_budget(name: str, got: Tensor, plain: Tensor, exact: Tensor) -> float:
    """The largest error; raises where it is above twice that of plain PyTorch.

    The interpreter truncates to bfloat16, where a device rounds.
    """
    truncates = got.device.type == "cpu" and got.dtype == torch.bfloat16
    size = float(exact.abs().max())
    error, budget = (float((x.double() - exact).abs().max()) for x in (got, plain))
    budget = 2 * budget + _FLOOR * max(size, 1.0) + (2**-7 * size if truncates else 0.0)
    if not error <= budget:
        raise NotMeasured("wrong", f"{name} is off by {error:.3g}, allowed {budget:.3g}", error=error, budget=budget)
    return error


def check_topk(device: torch.device) -> dict[str, float]:
    """Log-probs and both moments of topk_with_tail against float64; the k largest, each once."""
    vocab_size = 20_016 if device.type == "cuda" else 2003
    logits_NV = normal(3, vocab_size, torch.bfloat16, torch.Generator(device).manual_seed(2))
    kept = topk_with_tail(logits_NV, 64)
    logp_NV = logits_NV.double().log_softmax(dim=1)
    tail_NV = logp_NV.scatter(1, kept.ids_NK.long(), -torch.inf)
    exact = (logp_NV.topk(64, dim=1).values, tail_NV.logsumexp(dim=1), (tail_NV / 2).logsumexp(dim=1))
    errors = [float((got.double() - want).abs().max()) for got, want in zip(kept[1:], exact, strict=True)]
    chosen_NK = logp_NV.gather(1, kept.ids_NK.long())
    if not max(errors) <= 1e-5 or not torch.equal(chosen_NK, exact[0]):
        raise NotMeasured("wrong", f"errors of log-probs, mass and half moment: {errors}")
    return dict(zip(("logps_error", "mass_error", "half_error"), errors, strict=True))


def check_linear(device: torch.device) -> dict[str, float]:
    """The loss through a head: value and both gradients against float64 of the same bfloat16 tensors."""
    n_rows, width, vocab_size = (300, 64, 4096) if device.type == "cuda" else (5, 8, 272)
    inputs = Inputs.seeded(n_rows, vocab_size, torch.bfloat16, device)
    generator = torch.Generator(device).manual_seed(3)
    hidden_ND, weight_VD = (normal(n, width, torch.bfloat16, generator) / 3 for n in (n_rows, vocab_size))

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (hidden_ND, weight_VD)]
        loss = fused_linear_distillation_loss(
            *leaves, inputs.teacher, inputs.labels_N, reduction="sum", chunk_rows=n_rows // 2
        )  # two chunks or three, whose gradients of the weight add up
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    errors = [float((got.double() - exact).norm() / exact.norm()) for got, exact in
              zip(run(torch.bfloat16), run(torch.float64), strict=True)]  # fmt: skip
    # Logits and gradients of [N, V] are rounded to bfloat16, 2^-9 each; the interpreter truncates, twice that.
    if not max(errors) <= 2e-2:
        raise NotMeasured("wrong", f"relative errors of value, gradients of hidden and weight: {errors}")
    return dict(zip(("value_error", "hidden_error", "weight_error"), errors, strict=True))


def check_graph(device: torch.device) -> dict[str, bool]:
    """A call that is captured as a CUDA graph and replayed gives bit for bit what a call gives, twice."""
    if device.type != "cuda":
        raise NotMeasured("skipped", "CUDA graphs are for CUDA")
    inputs = Inputs.seeded(64, 4096, torch.bfloat16, device)
    args = (inputs.teacher, inputs.labels_N)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        expected = [x.clone() for x in value_and_gradient(distillation_loss, inputs.logits_NV, *args)]
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = value_and_gradient(distillation_loss, inputs.logits_NV, *args)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize(device)
        if not all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)):
            raise NotMeasured("wrong", "a replayed graph differs from the call that it was captured from")
    return {"bitwise": True}
