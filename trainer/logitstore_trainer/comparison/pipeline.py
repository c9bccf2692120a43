"""From a teacher and two texts to a store and two measured students: the part that every comparison shares.

It decides what is compared: two students of equal size, weights, batches and steps, of which one learns from the
labels alone and one from the store with the loss 0.7 * T^2 * KL + 0.3 * cross-entropy, at T = 2 unless it is said.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import logitstore
from logitstore_trainer.collect.collect import collect
from logitstore_trainer.collect.settings import CollectSettings
from logitstore_trainer.collect.teacher import load_teacher
from logitstore_trainer.comparison.measure import fidelity, held_out_metrics
from logitstore_trainer.comparison.stages import Stages
from logitstore_trainer.progress import Progress
from logitstore_trainer.student import build_student
from logitstore_trainer.train import TrainConfig, train

ALPHAS = {"labels": 0.0, "distilled": 0.7}
TRAIN_STORE, HELD_OUT_STORE = "teacher_logits.parquet", "heldout_logits.parquet"
STUDENT_FOLDERS = {name: f"student-{name}" for name in ALPHAS}


@dataclass(frozen=True)
class ComparisonSettings:
    """teacher: a folder or .gguf file. train_data, held_out_data: data sets as `logitstore collect` takes them. out: a
    folder. student: as build_student takes it; steps of batch_size samples each, lr: peak learning rate, the same for
    both. max_train_tokens, max_held_out_tokens: how much is collected, None for all. max_length: tokens of a sample.
    fidelity_rows: on how many held-out rows the store is compared with its teacher, None for all. temperature: of the
    distilled student's loss."""

    teacher: str
    train_data: Path
    held_out_data: Path
    out: Path
    student: str
    steps: int
    lr: float
    batch_size: int = 8
    max_length: int | None = None
    max_train_tokens: int | None = None
    max_held_out_tokens: int | None = None
    fidelity_rows: int | None = None
    codec_options: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 2.0
    seed: int = 0


def compare(settings: ComparisonSettings, stages: Stages) -> dict[str, Any]:
    """Collects, verifies, trains and measures: {"temperature", "store", "teacher", "students", "label_probability"}.

    Stores that are there already, whole or in part, are gone on with. Raises what its stages raise, and
    CorruptionError if a store that was just written does not verify.
    """
    store = _collect(settings, settings.train_data, TRAIN_STORE, settings.max_train_tokens, "collect", stages)
    held_out = _collect(
        settings, settings.held_out_data, HELD_OUT_STORE, settings.max_held_out_tokens, "collect held-out", stages
    )
    label_probability = _verify(store, stages)
    runs = {name: _train_student(settings, name, store, stages) for name in ALPHAS}
    teacher = load_teacher(settings.teacher, dtype="float32", device="cpu").model
    with stages.stage("compare store") as row:
        kept = fidelity(held_out, teacher, max_rows=settings.fidelity_rows)
        row |= {"tokens": held_out.n_tokens, "what": "KL to the teacher's whole logits, held-out text, T = 1 and 2"}
    with stages.stage("evaluate") as row:
        models = {"teacher": teacher}
        models |= {name: build_student(str(settings.out / STUDENT_FOLDERS[name]), held_out).model for name in ALPHAS}
        measured = {
            name: held_out_metrics(model, teacher, held_out, batch_size=settings.batch_size)
            for name, model in models.items()
        }
        row |= {"tokens": len(models) * held_out.n_tokens, "what": "teacher and students on held-out text"}
    n_teacher = sum(parameter.numel() for parameter in teacher.parameters())
    return {
        "temperature": settings.temperature,
        "label_probability": label_probability,
        "store": _store_row(store, kept),
        "teacher": {"n_parameters": n_teacher, **measured["teacher"]},
        "students": {name: {**runs[name], **measured[name]} for name in ALPHAS},
    }


def _collect(
    settings: ComparisonSettings, data: Path, name: str, max_tokens: int | None, stage: str, stages: Stages
) -> logitstore.LogitStore:
    with stages.stage(stage) as row:
        wanted = CollectSettings(
            teacher=settings.teacher,
            dataset=data,
            out=settings.out / name,
            codec_options=settings.codec_options,
            dtype="float32",
            device="cpu",
            max_length=settings.max_length,
            max_tokens=max_tokens,
        )
        collect(wanted, say=lambda line: None)
        store = logitstore.open(wanted.out)
        row["tokens"] = store.n_tokens
        row["what"] = (
            f"{len(store):,} samples, {store.blob_bytes / store.n_present_rows:.1f} bytes/token "
            f"(all {store.spec.vocab_size:,} logits in fp16: {2 * store.spec.vocab_size:,})"
        )
    return store


def _verify(store: logitstore.LogitStore, stages: Stages) -> dict[str, float]:
    """Mean stored probability of the token at each shift from the label."""
    with stages.stage("verify") as row:
        with Progress(total=len(store), desc="verify", unit="samples") as display:
            report = logitstore.verify(store.path, display.update)
        if not report.ok:
            raise logitstore.CorruptionError(f"{store.path} does not verify: {report.faults[0]}")
        row["tokens"] = store.n_tokens
        row["what"] = f"{report.n_checked:,} samples, no fault"
    return {f"{shift:+d}": mean for shift, mean in report.label_probability.items()}


def _train_student(
    settings: ComparisonSettings, name: str, store: logitstore.LogitStore, stages: Stages
) -> dict[str, Any]:
    with stages.stage(f"student, {name}") as row:
        folder = settings.out / STUDENT_FOLDERS[name]
        config = TrainConfig(
            student=settings.student,
            data=[str(store.path)],
            out=str(folder),
            temperature=settings.temperature,
            alpha=ALPHAS[name],
            steps=settings.steps,
            batch_size=settings.batch_size,
            lr=settings.lr,
            dtype="float32",
            device="cpu",
            seed=settings.seed,
            save_every=0,
            resume=folder.exists(),
        )
        metrics = train(config)
        row["tokens"] = metrics["n_tokens"]
        row["what"] = f"{metrics['n_parameters']:,} parameters, {metrics['steps']:,} steps, alpha {config.alpha:g}"
    return {
        "alpha": config.alpha,
        "n_parameters": metrics["n_parameters"],
        "n_tokens_trained": metrics["n_tokens"],
        "train_seconds": metrics["train_s"],
        "train_tokens_per_s": metrics["tokens_per_s"],
        "ce_by_step": [[entry["step"], entry["ce"]] for entry in metrics["history"] if "ce" in entry],
    }


def _store_row(store: logitstore.LogitStore, kept: dict[str, dict[str, float | None]]) -> dict[str, Any]:
    return {
        "codec": dict(store.spec.codec.config),
        "n_samples": len(store),
        "n_tokens": store.n_tokens,
        "n_present_rows": store.n_present_rows,
        "bytes_per_token": store.blob_bytes / store.n_present_rows,
        "container_bytes_per_token": store.file_bytes / store.n_present_rows,
        "fp16_bytes_per_token": 2 * store.spec.vocab_size,
        **kept["store"],
        **{f"fp16_{name}": value for name, value in kept["fp16"].items()},
    }
