"""YAML recipes of `logitstore train`: one flat mapping with the names of its options, read, changed, and written again.

A value is read as the type of its setting, from the text as it stands in the file, so that what YAML 1.1 guesses (3e-4
a text, no a False, 010 an eight) does not matter. The parser builds a tree of texts and never an object. An option on
the command line wins over --set, --set over the recipe, the recipe over the default.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml

from logitstore_trainer.train import SettingError, TrainConfig, check_config

RECIPE_NAME = "recipe.yaml"
_MAX_BYTES = 1 << 20
_TYPES = get_type_hints(TrainConfig)
_REQUIRED = tuple(field.name for field in fields(TrainConfig) if field.default is MISSING)
_OTHER_NAMES = {  # what other trainers call it
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "output_dir": "out",
    "model": "student",
    "model_name_or_path": "student",
    "dataset": "data",
    "store": "data",
    "divergence": "loss",
    "precision": "dtype",
    "logging_steps": "log_every",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "dataloader_num_workers": "workers",
    "resume_from_checkpoint": "resume",
}
_SCALAR_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp"))
_WORDS_FOR_NULL = frozenset(("", "~", "null", "Null", "NULL"))
_INTEGER = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_STEP_NOTE = re.compile(r"^batch_size:.*# here steps of ([0-9]{1,12}) samples on [0-9]+ process", re.MULTILINE)
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


@dataclass(frozen=True)
class Setting:
    """A value and where it was said: "recipe.yaml, line 3"."""

    value: Any
    where: str


def resolved_config(recipe: str | Path | None, overrides: Sequence[str], options: Mapping[str, Any]) -> TrainConfig:
    """The settings of a run: those of the recipe, then "name=value" overrides, then options (name to value), checked.

    Raises ValueError naming the place (file and line, --set or option) of an unknown or missing name, of a value of
    another type and of one that makes no run; OSError for a recipe that cannot be read.
    """
    settings = {} if recipe is None else read_recipe(recipe)
    for override in overrides:
        name, setting = _read_override(override)
        settings[name] = setting
    settings |= {name: Setting(value, "") for name, value in options.items()}
    missing = [name for name in _REQUIRED if name not in settings]
    if missing:
        where = "the command line" if recipe is None else f"{recipe} and the command line"
        raise ValueError(f"{where} lack{'s' if recipe is None else ''} {', '.join(map(_option, missing))}")
    try:
        config = TrainConfig(**{name: setting.value for name, setting in settings.items()})
        check_config(config)
    except SettingError as error:
        where = settings[error.setting].where if error.setting in settings else ""
        raise ValueError(f"{where}: {error}" if where else str(error)) from None
    return config


def read_recipe(path: str | Path) -> dict[str, Setting]:
    """The settings in a recipe by name. A name may be spelled as the option is: batch-size.

    Raises ValueError naming file and line for what is no flat mapping of known names to values of their types, OSError
    for a file that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        advice = f"; did you mean {path / RECIPE_NAME}?" if (path / RECIPE_NAME).exists() else ""
        raise ValueError(f"recipe {path} is a folder, expected a YAML file{advice}")
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"recipe {path} has more than {_MAX_BYTES:,} bytes: is it a recipe?")
    try:
        root = _tree(data.decode("utf-8"), str(path))
    except UnicodeDecodeError:
        raise ValueError(f"recipe {path} is no text in UTF-8: is it a recipe?") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} holds no settings, expected lines such as student: 20M")
    settings: dict[str, Setting] = {}
    for key, value in root.value:
        where = f"{path}, line {key.start_mark.line + 1}"
        name = _known_name(key.value if isinstance(key, yaml.ScalarNode) else "?", where)
        if name in settings:
            raise ValueError(f"{where}: {name} is there twice, first at {settings[name].where.split(', ')[-1]}")
        settings[name] = Setting(_value(name, value, where), where)
    return settings


def recipe_text(config: TrainConfig, notes: Mapping[str, str]) -> str:
    """Every setting of a run as a recipe: read again it gives an equal config, but for resume, which is False.

    `notes` maps names to what follows as a comment, such as what an automatic choice came to.
    """
    settings = {**asdict(config), "data": [str(each) for each in config.data], "resume": False}
    lines = [
        "# Every setting of this run; paths count from where it was started. To the same losses in another folder:",
        f"#   logitstore train {RECIPE_NAME} --out another",
    ]
    for name, value in settings.items():
        text = yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True).strip()
        lines.append(f"{name}: {text[1:-1]}" + (f"  # {notes[name]}" if name in notes else ""))
    return "\n".join(lines) + "\n"


def step_note(n_samples: int, n_processes: int) -> str:
    """The comment that a run puts behind its batch size, which is of one process and does not say of how many."""
    return f"here steps of {n_samples} samples on {n_processes} process{'' if n_processes == 1 else 'es'}"


def noted_samples_per_step(path: str | Path) -> int | None:
    """Samples of an optimizer step of the run that left this recipe, by its step_note; None where it has none."""
    with Path(path).open("rb") as file:
        found = _STEP_NOTE.search(file.read(_MAX_BYTES).decode("utf-8", errors="replace"))
    return int(found[1]) if found else None


def _read_override(override: str) -> tuple[str, Setting]:
    name, equals, text = override.partition("=")
    where = f"--set {override}"
    if not equals:
        raise ValueError(f"{where} has no '=', expected NAME=VALUE, as in --set lr=3e-4")
    name = _known_name(name.strip(), where)
    return name, Setting(_value(name, _tree(text, where), where), where)


def _tree(text: str, where: str) -> yaml.Node | None:
    """The YAML document as nodes that hold texts, None for an empty one. Raises ValueError for what is no YAML."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ValueError(f"{where}{line}: no YAML, {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: no YAML, {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply for a recipe, which is one flat mapping") from None


def _known_name(given: str, where: str) -> str:
    name = given.replace("-", "_")
    if name in _TYPES:
        return name
    nearest = difflib.get_close_matches(name.lower(), [*_TYPES, *_OTHER_NAMES], n=1, cutoff=0.0)[0]
    nearest = _OTHER_NAMES.get(nearest, nearest)
    raise ValueError(
        f"{where}: unknown setting {given!r}, the nearest is {nearest!r} (logitstore train --help has them all)"
    )


def _value(name: str, node: yaml.Node | None, where: str) -> Any:
    """What the node says, as the type of the setting."""
    if name == "data":
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return [_scalar(name, part, (str,), where) for part in parts]
    return _scalar(name, node, get_args(_TYPES[name]) or (_TYPES[name],), where)


def _scalar(name: str, node: yaml.Node | None, kinds: tuple[type, ...], where: str) -> Any:
    expected = " or ".join(_KINDS[kind] for kind in kinds)
    if node is not None and not isinstance(node, yaml.ScalarNode):
        shape = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
        raise ValueError(f"{where}: {name} is {shape}, expected {expected}")
    if node is not None and node.tag not in _SCALAR_TAGS:
        raise ValueError(f"{where}: {name} has the YAML tag {node.tag}, expected {expected} without a tag")
    text, is_quoted = ("", False) if node is None else (node.value, node.style is not None)
    if text in _WORDS_FOR_NULL and not is_quoted:
        if NoneType in kinds:
            return None
        raise ValueError(f"{where}: {name} has no value, expected {expected}")
    for kind in kinds:
        value = None if kind is NoneType else _read_as(kind, text)
        if value is not None:
            return value
    raise ValueError(f"{where}: {name} is {text!r}, expected {expected}")


def _read_as(kind: type, text: str) -> Any:
    """The text as that type, None where it is none."""
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    if kind is int:
        return int(text) if _INTEGER.fullmatch(text) and len(text) < 20 else None
    try:
        return float(text)
    except ValueError:
        return None


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
