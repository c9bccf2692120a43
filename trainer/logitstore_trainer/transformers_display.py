"""The progress bars of transformers, hidden while ours are shown."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as hf_logging


@contextmanager
def transformers_display_kept() -> Iterator[None]:
    """Hides the bars of transformers, one for each file, between which ours would drown; puts back what was set."""
    bars_on, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars_on:
            hf_logging.enable_progress_bar()
