"""What a collection is asked to do: the settings of `logitstore collect`, and its command-line arguments.

Nothing heavy is imported here, so that `logitstore collect --help` answers at once.
"""

import argparse
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitstore_trainer.collect.ranks import ALONE, Rank, rank_of_process
from logitstore_trainer.collect.source_settings import (
    DATASET_SHAPES,
    SourceSettings,
    add_running_arguments,
    add_text_arguments,
    require_positive,
)
from logitstore_trainer.plan.goal import Goal, add_goal_arguments, goal_from_arguments

AUTO = "auto"
FITTED_HEADS = ("log", "sqrtp")

EPILOG = f"""\
{DATASET_SHAPES}
examples:
  logitstore collect --teacher HuggingFaceTB/SmolLM2-135M-Instruct --dataset my_prompts.jsonl \\
      --generate 256 --out teacher_logits.parquet
  logitstore collect --teacher ./llama --dataset docs.jsonl --out logits.parquet --codec auto --max-kl 0.2
  logitstore collect --teacher ./llama --dataset chats.jsonl --out logits.parquet --codec topk --set k=32 --set head=fp8
  logitstore collect --teacher ./llama --dataset docs.jsonl --out logits.parquet \\
      --set head=log --set min_prob=0.01 --set tail=predicted
  logitstore collect --teacher ./llama --dataset docs.jsonl --out logits.parquet --codec varopt --set k=16
  torchrun --standalone --nproc_per_node 8 -m logitstore_trainer collect \\
      --teacher ./llama --dataset docs.jsonl --out logits.parquet --tables plan
  sbatch --array=0-15 --gpus=1 --wrap "logitstore collect --teacher ./llama --dataset docs.jsonl --out logits.parquet"
  logitstore collect --teacher model.Q4_1.gguf --dataset docs.parquet --out logits.parquet --max-tokens 1000000

--codec auto, head=log, head=sqrtp and tail=predicted are fitted first, to rows spread over the data set; the tables lie
beside the store in x.parquet.tables/. Interrupted, the same command continues where it stopped; finished, it says so
and does nothing.

Under torchrun and in a SLURM job or job array the processes share the work, one GPU each, and the last to finish puts
the store together; any number of processes goes on with what others began. They take a fitted codec from --tables.
"""


@dataclass(frozen=True, kw_only=True)
class CollectSettings(SourceSettings):
    """codec_options: the codec's options beside vocab_size. tables: a folder that codec.save wrote, or a store, whose
    fitted codec is used instead. goal: what `codec` "auto" is chosen for; without tokens, those of this collection.
    plan_rows: rows that a codec is fitted and measured on, None for a share of the data set. use_cache: whether fitted
    tail models are kept in, and taken from, the user's cache folder. rank: which of several processes this one is."""

    out: Path
    codec: str = "topk"
    codec_options: Mapping[str, Any] = field(default_factory=dict)
    tables: Path | None = None
    goal: Goal | None = None
    plan_rows: int | None = None
    use_cache: bool = True
    rank: Rank = ALONE

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("plan_rows", self.plan_rows)
        if self.out.suffix not in ("", ".parquet"):
            raise ValueError(
                f"--out {self.out} ends in {self.out.suffix!r}, expected .parquet or no ending: a store is Parquet; "
                f"for example {self.out.with_suffix('.parquet')}"
            )
        if self.tables is not None and (self.codec_options or self.codec != "topk"):
            raise ValueError("--tables names a codec with all its options; leave out --codec and --set")
        if self.codec == AUTO and self.goal is None:
            raise ValueError("--codec auto needs a goal: --max-kl NATS or --max-bytes-per-token B")
        if self.codec != AUTO and self.goal is not None:
            raise ValueError("--max-kl and --max-bytes-per-token are for --codec auto; add it, or leave them out")
        if self.codec == AUTO and self.codec_options:
            raise ValueError("--codec auto chooses all options; leave out --set, or name the codec")
        if self.plan_rows is not None and not self.is_to_fit:
            raise ValueError("--plan-rows is for codecs that are fitted first: --codec auto, head=log, tail=predicted")
        for name in {"name", "vocab_size"} & set(self.codec_options):
            raise ValueError(
                f"--set {name} is not an option: the codec is named by --codec, its vocabulary is the teacher's"
            )

    @property
    def is_to_fit(self) -> bool:
        """Whether the codec is fitted to a sample of the data set before anything is collected."""
        options = self.codec_options
        needs_tables = options.get("tail") == "predicted" or options.get("head") in FITTED_HEADS
        return self.tables is None and (self.codec == AUTO or (self.codec == "topk" and needs_tables))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `logitstore collect`."""
    parser.epilog = EPILOG
    required = parser.add_argument_group("required")
    required.add_argument("--teacher", required=True, metavar="M", help="a model: hub name, folder, or .gguf file")
    required.add_argument("--dataset", required=True, type=Path, metavar="F", help="a .jsonl, .parquet or .txt file")
    required.add_argument("--out", required=True, type=Path, metavar="x.parquet", help="the store to write")
    stored = parser.add_argument_group("what is stored")
    stored.add_argument(
        "--codec", default="topk", help="topk (default); auto: chosen for a goal; varopt or rskd: samples, for T = 1"
    )
    stored.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", dest="options",
        help="an option of the codec: k=64, head=int8|fp8|fp16|log|sqrtp, head_step=0.5, min_prob=0.01, top_p=0.98, "
        "tail=predicted, tail_step=0.13 (topk), max_weight=0.03 (varopt), draws=50 (rskd), seed=0 (varopt, rskd); may "
        "be repeated",
    )  # fmt: skip
    stored.add_argument(
        "--tables", type=Path, metavar="DIR", help="a fitted codec: a folder that codec.save wrote, or another store"
    )
    add_text_arguments(stored)
    fitting = parser.add_argument_group("what a codec is fitted on, and --codec auto is chosen for")
    add_goal_arguments(fitting, required=False, tokens="those of this collection")
    add_fitting_arguments(fitting)
    running = parser.add_argument_group("how the teacher runs")
    add_running_arguments(running)
    running.add_argument(
        "--rank", type=int, metavar="R",
        help="this process is number R, from 0, of --ranks (default: what torchrun or SLURM says)",
    )  # fmt: skip
    running.add_argument("--ranks", type=int, metavar="N", help="processes that share the work")


def add_fitting_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds how many rows a codec is fitted on, and whether its tail model may come from the cache."""
    group.add_argument(
        "--plan-rows", type=int, metavar="N",
        help="rows to fit and measure on (default: a twentieth of what will be stored, 4,000 at least, 50,000 at most)",
    )  # fmt: skip
    group.add_argument("--no-cache", action="store_false", dest="use_cache", help="fit anew, and keep nothing of it")


def settings_from_arguments(args: argparse.Namespace) -> CollectSettings:
    """The settings that parsed arguments stand for. Raises ValueError for a malformed --set."""
    values = {name: value for name, value in vars(args).items() if name in CollectSettings.__dataclass_fields__}
    values["rank"] = rank_of_process(os.environ, args.rank, args.ranks)
    return CollectSettings(**values, codec_options=parsed_options(args.options), goal=goal_from_arguments(args))


def parsed_options(options: list[str]) -> dict[str, Any]:
    """{"k": 32, "min_prob": 0.01, "head": "fp8"} of ["k=32", "min_prob=0.01", "head=fp8"].

    Raises ValueError for one without `=`.
    """
    parsed: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise ValueError(f"--set takes OPTION=VALUE, got {option!r}; for example --set k=32")
        parsed[name] = _number_or_text(value)
    return parsed


def _number_or_text(value: str) -> int | float | str:
    for number in (int, float):
        with suppress(ValueError):
            return number(value)
    return value
