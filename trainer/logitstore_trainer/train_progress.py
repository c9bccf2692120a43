"""What a training run shows while it runs: steps, time left, the last logged loss with its parts, and tokens/s."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from logitstore_trainer.progress import Progress
from logitstore_trainer.train import LOSS_NAMES

if TYPE_CHECKING:
    from logitstore_trainer.hf_trainer import DistillationTrainer


class ReportProgress(TrainerCallback):
    """A bar on a terminal, a line every ten seconds in a log file; steps are those of the whole run, resumed or not.

    Add it after the other callbacks: it waits for the log of a step where one is due.
    """

    def __init__(self, trainer: "DistillationTrainer") -> None:
        self._trainer = trainer
        self._display: Progress | None = None
        self._n_shown = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._n_shown = state.global_step
        if state.is_world_process_zero:
            self._display = Progress(total=state.max_steps, desc="train", unit="steps", start=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not control.should_log:
            self._show(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self._display is None or not logs or "kl" not in logs:
            return
        divergence = f"{LOSS_NAMES[self._trainer.divergence]} at T = {self._trainer.temperature:g}"
        self._display.note(
            f"loss {logs['loss']:.4f}, {divergence} {logs['kl']:.4f}, "
            f"CE {logs['ce']:.4f}, {logs['tokens_per_s']:,.0f} tokens/s, lr {logs['learning_rate']:.2e}"
        )
        self._show(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None

    def _show(self, step: int) -> None:
        if self._display is not None:
            self._display.update(step - self._n_shown)
        self._n_shown = step
