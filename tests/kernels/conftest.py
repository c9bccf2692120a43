"""Random teachers and students for the loss tests, and the loss worked out row by row in numpy float64."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from logitstore_kernels import TeacherBatch, topk_with_tail
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One problem: student and teacher logits [N, V] float64, what a batch keeps of the latter, labels [N].

    The batch's dense tail has a random shape: it is the teacher's in mass alone.
    """

    logits_NV: Tensor
    teacher_logits_NV: Tensor
    teacher: TeacherBatch
    labels_N: Tensor

    def leaf(self, dtype: torch.dtype) -> Tensor:
        return self.logits_NV.to(dtype).clone().requires_grad_()

    def with_ignored(self, *rows: int) -> "Case":
        labels_N = self.labels_N.clone()
        labels_N[list(rows)] = -100
        return replace(self, labels_N=labels_N)


def make_case(n: int, v: int, k: int, *, seed: int = 0, spread: float = 3.0) -> Case:
    rng = torch.Generator().manual_seed(seed)
    student_NV = torch.randn(n, v, generator=rng, dtype=torch.float64) * spread
    teacher_NV = torch.randn(n, v, generator=rng, dtype=torch.float64) * spread
    # Half of the student agrees with the teacher, as one that has learned something does.
    student_NV = 0.5 * (student_NV + teacher_NV)
    labels_N = torch.randint(0, v, (n,), generator=rng)
    teacher = teacher_of(teacher_NV, k).with_dense_tail(*random_shape(n, v, seed=seed, spread=spread))
    return Case(student_NV, teacher_NV, teacher, labels_N)


def random_shape(n: int, v: int, *, r: int = 3, seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """(coefs_Nr, basis_Vr, bias_V) of tails that have nothing to do with a teacher's, float64."""
    rng = torch.Generator().manual_seed(seed + 1)
    shapes = ((n, r), (v, r), (v,))
    coefs_Nr, basis_Vr, bias_V = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    return coefs_Nr * spread / r**0.5, basis_Vr, bias_V * spread


def teacher_of(teacher_logits_NV: Tensor, k: int) -> TeacherBatch:
    kept = topk_with_tail(teacher_logits_NV, k)
    return TeacherBatch.from_topk(*kept, vocab_size=teacher_logits_NV.shape[1])


def _logsumexp(x: np.ndarray) -> float:
    peak = x.max(initial=-np.inf)
    return peak if np.isneginf(peak) else float(peak + np.log(np.exp(x - peak).sum()))


def kl_row_by_hand(z_V: np.ndarray, teacher: TeacherBatch, row: int, temperature: float, tail: str) -> float:
    """KL of one row at T in nats from the definitions, in numpy float64; the student must be finite."""
    ids = teacher.ids_NK[row].numpy()
    entry = ids >= 0
    ids, logp = ids[entry], teacher.logprobs_NK[row].numpy().astype(np.float64)[entry]
    v, n_tail, beta = teacher.vocab_size, teacher.vocab_size - len(ids), 1 / temperature
    mass = float(teacher.tail_logmass_N[row])
    half = mass if teacher.tail_logmoment_half_N is None else float(teacher.tail_logmoment_half_N[row])
    head = logp - _logsumexp(logp) + np.log1p(-np.exp(mass))
    if np.isneginf(mass):
        rho = -np.inf
    elif temperature == 1:
        rho = mass
    else:
        rho = float(np.interp(beta, [0, 0.5, 1], [math.log(n_tail), half, mass]))
        if beta > 1:
            rho = half + (beta - 0.5) * (mass - half) / 0.5
    if tail == "renormalised":
        rho = -np.inf
    weights = head * beta - _logsumexp(np.append(head * beta, rho))
    rho_normalised = rho - _logsumexp(np.append(head * beta, rho))
    logq_V = z_V / temperature - _logsumexp(z_V / temperature)
    kl = float((np.exp(weights) * (weights - logq_V[ids])).sum())
    if tail in ("renormalised", "dropped") or np.isneginf(rho):
        return kl
    others = np.setdiff1d(np.arange(v), ids)
    t_tail = math.exp(rho_normalised)
    if tail == "bucket":
        return kl + t_tail * (rho_normalised - _logsumexp(logq_V[others]))
    if tail == "dense":
        dense = teacher.dense_tail
        shape = dense.basis_Vr[others].double().numpy() @ dense.coefs_Nr[row].double().numpy()
        shape = (shape + dense.bias_V[others].double().numpy()) / temperature
        logt = rho_normalised + shape - _logsumexp(shape)
        return kl + float((np.exp(logt) * (logt - logq_V[others])).sum())
    share = t_tail / n_tail
    return kl + float((share * (math.log(share) - logq_V[others])).sum())


def loss_rows_by_hand(case: Case, temperature: float, alpha: float, tail: str) -> np.ndarray:
    """alpha * T^2 * KL + (1 - alpha) * CE of each row [N], 0 where the label is -100 or the teacher row absent."""
    rows = []
    for row, label in enumerate(case.labels_N.tolist()):
        z_V = case.logits_NV[row].numpy()
        if label == -100 or bool((case.teacher.ids_NK[row] < 0).all()):
            rows.append(0.0)
            continue
        kl = kl_row_by_hand(z_V, case.teacher, row, temperature, tail)
        ce = _logsumexp(z_V) - z_V[label]
        rows.append(alpha * temperature**2 * kl + (1 - alpha) * ce)
    return np.array(rows)


@pytest.fixture(scope="session")
def case_factory():
    return make_case


@pytest.fixture(scope="session")
def shape_factory():
    return random_shape


@pytest.fixture(scope="session")
def teacher_from_logits():
    return teacher_of


@pytest.fixture(scope="session")
def by_hand():
    return loss_rows_by_hand


def dense_logprobs_of(teacher: TeacherBatch, temperature: float) -> Tensor:
    """[N, V] float64: the batch's distribution at T with a uniform tail, from float64 arithmetic of its own."""
    n, v = teacher.n_rows, teacher.vocab_size
    out = np.zeros((n, v))
    for row in range(n):
        ids = teacher.ids_NK[row].numpy()
        logp = teacher.logprobs_NK[row].numpy().astype(np.float64)
        mass, half = float(teacher.tail_logmass_N[row]), float(teacher.tail_logmoment_half_N[row])
        head = (logp - _logsumexp(logp) + np.log1p(-np.exp(mass))) / temperature
        log_n, beta = math.log(v - len(ids)), 1 / temperature
        rho = half + (2 * beta - 1) * (mass - half) if beta > 0.5 else log_n + 2 * beta * (half - log_n)
        out[row] = rho - log_n
        out[row, ids] = head
        out[row] -= _logsumexp(np.append(head, rho))
    return torch.from_numpy(out)


@pytest.fixture(scope="session")
def dense_logprobs():
    return dense_logprobs_of


def value_and_gradient_of(loss_function, leaf, *args, **kwargs):
    """(loss in float64, its gradient in float64) of loss_function(leaf, ...), summed if it is not a scalar."""
    leaf = leaf.detach().clone().requires_grad_()
    loss = loss_function(leaf, *args, **kwargs)
    loss.sum().backward()
    return loss.detach().double(), leaf.grad.double()


@pytest.fixture(scope="session")
def value_and_gradient():
    return value_and_gradient_of


def run_two_processes(worker: Path, meeting_file: Path) -> None:
    """Run the script once per rank of a group of two, and fail with what it printed unless both leave with 0."""
    command = [sys.executable, str(worker), str(meeting_file)]
    ranks = [{"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"} for rank in range(2)]
    running = [
        subprocess.Popen(command, env=os.environ | rank, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in ranks
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(printed)


@pytest.fixture(scope="session")
def two_processes():
    return run_two_processes


@pytest.fixture
def triton_interpreter(monkeypatch):
    """Triton kernels run on CPU tensors, by the interpreter. No test imports them without this fixture: the choice
    between compiler and interpreter is made when they are imported."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
