"""What a plan shows: a table for the terminal, one paragraph with the recommendation, and the report with the plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitstore_trainer.bench.environment import environment_rows
from logitstore_trainer.plan.goal import DEFAULT_TOKENS
from logitstore_trainer.report import Paragraph, Plot, Section, Series, Table, line_plot, write_report
from logitstore_trainer.units import bytes_text

if TYPE_CHECKING:
    from logitstore_trainer.plan.goal import Goal
    from logitstore_trainer.plan.plan import Planned

FEW_ROWS_FITTED = 10_000
PRECISION = 0.1
_MEANING = (
    "bytes/token: blobs, everything counted, on rows that no fit has seen; tables: stored once beside the data. "
    "r: coefficients of a predicted tail. KL(teacher || what is read back) in nats, one standard error over samples "
    "behind it. *: on the frontier."
)


def in_words(config: dict[str, Any]) -> str:
    """A configuration, in words: "predicted, p >= 0.005, log 0.5, tail step 0.13"."""
    kept = f"p >= {config['min_prob']:g}" if "min_prob" in config else f"k = {config['k']}"
    head = config["head"] + (f" {config['head_step']:g}" if "head_step" in config else "")
    step = f", tail step {config['tail_step']:g}" if "tail_step" in config else ""
    return f"{config['tail']}, {kept}, {head}{step}"


def plan_table(results: Sequence[dict[str, Any]], goal: "Goal") -> tuple[list[str], list[list[Any]]]:
    """(headers, rows), fewest bytes first."""
    names = [f"{temperature:g}" for temperature in goal.temperatures]
    headers = ["", "configuration", "r", "bytes/token", "tables MB", "entries", *(f"KL T={name}" for name in names)]
    rows = []
    for row in sorted(results, key=lambda row: row["bytes_per_token"]):
        kls = [f"{row['kl'][name]:.4f}" + _error(row["kl_se"][name]) for name in names]
        size = f"{row['bytes_per_token']:.1f}" + _error(row["bytes_per_token_se"])
        star = "*" if row["frontier"] else ""
        tables = f"{row['table_bytes'] / 1e6:.1f}"
        rank = "" if row["tail_rank"] is None else row["tail_rank"]
        rows.append([star, in_words(row["config"]), rank, size, tables, f"{row['entries']:.1f}", *kls])
    return headers, rows


def _error(standard_error: float | None) -> str:
    return "" if standard_error is None else f" +- {standard_error:.2g}"


def choice_text(planned: "Planned", goal: "Goal") -> str:
    """The chosen configuration in one line, with its size and loss; where there is none, the nearest."""
    best = planned.chosen
    if best is None:
        nearest = min(planned.results, key=goal.loss if goal.max_kl is not None else _bytes_per_token)
        return f"no configuration reaches {_wanted(goal)}; the nearest: {_measured_text(nearest, goal)}"
    tables = f", of which {bytes_text(best['table_bytes'])} are tables" if best["table_bytes"] else ""
    tokens = goal.tokens or DEFAULT_TOKENS
    size = f"{tokens:,.0f} tokens take {bytes_text(goal.total_bytes(best))}{tables}"
    return f"{_measured_text(best, goal)}; {size}"


def recommendation_lines(planned: "Planned", goal: "Goal") -> list[str]:
    """What to take, what it costs for the goal's number of tokens, where a codec without tables wins, and how far the
    numbers can be trusted."""
    text, best = choice_text(planned, goal), planned.chosen
    lines = [text[0].upper() + text[1:] + "." if best is None else f"For {_wanted(goal)}: {text}."]
    if best is not None:
        lines.append("The token ids of the text and Parquet's own bytes come on top: some 4 bytes a token.")
        rivals = [row for row in planned.results if not row["table_bytes"] and goal.chosen([row])]
        if best["table_bytes"] and rivals:
            rival = min(rivals, key=_bytes_per_token)
            saved = rival["bytes_per_token"] - best["bytes_per_token"]
            if saved > 0:
                lines.append(
                    f"Below {best['table_bytes'] / saved:,.0f} tokens {in_words(rival['config'])} "
                    f"({rival['bytes_per_token']:.1f} bytes a token, no tables) takes less."
                )
    return [*lines, *(f"Warning: {warning}." for warning in warnings_of(planned, goal))]


def warnings_of(planned: "Planned", goal: "Goal") -> list[str]:
    """Why the numbers of the chosen configuration should be taken with care; one line each, none where they need not.

    A tail model fitted to fewer rows than FEW_ROWS_FITTED is worse than the same teacher allows; a KL whose standard
    error is above PRECISION of it may lie on the other side of the goal.
    """
    found = []
    if planned.rows_fitted < FEW_ROWS_FITTED:
        found.append(f"fitted to only {planned.rows_fitted:,} rows; a fitted codec gets better with more")
    if planned.chosen is None:
        return found
    for temperature in goal.counted_temperatures:
        kl, error = (planned.chosen[key][f"{temperature:g}"] for key in ("kl", "kl_se"))
        measured = f"measured on {planned.rows_measured:,} rows of {planned.texts_measured} texts"
        if error is None:
            found.append(f"the KL at T = {temperature:g} is {measured}, too few for a standard error")
        elif error > PRECISION * kl:
            found.append(
                f"the KL at T = {temperature:g} is {kl:.4f} with a standard error of {error:.2g} ({error / kl:.0%}), "
                f"{measured}; more of them make it surer"
            )
    return found


def _wanted(goal: "Goal") -> str:
    if goal.max_kl is not None:
        return goal.text()
    return f"at most {goal.max_bytes_per_token:g} bytes a token, two standard errors to spare"


def _bytes_per_token(row: dict[str, Any]) -> float:
    return row["bytes_per_token"]


def _measured_text(row: dict[str, Any], goal: "Goal") -> str:
    """A configuration with its bytes a token and its KL at each temperature that is measured."""
    kls = " and ".join(
        f"{row['kl'][name]:.4f}{_error(row['kl_se'][name])} at T = {name}"
        for name in (f"{temperature:g}" for temperature in goal.temperatures)
    )
    size = f"{row['bytes_per_token']:.1f}{_error(row['bytes_per_token_se'])}"
    return f"{in_words(row['config'])}, {size} bytes a token, KL {kls}"


def write_page(path: Path, planned: "Planned", goal: "Goal", facts: dict[str, Any]) -> Path:
    """Writes the report and returns its path."""
    results = planned.results
    headers, rows = plan_table(results, goal)
    sections = [
        Section("Recommendation", [Paragraph(line) for line in recommendation_lines(planned, goal)]),
        Section(
            "Size against fidelity",
            [
                *(_frontier_plot(results, temperature) for temperature in goal.temperatures),
                Table(headers, rows, _MEANING),
            ],
        ),
        Section("How this was measured", [Table(("what", "value"), environment_rows(facts))]),
    ]
    subtitle = f"{facts['rows_fitted']:,} rows of {facts['sample']} fitted, {facts['rows_measured']:,} others measured."
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
