"""One of the processes of test_plug_ins.py: the plain loop and the fused loss under DDP with gloo, in float64 or 32."""

import os
import sys

import torch
from logitstore_trainer import DistillationLoss, OptimizerSteps, collate
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from transformers import LlamaForCausalLM

import logitstore


class FusedStudent(torch.nn.Module):
    """The student with the loss in its forward(), where DDP sees the gradient of the head."""

    def __init__(self, model, loss_of):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, batch):
        hidden = self.model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return self.loss_of.from_hidden(hidden.last_hidden_state, self.model.lm_head.weight, batch)


def run(path, folder, dtype):
    """The summed loss and the gradient of one step of two micro-batches of one sample on each process, both ways."""
    store, rank = logitstore.open(path), torch.distributed.get_rank()
    results = {}
    for way in ("logits", "fused"):
        model, loss_of = LlamaForCausalLM.from_pretrained(folder, dtype=dtype), DistillationLoss(store)
        wrapped = DistributedDataParallel(FusedStudent(model, loss_of) if way == "fused" else model)
        loader = DataLoader(Subset(store, [rank, rank + 2]), batch_size=1, collate_fn=collate)
        loss = torch.zeros((), dtype=torch.float64)
        for batch in next(iter(OptimizerSteps(loader, 2))):
            if way == "fused":
                share = wrapped(batch)
            else:
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                share = loss_of(wrapped(**inputs).logits, batch)
            share.backward()
            loss += share.detach()
        torch.distributed.all_reduce(loss)
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        results[way] = (float(loss / torch.distributed.get_world_size()), gradients)
    return results


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    found = {str(dtype): run(sys.argv[1], sys.argv[2], dtype) for dtype in (torch.float64, torch.float32)}
    if torch.distributed.get_rank() == 0:
        torch.save(found, sys.argv[3])
    torch.distributed.barrier()
    os._exit(0)
