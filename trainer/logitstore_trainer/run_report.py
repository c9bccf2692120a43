"""The page that a training run leaves: `run_report.html`, with the curves of the whole run, its figures and settings.

Everything drawn is in the run's history, which checkpoints carry: a run that was stopped and went on is one curve. Of a
long run a point is the mean of several logs, so that the page stays small; the caption says of how many.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from logitstore_trainer.bench.environment import environment_rows
from logitstore_trainer.report import Paragraph, Plot, Preformatted, Section, Series, Table, line_plot, write_report
from logitstore_trainer.train import LOSS_NAMES

REPORT_NAME = "run_report.html"
_MOST_POINTS = 200
_OF_LAST_PART = "Of a run that was stopped and went on, this is its last part."


def write_run_report(path: Path, metrics: dict[str, Any], *, recipe: str, environment: dict[str, Any]) -> Path:
    """Writes the page of a finished run in one step and returns its path.

    metrics: what `train` returns. recipe: the text of its recipe.yaml. environment: as bench/environment.py has it.
    """
    config = metrics["config"]
    stores = ", ".join(Path(each).name for each in config["data"])
    return write_report(
        path,
        f"Training run: {Path(config['out']).resolve().name}",
        run_sections(metrics, recipe=recipe, environment=environment),
        subtitle=f"Student {config['student']}, {metrics['n_parameters']:,} parameters, from {stores}",
    )


def run_sections(metrics: dict[str, Any], *, recipe: str, environment: dict[str, Any]) -> list[Section]:
    """What the page shows: figures, curves, configuration, and where it was run."""
    config, history = metrics["config"], metrics["history"]
    divergence, unit = divergence_label(config)
    losses = [
        _both("loss", "loss (nats per token)", history),
        _both("kl", f"{divergence}{unit}", history),
        _both("ce", "cross-entropy (nats per token)", history),
    ]
    pace = [
        _training_alone("learning_rate", "learning rate", history),
        _training_alone("tokens_per_s", "tokens/s", history),
        Paragraph("Tokens of all processes; checkpoints count as training time, evaluations do not."),
    ]
    return [
        Section("What came out", [Table(*figures_table(metrics), _meaning(config)), Table(*_run_table(metrics))]),
        Section("Loss and its parts", losses),
        Section("Pace", pace),
        Section("Configuration", [Preformatted(recipe.rstrip("\n"))]),
        Section("Where it was run", [Table(("what", "value"), environment_rows(environment), _OF_LAST_PART)]),
    ]  # fmt: skip


def figures_table(metrics: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(headers, rows): each quantity as it was last logged in training, and on held-out text where there is some."""
    divergence, unit = divergence_label(metrics["config"])
    rows: list[list[Any]] = [
        ["loss (nats per token)", metrics["loss"], metrics.get("eval_loss")],
        [f"{divergence}{unit}", metrics["kl"], metrics.get("eval_kl")],
        ["cross-entropy (nats per token)", metrics["ce"], metrics.get("eval_ce")],
    ]
    if "held_out" not in metrics:
        return ["quantity", "training, last logged"], [row[:2] for row in rows]
    held_out = metrics["held_out"]
    rows += [
        ["perplexity", None, held_out["perplexity"]],
        ["KL(stored teacher || student) at T = 1 (nats per token)", None, held_out["kl_store_nats"]],
        [f"top-1 agreement with the {held_out['top1_against']}", None, f"{held_out['top1_agreement']:.1%}"],
        ["calibration error", None, f"{held_out['calibration_error']:.2%}"],
        ["tokens measured", None, held_out["n_tokens"]],
    ]
    return ["quantity", "training, last logged", "held out"], rows


def divergence_label(config: dict[str, Any]) -> tuple[str, str]:
    """The divergence that was trained on, with its temperature, and the unit to put behind it, "" where it has none."""
    unit = "" if config["loss"] == "tvd" else " (nats per token)"
    return f"{LOSS_NAMES[config['loss']]} at T = {config['temperature']:g}", unit


def _run_table(metrics: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    return ["optimizer steps", "epochs", "tokens trained on", "seconds of training", "tokens/s"], [
        [metrics["steps"], metrics["epoch"], metrics["n_tokens"], metrics["train_s"], metrics["tokens_per_s"]]
    ]


def _meaning(config: dict[str, Any]) -> str:
    name, alpha = LOSS_NAMES[config["loss"]], config["alpha"]
    return (
        f"loss = {alpha:g} * T^2 * {name} + {1 - alpha:g} * cross-entropy; the {name} is shown without its factor T^2. "
        "Means over the tokens that are to be learned."
    )


def _both(name: str, y_label: str, history: Sequence[dict[str, Any]]) -> Plot:
    """A curve of training, and of the held-out set where it was evaluated."""
    training, held_out = _curve("training", name, history), _curve("held out", f"eval_{name}", history)
    return _plot([training, held_out] if held_out.series.x else [training], y_label)


def _training_alone(name: str, y_label: str, history: Sequence[dict[str, Any]]) -> Plot:
    return _plot([_curve("training", name, history)], y_label, y_from_zero=True)


class _Curve(NamedTuple):
    series: Series
    logs_per_point: int


def _plot(curves: list[_Curve], y_label: str, *, y_from_zero: bool = False) -> Plot:
    means = [f'Each point of "{series.name}" is the mean of {n} logs.' for series, n in curves if n > 1]
    drawn = line_plot(
        [curve.series for curve in curves], x_label="optimizer step", y_label=y_label, y_from_zero=y_from_zero
    )
    return Plot(drawn, " ".join(means))


def _curve(label: str, name: str, history: Sequence[dict[str, Any]]) -> _Curve:
    """The values of that name over steps; of many logs, means of as many as leave _MOST_POINTS points."""
    logged = [(entry["step"], entry[name]) for entry in history if entry.get(name) is not None]
    size = max(-(-len(logged) // _MOST_POINTS), 1)
    groups = [logged[start : start + size] for start in range(0, len(logged), size)]
    steps = [sum(step for step, _ in group) / len(group) for group in groups]
    return _Curve(Series(label, steps, [sum(value for _, value in group) / len(group) for group in groups]), size)
