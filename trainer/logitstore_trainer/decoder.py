"""From a collated batch to the teacher that the loss kernels take, with what a store says once instead of per row.

That is the vocabulary size, and for a store with predicted tails the tail model, which runs here, on the device of the
batch, over whole sequences. A dataset built from several stores is accepted only if one decoder serves them all.

Letters: B batch, L length, K entries, r coefficients, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from logitstore_kernels import TeacherBatch

from logitstore.codecs.checks import require_tables
from logitstore.errors import SpecMismatchError
from logitstore.tail_model import TailInputs, model_tensors, predicted_coefs
from logitstore_trainer.packing import SAMPLE_PLACES, by_sample, in_rows

if TYPE_CHECKING:
    from logitstore import LogitStore, StoreSpec


_LOSS_TAIL_OF_CODEC = {"residual": "bucket", "sampled": "sampled", "predicted": "dense"}


class TeacherDecoder(torch.nn.Module):
    """Decodes batches of one store: `TeacherDecoder(store).to(device)(batch)` is a TeacherBatch of B * L rows.

    Row b * L + t describes token t + 1 of sample b; absent rows and pads have no entries. `spec` and `store_path` (None
    where it has none) are the store's.
    One-byte codes stay codes: they are decoded where the loss is computed. Of a store with predicted tails the batch
    has the dense tail. The table of the codes and the model's arrays are buffers, which `to` moves and no checkpoint
    holds.
    """

    def __init__(self, store: "LogitStore") -> None:
        super().__init__()
        self.spec: StoreSpec = store.spec
        self.store_path = getattr(store, "path", None)
        table = getattr(self.spec.codec, "value_table", None)
        self.register_buffer("value_table", None if table is None else torch.from_numpy(table.copy()), persistent=False)
        self._model_names: list[str] = []
        if self.spec.codec.tail == "predicted":
            tensors = model_tensors(require_tables(self.spec.codec).predictor.model)
            self._model_names = list(tensors)
            for name, tensor in tensors.items():
                self.register_buffer(f"tail_{name}", tensor, persistent=False)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> TeacherBatch:
        """The teacher of a batch made by `collate` or `collate_packed`, on the batch's device.

        Raises ValueError if the teacher's columns are missing, as when another collator made the batch.
        """
        if "teacher_ids" not in batch:
            raise ValueError(
                f"the batch has no teacher_ids, only {', '.join(sorted(batch))}: "
                "pass data_collator=logitstore_trainer.collate and a LogitStore as the dataset"
            )
        if self.spec.codec.tail == "sampled":
            ids_NK, logweights_NK = (batch[name].flatten(0, 1) for name in ("teacher_ids", "teacher_logprobs"))
            return TeacherBatch.from_samples(ids_NK, logweights_NK, vocab_size=self.spec.vocab_size)
        table = self.value_table if "teacher_codes" in batch else None
        teacher = TeacherBatch.from_collated(batch, vocab_size=self.spec.vocab_size, value_table=table)
        if not self._model_names:
            return teacher
        tensors = {name: getattr(self, f"tail_{name}") for name in self._model_names}
        logps_BLK = teacher.logprobs_NK.view_as(batch["teacher_ids"])
        if SAMPLE_PLACES in batch:
            coefs_Nr = _packed_coefs(tensors, batch, logps_BLK)
        else:
            coefs_Nr = _coefs(tensors, batch, logps_BLK).flatten(0, 1)
        return teacher.with_dense_tail(coefs_Nr, tensors["basis"], tensors["bias"])


def _packed_coefs(
    tensors: dict[str, torch.Tensor], batch: Mapping[str, torch.Tensor], logps_BLK: torch.Tensor
) -> torch.Tensor:
    """The same [N, r] for a packed batch: a prediction reads the other rows of its sample, so each is taken apart."""
    places_SM = batch[SAMPLE_PLACES]
    parts = {
        name: by_sample(batch[name], places_SM, pad)
        for name, pad in (
            ("input_ids", 0), ("teacher_ids", -1), ("teacher_tail_logmass", torch.nan),
            ("teacher_tail_logmoment_half", torch.nan), ("teacher_corrections", 0.0),
        ) if name in batch
    }  # fmt: skip
    coefs_SMr = _coefs(tensors, parts, by_sample(logps_BLK, places_SM, -torch.inf))
    return in_rows(coefs_SMr, places_SM, batch["input_ids"].numel())


@torch.no_grad()
def _coefs(tensors: dict[str, torch.Tensor], batch: Mapping[str, torch.Tensor], logps: torch.Tensor) -> torch.Tensor:
    """Coefficients of the tails' logits [B, L, r]: predicted, and corrected where the store has corrections.

    logps: the head's log-probs as stored, [B, L, K].
    """
    input_ids, ids = batch["input_ids"], batch["teacher_ids"].long()
    mass, half = batch["teacher_tail_logmass"], batch["teacher_tail_logmoment_half"]
    following = torch.nn.functional.pad(input_ids[:, 1:], (0, 1))
    entry = ids >= 0
    head = logps.masked_fill(~entry, -torch.inf).logsumexp(-1, keepdim=True)
    shift = torch.log(-torch.expm1(mass.clamp(max=-1e-9)))[..., None] - head
    logps = torch.where(entry, logps + shift, 0.0)
    coefs = predicted_coefs(tensors, TailInputs(input_ids, following, ids, logps, mass, half))
    corrections = batch.get("teacher_corrections")
    if corrections is not None:
        coefs[..., : corrections.shape[-1]] += corrections
    return coefs


def default_tail(decoder: TeacherDecoder) -> str:
    """How the loss treats what the store's codec says of the tail: "bucket" for residual mass, "dense" for predicted
    tails, "sampled" for samples.

    Raises ValueError for a codec without a default.
    """
    tail = decoder.spec.codec.tail
    if tail not in _LOSS_TAIL_OF_CODEC:
        raise ValueError(f"no default for a store with tail={tail!r}: pass tail='bucket', 'uniform' or another")
    return _LOSS_TAIL_OF_CODEC[tail]


def fitting_tail(decoder: TeacherDecoder, tail: str | None, temperature: float) -> str:
    """`tail`, or the store's default where it is None. Raises ValueError where store, tail and temperature do not go
    together: known before the first batch, which the loss would refuse."""
    of_store = default_tail(decoder)
    tail = tail or of_store
    name = decoder.spec.codec.config["name"]
    if (tail == "sampled") != (of_store == "sampled") or (tail == "dense" and of_store != "dense"):
        raise ValueError(f"tail={tail!r} is not for a store of codec {name!r}; use tail={of_store!r}, or leave it out")
    if tail == "sampled" and temperature != 1:
        raise ValueError(
            f"a store of codec {name!r} holds samples, which are for temperature 1 alone, got {temperature}; "
            "pass temperature=1 (--temperature 1), or collect with --codec topk"
        )
    return tail


def decoder_for_dataset(dataset: Any) -> TeacherDecoder:
    """The decoder that serves every store in a dataset: a LogitStore, or Subset / ConcatDataset / list / dict of them.

    Raises TypeError or ValueError for a dataset that is not made of stores, and SpecMismatchError, naming both stores,
    if they differ in vocabulary, tokenizer, codec or teacher.
    """
    stores = list(_stores_in(dataset))
    if not stores:
        raise ValueError("the dataset holds no store: pass an opened LogitStore, or decoder=TeacherDecoder(store)")
    for other in stores[1:]:
        check_same_teacher(stores[0], other)
    return TeacherDecoder(stores[0])


def check_same_teacher(first: "LogitStore", other: "LogitStore") -> None:
    """Raises SpecMismatchError if two stores differ in vocabulary, tokenizer, codec or teacher; the text may differ."""
    ours, theirs = _identity(first.spec), _identity(other.spec)
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        what = "; ".join(f"{name} {ours[name]} against {theirs[name]}" for name in differing)
        raise SpecMismatchError(
            f"{_name(first)} and {_name(other)} cannot be used together: {what}. "
            "Train from one of them, or collect both in the same way"
        )


def _identity(spec: "StoreSpec") -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab_size,
        "tokenizer_sha256": spec.tokenizer_sha256,
        "codec": spec.codec.config,
        "teacher": spec.teacher_sha256 or spec.teacher,
    }


def _stores_in(dataset: Any) -> Iterable["LogitStore"]:
    if isinstance(dataset, torch.utils.data.Subset):
        yield from _stores_in(dataset.dataset)
    elif isinstance(dataset, torch.utils.data.ConcatDataset):
        for part in dataset.datasets:
            yield from _stores_in(part)
    elif isinstance(dataset, list | tuple):
        for part in dataset:
            yield from _stores_in(part)
    elif isinstance(dataset, dict):
        yield from _stores_in(list(dataset.values()))
    elif hasattr(dataset, "spec"):
        yield dataset
    else:
        raise TypeError(
            f"cannot see which store a {type(dataset).__name__} reads: pass an opened LogitStore, "
            "a Subset or ConcatDataset of them, or decoder=TeacherDecoder(store)"
        )


def _name(store: "LogitStore") -> str:
    return f"store {getattr(store, 'path', None) or 'without a path'}"
