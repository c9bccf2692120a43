"""The loss of a collated batch, for training loops that are not transformers' Trainer: what is due, said once.

A step's loss is the sum over its valid tokens divided by their number over all micro-batches and processes. A loop
sees one micro-batch at a time, so `OptimizerSteps` hands out the micro-batches of a step together and writes into each
how many tokens the whole step has, where `DistillationLoss` reads it. Nothing else is to be multiplied or divided:
summed over a step's micro-batches and averaged over processes, as DDP does with gradients, it is the loss of one big
batch. That takes memory for the batches of one step and, with several processes, a sum of one number a step.

Letters: B batch, L length, V vocabulary, D width. T is the temperature.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from logitstore_kernels import distillation_loss, fused_linear_distillation_loss
from logitstore_kernels.divergences import FORWARD_KL, check_divergence_of_tail
from torch import Tensor

from logitstore_trainer.collator import IGNORE_INDEX, next_token_labels
from logitstore_trainer.decoder import decoder_for_dataset, fitting_tail

ITEMS_PER_PROCESS = "items_per_process"


class DistillationLoss:
    """alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy of a batch made by `collate`.

    dataset: a LogitStore, or a Subset / ConcatDataset / list of stores of one teacher. temperature is T > 0, alpha in
    [0, 1], tail as in `distillation_loss`, None for what suits the store; divergence and jsd_beta as there, in the KL's
    place. What decodes the teacher moves to the device of a batch. `n_calls` counts the losses that were computed.

    Raises TypeError or ValueError for a dataset without a store and for a tail, temperature or divergence that it is
    not for, SpecMismatchError for stores that differ.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        temperature: float = 2.0,
        alpha: float = 0.7,
        tail: str | None = None,
        divergence: str = FORWARD_KL,
        jsd_beta: float = 0.5,
    ) -> None:
        self.decoder = decoder_for_dataset(dataset)
        tail = fitting_tail(self.decoder, tail, temperature)
        check_divergence_of_tail(divergence, tail)
        self.options = {"temperature": temperature, "alpha": alpha, "tail": tail, "ignore_index": IGNORE_INDEX}
        self.divergence, self.jsd_beta = divergence, jsd_beta
        self.n_calls = 0

    def __call__(
        self, logits_BLV: Tensor, batch: Mapping[str, Tensor], num_items_in_batch: Tensor | float | None = None
    ) -> Tensor:
        """The loss, a 0-d tensor, of the model's logits [B, L, V], of which row (b, t) predicts token t + 1.

        The sum over valid tokens is divided by num_items_in_batch; by what OptimizerSteps wrote into the batch where
        that is None; and by the batch's own number of them where there is neither.

        Raises ValueError for a batch without the teacher's columns, or of another shape than the logits.
        """
        labels_N = next_token_labels(batch["labels"])
        return distillation_loss(
            logits_BLV.flatten(0, 1), self._teacher(batch), labels_N, divergence=self.divergence,
            jsd_beta=self.jsd_beta, num_items_in_batch=_n_items(batch, num_items_in_batch), **self.options,
        )  # fmt: skip

    def from_hidden(
        self,
        hidden_BLD: Tensor,
        weight_VD: Tensor,
        batch: Mapping[str, Tensor],
        num_items_in_batch: Tensor | float | None = None,
    ) -> Tensor:
        """The same from the last hidden states [B, L, D] and the lm_head's weight [V, D], without logits of all rows.

        Under DDP and FSDP2 it belongs into the forward() of the wrapped module, which synchronises what it sees.

        Raises ValueError for a divergence other than forward_kl.
        """
        if self.divergence != FORWARD_KL:
            raise ValueError(
                f"from_hidden computes {FORWARD_KL} alone, this loss has divergence={self.divergence!r}: call it with "
                "the model's logits"
            )
        labels_N = next_token_labels(batch["labels"])
        return fused_linear_distillation_loss(
            hidden_BLD.flatten(0, 1), weight_VD, self._teacher(batch), labels_N,
            num_items_in_batch=_n_items(batch, num_items_in_batch), **self.options,
        )  # fmt: skip

    def _teacher(self, batch: Mapping[str, Tensor]) -> Any:
        self.n_calls += 1
        return self.decoder.to(batch["labels"].device)(batch)


class OptimizerSteps:
    """The batches of `loader` in lists of n_batches, one list an optimizer step; the last list may be shorter.

    Each batch gets "items_per_process": the valid tokens of the whole step over all processes, divided by the number of
    processes, 0-d float64 (float32 on MPS). With torch.distributed every process must ask for as many steps. Can be
    iterated over as often as the loader can.

    Raises ValueError for n_batches below 1.
    """

    def __init__(self, loader: Iterable[dict[str, Tensor]], n_batches: int) -> None:
        if n_batches < 1:
            raise ValueError(f"OptimizerSteps got n_batches={n_batches}, expected at least 1 batch a step")
        self._loader, self._n_batches = loader, n_batches

    def __len__(self) -> int:
        return -(-len(self._loader) // self._n_batches)

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        batches = iter(self._loader)
        while step := list(islice(batches, self._n_batches)):
            labels = [next_token_labels(batch["labels"]) for batch in step]
            n_items = torch.stack([(labels_N != IGNORE_INDEX).sum() for labels_N in labels]).sum()
            per_process = _mean_over_processes(n_items)
            yield [{**batch, ITEMS_PER_PROCESS: per_process} for batch in step]


def _mean_over_processes(count: Tensor) -> Tensor:
    mean = count.to(torch.float32 if count.device.type == "mps" else torch.float64)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # NCCL reduces tensors of the GPU alone, and a loader's batches may not be there yet.
        device = torch.device("cuda") if torch.distributed.get_backend() == "nccl" else mean.device
        total = mean.to(device)
        torch.distributed.all_reduce(total)
        mean = total.to(mean.device) / torch.distributed.get_world_size()
    return mean


def _n_items(batch: Mapping[str, Tensor], given: Tensor | float | None) -> Tensor | float | None:
    return batch.get(ITEMS_PER_PROCESS) if given is None else given
