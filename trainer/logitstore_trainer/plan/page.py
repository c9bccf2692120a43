"""What a plan shows: a table for the terminal, one paragraph with the recommendation, and the report with the plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitstore_trainer.bench.environment import environment_rows
from logitstore_trainer.report import Paragraph, Plot, Section, Series, Table, line_plot, write_report

if TYPE_CHECKING:
    from logitstore_trainer.plan.plan import Goal

_MEANING = (
    "bytes/token: blobs, everything counted, on rows that no fit has seen; tables: stored once beside the data. "
    "KL(teacher || what is read back) in nats, one standard error over samples behind it. *: on the frontier."
)


def configuration_text(config: dict[str, Any]) -> str:
    """A configuration in a few words: "predicted, p >= 0.005, log 0.5, tail step 0.13"."""
    kept = f"p >= {config['min_prob']:g}" if "min_prob" in config else f"k = {config['k']}"
    head = config["head"] + (f" {config['head_step']:g}" if "head_step" in config else "")
    step = f", tail step {config['tail_step']:g}" if "tail_step" in config else ""
    return f"{config['tail']}, {kept}, {head}{step}"


def plan_table(results: Sequence[dict[str, Any]], goal: "Goal") -> tuple[list[str], list[list[Any]]]:
    """(headers, rows), fewest bytes first."""
    names = [f"{temperature:g}" for temperature in goal.temperatures]
    headers = ["", "configuration", "bytes/token", "tables MB", "entries", *(f"KL T={name}" for name in names)]
    rows = []
    for row in sorted(results, key=lambda row: row["bytes_per_token"]):
        kls = [f"{row['kl'][name]:.4f}" + _error(row["kl_se"][name]) for name in names]
        size = f"{row['bytes_per_token']:.1f}"
        star = "*" if row["frontier"] else ""
        tables = f"{row['table_bytes'] / 1e6:.1f}"
        rows.append([star, configuration_text(row["config"]), size, tables, f"{row['entries']:.1f}", *kls])
    return headers, rows


def _error(standard_error: float | None) -> str:
    return "" if standard_error is None else f" +-{standard_error:.2g}"


def recommendation_text(
    results: Sequence[dict[str, Any]], best: dict[str, Any] | None, goal: "Goal", folder: Path | None
) -> str:
    """What to take, what it costs for the goal's number of tokens, and where a codec without tables wins."""
    wanted = f"at most {goal.max_bytes_per_token} bytes a token"
    if goal.max_kl is not None:
        wanted = f"a KL of at most {goal.max_kl} nats at T = {goal.temperature or 1:g}"
    if best is None:
        nearest = min(results, key=goal.loss if goal.max_kl is not None else lambda row: row["bytes_per_token"])
        return (
            f"No configuration reaches {wanted}. The nearest: {configuration_text(nearest['config'])}, "
            f"{nearest['bytes_per_token']:.1f} bytes a token, KL {nearest['kl']['1']:.4f} (T = 1), "
            f"{nearest['kl']['2']:.4f} (T = 2)."
        )
    size = best["bytes_per_token"] * goal.tokens + best["table_bytes"]
    lines = [
        f"For {wanted}: {configuration_text(best['config'])}; {best['bytes_per_token']:.1f} bytes a token, "
        f"KL {best['kl']['1']:.4f} at T = 1 and {best['kl']['2']:.4f} at T = 2.",
        f"{goal.tokens:,.0f} tokens take {_size(size)}, of which {_size(best['table_bytes'])} are tables "
        "(token ids of the text and Parquet's own bytes apart: some 4 bytes a token).",
    ]
    rivals = [row for row in results if not row["table_bytes"] and goal.chosen([row])]
    if best["table_bytes"] and rivals:
        rival = min(rivals, key=lambda row: row["bytes_per_token"])
        saved = rival["bytes_per_token"] - best["bytes_per_token"]
        if saved > 0:
            lines.append(
                f"Below {best['table_bytes'] / saved:,.0f} tokens {configuration_text(rival['config'])} "
                f"({rival['bytes_per_token']:.1f} bytes a token, no tables) takes less."
            )
    if folder is not None:
        lines.append(f"Use it: logitstore collect ... --tables {folder}")
    return "\n".join(lines)


def _size(n_bytes: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes / 1e3:.1f} kB"


def write_page(
    path: Path, results: Sequence[dict[str, Any]], best: dict[str, Any] | None, goal: "Goal", facts: dict[str, Any]
) -> Path:
    """Writes the report and returns its path."""
    headers, rows = plan_table(results, goal)
    text = recommendation_text(results, best, goal, None)
    sections = [
        Section("Recommendation", [Paragraph(line) for line in text.splitlines()]),
        Section(
            "Size against fidelity",
            [
                *(_frontier_plot(results, temperature) for temperature in goal.temperatures),
                Table(headers, rows, _MEANING),
            ],
        ),
        Section("How this was measured", [Table(("what", "value"), environment_rows(facts))]),
    ]
    subtitle = f"{facts['rows_fitted']:,} rows of {facts['logits']} fitted, {facts['rows_measured']:,} others measured."
    return write_report(path, "Which codec for this teacher", sections, subtitle)


def _frontier_plot(results: Sequence[dict[str, Any]], temperature: float) -> Plot:
    families: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(results, key=lambda row: row["bytes_per_token"]):
        fitted = "fitted" if row["table_bytes"] else "no tables"
        families.setdefault(f"{row['config']['tail']}, {fitted}", []).append(row)
    name = f"{temperature:g}"
    series = [
        Series(
            family,
            [row["bytes_per_token"] for row in rows],
            [row["kl"][name] for row in rows],
            y_error=[row["kl_se"][name] for row in rows],
            connected=False,
        )
        for family, rows in families.items()
    ]
    svg = line_plot(
        series,
        x_label="bytes per token",
        y_label=f"KL at T = {name} (nats)",
        title=f"Lower left is better (T = {name})",
        log_x=True,
        log_y=True,
    )
    return Plot(svg, f"KL(teacher || what is read back) at T = {name}, one standard error as bars.")
