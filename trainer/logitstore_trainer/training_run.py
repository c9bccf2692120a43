"""One run of the bundled trainer, on transformers' Trainer: from a store and a student to a folder with the model.

Weights and optimizer are float32; `bf16` means autocast. Interrupted at any instant, the run continues from its last
complete checkpoint and ends in the weights it would have had (bit for bit on a CPU): order of samples, optimizer,
schedule and random state are restored. What has been trained since that checkpoint is trained again. With another
number of processes the steps take the same samples (step_shape.py); only dropout draws anew.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from logitstore_kernels.divergences import check_divergence_of_tail
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

import logitstore
from logitstore_trainer import checkpoints
from logitstore_trainer.bench.environment import environment
from logitstore_trainer.decoder import decoder_for_dataset, fitting_tail
from logitstore_trainer.evaluate import evaluate_student
from logitstore_trainer.finite_loss import RequireFiniteLoss
from logitstore_trainer.held_out import split_by_source_row
from logitstore_trainer.hf_trainer import DistillationTrainer
from logitstore_trainer.model_card import CARD_NAME, model_card
from logitstore_trainer.new_folder import removed_if_left_empty
from logitstore_trainer.recipe import RECIPE_NAME, recipe_text, step_note
from logitstore_trainer.run_report import REPORT_NAME, write_run_report
from logitstore_trainer.step_shape import StepShape, shared_step
from logitstore_trainer.student import Student, build_student
from logitstore_trainer.train import TrainConfig
from logitstore_trainer.train_progress import ReportProgress
from logitstore_trainer.transformers_display import transformers_display_kept

# What may change between a run and its resumption without changing the weights.
_FREE_SETTINGS = ("out", "resume", "device", "save_every", "eval_every", "log_every", "report_to", "workers")
_FROM_SCRATCH_LR, _LOADED_LR = 1e-3, 5e-5


def run_training(config: TrainConfig, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """The metrics of the run that `config` asks for; see `logitstore_trainer.train.train`."""
    _check_device(config)
    reporters = _reporters(config.report_to)
    with transformers_display_kept(), removed_if_left_empty(Path(config.out)):
        return _run(config, [*reporters, *callbacks])


def _run(config: TrainConfig, callbacks: Sequence[Any]) -> dict[str, Any]:
    out = Path(config.out)
    train_set, eval_set, stores = _open_data(config)
    tail = fitting_tail(decoder_for_dataset(train_set), config.tail, config.temperature)
    check_divergence_of_tail(config.loss, tail)
    shape = _step_shape(config, out)
    identity = {**_identity(config, train_set, stores[0]), "samples_per_step": shape.n_samples}
    is_main = int(os.environ.get("RANK", "0")) == 0
    if is_main:
        checkpoints.check_folder(out, identity, resume=config.resume)
    finished = checkpoints.read_metrics(out)
    if finished is not None:
        print(f"{out} holds this run, finished: nothing to do", file=sys.stderr)
        return finished
    if is_main:
        checkpoints.check_last_checkpoint(out)
    student = build_student(config.student, stores[0], seed=config.seed)
    trainer = _make_trainer(config, shape, student, train_set, eval_set, callbacks)
    if is_main:
        checkpoints.start_folder(out, identity)
        checkpoints.write_text(out / RECIPE_NAME, recipe_text(config, _what_was_chosen(config, trainer, shape)))
    try:
        with checkpoints.write_errors_named(out):
            metrics = _train(config, student, trainer, eval_set, out)
            if is_main:
                _save(metrics, student, trainer, stores, out)
            return metrics
    except KeyboardInterrupt as interrupt:
        checkpoints.remove_partial(out)
        kept = checkpoints.last_complete_checkpoint(out)
        state = f"{kept.name} is kept" if kept else "no checkpoint had been written yet"
        raise KeyboardInterrupt(
            f"interrupted at step {trainer.state.global_step}, {state}; --resume continues"
        ) from interrupt


def _train(
    config: TrainConfig, student: Student, trainer: DistillationTrainer, eval_set: Any, out: Path
) -> dict[str, Any]:
    checkpoint = checkpoints.last_complete_checkpoint(out)
    start_s = time.perf_counter()
    state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if state is not None and state.global_step >= state.max_steps:
        # Trainer would take one more step before it noticed.
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return _metrics(config, student, trainer, eval_set, wall_s=time.perf_counter() - start_s)


def _save(
    metrics: dict[str, Any],
    student: Student,
    trainer: DistillationTrainer,
    stores: list[logitstore.LogitStore],
    out: Path,
) -> None:
    """Writes what a finished run leaves; the metrics last, since they mark it as finished."""
    checkpoints.save_final_model(trainer.accelerator.unwrap_model(trainer.model), student.tokenizer, out)
    recipe = (out / RECIPE_NAME).read_text(encoding="utf-8")
    write_run_report(out / REPORT_NAME, metrics, recipe=recipe, environment=environment())
    checkpoints.write_text(out / CARD_NAME, model_card(metrics, stores, from_scratch=student.from_scratch))
    checkpoints.write_json(out / checkpoints.METRICS_NAME, metrics)


def _open_data(config: TrainConfig) -> tuple[Any, Any, list[logitstore.LogitStore]]:
    """The training set, the held-out set or None, and the stores that they are of."""
    stores = [logitstore.open(path) for path in config.data]
    train_set = stores[0] if len(stores) == 1 else torch.utils.data.ConcatDataset(stores)
    eval_set = logitstore.open(config.eval_data) if config.eval_data else None
    if config.eval_fraction:
        split = split_by_source_row(stores, config.eval_fraction, config.seed)
        eval_set = torch.utils.data.Subset(train_set, split.held_out)
        train_set = torch.utils.data.Subset(train_set, split.train)
    if len(train_set) == 0:
        raise ValueError(f"{' and '.join(config.data)} leaves no sample to train on")
    _require_learned_tokens(train_set, f"{' and '.join(config.data)}: nothing to train on")
    if eval_set is not None:
        source = f"--eval-data {config.eval_data}" if config.eval_data else f"--eval-fraction {config.eval_fraction}"
        _require_learned_tokens(eval_set, f"{source}: nothing to measure on")
    return train_set, eval_set, stores


def _require_learned_tokens(dataset: Any, problem: str) -> None:
    """Raises ValueError unless a token of the dataset is to be learned; reads samples up to the first such one."""
    samples = (dataset[i] for i in range(len(dataset)))
    if not any((sample.loss_mask[1:] & sample.targets.present).any() for sample in samples):
        raise ValueError(f"{problem}, none of the tokens of {len(dataset)} samples is to be learned")


def asked_step(config: TrainConfig) -> StepShape:
    """The step of a new run with these settings, started like this process."""
    return StepShape(config.batch_size, config.grad_accum, _n_processes(config))


def _step_shape(config: TrainConfig, out: Path) -> StepShape:
    """How the processes of this run share a step: as `config` says, or where a run goes on, the same samples a step.

    Raises ValueError where that many processes cannot share them.
    """
    asked = asked_step(config)
    begun = checkpoints.recorded_samples_per_step(out) if config.resume else None
    if begun is None or begun == asked.n_samples:
        return asked
    shape = shared_step(begun, asked.n_processes, config.batch_size)
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"{out} takes steps of {begun} samples: {shape.n_processes} processes share them in {shape.grad_accum} "
            f"batches of {shape.batch_size} each",
            file=sys.stderr,
        )
    return shape


def _n_processes(config: TrainConfig) -> int:
    """Processes, or the GPUs over which transformers spreads the batches of a single one."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return max(torch.cuda.device_count(), 1) if config.device in ("auto", "cuda") else 1


def _make_trainer(
    config: TrainConfig,
    shape: StepShape,
    student: Student,
    train_set: Any,
    eval_set: Any,
    callbacks: Sequence[Any],
) -> DistillationTrainer:
    lr = config.lr if config.lr is not None else (_FROM_SCRATCH_LR if student.from_scratch else _LOADED_LR)
    args = TrainingArguments(
        output_dir=config.out,
        num_train_epochs=config.epochs,
        max_steps=config.steps if config.steps is not None else -1,
        per_device_train_batch_size=shape.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=shape.grad_accum,
        learning_rate=lr,
        warmup_steps=0 if config.steps == 1 else config.warmup,  # transformers' first step of a warm-up has lr 0
        lr_scheduler_type="cosine",
        bf16=_use_bf16(config),
        use_cpu=config.device == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 1,
        save_total_limit=2,
        eval_strategy="steps" if eval_set is not None and config.eval_every else "no",
        eval_steps=config.eval_every or None,
        prediction_loss_only=True,
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=torch.cuda.is_available() and config.device != "cpu",
        disable_tqdm=True,
        log_level="error",  # its warnings name the tied head as missing from every checkpoint
        report_to="none",  # _reporters are among the callbacks
    )
    at_the_end = [_EvaluateLastStep()] if eval_set is not None else []
    trainer = DistillationTrainer(
        model=student.model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=student.tokenizer,
        temperature=config.temperature,
        alpha=config.alpha,
        tail=config.tail,
        divergence=config.loss,
        pack=config.pack,
        jsd_beta=config.jsd_beta,
        callbacks=[RequireFiniteLoss(), checkpoints.MarkComplete(), *at_the_end, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ReportProgress(trainer))
    return trainer


def _metrics(
    config: TrainConfig, student: Student, trainer: DistillationTrainer, eval_set: Any, *, wall_s: float
) -> dict[str, Any]:
    history = trainer.state.log_history
    logged = [entry for entry in history if "kl" in entry]
    last = logged[-1] if logged else {}
    n_tokens, train_s = last.get("n_tokens", 0), last.get("train_s", 0.0)
    args = trainer.args
    metrics = {
        **{name: last.get(name) for name in ("loss", "kl", "ce")},
        "steps": trainer.state.global_step,
        "epoch": trainer.state.epoch,
        "n_parameters": sum(parameter.numel() for parameter in student.model.parameters()),
        "samples_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "tail": trainer.tail,
        "peak_lr": args.learning_rate,
        "n_tokens": n_tokens,
        "train_s": train_s,
        "tokens_per_s": n_tokens / train_s if train_s else 0.0,
        "wall_s": wall_s,
    }
    if eval_set is not None:
        evaluated = _last_evaluation(history, trainer.state.global_step) or trainer.evaluate()
        metrics.update({name: evaluated[name] for name in ("eval_loss", "eval_kl", "eval_ce")})
        held_out = evaluate_student(trainer.model, eval_set, trainer.decoder, batch_size=config.batch_size)
        metrics["held_out"] = held_out.to_json()
    return {**metrics, "config": {**asdict(config), "data": list(config.data)}, "history": history}


class _EvaluateLastStep(TrainerCallback):
    """Held-out figures after the last step are taken within the training: some reporters close their run behind it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop:
            control.should_evaluate = True


def _last_evaluation(history: Sequence[dict[str, Any]], step: int) -> dict[str, Any] | None:
    """The held-out figures after that step, None where it was not evaluated."""
    return next((entry for entry in reversed(history) if "eval_kl" in entry and entry["step"] == step), None)


def _what_was_chosen(config: TrainConfig, trainer: DistillationTrainer, shape: StepShape) -> dict[str, str]:
    """What the settings that were left to the trainer came to, by name, and how large the steps are."""
    chosen = {"tail": trainer.tail} if config.tail is None else {}
    if config.lr is None:
        chosen["lr"] = f"{trainer.args.learning_rate:g}"
    if config.dtype == "auto":
        chosen["dtype"] = "bfloat16" if trainer.args.bf16 else "float32"
    if config.device == "auto":
        chosen["device"] = trainer.args.device.type
    notes = {name: f"here {value}" for name, value in chosen.items()}
    return {**notes, "batch_size": step_note(shape.n_samples, shape.n_processes)}


def _identity(config: TrainConfig, train_set: Any, store: logitstore.LogitStore) -> dict[str, Any]:
    settings = {key: value for key, value in asdict(config).items() if key not in _FREE_SETTINGS}
    spec = store.spec
    return {
        **settings,
        "data": [str(path) for path in config.data],
        "n_samples": len(train_set),
        "teacher": spec.teacher,
        "vocab_size": spec.vocab_size,
        "tokenizer_sha256": spec.tokenizer_sha256,
        "dataset_sha256": spec.dataset_sha256,
        "codec": dict(spec.codec.config),
    }


def _reporters(report_to: str) -> list[TrainerCallback]:
    """transformers' callbacks that --report-to names, made before anything slow. Raises ValueError if it cannot be."""
    names: str | list[str] = report_to if "," not in report_to else [name.strip() for name in report_to.split(",")]
    try:
        return [callback() for callback in get_reporting_integration_callbacks(names)]
    except (ValueError, RuntimeError, ImportError) as error:
        first_line = str(error).split("\n")[0].rstrip(". ")
        raise ValueError(f"--report-to {report_to} cannot be used: {first_line}; name another, or none") from None


def _check_device(config: TrainConfig) -> None:
    available = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if config.dtype == "bfloat16" and config.device == "auto" and not torch.cuda.is_available():
        raise ValueError("--dtype bfloat16 without a GPU: say --device cpu if you mean it (most CPUs are slower in it)")
    if not available[config.device]:
        raise ValueError(f"--device {config.device}: this PyTorch sees no such device here; use --device cpu or auto")


def _use_bf16(config: TrainConfig) -> bool:
    # On a CPU without bf16 units autocast is several times slower than float32, so auto means CUDA only.
    if config.dtype == "auto":
        return config.device in ("auto", "cuda") and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return config.dtype == "bfloat16"
