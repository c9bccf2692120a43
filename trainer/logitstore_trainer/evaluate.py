"""Held-out measurements of a student: cross-entropy, KL to the stored teacher, and KL and agreement with a live one.

The store's KL sees the teacher through the codec; only a live teacher gives the KL over the whole vocabulary. Both
models' logits of one batch are held at once, in their own dtype; everything else is done over chunks of rows.

Letters: B batch, L length, N rows, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from logitstore_kernels import distillation_loss_parts

from logitstore_trainer.calibration import N_BINS, CalibrationBin, calibration_bins, calibration_error, calibration_sums
from logitstore_trainer.collator import IGNORE_INDEX, collate, next_token_labels
from logitstore_trainer.decoder import TeacherDecoder, decoder_for_dataset, fitting_tail
from logitstore_trainer.progress import Progress

if TYPE_CHECKING:
    from logitstore import Sample

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Evaluation:
    """Means over the held-out tokens that are to be learned, in nats per token.

    loss_nats: cross-entropy with the text. kl_store_nats: KL(stored teacher || student) at `temperature`, without T^2,
    the tail treated as `tail` says ("bucket" is a lower bound of the KL over the vocabulary; "sampled" lies above it by
    what the samples' own noise adds, the same for every student). kl_teacher_nats: exact
    KL(teacher || student) at T = 1, None without a live teacher. top1_agreement: share of tokens at which student and
    teacher rank the same token first; the teacher is the live one, or the store's first entry (`top1_against`).
    perplexity: e^loss_nats. calibration_error and calibration: see calibration.py.
    """

    n_tokens: int
    loss_nats: float
    kl_store_nats: float
    kl_teacher_nats: float | None
    top1_agreement: float
    top1_against: str
    temperature: float
    tail: str
    perplexity: float
    calibration_error: float
    calibration: tuple[CalibrationBin, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields, as JSON values."""
        return asdict(self)


@contextmanager
def in_eval_mode(*models: torch.nn.Module) -> Iterator[None]:
    """Puts the models into eval mode, and back into the mode of each when the block is left, by an error too."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


@torch.no_grad()
def evaluate_student(
    model: torch.nn.Module,
    dataset: Sequence["Sample"],
    decoder: TeacherDecoder | None = None,
    *,
    temperature: float = 1.0,
    tail: str | None = None,
    teacher_model: torch.nn.Module | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Evaluates a causal LM on samples of a store: a LogitStore, a Subset of one, or a list of samples.

    It runs on the model's device and leaves both models in the mode (train or eval) in which it found them, also where
    it raises. A list needs the decoder; otherwise it is built from the dataset. tail None: what suits the store. Raises
    ValueError if nothing is to be learned in it, and for a tail or temperature that the store is not for.
    """
    decoder = decoder_for_dataset(dataset) if decoder is None else decoder
    tail = fitting_tail(decoder, tail, temperature)
    device = next(model.parameters()).device
    models = [model] if teacher_model is None else [model, teacher_model]
    sums, calibration = torch.zeros(5, dtype=torch.float64), torch.zeros(3, N_BINS, dtype=torch.float64)
    with in_eval_mode(*models), Progress(total=len(dataset), desc="evaluate", unit="samples") as display:
        for start in range(0, len(dataset), batch_size):
            samples = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            batch = {name: tensor.to(device) for name, tensor in collate(samples).items()}
            batch_sums, batch_calibration = _batch_sums(models, batch, decoder, temperature=temperature, tail=tail)
            sums += batch_sums
            calibration += batch_calibration
            display.update(len(samples))
    n_tokens = int(sums[0])
    if n_tokens == 0:
        raise ValueError(f"nothing to evaluate: none of the tokens of {len(dataset)} samples is to be learned")
    ce, kl_store, kl_teacher, agreeing = (sums[1:] / n_tokens).tolist()
    return Evaluation(
        n_tokens=n_tokens,
        loss_nats=ce,
        kl_store_nats=kl_store,
        kl_teacher_nats=None if teacher_model is None else kl_teacher,
        top1_agreement=agreeing,
        top1_against="store" if teacher_model is None else "teacher",
        temperature=temperature,
        tail=tail,
        perplexity=math.exp(ce) if ce < 700 else math.inf,
        calibration_error=calibration_error(calibration),
        calibration=tuple(calibration_bins(calibration)),
    )


def _batch_sums(
    models: list[torch.nn.Module],
    batch: dict[str, torch.Tensor],
    decoder: TeacherDecoder,
    *,
    temperature: float,
    tail: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over a batch's valid rows [5], float64 (tokens, cross-entropy, stored KL, exact KL, agreeing tokens), and
    calibration_sums of them."""
    logits_NV = _logits(models[0], batch)
    labels_N = next_token_labels(batch["labels"])
    parts = distillation_loss_parts(
        logits_NV,
        decoder(batch),
        labels_N,
        temperature=temperature,
        alpha=0.5,
        tail=tail,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    rows_N = (labels_N != IGNORE_INDEX).nonzero().squeeze(1)
    teacher_NV = _logits(models[1], batch) if len(models) > 1 else None
    store_top1_N = batch["teacher_ids"][..., 0].flatten()
    vocab_size = decoder.spec.vocab_size
    kl, agreeing = 0.0, 0
    calibration = torch.zeros(3, N_BINS, dtype=torch.float64)
    for rows in rows_N.split(max(_CHUNK_ELEMENTS // vocab_size, 1)):
        student = logits_NV[rows, :vocab_size]
        calibration += calibration_sums(student, labels_N[rows])
        if teacher_NV is None:
            teacher_top1 = store_top1_N[rows]
        else:
            teacher = teacher_NV[rows, :vocab_size]
            teacher_top1 = teacher.argmax(dim=1)
            kl += float(kl_divergence(teacher, student).double().sum())
        agreeing += int((student.argmax(dim=1) == teacher_top1).sum())
    sums = torch.tensor([len(rows_N), float(parts.ce), float(parts.kl), kl, agreeing], dtype=torch.float64)
    return sums, calibration


def kl_divergence(teacher_logits_NV: torch.Tensor, student_logits_NV: torch.Tensor) -> torch.Tensor:
    """KL(softmax(teacher) || softmax(student)) of each row [N] in nats, at T = 1, in float32 (float64 if either is)."""
    dtype = torch.promote_types(torch.promote_types(teacher_logits_NV.dtype, student_logits_NV.dtype), torch.float32)
    teacher_NV = teacher_logits_NV.to(dtype).log_softmax(dim=1)
    student_NV = student_logits_NV.to(dtype).log_softmax(dim=1)
    terms_NV = teacher_NV.exp() * (teacher_NV - student_NV)
    return terms_NV.masked_fill_(teacher_NV == -torch.inf, 0.0).sum(dim=1)


def _logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return outputs.logits.flatten(0, 1)
