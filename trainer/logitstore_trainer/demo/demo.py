"""The demo: the whole line on real text, with a teacher made on the spot, in a few minutes on two cores.

Text and teacher are made here; what is done with them is comparison/pipeline.py. The teacher gets more than twice a
student's compute (parameters x tokens). Nothing is chosen after the fact: the recipe was fixed on other
runs, and what a run gives is what it prints. Everything is float32 on the CPU, so that a seed gives a result again.
"""

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from logitstore_trainer.bench.environment import environment, write_json
from logitstore_trainer.comparison import page
from logitstore_trainer.comparison.pipeline import (
    HELD_OUT_STORE,
    STUDENT_FOLDERS,
    TRAIN_STORE,
    ComparisonSettings,
    compare,
)
from logitstore_trainer.comparison.stages import Say, Stages
from logitstore_trainer.demo.models import build_teacher, token_stream, train_teacher, train_tokenizer
from logitstore_trainer.demo.recipe import FULL, Recipe
from logitstore_trainer.demo.text import SplitText, python_documentation, split_pages, transfer_texts, write_texts

MARKER = "demo.json"
_FILES = ("train.jsonl", "heldout.jsonl", "report.html", "results.json")
_FOLDERS = ("teacher", *STUDENT_FOLDERS.values())
_STORES = (TRAIN_STORE, HELD_OUT_STORE)


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
    subtitle = (
        f"Teacher, store and two students made from {results['text']['train_bytes']:,} bytes of Python's documentation "
        f"in {results['seconds']:.0f} s (seed {seed}, recipe {recipe.name})."
    )
    report = page.write_page(
        out / "report.html", results, title="logitstore demo", subtitle=subtitle, how=_how_rows(results)
    )
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
    for name in (*_FILES, *_STORES):
        (out / name).unlink(missing_ok=True)
    sidecars = [f"{store}.{kind}" for store in _STORES for kind in ("tables", "work")]
    for name in (*_FOLDERS, *sidecars):
        shutil.rmtree(out / name, ignore_errors=True)
    write_json(out / MARKER, run)


def _run(out: Path, recipe: Recipe, seed: int, stages: Stages) -> dict[str, Any]:
    text = _write_text(out, recipe, stages)
    trained = _make_teacher(out, recipe, text, seed, stages)
    settings = ComparisonSettings(
        teacher=str(out / "teacher"),
        train_data=out / "train.jsonl",
        held_out_data=out / "heldout.jsonl",
        out=out,
        student=recipe.student,
        steps=recipe.student_steps,
        lr=recipe.student_lr,
        batch_size=recipe.student_batch_size,
        max_length=recipe.length,
        max_train_tokens=recipe.max_tokens,
        max_held_out_tokens=recipe.max_tokens,
        codec_options={"k": recipe.k},
        seed=seed,
    )
    compared = compare(settings, stages)
    return {
        "seed": seed,
        "recipe": asdict(recipe),
        "text": _text_row(text),
        **compared,
        "teacher": {**trained, **compared["teacher"]},
        "stages": stages.rows,
    }


def _write_text(out: Path, recipe: Recipe, stages: Stages) -> SplitText:
    with stages.stage("text") as row:
        text = split_pages(python_documentation())
        write_texts(out / "train.jsonl", transfer_texts(text.train, recipe.transfer_share))
        write_texts(out / "heldout.jsonl", text.held_out)
        row["what"] = (
            f"{text.n_paragraphs:,} paragraphs of Python's documentation, {text.n_repeats:,} repeats dropped: "
            f"{text.train_bytes:,} bytes for the teacher, {recipe.transfer_share:.0%} of their pages for the students, "
            f"{text.held_out_bytes:,} bytes held out"
        )
    return text


def _make_teacher(out: Path, recipe: Recipe, text: SplitText, seed: int, stages: Stages) -> dict[str, Any]:
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
    return {
        "n_parameters": n_parameters,
        "n_tokens_trained": trained.n_tokens,
        "train_seconds": trained.seconds,
        "train_tokens_per_s": trained.n_tokens / trained.seconds,
        "ce_by_step": [list(point) for point in trained.loss_by_step],
    }


def _text_row(text: SplitText) -> dict[str, int]:
    return {
        "n_paragraphs": text.n_paragraphs,
        "n_repeats": text.n_repeats,
        "train_bytes": text.train_bytes,
        "held_out_bytes": text.held_out_bytes,
    }


def _how_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    recipe, text = results["recipe"], results["text"]
    training = recipe["training"]
    return [
        ("text", f"{text['n_paragraphs']:,} distinct paragraphs ({text['n_repeats']:,} repeats dropped)"),
        ("students' text", f"{recipe['transfer_share']:.0%} of the teacher's pages, chosen by the page's SHA-256"),
        ("held out", f"{text['held_out_bytes']:,} bytes, chosen by the SHA-256 of the paragraph"),
        ("tokenizer", f"byte-level BPE of {recipe['vocab_size']:,} tokens, trained on the training text"),
        ("teacher", "Llama, " + ", ".join(f"{name} {value}" for name, value in recipe["teacher"].items())),
        (
            "teacher's training",
            f"{training['steps']:,} steps of {training['batch_size']} x {training['length']} tokens, "
            f"learning rate {training['lr']:g}",
        ),
        ("students", recipe["student"]),
        (
            "students' training",
            f"{recipe['student_steps']:,} steps of {recipe['student_batch_size']} samples of at most "
            f"{recipe['length']} tokens, learning rate {recipe['student_lr']:g}",
        ),
    ]
