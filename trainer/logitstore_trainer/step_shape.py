"""The samples of an optimizer step, and how several processes share them: what lets a run go on with another number.

A step takes batch size * accumulation * processes samples, the same for the whole run. Which samples a step takes then
follows from its number alone, the loss divides by all their tokens, and so a run that goes on with another number of
processes takes the steps that it would have taken: only accumulation and batch size are shared out anew. transformers'
Trainer counts its checkpoints in steps, too, and passes over the right samples as long as their number a step is kept;
where it is not, it would train on some twice and never on others, and SamplesPerStep refuses.
"""

from typing import Any, NamedTuple

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from logitstore.errors import SpecMismatchError


class StepShape(NamedTuple):
    """Samples of a forward pass, forward passes of an optimizer step, and the processes that each do that many."""

    batch_size: int
    grad_accum: int
    n_processes: int

    @property
    def n_samples(self) -> int:
        """Samples of an optimizer step, over all processes."""
        return self.batch_size * self.grad_accum * self.n_processes


def shared_step(n_samples: int, n_processes: int, largest_batch: int) -> StepShape:
    """A step of n_samples samples on n_processes, in the largest batches up to largest_batch that divide a share.

    Raises ValueError where the samples cannot be shared evenly.
    """
    share, left_over = divmod(n_samples, n_processes)
    if left_over or share == 0:
        counts = ", ".join(str(n) for n in range(1, n_samples + 1) if n_samples % n == 0)
        raise ValueError(
            f"the run takes steps of {n_samples} samples, which {n_processes} processes cannot share evenly; resume it "
            f"with one of {counts} processes"
        )
    batch_size = max(n for n in range(1, min(largest_batch, share) + 1) if share % n == 0)
    return StepShape(batch_size, share // batch_size, n_processes)


class SamplesPerStep(TrainerCallback, ExportableState):
    """Writes into each checkpoint how many samples a step takes, and refuses to go on from one with another number.

    Raises SpecMismatchError before the first step. A checkpoint that does not say it is taken as it is.
    """

    def __init__(self) -> None:
        self.n_samples: int | None = None

    def state(self) -> dict[str, Any]:
        """What Trainer writes into trainer_state.json."""
        return {"args": {}, "attributes": {"n_samples": self.n_samples}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        recorded = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]["n_samples"]
        self.n_samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if state.global_step and recorded is not None and recorded != self.n_samples:
            raise SpecMismatchError(
                f"the checkpoint at step {state.global_step} is of steps of {recorded} samples, this run takes "
                f"{self.n_samples} (batch size {args.train_batch_size} * accumulation "
                f"{args.gradient_accumulation_steps} * {args.world_size} processes), and Trainer would pass over the "
                f"wrong samples; choose a batch size and an accumulation that make it {recorded}"
            )
