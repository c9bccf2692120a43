"""The `logitstore` command: finds the sub-command, and turns every error that a user can cause into one line.

Exit codes: 0 done, 1 a check found a fault or the run was interrupted, 2 bad arguments or bad input. Each sub-command
is a module with add_arguments(parser) and run(args) -> exit code, imported only when it is asked for.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from logitstore.errors import CorruptionError, LogitStoreError


class Command(NamedTuple):
    """The module of a sub-command, and what `logitstore --help` says of it."""

    module: str
    help: str


COMMANDS = {
    "demo": Command("logitstore_trainer.demo.command", "the whole pipeline on bundled text, with a report: start here"),
    "plan": Command("logitstore_trainer.plan.command", "which codec for a size or a fidelity, fitted to your teacher"),
    "collect": Command("logitstore_trainer.collect.command", "store a teacher's distributions over a data set"),
    "inspect": Command("logitstore_trainer.store_commands.inspect", "what a store holds"),
    "verify": Command("logitstore_trainer.store_commands.verify", "check a store's data, checksums and alignment"),
    "head": Command("logitstore_trainer.store_commands.head", "the first tokens with the teacher's top tokens"),
    "train": Command("logitstore_trainer.train", "train a student from a store"),
    "eval": Command("logitstore_trainer.eval_command", "measure students on a held-out store, with a report"),
    "kernels": Command("logitstore_trainer.kernel_paths", "which path each loss takes on this machine, and why"),
    "bench": Command("logitstore_trainer.bench.command", "measure storage, throughput or kernels, with a report"),
}

EPILOG = """\
examples:
  logitstore demo
  logitstore collect --teacher ./llama --dataset my_prompts.jsonl --out teacher_logits.parquet
  logitstore train --student 5M --data teacher_logits.parquet --out student
  logitstore COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        args = _parsed(words)
        return args.run(args)

    return one_line_errors(run)


def one_line_errors(run: Callable[[], int]) -> int:
    """The exit code of run(), every error that a user can cause turned into one line on standard error."""
    try:
        return run()
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except CorruptionError as error:
        return _fail(_one_line(error), 1)
    except (LogitStoreError, ValueError, OSError) as error:
        return _fail(_one_line(error), 2)
    except (MemoryError, RuntimeError) as error:  # torch's out-of-memory errors are RuntimeErrors
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return _fail(f"out of memory: {_one_line(error)[:200]}; use a smaller --batch-size or --max-length", 2)


def _parsed(argv: list[str]) -> argparse.Namespace:
    _refuse_empty_arguments(argv)
    parser = argparse.ArgumentParser(
        prog="logitstore",
        description="Store a teacher's next-token distributions in tens of bytes a token, and distil from them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = next((word for word in argv if not word.startswith("-")), None)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == asked:
            module = importlib.import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser.parse_args(argv)


def _refuse_empty_arguments(argv: list[str]) -> None:
    """Raises ValueError for an empty argument, as an unset variable of a shell leaves it: "" names nothing, and as a
    path it would be the current folder."""
    for before, word in zip(["", *argv], argv, strict=False):
        option, equals, value = word.partition("=")
        if equals and option.startswith("--") and not value.strip():
            raise ValueError(f"{option} has an empty value; name something, or leave the option out")
        if not word.strip():
            where = f"behind {before}" if before else "in the first place"
            raise ValueError(f"there is an empty argument {where}; name something, or leave it out")


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _fail(line: str, code: int) -> int:
    print(f"logitstore: {line}", file=sys.stderr)
    return code
