"""Trains students from a store of teacher distributions: collator, decoder, Trainer, and the `logitstore` command.

The names are imported on first use (PEP 562), so that `collate` and `TeacherDecoder` fit into a training loop that
has no transformers installed, and so that the command line starts at once. No module may bear an exported name: once
imported it would take its place, which is why `collate` lives in collator.py.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitstore_trainer.batch_loss import DistillationLoss, OptimizerSteps
    from logitstore_trainer.collator import collate
    from logitstore_trainer.decoder import TeacherDecoder
    from logitstore_trainer.hf_trainer import DistillationMixin, DistillationTrainer
    from logitstore_trainer.loss_hook import distill
    from logitstore_trainer.packing import collate_packed

__all__ = [
    "DistillationLoss",
    "DistillationMixin",
    "DistillationTrainer",
    "OptimizerSteps",
    "TeacherDecoder",
    "collate",
    "collate_packed",
    "distill",
]

_HOME = {
    "collate": "logitstore_trainer.collator",
    "collate_packed": "logitstore_trainer.packing",
    "TeacherDecoder": "logitstore_trainer.decoder",
    "DistillationTrainer": "logitstore_trainer.hf_trainer",
    "DistillationMixin": "logitstore_trainer.hf_trainer",
    "DistillationLoss": "logitstore_trainer.batch_loss",
    "OptimizerSteps": "logitstore_trainer.batch_loss",
    "distill": "logitstore_trainer.loss_hook",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
