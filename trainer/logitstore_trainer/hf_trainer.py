"""Distillation on transformers' Trainer: a mixin that computes the loss, and Trainer with the mixin applied.

The loss of an optimizer step is the sum over its valid tokens divided by their number over all micro-batches and
ranks, so gradient accumulation gives the gradient of one big batch. Trainer counts those tokens from the labels;
`collate` sets to -100 every label whose teacher row is absent, so both sides count the same. The model is called
without labels: its own loss would cost a second softmax and be thrown away.

On an accelerator training adds no host synchronisation to Trainer's own, whatever the divergence: the parts of the loss
stay on the device until they are logged. On a CPU, where reading waits for nothing, labels and rows are checked.
"""

import inspect
import time
from functools import partial
from typing import Any

import torch
from logitstore_kernels import distillation_loss_parts
from logitstore_kernels.divergences import check_divergence_of_tail
from transformers import Trainer

from logitstore_trainer.collator import IGNORE_INDEX, collate, next_token_labels
from logitstore_trainer.decoder import TeacherDecoder, decoder_for_dataset, fitting_tail
from logitstore_trainer.packing import SAMPLE_PLACES, collate_packed, model_inputs, require_packing
from logitstore_trainer.special_tokens import say_notes, special_token_notes
from logitstore_trainer.step_shape import SamplesPerStep
from logitstore_trainer.student import check_tokenizer, check_vocabulary

TEACHER_COLUMNS = (
    "teacher_ids",
    "teacher_codes",
    "teacher_code_scale",
    "teacher_code_offset",
    "teacher_logprobs",
    "teacher_tail_logmass",
    "teacher_tail_logmoment_half",
    "teacher_corrections",
)


class DistillationMixin:
    """Makes a Trainer minimise alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy, mean over tokens.

    Put it before a Trainer class. `temperature` is T, on both sides; `alpha` is in [0, 1]; `tail` as in
    `distillation_loss`, None for what suits the store; `divergence` and `jsd_beta` as there, in the KL's place (`kl` is
    then that divergence). `decoder` is built from train_dataset (or eval_dataset) unless given; the collator, unless
    given, is `collate` with the tokenizer's pad token, or with `pack` `collate_packed`. `kl` (without alpha and T^2)
    and `ce` are logged beside the loss, and of all ranks, over checkpoints that a run went on from: `n_tokens` (trained
    on, pads not counted), `train_s` (their seconds, evaluations not counted) and `tokens_per_s` since the last log.
    Evaluation reports eval_loss, eval_kl and eval_ce as means over tokens, not over batches.
    Special tokens in which processing_class differs from the store's tokenizer are said on standard error.

    Raises SpecMismatchError if the tokenizer or the student's vocabulary does not fit the store, ValueError for
    options that would replace this loss, for a tail or temperature that the store is not for, and for a model that
    cannot be packed. train() raises SpecMismatchError for a checkpoint whose steps take another number of samples.
    """

    # The loss is already a share of the whole accumulated batch; Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        temperature: float = 2.0,
        alpha: float = 0.7,
        tail: str | None = None,
        decoder: TeacherDecoder | None = None,
        divergence: str = "forward_kl",
        jsd_beta: float = 0.5,
        pack: bool = False,
        **kwargs: Any,
    ) -> None:
        bound = inspect.signature(super().__init__).bind_partial(*args, **kwargs)
        given = bound.arguments
        _refuse_other_losses(given)
        if decoder is None:
            datasets = [given.get("train_dataset"), given.get("eval_dataset")]
            decoder = decoder_for_dataset([dataset for dataset in datasets if dataset is not None])
        tokenizer = getattr(given.get("processing_class"), "tokenizer", given.get("processing_class"))
        if tokenizer is not None:
            check_tokenizer(decoder.spec, tokenizer)
        if given.get("data_collator") is None:
            collator = collate_packed if pack else collate
            given["data_collator"] = partial(collator, pad_token_id=_pad_token_id(tokenizer))
        elif pack:
            raise ValueError("pack=True and a data_collator exclude each other: leave one out")
        self.temperature, self.alpha, self.tail = temperature, alpha, fitting_tail(decoder, tail, temperature)
        check_divergence_of_tail(divergence, self.tail)
        self.divergence, self.jsd_beta = divergence, jsd_beta
        self._train_parts, self._eval_parts = _Sums(), _Sums()
        self._parts_since_step, self._n_loss_calls = 0, 0
        self._n_tokens_seen: torch.Tensor | int = 0
        self._n_tokens_logged = 0
        self._since_s: float | None = None  # when the training that the next log tells of began
        super().__init__(*bound.args, **bound.kwargs)
        check_vocabulary(decoder.spec, self.model)
        if pack:
            require_packing(self.model)
        self.add_callback(SamplesPerStep())
        self.decoder = decoder.to(self.args.device)
        if tokenizer is not None and self.is_world_process_zero():
            say_notes(special_token_notes(decoder.store_path, decoder.spec, tokenizer))
        # Makes Trainer count the labels of a step whatever the model's forward takes, and (before 5.23) not divide.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the step's loss: the sum over its valid tokens / num_items_in_batch, times the ranks.

        DDP averages gradients over ranks, hence the factor. Without num_items_in_batch: the mean over the batch.
        """
        self._n_loss_calls += 1
        if self._since_s is None and model.training:
            self._since_s = time.perf_counter()
        teacher = self.decoder(inputs)
        labels_N = next_token_labels(inputs["labels"])
        is_packed = SAMPLE_PLACES in inputs
        others = {name: value for name, value in inputs.items() if name not in TEACHER_COLUMNS and name != "labels"}
        outputs = model(**(model_inputs(inputs) if is_packed else others))
        n_items, n_ranks = self._denominator(num_items_in_batch)
        parts = distillation_loss_parts(
            outputs.logits.flatten(0, 1),
            teacher,
            labels_N,
            temperature=self.temperature,
            alpha=self.alpha,
            tail=self.tail,
            ignore_index=IGNORE_INDEX,
            num_items_in_batch=n_items,
            divergence=self.divergence,
            jsd_beta=self.jsd_beta,
        )
        loss = parts.loss * n_ranks
        if model.training:
            if self._train_parts.empty:
                self._parts_since_step = self.state.global_step
            self._train_parts.add(kl=parts.kl * n_ranks, ce=parts.ce * n_ranks)
            is_token = inputs[SAMPLE_PLACES] >= 0 if is_packed else inputs["attention_mask"]
            self._n_tokens_seen = self._n_tokens_seen + is_token.sum()
        else:
            n_items = (labels_N != IGNORE_INDEX).sum() if n_items is None else n_items
            shares = {"loss": loss.detach(), "kl": parts.kl * n_ranks, "ce": parts.ce * n_ranks}
            self._eval_parts.add(tokens=n_items, **{k: v * n_items for k, v in shares.items()})
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's step. Raises RuntimeError if another class before the mixin computed the loss in its place."""
        n_calls_before = self._n_loss_calls
        loss = super().training_step(*args, **kwargs)
        if self._n_loss_calls == n_calls_before:
            raise RuntimeError(
                f"the distillation loss was not called in a step of {type(self).__name__}: its compute_loss takes the "
                "place of DistillationMixin's and would train on labels alone. Put DistillationMixin before the "
                "Trainer class, and call super().compute_loss where you override it"
            )
        return loss

    def _denominator(self, num_items: torch.Tensor | int | None) -> tuple[torch.Tensor | int | None, int]:
        """What the sum over this process's tokens is divided by, and the ranks over which Trainer counted them."""
        if num_items is None:
            return None, 1
        if self.args.n_gpu > 1:
            # DataParallel: the logits of all devices are gathered here, and the count comes repeated per device.
            total = num_items.reshape(-1)[0] if torch.is_tensor(num_items) else num_items
            return (total if self.args.average_tokens_across_devices else total * self.args.n_gpu), 1
        if not self.args.average_tokens_across_devices:
            return num_items, 1
        return num_items, self.accelerator.num_processes // self.get_tp_size()

    def n_tokens_seen(self) -> int:
        """Tokens (pads not counted) that all ranks have trained on since this was made; every rank must call it."""
        local = torch.as_tensor(self._n_tokens_seen, device=self.accelerator.device).reshape(1)
        return int(self.accelerator.gather(local).sum())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds kl and ce, means over the steps since the last log like Trainer's loss, and the pace, and logs."""
        is_of_training = "loss" in logs and not self._train_parts.empty
        if is_of_training:
            n_steps = max(self.state.global_step - self._parts_since_step, 1)
            parts = self._train_parts.take(self.accelerator)
            logs.update({name: value / n_steps for name, value in parts.items()})
            logs.update(self._pace())
        super().log(logs, *args, **kwargs)
        if is_of_training:
            self._since_s = None if self.control.should_training_stop else time.perf_counter()

    def _pace(self) -> dict[str, float]:
        """Tokens and seconds of training up to here, those of the history before included, and the rate since it."""
        before = next((entry for entry in reversed(self.state.log_history) if "train_s" in entry), {})
        n_tokens_seen = self.n_tokens_seen()  # waits for the device
        n_tokens, self._n_tokens_logged = n_tokens_seen - self._n_tokens_logged, n_tokens_seen
        seconds = max(time.perf_counter() - (self._since_s or 0.0), 1e-9)
        return {
            "n_tokens": before.get("n_tokens", 0) + n_tokens,
            "train_s": before.get("train_s", 0.0) + seconds,
            "tokens_per_s": n_tokens / seconds,
        }

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Trainer's loop, with loss, kl and ce as means over all tokens: Trainer's own is a mean of batch means."""
        self._eval_parts = _Sums()
        start_s = time.perf_counter()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        if self._since_s is not None:
            self._since_s += time.perf_counter() - start_s
        if not self._eval_parts.empty:
            sums = self._eval_parts.take(self.accelerator)
            n_tokens = sums.pop("tokens")
            if n_tokens > 0:
                output.metrics.update({f"{metric_key_prefix}_{k}": v / n_tokens for k, v in sums.items()})
        return output

    def _set_signature_columns_if_needed(self) -> None:
        # The model's forward does not take them, so Trainer would drop them as unused.
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in TEACHER_COLUMNS if name not in self._signature_columns]


class DistillationTrainer(DistillationMixin, Trainer):
    """transformers' Trainer for distillation from a store: see DistillationMixin for the added arguments."""


class _Sums:
    """Named sums of device scalars, read by the host only when they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    @property
    def empty(self) -> bool:
        return not self._sums

    def add(self, **values: torch.Tensor | int) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self, accelerator: Any) -> dict[str, float]:
        """Mean over the ranks of each sum, as a number, and starts again from zero."""
        names = list(self._sums)
        device = accelerator.device
        stacked = torch.stack([torch.as_tensor(self._sums[name], device=device).float() for name in names])
        self._sums = {}
        means = accelerator.gather(stacked.unsqueeze(0)).mean(dim=0).tolist()
        return dict(zip(names, means, strict=True))


def _pad_token_id(tokenizer: Any) -> int:
    # Pads are masked everywhere, so any id in range will do where the tokenizer has none.
    pad = getattr(tokenizer, "pad_token_id", None)
    return 0 if pad is None else pad


def _refuse_other_losses(given: dict[str, Any]) -> None:
    if given.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func would be ignored: DistillationMixin computes the loss; leave it out")
    smoothing = getattr(given.get("args"), "label_smoothing_factor", 0)
    if smoothing:
        raise ValueError(
            f"label_smoothing_factor={smoothing} would be ignored: DistillationMixin computes the loss; set it to 0"
        )
