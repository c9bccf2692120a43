"""KL of predicted tails and its gradient on the tokens that a step of a fit looks at: T = 1 and T = 2, added.

A step looks at the likeliest tokens and at some of the others, drawn and weighed up. Rows go through in blocks that
stay in the cache of a processor, so that the loss costs little more than its three matrix products.

Letters: N rows, n rows of a block, M tokens of a step and one spare, K entries, D width of the head, V vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ROWS = 128
NEVER = -1e30  # a logit of no probability; finite, so that no difference of two is NaN


@dataclass(frozen=True, eq=False)
class StepColumns:
    """The tokens of a step: head [M, D] and bias [M] of the teacher, weight [M]: how many tokens each stands for, and
    place [V] int64: where each token is. The last column is a spare of weight 0, the place of tokens that are not
    there."""

    head: "Tensor"
    bias: "Tensor"
    weight: "Tensor"
    place: "Tensor"


def drawn_columns(
    lm_head: "Tensor", bias: "Tensor", likeliest: "Tensor", n_columns: int, generator: Any
) -> StepColumns:
    """n_columns tokens: the first half of them those that `likeliest` [V] begins with, the others drawn; all where
    there are no more. The generator is the processor's, so that every device draws the same."""
    import torch

    vocab_size, device = len(likeliest), lm_head.device
    n_columns = min(n_columns, vocab_size)
    n_always = n_columns // 2 if n_columns < vocab_size else vocab_size
    n_others, n_drawn = vocab_size - n_always, n_columns - n_always
    drawn = torch.randperm(n_others, generator=generator)[:n_drawn].to(device)
    ids = torch.cat([likeliest[:n_always], likeliest[n_always:][drawn]])
    weight = torch.ones(n_columns + 1, device=device)
    if n_drawn:
        weight[n_always:] = n_others / n_drawn
    weight[-1] = 0.0
    place = torch.full((vocab_size,), n_columns, device=device)
    place[ids] = torch.arange(n_columns, device=device)
    head = torch.cat([lm_head[ids], lm_head.new_zeros(1, lm_head.shape[1])])
    return StepColumns(head, torch.cat([bias[ids], bias.new_full((1,), NEVER)]), weight, place)


def tail_kl(
    columns: StepColumns,
    teacher: "Tensor",
    lse_1: "Tensor",
    lse_2: "Tensor",
    entries: "Tensor",
    predicted: "Tensor",
) -> tuple["Tensor", "Tensor"]:
    """(mean KL of the rows' tails at T = 1 and T = 2, added, in nats; its gradient in `predicted` [N, D]).

    teacher, predicted [N, D] float32: hidden states. lse_1, lse_2 [N]: log-sum-exp of the teacher's logits at T = 1 and
    T = 2, over all tokens. entries [N, K] int64, -1 in pads: tokens of the head, exact and so in no tail.
    """
    import torch

    n_rows, spare = len(teacher), len(columns.head) - 1
    place = torch.where(entries >= 0, columns.place[entries.clamp(min=0)], spare)
    loss = teacher.new_zeros(())
    gradient = torch.empty_like(predicted)
    for start in range(0, n_rows, BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        z = torch.addmm(columns.bias, teacher[rows], columns.head.T).scatter_(1, place[rows], NEVER)
        s = torch.addmm(columns.bias, predicted[rows], columns.head.T).scatter_(1, place[rows], NEVER)
        z_max, s_max = z.amax(1), s.amax(1)
        difference = z - s
        # exp(z / 2) squared is exp(z): one exponential serves both temperatures
        p_half = z.sub_(z_max[:, None]).mul_(0.5).exp_()
        q_half = s.sub_(s_max[:, None]).mul_(0.5).exp_()
        p, q = p_half.square(), q_half.square()
        scale_1 = (z_max - lse_1[rows]).exp()
        scale_2 = (z_max / 2 - lse_2[rows]).exp()
        mass_1, mass_2 = scale_1 * (p @ columns.weight), scale_2 * (p_half @ columns.weight)
        sum_1, sum_2 = q @ columns.weight, q_half @ columns.weight
        pull = p.mul_(scale_1[:, None]).addcmul_(p_half, scale_2[:, None] / 2)
        push = q.mul_((mass_1 / sum_1)[:, None]).addcmul_(q_half, (mass_2 / sum_2)[:, None] / 2)
        loss += ((pull * difference) @ columns.weight).sum()
        for mass, lse_q, lse in (
            (mass_1, s_max + sum_1.log(), lse_1[rows]),
            (mass_2, s_max / 2 + sum_2.log(), lse_2[rows]),
        ):
            loss += (mass * (lse_q - lse) - torch.xlogy(mass, mass)).sum()
        torch.mm(push.sub_(pull).mul_(columns.weight), columns.head, out=gradient[rows])
    return loss / n_rows, gradient.div_(n_rows)
