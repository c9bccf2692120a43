"""Loops that run as machine code: numba compiles a function at its first call and keeps the result on disk.

For what numpy would do in dozens of passes over small arrays. Compiled code does not check its indices: a function
takes arrays whose sizes its caller has made or checked, and bounds by itself whatever it derives from stored numbers.
No fast maths, so that integers and IEEE operations give the same everywhere.

Numba keeps compiled functions beside their source, or where that folder cannot be written, in the user's cache. It
notices changes of the function's own file alone, so that a compiled function calls none of another file, and takes from
other files only constants of the format, which do not change.
Modules that import this one are imported where they are needed: numba takes half a second.
"""

from collections.abc import Callable

import numba


def compiled(function: Callable) -> Callable:
    """The function, to be compiled at its first call; other threads run while it does."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder to keep it in: every process compiles it anew
        return numba.njit(nogil=True)(function)
