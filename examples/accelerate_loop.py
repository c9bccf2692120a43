"""Distillation in an Accelerate loop. Accelerator keeps gradient_accumulation_steps at 1: steps are counted here."""

import torch
from accelerate import Accelerator
from logitstore_trainer import DistillationLoss, OptimizerSteps, collate
from torch.utils.data import DataLoader

import logitstore


def train(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: str) -> None:
    """One epoch over the store at `path`, two micro-batches of two samples a step and process."""
    # fmt: off
    # plug-in: begin
    store = logitstore.open(path)
    loss_of = DistillationLoss(store, temperature=2.0, alpha=0.7)
    loader = DataLoader(store, batch_size=2, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batches in OptimizerSteps(loader, 2):
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            accelerator.backward(loss_of(logits, batch))
        optimizer.step()
        optimizer.zero_grad()
    # plug-in: end
    # fmt: on
