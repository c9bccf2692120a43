"""`logitstore eval`: students on one held-out store, side by side: table, results.json and report.html.

A student is a folder or a hub name. `--eval-fraction F --seed S` takes the part of a store that `train` with the same
two held out; without them all of the store is measured, so give one that nobody was trained on.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from logitstore_trainer.report import Paragraph, Plot, Section, Series, Table, bar_plot, format_table, line_plot
from logitstore_trainer.report import write_report as write_page

EXAMPLES = """examples:
  logitstore eval student labels-only --data held_out.parquet --out eval
  logitstore eval student --data teacher_logits.parquet --eval-fraction 0.05 --seed 0 --out eval
  logitstore eval student --data held_out.parquet --teacher HuggingFaceTB/SmolLM2-135M-Instruct --out eval
"""
MEANING = (
    "Means over held-out tokens. Perplexity: e to the cross-entropy with the text. KL(teacher || student) at the given "
    "T, in nats, without the factor T^2, against the stored teacher or, exact and at T = 1, the live one. Agreement: "
    "student and teacher rank the same token first. Calibration error: how far the confidence in the first guess is "
    "from how often it is right, over 15 bins."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `logitstore eval`."""
    parser.epilog = EXAMPLES
    parser.add_argument("students", nargs="+", metavar="STUDENT", help="model folders or hub names")
    parser.add_argument("--data", required=True, metavar="PATH", help="the held-out store")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for results.json and report.html")
    parser.add_argument("--eval-fraction", type=float, metavar="F", help="measure the share that train held out")
    parser.add_argument("--seed", type=int, default=0, help="of that share, as train had it (default 0)")
    parser.add_argument("--teacher", metavar="M", help="also run the teacher: exact KL over the whole vocabulary")
    parser.add_argument("--temperature", type=float, default=1.0, help="T of the KL to the store (default 1)")
    parser.add_argument("--tail", help="as in train (default: what suits the store)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples per forward pass (default 8)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints the table and writes both files; returns 0. Raises ValueError for arguments that do not fit."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not args.batch_size > 0:
        raise ValueError(f"--batch-size {args.batch_size} must be above 0")
    if args.eval_fraction is not None and not 0 < args.eval_fraction < 1:
        raise ValueError(f"--eval-fraction {args.eval_fraction} must lie in (0, 1); leave it out to measure all")
    if not 0 < args.temperature < float("inf"):
        raise ValueError(f"--temperature {args.temperature} must be above 0 and finite")
    twice = next((name for name in args.students if args.students.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"student {twice} is named twice; name each once")
    from logitstore_trainer.bench.environment import environment, output_folder, write_json
    from logitstore_trainer.transformers_display import transformers_display_kept

    out = output_folder(args.out)
    with transformers_display_kept():
        students = evaluate_students(args)
    results = {"data": str(args.data), "students": students, "environment": environment()}
    write_json(out / "results.json", results)
    write_page(out / "report.html", "Students on held-out text", page_sections(results), str(args.data))
    print(format_table(*result_table(results)))
    print(f"\nresults.json and report.html: {out}")
    return 0


def evaluate_students(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """{student: its Evaluation as JSON, with n_parameters}; each model is let go before the next one is loaded."""
    import torch

    import logitstore
    from logitstore_trainer.decoder import TeacherDecoder, fitting_tail
    from logitstore_trainer.devices import choose_device
    from logitstore_trainer.evaluate import evaluate_student
    from logitstore_trainer.held_out import split_by_source_row
    from logitstore_trainer.student import build_student

    device, store = choose_device(args.device), logitstore.open(args.data)
    dataset = store
    if args.eval_fraction is not None:
        dataset = torch.utils.data.Subset(store, split_by_source_row([store], args.eval_fraction, args.seed).held_out)
    decoder = TeacherDecoder(store).to(device)
    fitting_tail(decoder, args.tail, args.temperature)
    teacher = None if args.teacher is None else build_student(args.teacher, store).model.to(device)
    results = {}
    for name in args.students:
        student = build_student(name, store)
        if student.from_scratch:
            raise ValueError(f"student {name!r} is a size or a shape, which has random weights; name a model folder")
        measured = evaluate_student(
            student.model.to(device), dataset, decoder, temperature=args.temperature, tail=args.tail,
            teacher_model=teacher, batch_size=args.batch_size,
        )  # fmt: skip
        results[name] = {**measured.to_json(), "n_parameters": student.model.num_parameters()}
    return results


def result_table(results: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(headers, a row for each student) of the one table."""
    students = results["students"]
    first = next(iter(students.values()))
    headers = ["student", "parameters", "tokens", "perplexity", "loss (nats)"]
    headers += [f"KL to store, T = {first['temperature']:g} (nats)", "KL to teacher (nats)"]
    headers += [f"top-1 agreement with {first['top1_against']}", "calibration error"]
    return headers, [
        [
            name, one["n_parameters"], one["n_tokens"], one["perplexity"], one["loss_nats"], one["kl_store_nats"],
            one["kl_teacher_nats"], f"{one['top1_agreement']:.1%}", f"{one['calibration_error']:.2%}",
        ]
        for name, one in students.items()
    ]  # fmt: skip


def page_sections(results: dict[str, Any]) -> list[Section]:
    """What report.html shows: the table, bars of KL and loss, the calibration curves, and where it was run."""
    from logitstore_trainer.bench.environment import environment_rows

    students: dict[str, dict[str, Any]] = results["students"]
    names = list(students)
    is_exact = all(one["kl_teacher_nats"] is not None for one in students.values())
    key, whose = ("kl_teacher_nats", "teacher") if is_exact else ("kl_store_nats", "stored teacher")
    kls = bar_plot(names, {"KL": [one[key] for one in students.values()]}, value_label=f"KL({whose} || student) (nats)")
    losses = bar_plot(
        names, {"loss": [one["loss_nats"] for one in students.values()]}, value_label="held-out loss (nats per token)"
    )
    return [
        Section("What came out", [Table(*result_table(results), MEANING)]),
        Section("Closeness to the teacher", [Plot(kls, "Shorter is closer."), Plot(losses, "Shorter is better.")]),
        Section("Calibration", [Plot(calibration_plot(students), "On the diagonal, confidence is what it says."),
                                Paragraph("Above it a student is right more often than it believes, below less.")]),
        Section("Where it was run", [Table(("what", "value"), environment_rows(results["environment"]))]),
    ]  # fmt: skip


def calibration_plot(students: dict[str, dict[str, Any]]) -> str:
    """An SVG: share of right first guesses over the mean confidence, a line a student, and the diagonal."""
    lines = [Series("perfect", [0.0, 1.0], [0.0, 1.0])]
    for name, one in students.items():
        filled: Sequence[dict[str, Any]] = [each for each in one["calibration"] if each["n_rows"]]
        lines.append(Series(name, [each["mean_confidence"] for each in filled], [each["accuracy"] for each in filled]))
    return line_plot(lines, x_label="mean confidence in the first guess", y_label="share that is right")
