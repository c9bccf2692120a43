"""Locks that processes on several machines hold by file, and that the system lets go of when their process dies."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock, for as long as the `with` block lasts; with wait it comes when it is free.

    False where another process holds it (without wait), or where its folder is not there (any more). Raises OSError
    where the system or the file system has no such locks.
    """
    descriptor = _locked_descriptor(path, wait=wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked_descriptor(path: Path, *, wait: bool) -> int | None:
    try:
        import fcntl
    except ImportError:
        raise OSError(f"{path}: several processes need locks on files (flock), which this system lacks") from None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # whoever held it before may have deleted the file: a lock on a deleted file keeps nobody out
            if _is_same_file(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            raise OSError(
                f"{path} cannot be locked ({error.strerror}); several processes need a file system with flock"
            ) from None
        os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
