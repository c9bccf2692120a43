"""Progress with rate and ETA: a bar on a terminal, a line every ten seconds in a log file.

A log full of carriage returns is unreadable, and a silent minute looks like a hang; so what is printed depends on
whether standard error is a terminal, and nothing is printed for work that ends within two seconds.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

from tqdm import tqdm

_LOG_INTERVAL_S = 10.0
_QUIET_S = 2.0


class _LogLines:
    """The part of tqdm's interface that we use, printing plain lines."""

    def __init__(self, total: int | None, desc: str, unit: str) -> None:
        self.total, self.desc, self.unit, self.n = total, desc, unit, 0
        self._start_s = self._last_s = time.monotonic()
        self._printed = False

    def update(self, n: int = 1) -> None:
        self.n += n
        now_s = time.monotonic()
        if now_s - self._last_s >= _LOG_INTERVAL_S:
            self._last_s = now_s
            self._print(now_s)

    def close(self) -> None:
        now_s = time.monotonic()
        if now_s - self._start_s >= _QUIET_S:
            self._print(now_s)

    def _print(self, now_s: float) -> None:
        elapsed_s = max(now_s - self._start_s, 1e-9)
        rate = self.n / elapsed_s
        of_total, eta = "", ""
        if self.total:
            of_total = f"/{self.total:,} ({100 * self.n / self.total:.0f} %)"
            if rate > 0 and self.n < self.total:
                eta = f", {tqdm.format_interval((self.total - self.n) / rate)} left"
        line = f"{self.desc}: {self.n:,}{of_total} {self.unit}, {rate:,.4g} {self.unit}/s, {elapsed_s:.0f} s{eta}"
        print(line, file=sys.stderr, flush=True)


class Progress:
    """A progress display to update by hand; also a context manager. `total` may be None when it is not known."""

    def __init__(self, *, total: int | None, desc: str, unit: str) -> None:
        if sys.stderr.isatty():
            scale = unit in ("tokens", "rows", "bytes")
            self._display: Any = tqdm(
                total=total, desc=desc, unit=f" {unit}", unit_scale=scale, delay=_QUIET_S, dynamic_ncols=True
            )
        else:
            self._display = _LogLines(total, desc, unit)

    def update(self, n: int = 1) -> None:
        """Count n more units as done."""
        self._display.update(n)

    def close(self) -> None:
        self._display.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def progress(iterable: Iterable[Any], *, total: int | None, desc: str, unit: str) -> Iterator[Any]:
    """Yields the items of `iterable`, counting each as one unit."""
    with Progress(total=total, desc=desc, unit=unit) as display:
        for item in iterable:
            yield item
            display.update()
