"""What `logitstore eval` shows: its tables, and the sections of report.html with their plots."""

from collections.abc import Sequence
from typing import Any

from logitstore_trainer.report import Paragraph, Plot, Section, Series, Table, bar_plot, line_plot

MEANING = (
    "Means over held-out tokens. Perplexity: e to the cross-entropy with the text. KL(teacher || student) at the given "
    "T, in nats, without the factor T^2, against the stored teacher or, exact and at T = 1, the live one. Agreement: "
    "student and teacher rank the same token first. Calibration error: how far the confidence in the first guess is "
    "from how often it is right, over 15 bins."
)
ANSWERS_MEANING = (
    "Share of questions that a model answers with the right number, decoded greedily, with its 95 % Wilson interval. "
    'The answer is the number behind "####", else the last one. Cut: it had not ended after as many tokens as allowed.'
)


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


def answers_table(results: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(headers, a row for each model that answered, the teacher first); results have questions."""
    headers = ["model", "questions", "right", "exact match", "95 % interval", "without a number", "cut"]
    return headers, [
        [
            name, one["n"], one["n_right"], f"{one['share']:.1%}",
            "{:.1%} to {:.1%}".format(*one["interval"]), one["n_without_number"], one["n_cut"],
        ]
        for name, one in _exact_matches(results).items()
    ]  # fmt: skip


def page_sections(results: dict[str, Any]) -> list[Section]:
    """What report.html shows: the table, bars of KL and loss, answers, the calibration curves, and where it was run."""
    from logitstore_trainer.bench.environment import environment_rows

    students: dict[str, dict[str, Any]] = results["students"]
    names = list(students)
    is_exact = all(one["kl_teacher_nats"] is not None for one in students.values())
    key, whose = ("kl_teacher_nats", "teacher") if is_exact else ("kl_store_nats", "stored teacher")
    kls = bar_plot(names, {"KL": [one[key] for one in students.values()]}, value_label=f"KL({whose} || student) (nats)")
    losses = bar_plot(
        names, {"loss": [one["loss_nats"] for one in students.values()]}, value_label="held-out loss (nats per token)"
    )
    answers = [] if results["questions"] is None else [answers_section(results)]
    return [
        Section("What came out", [Table(*result_table(results), MEANING)]),
        Section("Closeness to the teacher", [Plot(kls, "Shorter is closer."), Plot(losses, "Shorter is better.")]),
        *answers,
        Section("Calibration", [Plot(calibration_plot(students), "On the diagonal, confidence is what it says."),
                                Paragraph("Above it a student is right more often than it believes, below less.")]),
        Section("Where it was run", [Table(("what", "value"), environment_rows(results["environment"]))]),
    ]  # fmt: skip


def answers_section(results: dict[str, Any]) -> Section:
    """How many questions each model answers rightly: table, and bars with their intervals."""
    scores = _exact_matches(results)
    bars = bar_plot(
        list(scores),
        {"exact match": [100 * one["share"] for one in scores.values()]},
        value_label="questions with the right answer (%)",
        intervals={"exact match": [(100 * low, 100 * high) for low, high in (o["interval"] for o in scores.values())]},
    )
    asked = results["questions"]
    source = f"{asked['n']:,} questions of {asked['file']}, at most {asked['max_new_tokens']:,} new tokens an answer."
    return Section("Answers", [Table(*answers_table(results), ANSWERS_MEANING), Plot(bars, source)])


def _exact_matches(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{model: its ExactMatch}, the teacher first."""
    teacher = results["teacher"]
    scores = {} if teacher is None else {f"{teacher['name']} (teacher)": teacher["exact_match"]}
    return scores | {name: one["exact_match"] for name, one in results["students"].items()}


def calibration_plot(students: dict[str, dict[str, Any]]) -> str:
    """An SVG: share of right first guesses over the mean confidence, a line a student, and the diagonal."""
    lines = [Series("perfect", [0.0, 1.0], [0.0, 1.0])]
    for name, one in students.items():
        filled: Sequence[dict[str, Any]] = [each for each in one["calibration"] if each["n_rows"]]
        lines.append(Series(name, [each["mean_confidence"] for each in filled], [each["accuracy"] for each in filled]))
    return line_plot(lines, x_label="mean confidence in the first guess", y_label="share that is right")
