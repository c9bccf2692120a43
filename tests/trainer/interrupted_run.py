"""A small student and the Ctrl-C that its training gets."""

from transformers import TrainerCallback

STUDENT = "llama:layers=2,width=32,heads=2,mlp=64"


class InterruptAt(TrainerCallback):
    """Ctrl-C after a number of optimizer steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt
