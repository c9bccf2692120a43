"""What the page of `bench storage` says beyond size and fidelity: what to choose, where bytes go, kinds of text, the
tail."""

from collections.abc import Sequence
from typing import Any

from logitstore_trainer.bench.storage_names import configuration_text
from logitstore_trainer.report import Paragraph, Section, Table, cell_text

Rows = Sequence[dict[str, Any]]


def choice(results: Rows, unit_tokens: float = 1e9) -> Section | None:
    """One paragraph of advice, from the rows that were planned for budgets; None where there are none."""
    planned = [row for row in results if row["budget"] is not None and "tables" in row["config"]]
    if not planned:
        return None
    advice = [_advice(row, unit_tokens) for row in planned]
    untabled = [row for row in results if not row["table_bytes"] and row["codec"] == "topk"]
    below = [_break_even(row, untabled) for row in planned]
    least = min((tokens for tokens in below if tokens), default=None)
    text = "Take the largest budget that the disk allows. " + " ".join(advice)
    if least is not None:
        text += (
            f" Their tables are stored once: below some {least:,.0f} tokens a codec without tables that keeps as much "
            "takes less."
        )
    text += (
        " At T = 1 alone, for a loss that averages over very many tokens, the codecs that sample (varopt, rskd) have "
        "no bias at some 30 bytes; at any other temperature they say nothing."
    )
    return Section("What to choose", [Paragraph(text)])


def _advice(row: dict[str, Any], unit_tokens: float) -> str:
    size_gb = (row["bytes_per_token"] * unit_tokens + row["table_bytes"]) / 1e9
    return (
        f"For {row['budget']:g} bytes a token ({row['bytes_per_token']:.1f} on this text): "
        f"{configuration_text(row['config'])}, KL {row['kl_t1']:.3f} at T = 1 and {row['kl_t2']:.3f} at T = 2; a "
        f"billion tokens take {size_gb:.0f} GB."
    )


def _break_even(row: dict[str, Any], untabled: Rows) -> float | None:
    """Tokens from which the tables have paid for themselves, against the smallest codec without tables that is no worse
    at both temperatures."""
    no_worse = [other for other in untabled if other["kl_t1"] <= row["kl_t1"] and other["kl_t2"] <= row["kl_t2"]]
    saved = min((other["bytes_per_token"] for other in no_worse), default=0) - row["bytes_per_token"]
    return row["table_bytes"] / saved if saved > 0 else None


def where_bytes_go(results: Rows) -> Section | None:
    """Bytes a token by what they are for."""
    rows = [row for row in results if row["bytes_of"]]
    if not rows:
        return None
    parts = list(rows[0]["bytes_of"])
    cells = [
        [
            row["codec"],
            configuration_text(row["config"]),
            row["bytes_per_token"],
            *row["bytes_of"].values(),
            _container(row),
        ]
        for row in rows
    ]
    meaning = (
        "Of an entropy-coded blob: what its symbols cost under their tables; of others: what each plane takes when "
        "it is compressed alone, scaled to the blob. side: header, counts of entries, frame and checksum. container: "
        "what the files take beyond the blobs, the ids of the text (4 bytes a token) and tables among it."
    )
    return Section(
        "Where the bytes go", [Table(("codec", "configuration", "bytes/token", *parts, "container"), cells, meaning)]
    )


def _container(row: dict[str, Any]) -> float:
    return row["container_bytes_per_token"] - row["bytes_per_token"]


def kinds_of_text(results: Rows) -> Section | None:
    """Bytes and KL of each kind of text, those that no fit has seen marked."""
    kinds = list({name: None for row in results for name in row["kinds"]})
    unseen = {name for row in results for name, kind in row["kinds"].items() if kind["unseen"]}
    if len(kinds) < 2:
        return None
    headers = ["codec", "configuration"]
    for name in kinds:
        mark = " (in no fit)" if name in unseen else ""
        headers += [f"{name}{mark}: bytes", "KL T=1", "KL T=2"]
    cells = []
    for row in results:
        columns = ("bytes_per_token", "kl_t1", "kl_t2")
        numbers = [row["kinds"].get(name, {}).get(what) for name in kinds for what in columns]
        cells.append([row["codec"], configuration_text(row["config"]), *numbers])
    return Section(
        "Kinds of text",
        [
            Table(
                headers,
                cells,
                "Plots and table above hold the kinds that are in the fit; what is not fitted was not asked others.",
            )
        ],
    )


def the_tail(results: Rows) -> Section | None:
    """How well the tail's mass is known at each temperature, and the probability of tokens that a student asks for."""
    rows = [row for row in results if row["tail_mass_error"]]
    if not rows:
        return None
    headers = ["codec", "configuration", *(f"T = {t}" for t in rows[0]["tail_mass_error"]), "log-prob of asked tokens"]
    cells = [
        [
            row["codec"],
            configuration_text(row["config"]),
            *(f"{x:.2g}" for x in row["tail_mass_error"].values()),
            cell_text(row["logprobs_at_error"]),
        ]
        for row in rows
    ]
    meaning = (
        "Mean |tail mass as stored - the teacher's|, of the tokens that are not entries. Log-prob of asked tokens: "
        "mean |ln q - ln p| in nats at T = 1 over the 32 most probable tokens of a made-up student, whose logits are "
        "the teacher's and Gaussian noise of 2 nats."
    )
    return Section("The tail", [Table(headers, cells, meaning)])
