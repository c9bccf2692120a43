"""What a training run shows while it runs: a bar of steps with ETA, and now and then a line with the losses."""

import sys
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from transformers import TrainerCallback

from logitstore_trainer.progress import Progress

if TYPE_CHECKING:
    from logitstore_trainer.hf_trainer import DistillationTrainer

_LINE_INTERVAL_S = 10.0


class ReportProgress(TrainerCallback):
    """Shows steps with ETA, and at most every ten seconds the last logged loss, its parts and tokens/s."""

    def __init__(self, trainer: "DistillationTrainer") -> None:
        self._trainer = trainer
        self._bar: Progress | None = None
        self._start_s = self._last_line_s = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start_s = self._last_line_s = time.monotonic()
        if state.is_world_process_zero:
            self._bar = Progress(total=state.max_steps - state.global_step, desc="train", unit="steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        now_s = time.monotonic()
        if self._bar is None or not logs or "kl" not in logs or now_s - self._last_line_s < _LINE_INTERVAL_S:
            return
        self._last_line_s = now_s
        rate = self._trainer.n_local_tokens_seen() / max(now_s - self._start_s, 1e-9)
        line = (
            f"step {state.global_step:,}/{state.max_steps:,}: loss {logs['loss']:.4f}, "
            f"KL at T = {self._trainer.temperature:g} {logs['kl']:.4f}, cross-entropy {logs['ce']:.4f}, "
            f"lr {logs['learning_rate']:.2e}, {rate:,.0f} tokens/s"
        )
        tqdm.write(line, file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
