"""`logitstore bench kernels`: the loss on the device there is, value and gradient, next to what one would write.

Three candidates, called in turn on the same student logits: ours (`distillation_loss`), the same loss in eager PyTorch
(its reference), and the dense loop that distillation articles show, which needs the teacher's full logits in memory.
Each is first checked against float64; if one fails, nothing is measured. bytes are counted by hand: what the task must
move if every logit is read once and every gradient written once, whatever the candidate really moves, so GB/s are
comparable within a loss.

Letters: N rows, K entries kept, V vocabulary. T is the temperature.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from logitstore_trainer.bench.devices import synchronizer
from logitstore_trainer.bench.environment import environment, environment_rows, output_folder, write_json
from logitstore_trainer.bench.loss_candidates import (
    ALPHA,
    BUFFERS,
    EAGER,
    LOSSES,
    OURS,
    Case,
    K,
    LossInputs,
    bytes_needed,
    relative_errors,
    value_and_gradient,
)
from logitstore_trainer.bench.memory import peak_extra_bytes
from logitstore_trainer.bench.timing import Times, interleaved_times
from logitstore_trainer.devices import choose_device
from logitstore_trainer.progress import Progress
from logitstore_trainer.report import Paragraph, Plot, Section, Table, bar_plot, format_table, write_report

if TYPE_CHECKING:
    import torch

EXAMPLES = """examples:
  logitstore bench kernels --out bench-kernels
  logitstore bench kernels --quick --out bench-kernels
  logitstore bench kernels --device cpu --out bench-kernels
"""


CPU_CASES = tuple(Case(n, v, T, "float32") for n, v in ((256, 32_000), (128, 128_256)) for T in (1.0, 2.0))
GPU_CASES = tuple(Case(n, v, T, "bfloat16") for n, v in ((8192, 32_000), (4096, 128_256)) for T in (1.0, 2.0))
QUICK_CASES = (Case(128, 32_000, 2.0, "float32"),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `logitstore bench kernels`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for results.json and report.html")
    parser.add_argument(
        "--device", default="auto", help="device to measure (default: cuda, mps or cpu, the first there is)"
    )
    parser.add_argument("--quick", action="store_true", help="one small size and 5 calls of each")


def run(args: argparse.Namespace) -> int:
    """Checks, measures, writes results.json, environment.json and report.html into args.out; 1 if a check fails."""
    device = choose_device(args.device)
    out = output_folder(args.out)
    cases = QUICK_CASES if args.quick else GPU_CASES if device.type == "cuda" else CPU_CASES
    measured = measure(cases, device, repeats=5 if args.quick else 10)
    if measured.faults:
        print(f"check against float64 failed, nothing was measured: {'; '.join(measured.faults)}", file=sys.stderr)
        return 1
    headers, rows = result_table(measured.results)
    report = write_outputs(out, measured.results, device)
    print(format_table(headers, rows))
    print(f"report: {report}")
    return 0


class Measured(NamedTuple):
    """Rows of results.json; faults of the checks, in words, in which case there are no rows."""

    results: list[dict[str, Any]]
    faults: list[str]


def measure(cases: Sequence[Case], device: "torch.device", *, repeats: int) -> Measured:
    """Every loss at every case: checked at all of them first, then timed, then its peak memory taken."""
    faults, errors = [], {}
    for case in cases:
        inputs = LossInputs.seeded(case, device)
        errors[case] = {name: relative_errors(name, inputs) for name in LOSSES}
        faults += check_faults(errors[case], case)
    if faults:
        return Measured([], faults)
    results = []
    with Progress(total=len(cases) * len(LOSSES) * (repeats + 1), desc="loss", unit="calls") as display:
        for case in cases:
            inputs = LossInputs.seeded(case, device)
            times = _times(inputs, repeats, display.update)
            results += [_result_row(name, case, inputs, times[name], errors[case][name]) for name in LOSSES]
    return Measured(results, [])


def write_outputs(out: Path, results: list[dict[str, Any]], device: "torch.device") -> Path:
    """Writes results.json, environment.json and report.html into `out` and returns the path of the page."""
    facts = environment(device=str(device), k=K, alpha=ALPHA, tail="bucket", buffers=BUFFERS)
    write_json(out / "results.json", results)
    write_json(out / "environment.json", facts)
    headers, rows = result_table(results)
    return _write_report(out / "report.html", headers, rows, results, facts)


def check_faults(errors: dict[str, tuple[float, float]], case: Case) -> list[str]:
    """What is wrong, in words: ours may err twice as much as eager PyTorch (or by a rounding), the others by 1 %."""
    rounding = {"float32": 1e-6, "bfloat16": 8e-3, "float16": 1e-3}[case.dtype]
    faults = []
    for name, found in errors.items():
        for what, error, eager_error in zip(("loss", "gradient"), found, errors[EAGER], strict=True):
            budget = max(2 * eager_error, rounding) if name == OURS else max(1e-2, rounding)
            if not error <= budget:
                faults.append(f"{name} at {case}: {what} is off by {error:.2g} of its size, allowed {budget:.2g}")
    return faults


def result_table(results: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[Any]]]:
    """(headers, rows), one row for each case and candidate."""
    headers = ("loss", "N", "V", "T", "dtype", "p20 (ms)", "p50 (ms)", "p80 (ms)", "GB/s", "extra peak (MiB)",
               "loss error", "gradient error")  # fmt: skip
    rows = []
    for row in results:
        size = [row[name] for name in ("n_rows", "vocab_size", "temperature", "dtype")]
        times = [row[f"p{percent}_ms"] for percent in (20, 50, 80)]
        peak = row["extra_peak_bytes"]
        errors = [f"{row[name]:.1e}" for name in ("loss_error", "gradient_error")]
        rows.append([row["loss"], *size, *times, row["gb_per_s"], None if peak is None else peak / 2**20, *errors])
    return headers, rows


def _times(inputs: LossInputs, repeats: int, after_each: Callable[[], None]) -> dict[str, Times]:
    calls = {name: lambda i, name=name: value_and_gradient(name, inputs, buffer=i) for name in LOSSES}
    wait = synchronizer(inputs.labels_N.device)
    return interleaved_times(calls, repeats=repeats, synchronize=wait, after_each=after_each)


def _result_row(name: str, case: Case, inputs: LossInputs, times: Times, errors: tuple[float, float]) -> dict[str, Any]:
    n_bytes = bytes_needed(name, case)
    return {
        "loss": name,
        **asdict(case),
        "device": str(inputs.labels_N.device),
        **times.as_json(),
        "bytes_needed": n_bytes,
        "gb_per_s": n_bytes / times.p50_s / 1e9,
        "extra_peak_bytes": peak_extra_bytes(lambda: value_and_gradient(name, inputs), inputs.labels_N.device),
        "loss_error": errors[0],
        "gradient_error": errors[1],
    }


def _write_report(
    path: Path, headers: tuple[str, ...], rows: list[list[Any]], results: list[dict[str, Any]], facts: dict[str, Any]
) -> Path:
    sizes = list(dict.fromkeys(_size_text(row) for row in results))
    by_name = {name: [row for row in results if row["loss"] == name] for name in LOSSES}
    times = bar_plot(
        sizes, {name: [row["p50_ms"] for row in rows] for name, rows in by_name.items()}, value_label="time (ms)"
    )
    body: list[Any] = [Paragraph(_CHECK_TEXT), Plot(times, "Value and gradient, median; shorter is better.")]
    if all(row["extra_peak_bytes"] is not None for row in results):
        mib = {name: [row["extra_peak_bytes"] / 2**20 for row in rows] for name, rows in by_name.items()}
        peaks = bar_plot(sizes, mib, value_label="peak memory beyond the inputs (MiB)")
        body.append(Plot(peaks, "The gradient is in it; the dense loop's teacher logits, an input, are not."))
    sections = [
        Section("Time and memory of the loss", [*body, Table(headers, rows, _TABLE_TEXT)]),
        Section("How this was measured", [Table(("what", "value"), environment_rows(facts))]),
    ]
    return write_report(path, "What the distillation loss costs", sections, f"Device {facts['device']}.")


_CHECK_TEXT = (
    "Before it was timed, each loss was computed in float64 on the same inputs, and value and gradient compared. The "
    "dense loop computes another loss (the KL over every token); the other two compute the same one."
)
_TABLE_TEXT = (
    "GB/s: bytes that the task must move, counted by hand, over the median time. Errors: against float64, relative to "
    "the size of the loss and to the largest entry of the gradient."
)


def _size_text(row: dict[str, Any]) -> str:
    return f"{row['n_rows']} x {row['vocab_size']:,}, T = {row['temperature']:g}"
