"""`logitstore inspect`: what a store holds, from its metadata alone."""

import argparse
import json
from pathlib import Path
from typing import Any

import logitstore
from logitstore_trainer.report import format_table

EPILOG = """\
example:
  logitstore inspect teacher_logits.parquet
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `logitstore inspect`."""
    parser.epilog = EPILOG
    parser.add_argument("path", type=Path, metavar="PATH", help="a store: a .parquet file, or a folder of shards")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the store's spec and sizes; returns 0."""
    facts = store_facts(logitstore.open(args.path))
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    rows = [[name, _shown(value)] for name, value in facts.items() if value is not None and value != {}]
    print(format_table(["field", "value"], rows))
    return 0


def store_facts(store: logitstore.LogitStore) -> dict[str, Any]:
    """The spec's fields as JSON values, then counts, bytes, and bytes a present row (blobs, and whole files)."""
    spec = json.loads(store.spec.to_json())
    n_rows = store.n_present_rows
    fp16_bytes = 2 * (store.spec.head_width or store.spec.vocab_size)
    return {
        "path": str(store.path),
        **spec,
        "shards": len(store.shards),
        "samples": len(store),
        "tokens": store.n_tokens,
        "present_rows": n_rows,
        "blob_bytes": store.blob_bytes,
        "file_bytes": store.file_bytes,
        "bytes_per_token": store.blob_bytes / n_rows if n_rows else None,
        "container_bytes_per_token": store.file_bytes / n_rows if n_rows else None,
        "fp16_logits_bytes_per_token": fp16_bytes,
        "times_smaller_than_fp16": fp16_bytes * n_rows / store.file_bytes if n_rows else None,
    }


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
