"""The table and the page of `bench storage`, from the rows of results.json."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from logitstore_trainer.bench.environment import environment_rows
from logitstore_trainer.bench.storage_details import choice, kinds_of_text, the_tail, where_bytes_go
from logitstore_trainer.bench.storage_names import (
    DISTILLKIT,
    configuration_text,
    family_of,
    kind_of,
    point_label,
    size_text,
)
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

_UNCONNECTED = (DISTILLKIT, "parquet lists")  # points that differ in more than how much they keep
_HEADERS = (
    "codec",
    "configuration",
    "for",
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
    "tail rows/s",
)
_MEANING = (
    "for: the bytes a token that `plan` chose it for. bytes/token: blobs with header, checksum and zstd frame, over "
    "the rows encoded; in its container: the files as they lie on disk, with the ids of the text. KL(teacher || what "
    "is read back) at temperature T, without the factor T^2, mean over rows, +- one standard error over sequences; "
    "TV: total variation, 0 to 1. Gradient error: E||t_hat - t||^2, summed over the vocabulary, of what is read back "
    "against the teacher at T = 1, which is the squared error of the loss's gradient with respect to a student's "
    "logits; for the codecs that sample (varopt, rskd) it is variance, which averages out over rows, for all others "
    "squared bias, which does not. '-': not defined, because what is read back gives probability 0 to something that "
    "the teacher does not, or speaks of T = 1 alone. Encode: kept entries to blob; decode: blob to arrays; both on "
    "one core, the reduction from logits to kept entries apart. Tail: the tail model, rows to coefficients, on one "
    "core, a sample at a time."
)


def result_table(results: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[Any]]]:
    """(headers, rows) of the measured candidates, for the terminal and the page."""
    rows = []
    for row in results:
        named = [row["codec"], configuration_text(row["config"]), row["budget"]]
        sizes = [row["bytes_per_token"], row["container_bytes_per_token"]]
        kls = [row["kl_t1"], _two_digits(row["kl_t1_se"]), row["kl_t2"], _two_digits(row["kl_t2_se"])]
        errors = [row["tv_t1"], row["tv_t2"], row["gradient_error_t1"], _two_digits(row["gradient_error_t1_se"])]
        speeds = [row["encode_tokens_per_s"], row["decode_tokens_per_s"], row["tail_rows_per_s"]]
        rows.append([*named, *sizes, *kls, *errors, *speeds])
    return _HEADERS, rows


def write_storage_report(path: Path, results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Path:
    """Writes the page and returns its path."""
    headers, rows = result_table(results)
    subtitle = f"Logits: {facts['logits']}. Vocabulary {facts['vocab_size']:,}, {facts['rows_measured']:,} rows of "
    subtitle += f"{facts['samples_measured']} samples measured; codecs fitted on {facts['fitted_on']}"
    subtitle += f", {facts['rows_fitted']:,} rows of it." if facts["rows_fitted"] else "."
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
        *(
            section
            for section in (details(results) for details in (kinds_of_text, where_bytes_go, the_tail))
            if section
        ),
        Section("Speed", [Plot(speed_plot, "Longer is faster. Medians of three calls a sample.")]),
        Section("How this was measured", [Table(("what", "value"), environment_rows(facts))]),
    ]
    advice = choice(results)
    sections = [advice, *sections] if advice else sections
    return write_report(path, "What storing a teacher's distributions costs", sections, subtitle)


def _two_digits(standard_error: float | None) -> str | None:
    return None if standard_error is None else f"{standard_error:.2g}"


def _trade_off(results: Sequence[dict[str, Any]], temperature: int) -> Plot:
    svg = line_plot(
        _series(results, f"kl_t{temperature}", family_of),
        x_label="bytes per token, blobs only",
        y_label=f"KL at T = {temperature} (nats)",
        title=f"Lower left is better (T = {temperature})",
        log_x=True,
        log_y=True,
    )
    return Plot(svg, f"KL(teacher || what is read back) at T = {temperature}, one standard error as bars.")


def _gradient_trade_off(results: Sequence[dict[str, Any]]) -> Plot:
    svg = line_plot(
        _series(results, "gradient_error_t1", kind_of),
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
    for row in sorted(results, key=lambda row: row["bytes_per_token"]):
        if not _is_full_width(row) and row[quantity] is not None:
            curves.setdefault(family(row), []).append(row)
    return [
        Series(
            name,
            [row["bytes_per_token"] for row in rows],
            [row[quantity] for row in rows],
            labels=[point_label(row) for row in rows],
            y_error=[row[f"{quantity}_se"] for row in rows],
            connected=len({row["config"].get("head") for row in rows}) == 1 and name not in _UNCONNECTED,
        )
        for name, rows in curves.items()
    ]


def _is_full_width(row: dict[str, Any]) -> bool:
    """True for what keeps every logit: a hundred times larger than the rest, it would squeeze them into a corner."""
    return not size_text(row["config"])


def _left_out_of_plots(results: Sequence[dict[str, Any]]) -> list[Paragraph]:
    return [
        Paragraph(
            f"Far to the right of both plots: {row['codec']}, {row['bytes_per_token']:,.0f} bytes a token at a KL of "
            f"{cell_text(row['kl_t1'])} nats (T = 1)."
        )
        for row in results
        if _is_full_width(row)
    ]
