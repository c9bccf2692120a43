"""`logitstore demo`: its command-line arguments. Nothing heavy is imported here, so that --help answers at once."""

import argparse
import os
from pathlib import Path

DEFAULT_OUT = Path("logitstore-demo")
EPILOG = """\
What it does, on a CPU and without a download: trains a tokenizer and a teacher on the documentation inside Python,
stores the teacher's distributions, verifies the store, and trains two equal students, one on the text alone and one on
the store too. It prints what came out, whatever it is, and leaves every file in DIR:

  train.jsonl  heldout.jsonl       the text, one {"text": ...} a line
  teacher/                         the teacher and its tokenizer
  teacher_logits.parquet           what the students train on; try `logitstore head` on it
  heldout_logits.parquet           the same for the text that nobody was trained on
  student-labels/  student-distilled/
  report.html  results.json

examples:
  logitstore demo
  logitstore demo --quick --out quick-demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `logitstore demo`."""
    parser.epilog = EPILOG
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, metavar="DIR",
        help=f"folder for all files (default: ./{DEFAULT_OUT}); an earlier demo there is replaced",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and order of batches (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a toy run in seconds, its numbers mean nothing")


def run(args: argparse.Namespace) -> int:
    """Runs the demo and prints stages, table and where the report is; returns the exit code."""
    # everything is made here: a name that is not found must not send anybody to the network
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers.utils import logging as transformers_logging

    from logitstore_trainer.demo.demo import run_demo
    from logitstore_trainer.demo.recipe import FULL, QUICK

    transformers_logging.disable_progress_bar()
    run_demo(args.out, QUICK if args.quick else FULL, seed=args.seed)
    return 0
