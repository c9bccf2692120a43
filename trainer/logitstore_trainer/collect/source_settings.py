"""Which teacher reads which text, and how: the settings that `collect` and `plan` share, and their arguments.

Nothing heavy is imported here, so that --help answers at once.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

DEFAULT_MAX_LENGTH = 1024
DEFAULT_BATCH_SIZE = 8
DATASET_SHAPES = """\
the data set, one shape a file (.jsonl, .parquet, or .txt with one document a line):
  {"text": ...}                        documents; all tokens are learned, long ones are cut into windows
  {"prompt": ..., "completion": ...}   the completion and its closing EOS are learned
  {"messages": [{"role", "content"}]}  chat template; every assistant turn is learned, tool output is not
  {"prompt": ...}                      with --generate N the teacher writes the completion
"""


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """max_length: tokens of a sample. max_tokens: stop after the sample that reaches it. generate: most new tokens of a
    completion that the teacher writes. keep_prompt: store the rows of tokens that are not learned, too. seed: of
    sampled completions, and of the rows that a codec is fitted on. Raises ValueError for numbers out of range."""

    teacher: str
    dataset: Path
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
            require_positive(name, getattr(self, name))
        if not 0 <= self.generate_temperature < float("inf"):
            raise ValueError(f"--generate-temperature must be 0 or above, got {self.generate_temperature}")


def require_positive(name: str, value: int | None) -> None:
    """Raises ValueError, naming the option, for a number below 1; None is none."""
    if value is not None and value < 1:
        raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def add_text_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds what decides which tokens are read, and which of their rows are kept."""
    group.add_argument("--keep-prompt", action="store_true", help="store rows of tokens that are not learned, too")
    group.add_argument(
        "--max-length", type=int, metavar="L",
        help=f"most tokens of a sample (default: the teacher's limit, {DEFAULT_MAX_LENGTH} at most)",
    )  # fmt: skip
    group.add_argument("--max-tokens", type=int, metavar="N", help="stop after about N tokens")
    group.add_argument("--generate", type=int, metavar="N", help="the teacher completes prompts, N new tokens at most")
    group.add_argument(
        "--generate-temperature", type=float, default=0.0, metavar="T", help="0: greedy (default); else sampled at T"
    )
    group.add_argument(
        "--seed", type=int, default=0, help="of sampled completions, and of what a codec is fitted on (default: 0)"
    )


def add_running_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds what decides how the teacher runs."""
    group.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16 or float16")
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    group.add_argument(
        "--batch-size", type=int, default=DEFAULT_BATCH_SIZE, metavar="B",
        help=f"sequences at a time (default: {DEFAULT_BATCH_SIZE})",
    )  # fmt: skip
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
