"""A run whose loss is no longer a number is stopped: all that it would train and save from there on is not, either."""

import math
from typing import Any

from transformers import TrainerCallback


class RequireFiniteLoss(TrainerCallback):
    """Raises ValueError, saying what to change, where a logged training loss is NaN or infinite, on every rank alike.

    A checkpoint is logged before it is written, so none is written from such a loss. The Trainer must log what it
    computed (logging_nan_inf_filter=False): by default it logs the mean of the finite losses before, or 0.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if math.isfinite(loss):
            return
        if state.global_step == 1:
            raise ValueError(f"the loss of the first step is {loss}, before any weight changed: check the student")
        raise ValueError(
            f"the loss up to step {state.global_step} is {loss}: training has diverged. Start again in another folder "
            f"with a lower --lr (its peak is {args.learning_rate:g}) or a longer --warmup"
        )
