"""The many checks in processes of their own, so that their kernels compile at the same time; each writes its own rows.

A worker is the same script with --checks PART/PARTS. Workers that are not done in time are ended.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_parts.log import RowLog

SCRIPT = Path(__file__).resolve().parent.parent / "gpu_suite.py"


def run_workers(log: RowLog, n_workers: int, seconds: float, *, dry: bool) -> None:
    """Adds the rows of all workers, and one for a worker that left with an error or was ended."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{part}.jsonl" for part in range(1, n_workers + 1)]
        running = [
            subprocess.Popen(_command(n, n_workers, file, seconds, dry)) for n, file in enumerate(files, start=1)
        ]
        end_s = time.monotonic() + seconds + 30
        for part, (process, file) in enumerate(zip(running, files, strict=True), start=1):
            try:
                code = process.wait(timeout=max(0.0, end_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
                log.copy(json.loads(line))
            if code not in (0, 1):
                log.add("check", {"check": f"worker {part} of {n_workers}"}, "failed", reason=f"left with code {code}")


def _command(part: int, n_workers: int, file: Path, seconds: float, dry: bool) -> list[str]:
    command = [sys.executable, str(SCRIPT), "--checks", f"{part}/{n_workers}", "--out", str(file),
               "--minutes", str(seconds / 60)]  # fmt: skip
    return [*command, "--dry-run"] if dry else command
