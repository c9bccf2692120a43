"""Distillation in a Trainer that is already yours, by one line that replaces the model's loss function."""

from logitstore_trainer import distill
from transformers import PreTrainedModel, Trainer, TrainingArguments

import logitstore


def make_trainer(model: PreTrainedModel, args: TrainingArguments, path: str) -> Trainer:
    """Your Trainer, learning from the store at `path`."""
    trainer = Trainer(model, args, train_dataset=logitstore.open(path))
    # plug-in: begin
    distill(trainer, temperature=2.0, alpha=0.7)
    # plug-in: end
    return trainer
