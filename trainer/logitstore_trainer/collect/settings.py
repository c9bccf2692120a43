"""What a collection is asked to do: the settings of `logitstore collect`, and its command-line arguments.

Nothing heavy is imported here, so that `logitstore collect --help` answers at once.
"""

import argparse
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_MAX_LENGTH = 1024
DEFAULT_BATCH_SIZE = 8

EPILOG = """\
the data set, one shape a file (.jsonl, .parquet, or .txt with one document a line):
  {"text": ...}                        documents; all tokens are learned, long ones are cut into windows
  {"prompt": ..., "completion": ...}   the completion and its closing EOS are learned
  {"messages": [{"role", "content"}]}  chat template; every assistant turn is learned, tool output is not
  {"prompt": ...}                      with --generate N the teacher writes the completion

examples:
  logitstore collect --teacher HuggingFaceTB/SmolLM2-135M-Instruct --dataset my_prompts.jsonl \\
      --generate 256 --out teacher_logits.parquet
  logitstore collect --teacher ./llama --dataset chats.jsonl --out logits.parquet --codec topk --set k=32 --set head=fp8
  logitstore collect --teacher ./llama --dataset docs.jsonl --out logits.parquet --codec varopt --set k=16
  logitstore collect --teacher model.Q4_1.gguf --dataset docs.parquet --out logits.parquet --max-tokens 1000000

Interrupted, the same command continues where it stopped; finished, it says so and does nothing.
"""


@dataclass(frozen=True)
class CollectSettings:
    """codec_options: the codec's options beside vocab_size. tables: a folder that codec.save wrote, or a store, whose
    fitted codec is used instead. max_length: tokens of a sample. max_tokens: stop after the
    sample that reaches it. generate: most new tokens of a completion that the teacher writes. keep_prompt: store the
    rows of tokens that are not learned, too."""

    teacher: str
    dataset: Path
    out: Path
    codec: str = "topk"
    codec_options: Mapping[str, Any] = field(default_factory=dict)
    tables: Path | None = None
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int = DEFAULT_BATCH_SIZE
    max_length: int | None = None
    max_tokens: int | None = None
    generate: int | None = None
    generate_temperature: float = 0.0
    seed: int = 0
    keep_prompt: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length", "max_tokens", "generate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if not 0 <= self.generate_temperature < float("inf"):
            raise ValueError(f"--generate-temperature must be 0 or above, got {self.generate_temperature}")
        if self.tables is not None and (self.codec_options or self.codec != "topk"):
            raise ValueError("--tables names a codec with all its options; leave out --codec and --set")
        if self.codec_options.get("tail") == "predicted":
            raise ValueError("a predicted tail is fitted first: logitstore plan --out DIR, then collect --tables DIR")
        for name in {"name", "vocab_size"} & set(self.codec_options):
            raise ValueError(
                f"--set {name} is not an option: the codec is named by --codec, its vocabulary is the teacher's"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `logitstore collect`."""
    parser.epilog = EPILOG
    required = parser.add_argument_group("required")
    required.add_argument("--teacher", required=True, metavar="M", help="a model: hub name, folder, or .gguf file")
    required.add_argument("--dataset", required=True, type=Path, metavar="F", help="a .jsonl, .parquet or .txt file")
    required.add_argument("--out", required=True, type=Path, metavar="x.parquet", help="the store to write")
    stored = parser.add_argument_group("what is stored")
    stored.add_argument("--codec", default="topk", help="topk (default); varopt or rskd: samples, for T = 1")
    stored.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", dest="options",
        help="an option of the codec: k=64, head=int8|fp8|fp16|log|sqrtp, head_step=0.5, min_prob=0.01, top_p=0.98 "
        "(topk), max_weight=0.03 (varopt), draws=50 (rskd), seed=0 (varopt, rskd); may be repeated",
    )  # fmt: skip
    stored.add_argument(
        "--tables", type=Path, metavar="DIR", help="a fitted codec: a folder that codec.save wrote, or another store"
    )
    stored.add_argument("--keep-prompt", action="store_true", help="store rows of tokens that are not learned, too")
    stored.add_argument(
        "--max-length", type=int, metavar="L",
        help=f"most tokens of a sample (default: the teacher's limit, {DEFAULT_MAX_LENGTH} at most)",
    )  # fmt: skip
    stored.add_argument("--max-tokens", type=int, metavar="N", help="stop after about N tokens")
    stored.add_argument("--generate", type=int, metavar="N", help="the teacher completes prompts, N new tokens at most")
    stored.add_argument(
        "--generate-temperature", type=float, default=0.0, metavar="T", help="0: greedy (default); else sampled at T"
    )
    stored.add_argument("--seed", type=int, default=0, help="seed of sampled completions (default: 0)")
    running = parser.add_argument_group("how the teacher runs")
    running.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16 or float16")
    running.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    running.add_argument(
        "--batch-size", type=int, default=DEFAULT_BATCH_SIZE, metavar="B",
        help=f"sequences at a time (default: {DEFAULT_BATCH_SIZE})",
    )  # fmt: skip
    running.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def settings_from_arguments(args: argparse.Namespace) -> CollectSettings:
    """The settings that parsed arguments stand for. Raises ValueError for a malformed --set."""
    values = {name: value for name, value in vars(args).items() if name in CollectSettings.__dataclass_fields__}
    return CollectSettings(**values, codec_options=parsed_options(args.options))


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
