"""The table and the page of `bench storage`, from the rows of results.json."""

from collections.abc import Callable, Sequence
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
    cell_text,
    line_plot,
    write_report,
)

_DISTILLKIT = "DistillKit"
_UNCONNECTED = (_DISTILLKIT, "parquet lists")  # points that differ in more than how much they keep
_HEADERS = (
    "codec",
    "configuration",
    "bytes/token",
    "in its container",
    "KL T=1 (nats)",
    "+-",
    "KL T=2 (nats)",
    "+-",
    "TV T=1",
    "TV T=2",
    "gradient error T=1",
    "+-",
    "encode tokens/s",
    "decode tokens/s",
)
_MEANING = (
    "bytes/token: blobs with header, checksum and zstd frame, over the rows encoded; in its container: the files as "
    "they lie on disk, with the ids of the text. KL(teacher || what is read back) at temperature T, without the factor "
    "T^2, mean over rows, +- one standard error over sequences; TV: total variation, 0 to 1. Gradient error: "
    "E||t_hat - t||^2, summed over the vocabulary, of what is read back against the teacher at T = 1, which is the "
    "squared error of the loss's gradient with respect to a student's logits; for the codecs that sample (varopt, "
    "rskd) it is variance, which averages out over rows, for all others squared bias, which does not. '-': not "
    "defined, because what is read back gives probability 0 to something that the teacher does not, or speaks of T = 1 "
    "alone. Encode: kept entries to blob; decode: blob to arrays; both on one core, the reduction from logits to kept "
    "entries apart."
)


def configuration_text(config: dict[str, Any]) -> str:
    """What tells configurations apart in a few words: "int8 k=64", "k=64 int64 snappy", "log 0.5 k=16 fitted"."""
    words = [str(config[name]) for name in ("head", "head_step") if name in config]
    words += [_size_text(config)] if _size_text(config) else []
    words += [str(config[name]) for name in ("ids", "compression") if name in config]
    return " ".join([*words, "fitted"] if "tables" in config else words)


def _size_text(config: dict[str, Any]) -> str:
    """What decides how much of a row is kept: "k=64", "weight 0.03" or "50 draws"; "" for all of it."""
    if "max_weight" in config:
        return f"weight {config['max_weight']:g}"
    if "draws" in config:
        return f"{config['draws']} draws"
    return f"k={config['k']}" if "k" in config else ""


def result_table(results: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[Any]]]:
    """(headers, rows) of the measured candidates, for the terminal and the page."""
    rows = []
    for row in results:
        named = [row["codec"], configuration_text(row["config"])]
        sizes = [row["bytes_per_token"], row["container_bytes_per_token"]]
        kls = [row["kl_t1"], _two_digits(row["kl_t1_se"]), row["kl_t2"], _two_digits(row["kl_t2_se"])]
        errors = [row["tv_t1"], row["tv_t2"], row["gradient_error_t1"], _two_digits(row["gradient_error_t1_se"])]
        speeds = [row["encode_tokens_per_s"], row["decode_tokens_per_s"]]
        rows.append([*named, *sizes, *kls, *errors, *speeds])
    return _HEADERS, rows


def write_storage_report(path: Path, results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Path:
    """Writes the page and returns its path."""
    headers, rows = result_table(results)
    subtitle = f"Logits: {facts['logits']}. Vocabulary {facts['vocab_size']:,}, {facts['rows_measured']:,} rows of "
    subtitle += f"{facts['samples_measured']} samples measured; codecs fitted on {facts['fitted_on']}."
    speed_plot = bar_plot(
        [f"{row['codec']} {configuration_text(row['config'])}" for row in results],
        {name: [row[f"{name}_tokens_per_s"] for row in results] for name in ("encode", "decode")},
        value_label="tokens per second on one core",
        log=True,
    )
    sections = [
        Section(
            "Size against fidelity",
            [
                *(Paragraph(note) for note in facts["notes"]),
                *(_trade_off(results, temperature) for temperature in (1, 2)),
                _gradient_trade_off(results),
                *_left_out_of_plots(results),
                Table(headers, rows, _MEANING),
            ],
        ),
        Section("Speed", [Plot(speed_plot, "Longer is faster. Medians of three calls a sample.")]),
        Section("How this was measured", [Table(("what", "value"), environment_rows(facts))]),
    ]
    return write_report(path, "What storing a teacher's distributions costs", sections, subtitle)


def _two_digits(standard_error: float | None) -> str | None:
    return None if standard_error is None else f"{standard_error:.2g}"


def _trade_off(results: Sequence[dict[str, Any]], temperature: int) -> Plot:
    svg = line_plot(
        _series(results, f"kl_t{temperature}", _family),
        x_label="bytes per token, blobs only",
        y_label=f"KL at T = {temperature} (nats)",
        title=f"Lower left is better (T = {temperature})",
        log_x=True,
        log_y=True,
    )
    return Plot(svg, f"KL(teacher || what is read back) at T = {temperature}, one standard error as bars.")


def _gradient_trade_off(results: Sequence[dict[str, Any]]) -> Plot:
    svg = line_plot(
        _series(results, "gradient_error_t1", _kind),
        x_label="bytes per token, blobs only",
        y_label="E||t_hat - t||^2 at T = 1",
        title="Lower left is better, but bias stays and variance averages out",
        log_x=True,
        log_y=True,
    )
    return Plot(svg, "Squared error of the gradient: variance for varopt and rskd, squared bias for the others.")


def _series(results: Sequence[dict[str, Any]], quantity: str, family: Callable[[dict[str, Any]], str]) -> list[Series]:
    """One series for each family of the rows that have the quantity."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        if not _is_full_width(row) and row[quantity] is not None:
            curves.setdefault(family(row), []).append(row)
    return [
        Series(
            name,
            [row["bytes_per_token"] for row in rows],
            [row[quantity] for row in rows],
            labels=[_point_label(row) for row in rows],
            y_error=[row[f"{quantity}_se"] for row in rows],
            connected=len({row["config"].get("head") for row in rows}) == 1 and name not in _UNCONNECTED,
        )
        for name, rows in curves.items()
    ]


def _is_full_width(row: dict[str, Any]) -> bool:
    """True for what keeps every logit: a hundred times larger than the rest, it would squeeze them into a corner."""
    return not _size_text(row["config"])


def _left_out_of_plots(results: Sequence[dict[str, Any]]) -> list[Paragraph]:
    return [
        Paragraph(
            f"Far to the right of both plots: {row['codec']}, {row['bytes_per_token']:,.0f} bytes a token at a KL of "
            f"{cell_text(row['kl_t1'])} nats (T = 1)."
        )
        for row in results
        if _is_full_width(row)
    ]


def _kind(row: dict[str, Any]) -> str:
    """Its codec, fitted ones apart; all of DistillKit is one kind."""
    name = _DISTILLKIT if row["codec"].startswith(_DISTILLKIT) else row["codec"]
    return f"{name} fitted" if "tables" in row["config"] else name


def _family(row: dict[str, Any]) -> str:
    """Its kind, and for codecs with a head its head; a plot has six colours, which this makes enough."""
    return f"{_kind(row)} {row['config']['head']}" if "head" in row["config"] else _kind(row)


def _point_label(row: dict[str, Any]) -> str:
    """What it keeps; DistillKit's configurations differ in more, and are named."""
    name = row["codec"].removeprefix(_DISTILLKIT).strip()
    return name if name != row["codec"] else _size_text(row["config"])
