"""How a measured configuration is called in tables and plots."""

from typing import Any

DISTILLKIT = "DistillKit"


def configuration_text(config: dict[str, Any]) -> str:
    """What tells configurations apart in a few words: "int8 k=64", "k=64 int64 snappy", "log 0.5 k=16 fitted",
    "log 0.5 p>=0.005 predicted 0.13", "log 0.5 p>=0.005 predicted 0.13 r=256" where the coefficients are known."""
    words = [
        f"{config[name]:g}" if name == "head_step" else config[name] for name in ("head", "head_step") if name in config
    ]
    words += [size_text(config)] if size_text(config) else []
    words += [str(config[name]) for name in ("ids", "compression") if name in config]
    if config.get("tail") == "predicted":
        words += ["predicted", *([f"{config['tail_step']:g}"] if "tail_step" in config else [])]
        return " ".join([*words, *([f"r={config['tail_rank']}"] if "tail_rank" in config else [])])
    return " ".join([*words, "fitted"] if "tables" in config else words)


def size_text(config: dict[str, Any]) -> str:
    """What decides how much of a row is kept: "k=64", "p>=0.01", "weight 0.03", "50 draws", "rank 21"; "" for all."""
    if "max_weight" in config:
        return f"weight {config['max_weight']:g}"
    if "min_prob" in config:
        return f"p>={config['min_prob']:g}"
    if "draws" in config:
        return f"{config['draws']} draws"
    if "rank" in config:
        return f"rank {config['rank']}"
    if "most" in config:
        return f"top-p {config['top_p']:g}"
    return f"k={config['k']}" if "k" in config else ""


def kind_of(row: dict[str, Any]) -> str:
    """Its codec, fitted ones and predicted tails apart; all of DistillKit is one kind."""
    name = DISTILLKIT if row["codec"].startswith(DISTILLKIT) else row["codec"]
    if row["config"].get("tail") == "predicted":
        return f"{name} predicted"
    return f"{name} fitted" if "tables" in row["config"] else name


def family_of(row: dict[str, Any]) -> str:
    """Its kind, and for unfitted codecs with a head its head."""
    has_head = "head" in row["config"] and "tables" not in row["config"]
    return f"{kind_of(row)} {row['config']['head']}" if has_head else kind_of(row)


def point_label(row: dict[str, Any]) -> str:
    """What it keeps, or the budget it was chosen for; DistillKit's configurations differ in more, and are named."""
    name = row["codec"].removeprefix(DISTILLKIT).strip()
    if row["budget"] is not None:
        return f"{row['budget']:g} B"
    return name if name != row["codec"] else size_text(row["config"])
