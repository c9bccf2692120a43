"""What a distillation loss computes and what comes out per row: the two types that every path shares."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from logitstore_kernels.divergences import FORWARD_KL


@dataclass(frozen=True)
class LossTerms:
    """What is computed, by the arguments of distillation_loss of the same names.

    kl_wanted / ce_wanted say which softmaxes are taken; one with a weight above 0 must be.
    """

    temperature: float
    alpha: float
    tail: str
    kl_wanted: bool
    ce_wanted: bool
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    divergence: str = FORWARD_KL
    jsd_beta: float = 0.5

    @property
    def is_plain(self) -> bool:
        """Whether the divergence is forward KL, and neither label smoothing nor a z-loss nor a softcap is asked for."""
        extra = self.label_smoothing != 0 or self.z_loss != 0 or self.softcap is not None
        return self.divergence == FORWARD_KL and not extra


class LossRows(NamedTuple):
    """Per-row values [N], 0 in rows that do not count: the loss, which carries the graph, and its two parts."""

    loss_N: Tensor
    kl_N: Tensor
    ce_N: Tensor
