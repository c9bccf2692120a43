"""`logitstore verify`: every checksum and invariant of a store, and the proof that rows belong to their tokens."""

import argparse
import dataclasses
import json
from pathlib import Path

import logitstore
from logitstore_trainer.progress import Progress

EPILOG = """\
exit code 0: sound; 1: a fault was found, one line each; 2: there is no store at PATH.

example:
  logitstore verify teacher_logits.parquet
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `logitstore verify`."""
    parser.epilog = EPILOG
    parser.add_argument("path", type=Path, metavar="PATH", help="a store: a .parquet file, or a folder of shards")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 0 where there is no fault, else 1."""
    with Progress(total=None, desc=f"verifying {args.path.name}", unit="samples") as shown:
        report = logitstore.verify(args.path, shown.update)
    if args.json:
        print(json.dumps({**dataclasses.asdict(report), "path": str(report.path), "ok": report.ok}, indent=2))
        return 0 if report.ok else 1
    for fault in report.faults:
        print(f"fault: {fault}")
    if report.label_probability:
        shifts = ", ".join(f"{shift:+d}: {mean:.4f}" for shift, mean in report.label_probability.items())
        print(f"mean stored probability of the token at shift {shifts} (the label is at +0)")
    print(
        f"{report.path}: {'sound' if report.ok else f'{len(report.faults)} faults'}; {report.n_checked:,} of "
        f"{report.n_samples:,} samples, {report.n_present_rows:,} rows, {report.file_bytes:,} bytes"
    )
    return 0 if report.ok else 1
