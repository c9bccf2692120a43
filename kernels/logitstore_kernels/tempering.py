"""The teacher at a temperature T, from what a batch says of it at T = 1.

The order is the store's: shift the head's log-probs so that its mass is exactly 1 - tail mass, temper head and tail,
normalise. The tail at T is its log-moment rho(beta) = ln sum over the tail of p^beta, beta = 1/T, drawn as straight
lines through (0, ln n), (1/2, half moment) and (1, log-mass): exact at T = 1 and T = 2, above the convex truth between
and beyond T = 2, and for T < 1 the last line extended. Everything stays in log space; 1 - sum(p) is never formed.

Letters: N rows, K entries kept, V vocabulary. T is the temperature.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from logitstore_kernels.teacher_batch import TeacherBatch

NOT_NORMALISED = ("dropped", "sampled")


class TemperedTeacher(NamedTuple):
    """What the student is held against in each row: K entries and one tail. Absent rows are all -inf.

    logt_NK: ln t of each entry, -inf in pads.  logt_tail_N: ln t of the tail, -inf where there is none.
    Entries and tail sum to 1, except for the tails in NOT_NORMALISED: with "dropped" entries sum to the head's mass at
    T, with "sampled" to whatever the weights sum to.
    """

    logt_NK: Tensor
    logt_tail_N: Tensor


def log1mexp(x: Tensor) -> Tensor:
    """ln(1 - e^x) for x <= 0 without cancellation (Maechler 2012): 0 at -inf, -inf at 0."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def tail_logmoment(teacher: TeacherBatch, temperature: float, dtype: torch.dtype) -> Tensor:
    """rho(1/T) [N] in nats; -inf where the tail has no mass. The half moment must be there unless T = 1."""
    mass_N, n_tail_N = teacher.tail_logmass_N.to(dtype), teacher.n_tail_N
    beta = 1.0 / temperature
    if temperature == 1:
        rho_N = mass_N
    elif beta >= 0.5:
        half_N = teacher.tail_logmoment_half_N.to(dtype)
        rho_N = half_N + (2 * beta - 1) * (mass_N - half_N)
    else:
        half_N = teacher.tail_logmoment_half_N.to(dtype)
        log_n_N = n_tail_N.to(dtype).log()
        rho_N = log_n_N + 2 * beta * (half_N - log_n_N)
    return rho_N.masked_fill((mass_N == -math.inf) | (n_tail_N == 0), -math.inf)


def temper_teacher(teacher: TeacherBatch, *, temperature: float, tail: str, dtype: torch.dtype) -> TemperedTeacher:
    """The batch's N distributions at T in `dtype`: t_i = e^(l_i / T - A), t_tail = e^(rho - A).

    l is the shifted log-prob and A = ln(sum_i e^(l_i / T) + e^rho). For tail="renormalised" the tail is left out of A
    and has no mass; for "dropped" it is in A and is then taken away. For "sampled", where T is 1, t are the weights.
    """
    entry_NK = teacher.ids_NK >= 0
    present_N = entry_NK.any(dim=1)
    logp_NK = teacher.logprobs_NK.to(dtype).masked_fill(~entry_NK, -math.inf)
    if tail == "sampled":
        return TemperedTeacher(logp_NK, torch.full_like(logp_NK[:, 0], -math.inf))
    if tail == "renormalised":
        rho_N = torch.full_like(logp_NK[:, 0], -math.inf)
    else:
        rho_N = tail_logmoment(teacher, temperature, dtype)
        shift_N = log1mexp(teacher.tail_logmass_N.to(dtype)) - logp_NK.logsumexp(dim=1)
        logp_NK = logp_NK + shift_N[:, None]  # NaN in absent rows
    head_NK = logp_NK / temperature
    log_normaliser_N = torch.logaddexp(head_NK.logsumexp(dim=1), rho_N)
    keep_tail_N = torch.zeros_like(present_N) if tail == "dropped" else present_N
    return TemperedTeacher(
        (head_NK - log_normaliser_N[:, None]).masked_fill(~present_N[:, None], -math.inf),
        (rho_N - log_normaliser_N).masked_fill(~keep_tail_N, -math.inf),
    )
