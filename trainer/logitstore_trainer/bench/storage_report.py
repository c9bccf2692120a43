"""The table and the page of `bench storage`, from the rows of results.json."""

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
    cell_text,
    line_plot,
    write_report,
)

_DISTILLKIT = "DistillKit"
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
    "encode tokens/s",
    "decode tokens/s",
)
_MEANING = (
    "bytes/token: blobs with header, checksum and zstd frame, over the rows encoded; in its container: the files as "
    "they lie on disk, with the ids of the text. KL(teacher || what is read back) at temperature T, without the factor "
    "T^2, mean over rows, +- one standard error over sequences; TV: total variation, 0 to 1. '-': not defined, because "
    "what is read back gives probability 0 to something that the teacher does not. Encode: kept entries to blob; "
    "decode: blob to arrays; both on one core, the reduction from logits to kept entries apart."
)


def configuration_text(config: dict[str, Any]) -> str:
    """What tells configurations apart in a few words: "int8 k=64", "k=64 int64 snappy"."""
    words = [str(config["head"])] if "head" in config else []
    if "k" in config:
        words.append(f"k={config['k']}")
    words += [str(config[name]) for name in ("ids", "compression") if name in config]
    return " ".join(words)


def result_table(results: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[Any]]]:
    """(headers, rows) of the measured candidates, for the terminal and the page."""
    rows = []
    for row in results:
        named = [row["codec"], configuration_text(row["config"])]
        sizes = [row["bytes_per_token"], row["container_bytes_per_token"]]
        kls = [row["kl_t1"], _two_digits(row["kl_t1_se"]), row["kl_t2"], _two_digits(row["kl_t2_se"])]
        rest = [row[name] for name in ("tv_t1", "tv_t2", "encode_tokens_per_s", "decode_tokens_per_s")]
        rows.append([*named, *sizes, *kls, *rest])
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
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        if not _is_full_width(row):
            curves.setdefault(_family(row), []).append(row)
    series = [
        Series(
            name,
            [row["bytes_per_token"] for row in rows],
            [row[f"kl_t{temperature}"] for row in rows],
            labels=[_point_label(row) for row in rows],
            y_error=[row[f"kl_t{temperature}_se"] for row in rows],
            connected=name != _DISTILLKIT,
        )
        for name, rows in curves.items()
    ]
    svg = line_plot(
        series,
        x_label="bytes per token, blobs only",
        y_label=f"KL at T = {temperature} (nats)",
        title=f"Lower left is better (T = {temperature})",
        log_x=True,
        log_y=True,
    )
    return Plot(svg, f"KL(teacher || what is read back) at T = {temperature}, one standard error as bars.")


def _is_full_width(row: dict[str, Any]) -> bool:
    """True for what keeps every logit: a hundred times larger than the rest, it would squeeze them into a corner."""
    return "k" not in row["config"]


def _left_out_of_plots(results: Sequence[dict[str, Any]]) -> list[Paragraph]:
    return [
        Paragraph(
            f"Far to the right of both plots: {row['codec']}, {row['bytes_per_token']:,.0f} bytes a token at a KL of "
            f"{cell_text(row['kl_t1'])} nats (T = 1)."
        )
        for row in results
        if _is_full_width(row)
    ]


def _family(row: dict[str, Any]) -> str:
    config = row["config"]
    words = [row["codec"], *(str(config[name]) for name in ("head", "ids", "compression") if name in config)]
    return _DISTILLKIT if row["codec"].startswith(_DISTILLKIT) else " ".join(words)


def _point_label(row: dict[str, Any]) -> str:
    """Its k; DistillKit's configurations differ in more, and are named."""
    name = row["codec"].removeprefix(_DISTILLKIT).strip()
    return name if name != row["codec"] else f"k={row['config']['k']}"
