"""What a number needs beside it to be believed: hardware, versions, commit, command; and writing JSON in one step."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("logitstore", "numpy", "numba", "torch", "triton", "pyarrow", "zstandard", "safetensors", "transformers")


def environment(**facts: Any) -> dict[str, Any]:
    """One flat dict of JSON values: hardware, versions, commit, command and date, then the caller's own facts."""
    return {
        "command": shlex.join(["logitstore", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpu": _gpu_name(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        **facts,
    }


def environment_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts as (name, text) rows of a report's table; what is unknown is left out."""
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def output_folder(path: str | Path, contents: str = "results.json and report.html") -> Path:
    """The folder for what a command writes, made where it is missing; contents: that, in words. Raises ValueError where
    a file has that name."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; name a folder for {contents}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: str | Path, value: Any) -> Path:
    """Writes `value` and returns the path: folders are made, an older file is replaced in one step.

    Raises ValueError for NaN and infinities, which JSON does not have: what is undefined is None.
    """
    path = Path(path)
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, "+changes" where files differ from it; None outside a checkout of this project."""
    here = Path(__file__).resolve()
    root = here.parents[3]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
