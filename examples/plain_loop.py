"""Distillation in a plain PyTorch loop, alone or under torchrun with DDP: `model` may be either."""

import torch
from logitstore_trainer import DistillationLoss, OptimizerSteps, collate
from torch.utils.data import DataLoader

import logitstore


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: str, *, sampler=None, grad_accum=2) -> None:
    """One epoch over the store at `path`, grad_accum micro-batches of two samples a step."""
    # fmt: off
    # plug-in: begin
    store = logitstore.open(path)
    loss_of = DistillationLoss(store, temperature=2.0, alpha=0.7)
    loader = DataLoader(store, batch_size=2, sampler=sampler, collate_fn=collate)
    for batches in OptimizerSteps(loader, grad_accum):
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss_of(logits, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    # plug-in: end
    # fmt: on
