"""The model card: README.md beside a trained student, with what it was distilled from, what that lost, and its figures.

The card says what the run and its stores know, and of everything else that it is not known; nothing is fetched. Its
head is the YAML that model hubs read. Folders of the machine that trained are not named.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import logitstore
from logitstore_trainer.bench.storage_names import configuration_text
from logitstore_trainer.run_report import REPORT_NAME, figures_table
from logitstore_trainer.train import LOSS_NAMES

CARD_NAME = "README.md"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MOST_SAMPLES = 64
_NOT_KNOWN = "not known"


def model_card(metrics: dict[str, Any], stores: Sequence[logitstore.LogitStore], *, from_scratch: bool) -> str:
    """The text of the card. metrics: what `train` returns. stores: what was trained on, all of one teacher.

    from_scratch: whether the student started from random weights. Reads up to 64 samples of the first store.
    """
    config, spec = metrics["config"], stores[0].spec
    student, teacher = _called(config["student"]), _called(spec.teacher)
    origin = "trained from random weights" if from_scratch else f"trained from {student}"
    parts = [
        f"# {Path(config['out']).resolve().name}",
        f"A causal language model of {metrics['n_parameters']:,} parameters, {origin}, distilled with logitstore from "
        f"stored next-token distributions of the teacher {teacher}.",
        "## What it was distilled from",
        _table(("what", "value"), _teacher_rows(stores, teacher)),
        "## What the store costs and loses",
        "\n".join(f"- {line}" for line in _store_lines(stores)),
        "## How it was trained",
        _table(("setting", "value"), _training_rows(metrics, student)),
        f"All settings are in recipe.yaml, the curves in {REPORT_NAME}.",
        "## How it does",
        _results(metrics),
        "## Licence",
        _licence(
            teacher, None if from_scratch else student, sorted({store.spec.dataset or _NOT_KNOWN for store in stores})
        ),
    ]
    return _front_matter(config["student"], spec.teacher, from_scratch) + "\n" + "\n\n".join(parts) + "\n"


def _front_matter(student: str, teacher: str | None, from_scratch: bool) -> str:
    base_model = teacher if from_scratch else student
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if _is_hub_name(base_model):
        head["base_model"] = base_model
    head["tags"] = ["distillation", "knowledge-distillation", "logitstore"]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n"


def _teacher_rows(stores: Sequence[logitstore.LogitStore], teacher: str) -> list[tuple[str, str]]:
    spec = stores[0].spec
    datasets = {(store.spec.dataset, store.spec.dataset_sha256) for store in stores}
    described = [
        _NOT_KNOWN if name is None else f"{name} (SHA-256 {sha256[:12]})" if sha256 else name
        for name, sha256 in sorted(datasets, key=str)
    ]
    return [
        ("teacher", f"{teacher} (SHA-256 {spec.teacher_sha256[:12]})" if spec.teacher_sha256 else teacher),
        ("its dtype when it was stored", spec.teacher_dtype or _NOT_KNOWN),
        ("vocabulary", f"{spec.vocab_size:,} tokens"),
        ("data set", ", ".join(described)),
        ("stores", ", ".join(store.path.name for store in stores)),
        ("samples", f"{sum(map(len, stores)):,}"),
        ("stored distributions", f"{sum(store.n_present_rows for store in stores):,}"),
    ]


def _store_lines(stores: Sequence[logitstore.LogitStore]) -> list[str]:
    spec = stores[0].spec
    codec, n_rows = spec.codec, sum(store.n_present_rows for store in stores)
    fp16_bytes = 2 * (spec.head_width or spec.vocab_size)
    lines = [f"Codec: {codec.config['name']}, {configuration_text(codec.config)}, tail {codec.tail}."]
    if n_rows:
        per_row = sum(store.blob_bytes for store in stores) / n_rows
        lines.append(f"Size: {per_row:.1f} bytes a token; all logits in fp16 would take {fp16_bytes:,}.")
    kept = _kept_mass(stores[0])
    if kept is not None:
        mass, n_measured = kept
        lines.append(
            f"The tokens that it keeps one by one hold {mass:.2%} of the teacher's probability (mean over "
            f"{n_measured:,} tokens of the store); of all others it keeps "
            + ("the mass and a predicted shape." if codec.tail == "predicted" else "the mass, not the shape.")
        )
    elif codec.tail == "sampled":
        lines.append("It keeps a random sample of each distribution, whose expectation is the whole one, at T = 1.")
    goal = spec.collection
    if (max_kl := goal.get("max_kl")) is not None:
        at = goal.get("goal_temperature", 1.0)
        lines.append(f"The codec was chosen for KL(teacher || store) of at most {max_kl:g} nats at T = {at:g}.")
    if (max_bytes := goal.get("max_bytes_per_token")) is not None:
        lines.append(f"The codec was chosen for at most {max_bytes:g} bytes a token.")
    lines.append(
        "KL(teacher || store) of this very store is not known: that takes the teacher's whole logits "
        "(`logitstore bench storage` measures it)."
    )
    return lines


def _kept_mass(store: logitstore.LogitStore) -> tuple[float, int] | None:
    """(mean probability that the stored entries hold, rows it is the mean of) over samples spread over the store."""
    if store.spec.codec.tail == "sampled" or not len(store):
        return None
    n_samples = min(_MOST_SAMPLES, len(store))
    numbers = [i * len(store) // n_samples for i in range(n_samples)]
    tails = np.concatenate([store[i].targets.tail_logmass for i in numbers]).astype(np.float64)
    tails = tails[~np.isnan(tails)]
    return (float(-np.expm1(tails).mean()), len(tails)) if len(tails) else None


def _training_rows(metrics: dict[str, Any], student: str) -> list[tuple[str, str]]:
    config = metrics["config"]
    divergence, alpha = LOSS_NAMES[config["loss"]], config["alpha"]
    return [
        ("student", student),
        ("loss", f"{alpha:g} * T^2 * {divergence} + {1 - alpha:g} * cross-entropy, T = {config['temperature']:g}"),
        ("tail of the teacher", metrics["tail"]),
        ("optimizer steps", f"{metrics['steps']:,}"),
        ("samples a step", f"{metrics['samples_per_step']:,}"),
        ("peak learning rate", f"{metrics['peak_lr']:g}, cosine to 0"),
        ("tokens trained on", f"{metrics['n_tokens']:,}"),
        ("seed", str(config["seed"])),
    ]


def _results(metrics: dict[str, Any]) -> str:
    if "held_out" not in metrics:
        return "Nothing was held out: there is no figure that says how it does on text that it has not seen."
    config = metrics["config"]
    source = Path(config["eval_data"]).name if config["eval_data"] else f"{config['eval_fraction']:.1%} of the samples"
    _, rows = figures_table(metrics)
    held_out = [(name, f"{value:.4f}" if isinstance(value, float) else str(value)) for name, _, value in rows]
    return f"On text that was held out of training ({source}):\n\n" + _table(("quantity", "held out"), held_out)


def _licence(teacher: str, student: str | None, datasets: Sequence[str]) -> str:
    bound = f"the teacher ({teacher})" + (f", the model that the student started from ({student})" if student else "")
    return (
        f"Not known: neither the store nor the run records a licence. The terms of {bound} and of the data set "
        f"({', '.join(datasets)}) bind this model too: some forbid training other models on what theirs says, or ask "
        "for their name or licence to be kept. Check both before you pass the model on, and enter the licence here and "
        "in the head of this file."
    )


def _called(name: str | None) -> str:
    """The name, of a path its last part."""
    if name is None:
        return _NOT_KNOWN
    return name if _is_hub_name(name) or name.startswith("llama:") else Path(name).name or name


def _is_hub_name(name: str | None) -> bool:
    return name is not None and _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
