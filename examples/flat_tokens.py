"""Distillation where a batch is flat tokens and labels come shifted, as torchtitan has it: pred [N, V], labels [N]."""

import torch
from logitstore_kernels import distillation_loss
from logitstore_trainer import TeacherDecoder
from logitstore_trainer.collator import next_token_labels

import logitstore


def make_split_and_loss(store: logitstore.LogitStore) -> tuple:
    """(a collated batch -> model inputs and shifted labels; the loss of flat predictions and labels)."""
    # fmt: off
    # plug-in: begin
    decoder = TeacherDecoder(store)
    def split(batch: dict) -> tuple[dict, torch.Tensor]:
        inputs = {"input": batch["input_ids"], "teacher": decoder(batch)}
        return inputs, next_token_labels(batch["labels"])
    def loss_fn(pred_NV: torch.Tensor, labels_N: torch.Tensor, global_valid_tokens, *, teacher) -> torch.Tensor:
        return distillation_loss(pred_NV, teacher, labels_N, temperature=2.0, alpha=0.7,
                                 num_items_in_batch=global_valid_tokens)
    # plug-in: end
    # fmt: on
    return split, loss_fn
