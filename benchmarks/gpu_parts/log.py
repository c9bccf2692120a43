"""The rows of a run and its budgets of time: whatever happens to one result is one row, and the run goes on.

Statuses: measured, checked, wrong (a check failed, so there is no number), failed (an error, in words), out of memory,
missing (a rival that is not installed), skipped (cannot run here), cut (no time left), and of goals met, not met, and
not measured.
"""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

_GRACE_S = 45.0  # for the job that is running when the time is over


class NotMeasured(Exception):
    """Why there is no number: the status of the row, and the reason in words."""

    def __init__(self, status: str, reason: str, **values: Any) -> None:
        super().__init__(reason)
        self.status, self.values = status, values


@dataclass
class RowLog:
    """Rows as they come, each a line that is on disk before the next begins."""

    file: TextIO
    facts: dict[str, Any]
    device: torch.device
    end_s: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    device_lost: bool = False

    @staticmethod
    def create(path: Path, facts: dict[str, Any], device: torch.device, *, seconds: float) -> "RowLog":
        """A log whose sections may take `seconds` together; an older file of that name is replaced."""
        path.parent.mkdir(parents=True, exist_ok=True)
        return RowLog(path.open("w", encoding="utf-8"), facts, device, time.monotonic() + seconds)

    def __enter__(self) -> "RowLog":
        # A kernel that hangs gives Python nothing to raise in; the rows so far are on disk.
        self._watchdog = threading.Timer(self.end_s - time.monotonic() + _GRACE_S, self._stop)
        self._watchdog.daemon = True
        self._watchdog.start()
        return self

    def __exit__(self, *_error) -> None:
        self._watchdog.cancel()
        self.file.close()

    def _stop(self) -> None:
        self.add("run", {}, "failed", reason=f"still busy {_GRACE_S:g} s after its time was over; stopped")
        os._exit(3)

    def add(self, section: str, what: dict[str, Any], status: str, **values: Any) -> None:
        """One row, printed in short."""
        self.copy({"section": section, **what, "status": status, **values, **self.facts})
        shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in values.items()}
        print(section, *what.values(), status, *(f"{name}={value}" for name, value in shown.items()), flush=True)

    def copy(self, row: dict[str, Any]) -> None:
        """A whole row as it is, on disk when this returns."""
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def attempt(self, section: str, what: dict[str, Any], call: Callable[[], Any]) -> Any:
        """What the call returns, or None and a row that says why not."""
        try:
            result = call()
            self.wait()
            return result
        except NotMeasured as found:
            self.add(section, what, found.status, reason=str(found), **found.values)
        except torch.OutOfMemoryError as error:
            self.add(section, what, "out of memory", reason=first_line(error))
        except Exception as error:  # a rival's own, or a compiler's: nobody is there to see it, and the others go on
            self.add(section, what, "failed", reason=f"{type(error).__name__}: {first_line(error)}")
        self._recover()
        return None

    def _recover(self) -> None:
        """Gives memory back; after an illegal access every later call would fail, so the run is then over."""
        if self.device.type != "cuda" or self.device_lost:
            return
        try:
            torch.cuda.empty_cache()
            self.wait()
        except RuntimeError as error:
            self.device_lost = True
            self.add("run", {}, "failed", reason=f"the device does not answer any more: {first_line(error)}")

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Job:
    """One thing to do in a section: what it is, as fields of its rows, and the call that adds those rows."""

    what: dict[str, Any]
    run: Callable[[], None]


def run_section(log: RowLog, section: str, seconds: float, jobs: list[Job]) -> None:
    """The jobs in their order, until `seconds` or the time of the run are over; the others are rows that say so."""
    end_s = min(time.monotonic() + seconds, log.end_s)
    for job in jobs:
        if log.device_lost:
            log.add(section, job.what, "cut", reason="the device does not answer any more")
        elif time.monotonic() >= end_s:
            log.add(section, job.what, "cut", reason=f"the section's {seconds:g} s or the run's time were over")
        else:
            log.attempt(section, job.what, job.run)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]


def facts_of(device: torch.device, root: Path) -> dict[str, Any]:
    """What every row says of where it comes from: device, versions and the commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "liger": _version("liger-kernel"),
        "python": platform.python_version(),
        "commit": _commit(root),
        "command": " ".join(["python", *sys.argv]),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    """The commit of the checkout, "+changes" where files differ from it; None outside a checkout."""
    found = []
    for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        found.append(done.stdout.strip())
    return found[0] + ("+changes" if found[1] else "")
