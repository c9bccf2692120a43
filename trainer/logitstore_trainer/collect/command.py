"""Runs `logitstore collect` from parsed arguments."""

import argparse

from logitstore_trainer.collect.settings import add_arguments, settings_from_arguments

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Collects and prints what it took; returns the exit code."""
    settings = settings_from_arguments(args)
    from logitstore_trainer.collect.collect import collect

    result = collect(settings)
    if result.n_units_left:
        print(
            f"{result.path}: {result.n_samples:,} samples, {result.n_tokens:,} tokens in this run; "
            f"units still with other ranks: {result.n_units_left:,}; the last of them puts the store together"
        )
    elif not result.was_finished:
        per_row = result.blob_bytes / max(result.n_present_rows, 1)
        print(
            f"{result.path}: {result.n_samples:,} samples, {result.n_tokens:,} tokens, {result.n_present_rows:,} rows "
            f"at {per_row:.1f} bytes each, {result.file_bytes:,} bytes in all; {result.tokens_per_s:,.0f} tokens/s"
        )
    return 0
