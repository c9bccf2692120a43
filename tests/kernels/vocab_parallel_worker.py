"""One of the processes of test_vocab_parallel.py: the loss of its columns against the reference of all columns.

Run with RANK, WORLD_SIZE and the path of a file for the processes to meet at; leaves with 0 if everything is equal.
"""

import itertools
import math
import os
import sys

import pytest
import torch
import torch.distributed as dist
from logitstore_kernels import (
    TeacherBatch,
    topk_with_tail,
    vocab_parallel_distillation_loss,
    vocab_parallel_distillation_loss_parts,
)
from logitstore_kernels.reference import distillation_loss_parts_reference

N, V, K, PADDED = 9, 61, 5, 3
TAILS = ["bucket", "uniform", "renormalised", "dropped", "dense"]
# Where the second shard begins: uneven, one token, and a second shard of nothing but the head's padding.
STARTS = [40, 1, 60, V]


def problem():
    """(logits [N, V + PADDED] float64, teacher with a dense tail, labels [N]) for both processes alike."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    teacher_NV = 3 * draw(N, V)
    teacher_NV[2, 40:] += 30  # all entries in one shard
    teacher = TeacherBatch.from_topk(*topk_with_tail(teacher_NV, K), vocab_size=V)
    teacher = teacher.with_dense_tail(draw(N, 3), draw(V, 3), draw(V))
    labels_N = torch.randint(V, (N,), generator=rng)
    labels_N[4] = -100
    logits_NW = torch.cat([1.5 * (draw(N, V) + teacher_NV / 3), torch.full((N, PADDED), 70.0)], dim=1)
    logits_NW[3, :40] -= 900.0  # one shard far below the other
    logits_NW[4] = math.nan  # a row that does not count
    return logits_NW, teacher, labels_N


def value_and_gradient(loss_function, logits, *args, upstream, **kwargs):
    leaf = logits.clone().requires_grad_()
    parts = loss_function(leaf, *args, **kwargs)
    (parts.loss * upstream).sum().backward()
    return [part.detach() for part in parts], leaf.grad


def check(columns: slice, logits_NW, teacher, labels_N, *, dtype, rtol, atol, tails=TAILS) -> None:
    upstream_N = torch.linspace(-1, 2, N, dtype=torch.float64)
    for tail, temperature, alpha, reduction in itertools.product(
        tails, (1.0, 2.0, 1.5), (0.0, 0.7, 1.0), ("mean", "none")
    ):
        temperature = 1.0 if tail == "sampled" else temperature
        args = (teacher, labels_N, temperature, alpha, tail, -100, reduction)
        upstream = upstream_N if reduction == "none" else 3.0
        expected, gradient_NW = value_and_gradient(
            distillation_loss_parts_reference, logits_NW.to(dtype).double(), *args, upstream=upstream
        )
        got, gradient_NS = value_and_gradient(
            vocab_parallel_distillation_loss_parts, logits_NW[:, columns].to(dtype), *args, upstream=upstream,
            vocab_start=columns.start,
        )  # fmt: skip
        where = f"{tail}, T = {temperature}, alpha {alpha}, {reduction}, {columns}, {dtype}"
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=rtol, atol=atol, msg=lambda m: f"{where}: {m}")  # noqa: B023
        torch.testing.assert_close(
            gradient_NS.double(), gradient_NW[:, columns], rtol=rtol, atol=atol,
            msg=lambda m: f"gradient, {where}: {m}",  # noqa: B023
        )  # fmt: skip
        assert (gradient_NS[4] == 0).all(), where


def check_infinite_logits(columns: slice, teacher, labels_N) -> None:
    """A shard of nothing but -inf in a row: the same value, infinite or not, and a finite gradient."""
    logits_NW, _, _ = problem()
    logits_NW[5, 40:V] = -math.inf
    logits_NW[6, :40] = -math.inf
    logits_NW[7, teacher.ids_NK[7, 0]] = -math.inf
    labels_N = labels_N.clone()
    labels_N[5], labels_N[6], labels_N[7] = 0, 50, int(teacher.ids_NK[7, 1])
    for tail, temperature in itertools.product(TAILS, (1.0, 2.0)):
        args = (teacher, labels_N, temperature, 0.7, tail, -100, "none")
        expected, _ = value_and_gradient(distillation_loss_parts_reference, logits_NW, *args, upstream=1.0)
        got, gradient_NS = value_and_gradient(
            vocab_parallel_distillation_loss_parts, logits_NW[:, columns], *args, upstream=1.0,
            vocab_start=columns.start,
        )  # fmt: skip
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12, msg=lambda m: f"{tail}: {m}")  # noqa: B023
        assert gradient_NS.isfinite().all(), tail


def check_refusals(columns: slice, logits_NW, teacher, labels_N) -> None:
    logits_NS = logits_NW[:, columns]
    bad_calls = [
        (
            (logits_NS.numpy(), teacher, labels_N),
            {},
            TypeError,
            "student_logits_NS must be a torch.Tensor, got ndarray",
        ),
        ((logits_NS.long(), teacher, labels_N), {}, TypeError, "student_logits_NS must be of a float dtype"),
        ((logits_NS[None], teacher, labels_N), {}, ValueError, r"student_logits_NS must be \[N, S\], got shape \(1, 9"),
        ((logits_NS, None, labels_N), {}, TypeError, "the teacher must be a TeacherBatch, got NoneType"),
        ((logits_NS, teacher, labels_N), {"vocab_start": -1}, ValueError, "the shard's first column, got -1"),
        ((logits_NS, teacher, labels_N), {"vocab_start": 1.0}, TypeError, "vocab_start must be an int, got float"),
        ((logits_NS, teacher, labels_N), {"temperature": 0.0}, ValueError, "temperature must be positive"),
        # Every process gets as far as this one, so that none is left waiting.
        (
            (logits_NS, teacher, labels_N),
            {"vocab_start": 0},
            ValueError,
            "vocabulary of 61, but they have 40 \\+ 24 of",
        ),
    ]
    for args, kwargs, error, message in bad_calls:
        with pytest.raises(error, match=message):
            vocab_parallel_distillation_loss(*args, **({"vocab_start": columns.start} | kwargs))


def main(meeting_file: str) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=world_size)
    logits_NW, teacher, labels_N = problem()
    shards = [(slice(0, start), slice(start, V + PADDED))[rank] for start in STARTS]
    for columns in shards:
        check(columns, logits_NW, teacher, labels_N, dtype=torch.float64, rtol=1e-11, atol=1e-12)
    check(shards[0], logits_NW, teacher, labels_N, dtype=torch.float32, rtol=2e-5, atol=2e-6)
    samples = TeacherBatch.from_samples(teacher.ids_NK, teacher.logprobs_NK, vocab_size=V)
    check(shards[0], logits_NW, samples, labels_N, dtype=torch.float64, rtol=1e-11, atol=1e-12, tails=["sampled"])
    check_infinite_logits(shards[0], teacher, labels_N)
    check_refusals(shards[0], logits_NW, teacher, labels_N)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
