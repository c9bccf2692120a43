"""Distillation in a Lightning module: a batch of its Trainer is the list of micro-batches of one optimizer step."""

import torch
from lightning import LightningModule
from logitstore_trainer import DistillationLoss, OptimizerSteps, collate
from torch.utils.data import DataLoader

import logitstore


class DistilledModule(LightningModule):
    """Your module, learning from the store at `path`; several processes need a DistributedSampler."""

    def __init__(self, model: torch.nn.Module, path: str) -> None:
        super().__init__()
        self.model, self.automatic_optimization = model, False
        self.store = logitstore.open(path)
        self.loss_of = DistillationLoss(self.store, temperature=2.0, alpha=0.7)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=1.0)

    # fmt: off
    # plug-in: begin
    def train_dataloader(self):
        return OptimizerSteps(DataLoader(self.store, batch_size=2, collate_fn=collate), 2)
    def training_step(self, batches, _):
        for batch in batches:
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            self.manual_backward(self.loss_of(logits, batch))
        self.optimizers().step()
        self.optimizers().zero_grad()
    # plug-in: end
    # fmt: on
