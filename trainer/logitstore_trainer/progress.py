"""Progress with rate and ETA: a bar on a terminal, a line every ten seconds in a log file.

A log full of carriage returns is unreadable, and a silent minute looks like a hang; so what is printed depends on
whether standard error is a terminal, and nothing is printed for work that ends within two seconds.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

from tqdm import tqdm

_LOG_INTERVAL_S = 10.0
_QUIET_S = 2.0


FIT_STAGES = {
    "rows": ("read the sample", "rows"),
    "rows again": ("read it again", "rows"),
    "metric": ("weigh the tails", "rows"),
    "steps": ("fit the tail model", "steps"),
    "basis": ("order the directions", "rows"),
    "texts": ("fit the corrections", "texts"),
}


class _LogLines:
    """The part of tqdm's interface that we use, printing plain lines."""

    def __init__(self, total: int | None, desc: str, unit: str, start: int) -> None:
        self.total, self.desc, self.unit, self.n, self._start = total, desc, unit, start, start
        self._note = ""
        self._start_s = self._last_s = time.monotonic()
        self._n_printed = -1

    def update(self, n: int = 1) -> None:
        self.n += n
        now_s = time.monotonic()
        if now_s - self._last_s >= _LOG_INTERVAL_S:
            self._last_s = now_s
            self._print(now_s)

    def set_postfix_str(self, note: str, refresh: bool) -> None:
        self._note = note

    def close(self) -> None:
        now_s = time.monotonic()
        if now_s - self._start_s >= _QUIET_S and self.n != self._n_printed:
            self._print(now_s)

    def _print(self, now_s: float) -> None:
        self._n_printed = self.n
        elapsed_s = max(now_s - self._start_s, 1e-9)
        rate = (self.n - self._start) / elapsed_s
        of_total, eta = "", ""
        if self.total:
            of_total = f"/{self.total:,} ({100 * self.n / self.total:.0f} %)"
            if rate > 0 and self.n < self.total:
                eta = f", {tqdm.format_interval((self.total - self.n) / rate)} left"
        line = f"{self.desc}: {self.n:,}{of_total} {self.unit}, {rate:,.4g} {self.unit}/s, {elapsed_s:.0f} s{eta}"
        print(f"{line}; {self._note}" if self._note else line, file=sys.stderr, flush=True)


class Progress:
    """A progress display to update by hand; also a context manager. `total` may be None when it is not known.

    `start` units of the total were done before: they are shown and do not count in the rate.
    """

    def __init__(self, *, total: int | None, desc: str, unit: str, start: int = 0) -> None:
        if sys.stderr.isatty():
            scale = unit in ("tokens", "rows", "bytes")
            self._display: Any = tqdm(
                total=total, initial=start, desc=desc, unit=f" {unit}", unit_scale=scale, delay=_QUIET_S,
                dynamic_ncols=True,
            )  # fmt: skip
        else:
            self._display = _LogLines(total, desc, unit, start)

    def update(self, n: int = 1) -> None:
        """Count n more units as done."""
        self._display.update(n)

    def note(self, text: str) -> None:
        """What is shown behind the count from now on: figures of the work so far."""
        self._display.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        self._display.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class StageProgress:
    """Shows a fit: called with (stage, done, total), as on_progress of logitstore.calibrate is; a context manager."""

    def __init__(self) -> None:
        self._stage, self._done = "", 0
        self._display: Progress | None = None

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage != self._stage:
            self.close()
            desc, unit = FIT_STAGES[stage]
            self._stage, self._done = stage, 0
            self._display = Progress(total=total, desc=desc, unit=unit)
        assert self._display is not None
        self._display.update(done - self._done)
        self._done = done
        if done == total:
            self.close()

    def close(self) -> None:
        """Ends the display of the present stage."""
        if self._display is not None:
            self._display.close()
        self._stage, self._display = "", None

    def between_stages(self, say: Callable[[str], Any]) -> Callable[[str], Any]:
        """A `say` whose lines do not fall into a bar."""

        def close_and_say(line: str) -> None:
            self.close()
            say(line)

        return close_and_say

    def __enter__(self) -> "StageProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def progress(iterable: Iterable[Any], *, total: int | None, desc: str, unit: str) -> Iterator[Any]:
    """Yields the items of `iterable`, counting each as one unit."""
    with Progress(total=total, desc=desc, unit=unit) as display:
        for item in iterable:
            yield item
            display.update()
