"""How far a student is from a teacher, by the four measures that the loss knows: both KLs, JSD and total variation.

Each is taken over the outcomes that the tail makes: K entries and one tail ("bucket", and "renormalised", whose tail
has no mass), or all V tokens ("uniform", "dense"). Under autograd: nothing here is fused, only forward KL is.

Letters: N rows, O outcomes. p is the teacher at T, q the student at T.
"""

import math

import torch
from torch import Tensor

FORWARD_KL = "forward_kl"
TAILS_OF_DIVERGENCE = {
    FORWARD_KL: ("bucket", "uniform", "renormalised", "dropped", "dense", "sampled"),
    "reverse_kl": ("bucket", "uniform", "dense"),
    "jsd": ("bucket", "uniform", "renormalised", "dense"),
    "tvd": ("bucket", "uniform", "renormalised", "dense"),
}
"""The tails that each divergence is defined for, in the words of distillation_loss(tail=...)."""

WHY_NOT_TAIL = {
    "renormalised": "the teacher's probability of every token that is not an entry is 0, which makes it infinite",
    "dropped": "the teacher's entries do not sum to 1",
    "sampled": "weights of samples are no probabilities",
}


def check_divergence_of_tail(divergence: str, tail: str) -> None:
    """Raise ValueError unless the divergence is one of the four and defined for the tail."""
    if divergence not in TAILS_OF_DIVERGENCE:
        raise ValueError(f"divergence must be one of {', '.join(TAILS_OF_DIVERGENCE)}, got {divergence!r}")
    tails = TAILS_OF_DIVERGENCE[divergence]
    if tail not in tails:
        raise ValueError(
            f"divergence={divergence!r} is not defined for tail={tail!r}: {WHY_NOT_TAIL[tail]}; use one of "
            f"{', '.join(tails)}, or divergence='forward_kl'"
        )


def divergence_rows(logp_NO: Tensor, logq_NO: Tensor, divergence: str, jsd_beta: float) -> Tensor:
    """D(p, q) of each row [N] in nats (tvd: in [0, 1]), of distributions given as natural logs, -inf for 0.

    reverse_kl: sum of q ln(q / p), infinite where the student has probability and the teacher has none.
    jsd: b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q, b = jsd_beta (Agarwal et al. 2024, GKD); divided by
        b it tends to KL(p || q) as b goes to 0.
    tvd: half the sum of |p - q|; where p = q its gradient is taken to be 0.
    """
    if divergence == FORWARD_KL:
        return times_log_ratio(logp_NO, logq_NO).sum(dim=1)
    if divergence == "reverse_kl":
        return times_log_ratio(logq_NO, logp_NO).sum(dim=1)
    if divergence == "tvd":
        return 0.5 * (logp_NO.exp() - logq_NO.exp()).abs().sum(dim=1)
    impossible_NO = (logp_NO == -math.inf) & (logq_NO == -math.inf)  # where logaddexp has a gradient of NaN
    weighted_p_NO = logp_NO.masked_fill(impossible_NO, 0) + math.log(jsd_beta)
    weighted_q_NO = logq_NO.masked_fill(impossible_NO, 0) + math.log1p(-jsd_beta)
    logm_NO = torch.logaddexp(weighted_p_NO, weighted_q_NO)
    terms_NO = jsd_beta * times_log_ratio(logp_NO, logm_NO) + (1 - jsd_beta) * times_log_ratio(logq_NO, logm_NO)
    return terms_NO.sum(dim=1)


def times_log_ratio(logt: Tensor, logq: Tensor) -> Tensor:
    """t * (ln t - ln q), and 0 with a gradient of 0 where t = 0, whatever q is."""
    t = logt.exp()
    logt, logq = logt.masked_fill(t == 0, 0), logq.masked_fill(t == 0, 0)
    return t * (logt - logq)
