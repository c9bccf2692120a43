"""An output folder that is made for a command which then fails: no empty one stays behind."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def removed_if_left_empty(folder: Path) -> Iterator[None]:
    """Removes the folder where an error leaves the block, the folder was not there before, and nothing is in it."""
    was_there = folder.exists()
    try:
        yield
    except BaseException:
        if not was_there:
            with suppress(OSError):  # rmdir refuses a folder that holds something
                folder.rmdir()
        raise
