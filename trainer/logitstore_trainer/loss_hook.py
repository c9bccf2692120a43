"""One line that makes a finished Trainer distil: the model's loss function is replaced, and a guard watches that it is.

transformers' models hand what their forward does not know on to `model.loss_function`, the teacher's columns among it.
Trainers that compute the loss elsewhere never call it and train on labels alone without a word (TRL's SFTTrainer does):
the guard raises before the first optimizer step. For those, and for stores of predicted tails, whose decoder needs the
tokens, there is DistillationMixin.
"""

from functools import partial
from typing import Any

from logitstore_kernels.divergences import FORWARD_KL
from torch import Tensor
from transformers import Trainer, TrainerCallback

from logitstore_trainer.batch_loss import DistillationLoss
from logitstore_trainer.collator import collate
from logitstore_trainer.packing import collate_packed, require_packing
from logitstore_trainer.special_tokens import say_notes, special_token_notes
from logitstore_trainer.step_shape import SamplesPerStep
from logitstore_trainer.student import check_tokenizer, check_vocabulary


def distill(
    trainer: Trainer,
    *,
    temperature: float = 2.0,
    alpha: float = 0.7,
    tail: str | None = None,
    divergence: str = FORWARD_KL,
    jsd_beta: float = 0.5,
    pack: bool = False,
) -> DistillationLoss:
    """Makes a Trainer over a store learn from its teacher; mutates trainer and its model. Call it before train().

    The model's loss function, the collator and remove_unused_columns are replaced. Arguments as in DistillationLoss;
    pack: several samples in a row where they fit, for which the model's cache is switched off.

    Raises what DistillationLoss raises, SpecMismatchError for another tokenizer or a narrower vocabulary, and
    ValueError for a store with predicted tails and for a model that cannot be packed. At the first step RuntimeError,
    if the loss was not called, and before it SpecMismatchError for a checkpoint whose steps take another number of
    samples.
    """
    datasets = [data for data in (trainer.train_dataset, trainer.eval_dataset) if data is not None]
    loss = DistillationLoss(
        datasets, temperature=temperature, alpha=alpha, tail=tail, divergence=divergence, jsd_beta=jsd_beta
    )
    spec = loss.decoder.spec
    if spec.codec.tail == "predicted":
        raise ValueError(
            "a model's loss function does not see the tokens that predicted tails are decoded with: "
            "use logitstore_trainer.DistillationTrainer for this store"
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_vocabulary(spec, model)
    if trainer.processing_class is not None:
        check_tokenizer(spec, trainer.processing_class)
        if trainer.is_world_process_zero():
            say_notes(special_token_notes(loss.decoder.store_path, spec, trainer.processing_class))
    if pack:
        require_packing(model)
        model.config.use_cache = False  # with a cache the samples of a row would see each other
    pad_token_id = getattr(trainer.processing_class, "pad_token_id", None) or 0

    def loss_function(*, logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **columns: Any) -> Tensor:
        return loss(logits, {**columns, "labels": labels}, num_items_in_batch)

    model.loss_function = loss_function
    trainer.data_collator = partial(collate_packed if pack else collate, pad_token_id=pad_token_id)
    trainer.args.remove_unused_columns = False
    trainer.add_callback(LossGuard(loss))
    trainer.add_callback(SamplesPerStep())
    return loss


class LossGuard(TrainerCallback):
    """Raises RuntimeError before the first optimizer step of a run if `loss` was not called since the run began."""

    def __init__(self, loss: DistillationLoss) -> None:
        self._loss, self._n_calls_before, self._passed = loss, 0, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._n_calls_before, self._passed = self._loss.n_calls, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._passed and self._loss.n_calls == self._n_calls_before:
            raise RuntimeError(
                "the distillation loss was not called in the first step: this trainer does not use model.loss_function "
                "and would train on labels alone. Use class MyTrainer(DistillationMixin, ...) from "
                "logitstore_trainer.hf_trainer"
            )
        self._passed = True
