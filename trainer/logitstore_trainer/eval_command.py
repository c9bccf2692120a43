"""`logitstore eval`: students on one held-out store, side by side: table, results.json and report.html.

A student is a folder or a hub name. `--eval-fraction F --seed S` takes the part of a store that `train` with the same
two held out; without them all of the store is measured, so give one that nobody was trained on. `--answers` also has
the students, and the teacher where it is given, answer questions whose right number is known.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from logitstore_trainer.eval_page import answers_table, page_sections, result_table
from logitstore_trainer.new_folder import removed_if_left_empty
from logitstore_trainer.report import format_table
from logitstore_trainer.report import write_report as write_page

if TYPE_CHECKING:
    from logitstore import LogitStore
    from logitstore_trainer.answers import Questions
    from logitstore_trainer.student import Student

EXAMPLES = """examples:
  logitstore eval student labels-only --data held_out.parquet --out eval
  logitstore eval student --data teacher_logits.parquet --eval-fraction 0.05 --seed 0 --out eval
  logitstore eval student --data held_out.parquet --teacher HuggingFaceTB/SmolLM2-135M-Instruct --out eval
  logitstore eval student --data held_out.parquet --answers gsm8k-test.jsonl --answer-rows 200 --out eval
"""
DEFAULT_NEW_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `logitstore eval`."""
    parser.epilog = EXAMPLES
    parser.add_argument("students", nargs="+", metavar="STUDENT", help="model folders or hub names")
    parser.add_argument("--data", required=True, metavar="PATH", help="the held-out store")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for results.json and report.html")
    parser.add_argument("--eval-fraction", type=float, metavar="F", help="measure the share that train held out")
    parser.add_argument("--seed", type=int, default=0, help="of that share, as train had it (default 0)")
    parser.add_argument(
        "--teacher",
        metavar="M",
        help="also run the teacher, a folder, .gguf file or hub name: exact KL over the whole vocabulary",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="T of the KL to the store (default 1)")
    parser.add_argument("--tail", help="as in train (default: what suits the store)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples per forward pass (default 8)")
    parser.add_argument(
        "--answers",
        metavar="FILE",
        help='questions to answer: rows of prompt and completion (or messages) with the right number behind "####"',
    )
    parser.add_argument("--answer-rows", type=int, metavar="N", help="the first N of them (default: all)")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"most tokens of an answer (default {DEFAULT_NEW_TOKENS})",
    )
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
    _check_answer_options(args)
    _require_different_students(args.students)
    from logitstore_trainer.bench.environment import environment, output_folder, write_json
    from logitstore_trainer.transformers_display import transformers_display_kept

    with removed_if_left_empty(Path(args.out)), transformers_display_kept():
        out = output_folder(args.out)
        evaluated = evaluate_students(args)
    answers = [{"model": name, **answer} for name, each in evaluated.answers.items() for answer in each]
    results = {
        "data": str(args.data),
        "students": evaluated.students,
        "teacher": evaluated.teacher,
        "questions": evaluated.questions,
        "environment": environment(),
    }
    write_json(out / "results.json", results)
    if args.answers is not None:
        (out / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers), encoding="utf-8")
    write_page(out / "report.html", "Students on held-out text", page_sections(results), str(args.data))
    print(format_table(*result_table(results)))
    if args.answers is not None:
        print(f"\n{format_table(*answers_table(results))}")
    also = ", answers.jsonl" if args.answers is not None else ""
    print(f"\nresults.json{also} and report.html: {out}")
    return 0


def _require_different_students(names: list[str]) -> None:
    """Raises ValueError where two names are of one student: written alike, or of one folder."""
    before: dict[str, str] = {}
    for name in names:
        path = Path(name).expanduser()
        key = str(path.resolve()) if path.exists() else name
        if key in before:
            also = "" if before[key] == name else f", also as {before[key]}"
            raise ValueError(f"student {name} is named twice{also}; name each once")
        before[key] = name


def _check_answer_options(args: argparse.Namespace) -> None:
    for option, value in (("--answer-rows", args.answer_rows), ("--max-new-tokens", args.max_new_tokens)):
        if value is not None and args.answers is None:
            raise ValueError(f"{option} is for --answers FILE; add it, or leave it out")
        if value is not None and value <= 0:
            raise ValueError(f"{option} {value} must be above 0")


class Evaluated(NamedTuple):
    """What evaluate_students hands back, as JSON values.

    students: {name: its Evaluation, n_parameters, and exact_match or None}. teacher: {name, n_parameters, exact_match},
    None without --teacher. questions: what --answers was. answers: {model: its answers}.
    """

    students: dict[str, dict[str, Any]]
    teacher: dict[str, Any] | None
    questions: dict[str, Any] | None
    answers: dict[str, list[dict[str, Any]]]


def evaluate_students(args: argparse.Namespace) -> Evaluated:
    """Measures the students, and has them answer; each model but the teacher is let go before the next one is loaded.

    Raises ValueError for arguments that do not fit, SpecMismatchError for a student that the store is not for.
    """
    import torch

    import logitstore
    from logitstore_trainer.answers import read_questions
    from logitstore_trainer.decoder import TeacherDecoder, fitting_tail
    from logitstore_trainer.devices import choose_device
    from logitstore_trainer.evaluate import evaluate_student
    from logitstore_trainer.held_out import split_by_source_row
    from logitstore_trainer.special_tokens import say_notes, special_token_notes
    from logitstore_trainer.student import build_student

    device, store = choose_device(args.device), logitstore.open(args.data)
    questions = None if args.answers is None else read_questions(args.answers, args.answer_rows)
    dataset = store
    if args.eval_fraction is not None:
        dataset = torch.utils.data.Subset(store, split_by_source_row([store], args.eval_fraction, args.seed).held_out)
    decoder = TeacherDecoder(store).to(device)
    fitting_tail(decoder, args.tail, args.temperature)
    answers: dict[str, list[dict[str, Any]]] = {}
    teacher, teacher_result = None, None
    if args.teacher is not None:
        teacher = _loaded_teacher(args.teacher, store, args.device)
        score = _score(args, args.teacher, teacher, questions, store.spec.vocab_size, answers)
        teacher_result = {"name": args.teacher, "n_parameters": teacher.model.num_parameters(), "exact_match": score}
    results = {}
    for name in args.students:
        student = build_student(name, store)
        if student.from_scratch:
            raise ValueError(f"student {name!r} is a size or a shape, which has random weights; name a model folder")
        say_notes(special_token_notes(store.path, store.spec, student.tokenizer, name=name))
        measured = evaluate_student(
            student.model.to(device), dataset, decoder, temperature=args.temperature, tail=args.tail,
            teacher_model=None if teacher is None else teacher.model, batch_size=args.batch_size,
        )  # fmt: skip
        score = _score(args, name, student, questions, store.spec.vocab_size, answers)
        results[name] = {**measured.to_json(), "n_parameters": student.model.num_parameters(), "exact_match": score}
    return Evaluated(results, teacher_result, _described(args, questions), answers)


def _loaded_teacher(name: str, store: "LogitStore", device: str) -> "Student":
    """The teacher in float32 on the device: a folder, a .gguf file or a name on the hub, as `collect` takes it.

    Says where it is another one than the store's. Raises ValueError or OSError where it cannot be loaded,
    SpecMismatchError for one of other tokens.
    """
    from logitstore_trainer.collect.teacher import load_teacher
    from logitstore_trainer.student import Student, check_tokenizer, check_vocabulary

    teacher = load_teacher(name, dtype="float32", device=device)
    check_tokenizer(store.spec, teacher.tokenizer, who="teacher")
    check_vocabulary(store.spec, teacher.model, who="teacher")
    if store.spec.teacher_sha256 not in (None, teacher.info.sha256):
        print(
            f"{name} is not the teacher that {store.path} was collected from, {store.spec.teacher or '(no name)'}: "
            "other files, or another revision; the KL to the teacher is to this one",
            file=sys.stderr,
        )
    return Student(teacher.model, teacher.tokenizer, from_scratch=False)


def _score(
    args: argparse.Namespace,
    name: str,
    model: "Student",
    questions: "Questions | None",
    vocab_size: int,
    answers: dict[str, list[dict[str, Any]]],
) -> dict[str, Any] | None:
    """The ExactMatch of a model as JSON, or None without questions. Mutates `answers`, which gets what it wrote."""
    from logitstore_trainer.answers import answer_questions, exact_match

    if questions is None:
        return None
    written = answer_questions(
        name, model.model, model.tokenizer, questions, vocab_size=vocab_size,
        max_new_tokens=args.max_new_tokens or DEFAULT_NEW_TOKENS, batch_size=args.batch_size,
    )  # fmt: skip
    answers[name] = [answer.to_json() for answer in written]
    return exact_match(written).to_json()


def _described(args: argparse.Namespace, questions: "Questions | None") -> dict[str, Any] | None:
    if questions is None:
        return None
    return {
        "file": str(questions.path), "sha256": questions.sha256, "n": len(questions.rows),
        "max_new_tokens": args.max_new_tokens or DEFAULT_NEW_TOKENS,
    }  # fmt: skip
