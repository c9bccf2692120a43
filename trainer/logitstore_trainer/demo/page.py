"""What the demo shows: one table for the terminal, one sentence of verdict, and the report with its plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logitstore_trainer.bench.environment import environment_rows
from logitstore_trainer.report import (
    Paragraph,
    Plot,
    Section,
    Series,
    Table,
    bar_plot,
    format_table,
    line_plot,
    write_report,
)

HEADERS = ("held-out text", "fp16 logits", "store", "teacher", "labels only", "distilled")
_MODELS = ("teacher", "labels", "distilled")
_MODEL_NAMES = {"teacher": "teacher", "labels": "labels only", "distilled": "distilled"}
_CURVE_POINTS = 40
_MEANING = (
    "KL(teacher || column) is that of the column's next-token distribution, over the whole vocabulary and without the "
    "factor T^2; for the students it is taken against the live teacher. fp16 logits: all of them kept, the largest and "
    "simplest store. Bytes/token: blobs alone, per stored distribution. Compute: parameters x tokens trained on, in "
    "units of a student's."
)


def results_rows(results: dict[str, Any]) -> list[list[Any]]:
    """The rows of the one table, under HEADERS; None where a column has no such number."""
    store, models = results["store"], _models(results)
    student_compute = _compute(models["labels"])

    def of_models(label: str, values: Sequence[Any]) -> list[Any]:
        return [label, None, None, *values]

    return [
        ["bytes/token", store["fp16_bytes_per_token"], round(store["bytes_per_token"], 1), None, None, None],
        [
            "KL(teacher || .) at T = 1 (nats)",
            *(_small(store[name]) for name in ("fp16_kl_t1", "kl_t1")),
            None,
            *(_fixed(models[name]["kl_teacher_nats"]) for name in ("labels", "distilled")),
        ],
        ["KL(teacher || .) at T = 2 (nats)", *(_small(store[n]) for n in ("fp16_kl_t2", "kl_t2")), None, None, None],
        of_models("loss (nats/token)", [_fixed(models[name]["loss_nats"]) for name in _MODELS]),
        of_models(
            "top-1 agreement with teacher",
            [None, *(f"{models[name]['top1_agreement']:.1%}" for name in ("labels", "distilled"))],
        ),
        of_models("parameters", [models[name]["n_parameters"] for name in _MODELS]),
        of_models("compute (x student)", [f"{_compute(models[n]) / student_compute:.1f}" for n in _MODELS]),
        of_models("training tokens/s", [round(models[name]["train_tokens_per_s"]) for name in _MODELS]),
    ]


def table_text(results: dict[str, Any]) -> str:
    """The table for the terminal."""
    return format_table(HEADERS, results_rows(results))


def verdict(results: dict[str, Any]) -> str:
    """What came out in a sentence for each comparison, whichever way it went."""
    labels, distilled = (results["students"][name] for name in ("labels", "distilled"))
    store = results["store"]
    smaller = store["fp16_bytes_per_token"] / store["bytes_per_token"]
    return (
        f"The store is {smaller:.0f} times smaller than fp16 logits. Against its twin trained on labels alone, the "
        f"distilled student's KL to the teacher is {_change(labels, distilled, 'kl_teacher_nats')} and its held-out "
        f"loss {_change(labels, distilled, 'loss_nats')}."
    )


def write_page(path: Path, results: dict[str, Any]) -> Path:
    """Writes report.html from what is in results.json and returns its path."""
    text, recipe = results["text"], results["recipe"]
    subtitle = (
        f"Teacher, store and two students made from {text['train_bytes']:,} bytes of Python's documentation in "
        f"{results['seconds']:.0f} s (seed {results['seed']}, recipe {recipe['name']})."
    )
    sections = [
        Section("What came out", [Paragraph(verdict(results)), Table(HEADERS, results_rows(results), _MEANING)]),
        Section("The store", _store_plots(results)),
        Section("The students", _student_plots(results)),
        Section("Time", _time_parts(results)),
        Section("How it was made", [Table(("what", "value"), _recipe_rows(results))]),
        Section("Where it was run", [Table(("what", "value"), environment_rows(results["environment"]))]),
    ]
    return write_report(path, "logitstore demo", sections, subtitle)


def _store_plots(results: dict[str, Any]) -> list[Any]:
    store = results["store"]
    sizes = bar_plot(
        ["fp16 logits", "store"],
        {"bytes per token": [store["fp16_bytes_per_token"], store["bytes_per_token"]]},
        value_label="bytes per token",
        log=True,
    )
    kls = bar_plot(
        ["T = 1", "T = 2"],
        {
            "fp16 logits": [_positive(store["fp16_kl_t1"]), _positive(store["fp16_kl_t2"])],
            "store": [_positive(store["kl_t1"]), _positive(store["kl_t2"])],
        },
        value_label="KL(teacher || what is kept) (nats)",
        log=True,
    )
    whole = store["container_bytes_per_token"]
    return [
        Plot(sizes, f"Shorter is smaller. With the text's ids, loss mask and Parquet the file is {whole:.1f} a token."),
        Plot(kls, "Shorter is closer to the teacher. Held-out text, exact over the whole vocabulary."),
    ]


def _student_plots(results: dict[str, Any]) -> list[Any]:
    models = _models(results)
    students = ("labels", "distilled")
    losses = bar_plot(
        [_MODEL_NAMES[name] for name in _MODELS],
        {"held-out loss": [models[name]["loss_nats"] for name in _MODELS]},
        value_label="held-out loss (nats per token)",
    )
    kls = bar_plot(
        [_MODEL_NAMES[name] for name in students],
        {"KL": [models[name]["kl_teacher_nats"] for name in students]},
        value_label="KL(teacher || student) on held-out text (nats)",
    )
    curves = line_plot(
        [Series(_MODEL_NAMES[name], *_curve(models[name]["ce_by_step"])) for name in _MODELS],
        x_label="step",
        y_label="training cross-entropy (nats per token)",
    )
    return [
        Plot(kls, "Shorter is closer to the teacher."),
        Plot(losses, "Shorter is better."),
        Plot(
            curves,
            "Cross-entropy with the training text. The student on labels alone minimises just this, the distilled "
            "one mostly the KL to the stored teacher; both see the same batches in the same order.",
        ),
    ]


def _time_parts(results: dict[str, Any]) -> list[Any]:
    stages = results["stages"]
    timed = [row for row in stages if row["tokens_per_s"]]
    speeds = bar_plot(
        [row["stage"] for row in timed],
        {"tokens": [row["tokens_per_s"] for row in timed]},
        value_label="tokens per second, everything counted",
        log=True,
    )
    rows = [
        [row["stage"], _fixed(row["seconds"], 1), _fixed(row["cpu_seconds"], 1), row["tokens"], row["tokens_per_s"]]
        for row in stages
    ]
    return [
        Plot(speeds, "Longer is faster."),
        Table(("stage", "seconds", "CPU seconds", "tokens", "tokens/s"), rows, "Seconds with loading and saving."),
    ]


def _recipe_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    recipe, text, store = results["recipe"], results["text"], results["store"]
    training = recipe["training"]
    return [
        ("text", f"{text['n_paragraphs']:,} distinct paragraphs ({text['n_repeats']:,} repeats dropped)"),
        ("held out", f"{text['held_out_bytes']:,} bytes, chosen by the SHA-256 of the paragraph"),
        ("tokenizer", f"byte-level BPE of {recipe['vocab_size']:,} tokens, trained on the training text"),
        ("teacher", "Llama, " + ", ".join(f"{name} {value}" for name, value in recipe["teacher"].items())),
        (
            "teacher's training",
            f"{training['steps']:,} steps of {training['batch_size']} x {training['length']} tokens, "
            f"learning rate {training['lr']:g}",
        ),
        ("codec", ", ".join(f"{name} {value}" for name, value in store["codec"].items())),
        ("students", recipe["student"]),
        (
            "students' training",
            f"{recipe['student_steps']:,} steps of {recipe['student_batch_size']} samples of at most "
            f"{recipe['length']} tokens, learning rate {recipe['student_lr']:g}",
        ),
        ("loss of the distilled student", f"0.7 * T^2 * KL + 0.3 * cross-entropy, T = {results['temperature']:g}"),
    ]


def _models(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"teacher": results["teacher"], **results["students"]}


def _compute(model: dict[str, Any]) -> int:
    return model["n_parameters"] * model["n_tokens_trained"]


def _curve(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """At most about _CURVE_POINTS of the points, each the mean of its neighbours, so that lines can be told apart."""
    size = -(-len(points) // _CURVE_POINTS)
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    return [block[-1][0] for block in blocks], [sum(p[1] for p in block) / len(block) for block in blocks]


def _change(before: dict[str, Any], after: dict[str, Any], name: str) -> str:
    x, y = before[name], after[name]
    if x == y:
        return f"the same ({x:.4f} nats)"
    return f"{'lower' if y < x else 'higher'} ({y:.4f} against {x:.4f} nats)"


def _positive(value: float | None) -> float | None:
    return value if value is not None and value > 0 else None


def _fixed(value: float, digits: int = 4) -> str:
    return f"{value:,.{digits}f}"


def _small(value: float | None) -> str | None:
    return None if value is None else f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.4f}"
