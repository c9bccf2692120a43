"""The demo: the whole line on real text, with a teacher made on the spot, in a few minutes on two cores.

It decides what is compared: two students of equal size, weights, batches and steps, of which one learns from the
labels alone and one from the store with the loss 0.7 * T^2 * KL + 0.3 * cross-entropy at T = 2. The teacher gets more
than twice a student's compute (parameters x tokens). Nothing is chosen after the fact: the recipe was fixed on other
runs, and what a run gives is what it prints. Everything is float32 on the CPU, so that a seed gives a result again.
"""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import logitstore
from logitstore_trainer.bench.environment import environment, write_json
from logitstore_trainer.collect.collect import collect
from logitstore_trainer.collect.settings import CollectSettings
from logitstore_trainer.demo import page
from logitstore_trainer.demo.measure import fidelity, held_out_metrics
from logitstore_trainer.demo.models import build_teacher, token_stream, train_teacher, train_tokenizer
from logitstore_trainer.demo.recipe import ALPHAS, FULL, TEMPERATURE, Recipe
from logitstore_trainer.demo.stages import Say, Stages
from logitstore_trainer.demo.text import SplitText, python_documentation, split_pages, write_texts
from logitstore_trainer.progress import Progress
from logitstore_trainer.student import build_student
from logitstore_trainer.train import TrainConfig, train

MARKER = "demo.json"
_FILES = ("train.jsonl", "heldout.jsonl", "report.html", "results.json")
_FOLDERS = ("teacher", "student-labels", "student-distilled")
_STORES = {"train.jsonl": "teacher_logits.parquet", "heldout.jsonl": "heldout_logits.parquet"}


def run_demo(out: Path, recipe: Recipe = FULL, *, seed: int = 0, say: Say = print) -> dict[str, Any]:
    """Runs everything, writes the files into `out` and returns what is in its results.json.

    Raises ValueError if `out` holds something that is not an earlier demo, OSError where it cannot be written, and
    CorruptionError if the store that was just written does not verify.
    """
    start_s = time.perf_counter()
    prepare_folder(out, {"recipe": recipe.name, "seed": seed})
    stages = Stages(say)
    try:
        results = _run(out, recipe, seed, stages)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command starts again, and replaces {out}") from None
    results["seconds"] = time.perf_counter() - start_s
    results["environment"] = environment()
    write_json(out / "results.json", results)
    report = page.write_page(out / "report.html", results)
    say("")
    say(page.table_text(results))
    say("")
    say(page.verdict(results))
    say(f"{results['seconds']:.0f} s in all; report: {report}")
    return results


def prepare_folder(out: Path, run: dict[str, Any]) -> None:
    """Makes `out` ready: what an earlier demo left is removed, by name, and the marker of this one is written.

    Raises ValueError for a folder with files and no marker: it is somebody's, not a demo's.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, expected a folder; choose another")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise ValueError(f"--out {out} is not empty and not from an earlier demo; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in (*_FILES, *_STORES.values()):
        (out / name).unlink(missing_ok=True)
    sidecars = [f"{store}.{kind}" for store in _STORES.values() for kind in ("tables", "work")]
    for name in (*_FOLDERS, *sidecars):
        shutil.rmtree(out / name, ignore_errors=True)
    write_json(out / MARKER, run)


def _run(out: Path, recipe: Recipe, seed: int, stages: Stages) -> dict[str, Any]:
    text = _write_text(out, stages)
    teacher, teacher_row = _make_teacher(out, recipe, text, seed, stages)
    store = _collect(out, "train.jsonl", "collect", recipe, stages)
    held_out = _collect(out, "heldout.jsonl", "collect held-out", recipe, stages)
    _verify(store, stages)
    runs = {name: _train_student(out, name, store, recipe, seed, stages) for name in ALPHAS}
    with stages.stage("compare store") as row:
        kept = fidelity(held_out, teacher)
        row |= {"tokens": held_out.n_tokens, "what": "KL to the teacher's whole logits, held-out text, T = 1 and 2"}
    with stages.stage("evaluate") as row:
        models = {"teacher": teacher, **{name: _load_student(out, name, held_out) for name in ALPHAS}}
        measured = {name: held_out_metrics(model, teacher, held_out) for name, model in models.items()}
        row |= {"tokens": len(models) * held_out.n_tokens, "what": "teacher and students on held-out text"}
    return {
        "seed": seed,
        "recipe": asdict(recipe),
        "temperature": TEMPERATURE,
        "text": _text_row(text),
        "store": _store_row(store, kept),
        "teacher": {**teacher_row, **measured["teacher"]},
        "students": {name: {**runs[name], **measured[name]} for name in ALPHAS},
        "stages": stages.rows,
    }


def _write_text(out: Path, stages: Stages) -> SplitText:
    with stages.stage("text") as row:
        text = split_pages(python_documentation())
        write_texts(out / "train.jsonl", text.train)
        write_texts(out / "heldout.jsonl", text.held_out)
        row["what"] = (
            f"{text.n_paragraphs:,} paragraphs of Python's documentation, {text.n_repeats:,} repeats dropped: "
            f"{text.train_bytes:,} bytes to learn, {text.held_out_bytes:,} held out"
        )
    return text


def _make_teacher(out: Path, recipe: Recipe, text: SplitText, seed: int, stages: Stages) -> tuple[Any, dict[str, Any]]:
    with stages.stage("tokenizer") as row:
        tokenizer = train_tokenizer(text.train, recipe.vocab_size)
        stream = token_stream(text.train, tokenizer)
        row["what"] = f"{len(tokenizer):,} tokens of byte-level BPE, the text is {len(stream):,} of them"
    with stages.stage("teacher") as row:
        model = build_teacher(recipe.teacher, tokenizer, max_length=recipe.length, seed=seed)
        trained = train_teacher(model, stream, recipe.training, seed=seed)
        model.save_pretrained(str(out / "teacher"))
        tokenizer.save_pretrained(str(out / "teacher"))
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        row["tokens"] = trained.n_tokens
        row["what"] = f"{n_parameters:,} parameters, {recipe.training.steps:,} steps"
    return model, {
        "n_parameters": n_parameters,
        "n_tokens_trained": trained.n_tokens,
        "train_seconds": trained.seconds,
        "train_tokens_per_s": trained.n_tokens / trained.seconds,
        "ce_by_step": [list(point) for point in trained.loss_by_step],
    }


def _collect(out: Path, texts: str, stage: str, recipe: Recipe, stages: Stages) -> logitstore.LogitStore:
    with stages.stage(stage) as row:
        settings = CollectSettings(
            teacher=str(out / "teacher"),
            dataset=out / texts,
            out=out / _STORES[texts],
            codec_options={"k": recipe.k},
            dtype="float32",
            device="cpu",
            max_length=recipe.length,
            max_tokens=recipe.max_tokens,
        )
        collect(settings, say=lambda line: None)
        store = logitstore.open(settings.out)
        row["tokens"] = store.n_tokens
        row["what"] = (
            f"{len(store):,} samples, {store.blob_bytes / store.n_present_rows:.1f} bytes/token "
            f"(all {store.spec.vocab_size:,} logits in fp16: {2 * store.spec.vocab_size:,})"
        )
    return store


def _verify(store: logitstore.LogitStore, stages: Stages) -> None:
    with stages.stage("verify") as row:
        with Progress(total=len(store), desc="verify", unit="samples") as display:
            report = logitstore.verify(store.path, display.update)
        if not report.ok:
            raise logitstore.CorruptionError(f"{store.path} does not verify: {report.faults[0]}")
        row["tokens"] = store.n_tokens
        row["what"] = f"{report.n_checked:,} samples, no fault"


def _train_student(
    out: Path, name: str, store: logitstore.LogitStore, recipe: Recipe, seed: int, stages: Stages
) -> dict[str, Any]:
    with stages.stage(f"student, {name}") as row:
        config = TrainConfig(
            student=recipe.student,
            data=[str(store.path)],
            out=str(out / f"student-{name}"),
            temperature=TEMPERATURE,
            alpha=ALPHAS[name],
            steps=recipe.student_steps,
            batch_size=recipe.student_batch_size,
            lr=recipe.student_lr,
            dtype="fp32",
            device="cpu",
            seed=seed,
            save_every=0,
        )
        metrics = train(config)
        row["tokens"] = metrics["n_tokens"]
        row["what"] = f"{metrics['n_parameters']:,} parameters, {metrics['steps']:,} steps, alpha {config.alpha:g}"
    return {
        "alpha": config.alpha,
        "n_parameters": metrics["n_parameters"],
        "n_tokens_trained": metrics["n_tokens"],
        "train_seconds": metrics["wall_s"],
        "train_tokens_per_s": metrics["tokens_per_s"],
        "ce_by_step": [[entry["step"], entry["ce"]] for entry in metrics["history"] if "ce" in entry],
    }


def _load_student(out: Path, name: str, store: logitstore.LogitStore) -> Any:
    return build_student(str(out / f"student-{name}"), store).model


def _text_row(text: SplitText) -> dict[str, int]:
    return {
        "n_paragraphs": text.n_paragraphs,
        "n_repeats": text.n_repeats,
        "train_bytes": text.train_bytes,
        "held_out_bytes": text.held_out_bytes,
    }


def _store_row(store: logitstore.LogitStore, kept: dict[str, dict[str, float | None]]) -> dict[str, Any]:
    return {
        "codec": json.loads(json.dumps(dict(store.spec.codec.config))),
        "n_samples": len(store),
        "n_tokens": store.n_tokens,
        "n_present_rows": store.n_present_rows,
        "bytes_per_token": store.blob_bytes / store.n_present_rows,
        "container_bytes_per_token": store.file_bytes / store.n_present_rows,
        "fp16_bytes_per_token": 2 * store.spec.vocab_size,
        **kept["store"],
        **{f"fp16_{name}": value for name, value in kept["fp16"].items()},
    }
