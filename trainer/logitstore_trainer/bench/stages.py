"""The stages between a store and a training step, each callable alone on batches prepared up to it.

Letters: B batch, L length of its longest sample, N = B * L rows, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logitstore import LogitStore, Sample

if TYPE_CHECKING:
    import torch

TEMPERATURE, ALPHA = 2.0, 0.7
BYTES_COUNTED = {
    "read": "stored bytes: blobs, token ids, loss masks",
    "decode": "blobs",
    "collate": "tensors of the batch",
    "loss": "student logits read once, their gradient written once",
    "step": "stored bytes that the step consumes",
}


@dataclass(frozen=True)
class PreparedBatch:
    """One batch, brought to the point before each stage, so that every stage is timed alone."""

    indices: list[int]
    stored: list[Any]
    samples: list[Sample]
    tensors: dict[str, "torch.Tensor"]
    n_present: int

    @property
    def blob_bytes(self) -> int:
        return sum(len(one.blob) for one in self.stored)

    @property
    def stored_bytes(self) -> int:
        return self.blob_bytes + sum(one.input_ids.nbytes + -(-len(one.loss_mask) // 8) for one in self.stored)


class Stages:
    """The stages as calls that take the number of the round; each works on the batch of that round."""

    def __init__(self, store: LogitStore, batches: list[list[int]], student: str, device: "torch.device") -> None:
        import torch

        from logitstore_trainer.collator import collate
        from logitstore_trainer.decoder import TeacherDecoder, default_tail
        from logitstore_trainer.student import build_student

        self.store, self.device, self._collate = store, device, collate
        self.student = build_student(student, store).model.to(device).train()
        self.decoder = TeacherDecoder(store).to(device)
        self.tail = default_tail(self.decoder)
        self.temperature = 1.0 if self.tail == "sampled" else TEMPERATURE
        self.prepared = [self._prepare(indices) for indices in batches]
        n_rows = max(one.tensors["input_ids"].numel() for one in self.prepared)
        generator = torch.Generator().manual_seed(0)
        self._logits_NV = torch.randn(n_rows, store.spec.vocab_size, generator=generator).to(device)

    def stages(self) -> dict[str, Callable[[int], Any]]:
        return {
            "read": self._read,
            "decode": self._decode,
            "collate": self._collated,
            "loss": self._loss,
            "step": self._step,
        }

    def bytes_of(self, stage: str, batch: PreparedBatch) -> int:
        """What BYTES_COUNTED says of this stage, for one batch."""
        if stage == "decode":
            return batch.blob_bytes
        if stage == "collate":
            return sum(tensor.nbytes for tensor in batch.tensors.values())
        if stage == "loss":
            return 2 * batch.tensors["input_ids"].numel() * self.store.spec.vocab_size * 4
        return batch.stored_bytes

    def batch(self, round_index: int) -> PreparedBatch:
        return self.prepared[round_index % len(self.prepared)]

    def _prepare(self, indices: list[int]) -> PreparedBatch:
        samples = [self.store[index] for index in indices]
        stored = [self.store.read_stored(index)[0] for index in indices]
        n_present = sum(int(sample.targets.present.sum()) for sample in samples)
        tensors = {name: tensor.to(self.device) for name, tensor in self._collate(samples).items()}
        return PreparedBatch(indices, stored, samples, tensors, n_present)

    def _read(self, round_index: int) -> None:
        for index in self.batch(round_index).indices:
            self.store.read_stored(index)

    def _decode(self, round_index: int) -> None:
        codec = self.store.spec.codec
        for one in self.batch(round_index).stored:
            codec.decode(one.blob, one.input_ids)

    def _collated(self, round_index: int) -> None:
        self._collate(self.batch(round_index).samples)

    def _loss(self, round_index: int) -> None:
        tensors = self.batch(round_index).tensors
        logits_NV = self._logits_NV[: tensors["input_ids"].numel()].detach().requires_grad_()
        self._distillation_loss(logits_NV, tensors).backward()

    def _step(self, round_index: int) -> None:
        tensors = self.batch(round_index).tensors
        self.student.zero_grad()
        output = self.student(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"])
        self._distillation_loss(output.logits.flatten(0, 1), tensors).backward()

    def _distillation_loss(self, logits_NV: "torch.Tensor", tensors: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        from logitstore_kernels import distillation_loss

        from logitstore_trainer.collator import next_token_labels

        labels_N = next_token_labels(tensors["labels"])
        teacher = self.decoder(tensors)
        return distillation_loss(
            logits_NV, teacher, labels_N, temperature=self.temperature, alpha=ALPHA, tail=self.tail
        )
