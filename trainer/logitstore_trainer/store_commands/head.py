"""`logitstore head`: the first tokens of a store as text, each beside what the teacher expected there."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

import logitstore
from logitstore.temperature import shifted_head
from logitstore_trainer.report import format_table

EPILOG = """\
example:
  logitstore head teacher_logits.parquet --sample 3 --rows 20
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `logitstore head`."""
    parser.epilog = EPILOG
    parser.add_argument("path", type=Path, metavar="PATH", help="a store: a .parquet file, or a folder of shards")
    parser.add_argument("--sample", type=int, default=0, metavar="I", help="which sample (default: 0)")
    parser.add_argument("--rows", type=int, default=10, metavar="N", help="how many of its stored rows (default: 10)")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="how many tokens of each row (default: 5)")


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns 0."""
    store = logitstore.open(args.path)
    if args.rows < 1 or args.top < 1:
        raise ValueError(f"--rows and --top must be at least 1, got {args.rows} and {args.top}")
    if not -len(store) <= args.sample < len(store):
        raise ValueError(f"--sample {args.sample}: {args.path} has {len(store)} samples, 0 to {len(store) - 1}")
    sample = store[args.sample]
    text_of = _text_of(store)
    rows = np.flatnonzero(sample.targets.present)[: args.rows]
    headers = ["row", "label", "p(label)", *(f"top {i + 1}" for i in range(args.top)), "tail mass"]
    print(f"{args.path}, sample {sample.sample_id} (data set row {sample.source_row}), {len(sample.input_ids)} tokens")
    print(format_table(headers, [_line(sample, int(t), args.top, text_of) for t in rows]))
    if store.tokenizer_folder is None:
        print(f"no tokenizer beside {args.path}, so tokens are shown as ids")
    return 0


def _line(sample: logitstore.Sample, t: int, top: int, text_of: Callable[[int], str]) -> list[str]:
    targets = sample.targets
    entries = slice(int(targets.offsets[t]), int(targets.offsets[t + 1]))
    ids = targets.ids[entries]
    probabilities = np.exp(shifted_head(targets.logps, targets.offsets, targets.tail_logmass)[entries])
    label = int(sample.input_ids[t + 1])
    found = np.flatnonzero(ids == label)
    shown = [f"{text_of(int(i))} {p:.3f}" for i, p in zip(ids[:top], probabilities[:top], strict=True)]
    return [
        str(t),
        text_of(label),
        f"{probabilities[found[0]]:.3f}" if len(found) else "not drawn" if targets.is_sampled else "in the tail",
        *shown,
        *[""] * (top - len(shown)),
        f"{np.exp(targets.tail_logmass[t]):.4f}",
    ]


def _text_of(store: logitstore.LogitStore) -> Callable[[int], str]:
    folder = store.tokenizer_folder
    if folder is None:
        return str
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda token: repr(tokenizer.decode([token]))
