"""`logitstore bench throughput PATH`: how fast a store feeds a training step, stage by stage.

Stages: read (one pread for the blob, more for the text, all checksums), decode (blob to arrays), collate (samples to
padded tensors), loss (value and gradient on given logits) and step (forward, loss, backward of a student). The first
three run on one core and are what training waits for if nothing is prefetched; the loss is a part of the step.

Reads come from the page cache once a sample was read before: on a cold disk add the disk's own time for these bytes.

Letters: B batch, L length of its longest sample, N = B * L rows, V vocabulary.
"""

import argparse
from pathlib import Path
from typing import Any

import logitstore
from logitstore import LogitStore
from logitstore_trainer.bench.devices import synchronizer
from logitstore_trainer.bench.environment import environment, environment_rows, output_folder, write_json
from logitstore_trainer.bench.stages import ALPHA, BYTES_COUNTED, Stages
from logitstore_trainer.bench.timing import Times, interleaved_times
from logitstore_trainer.devices import choose_device
from logitstore_trainer.progress import Progress
from logitstore_trainer.report import Paragraph, Plot, Section, Table, bar_plot, cell_text, format_table, write_report

DEFAULT_STUDENT = "llama:layers=3,width=192,heads=3"
_DATA_STAGES = ("read", "decode", "collate")
_MAX_LOGITS_BYTES = 1 << 30
EXAMPLES = """examples:
  logitstore bench throughput teacher_logits.parquet --out bench-throughput
  logitstore bench throughput teacher_logits.parquet --student 20M --batch-size 8 --out bench-throughput
  logitstore bench throughput teacher_logits.parquet --quick --out bench-throughput
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `logitstore bench throughput`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("path", metavar="PATH", help="a store")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for results.json and report.html")
    parser.add_argument(
        "--student",
        metavar="M",
        default=DEFAULT_STUDENT,
        help="student of the step: a model, a size such as 20M, or a shape (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=4, metavar="B", help="samples a batch (default: %(default)s)")
    parser.add_argument(
        "--device", default="auto", help="device of loss and step (default: cuda, mps or cpu, the first there is)"
    )
    parser.add_argument("--quick", action="store_true", help="3 calls of each stage in place of 10")


def run(args: argparse.Namespace) -> int:
    """Measures, writes results.json, environment.json and report.html into args.out, prints the table; returns 0."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    store = logitstore.open(args.path)
    if len(store) == 0:
        raise ValueError(f"{args.path} holds no samples; there is nothing to measure")
    out = output_folder(args.out)
    batches = _sample_batches(store, args.batch_size)
    work = Stages(store, batches, args.student, choose_device(args.device))
    repeats = 3 if args.quick else 10
    stages = work.stages()
    with Progress(total=len(stages) * (repeats + 1), desc="throughput", unit="calls") as display:
        times = interleaved_times(
            stages, repeats=repeats, synchronize=synchronizer(work.device), after_each=display.update
        )
    results = [_result_row(stage, times[stage], work, repeats) for stage in stages]
    verdict = bottleneck(times)
    facts = environment(
        store=str(args.path),
        codec=store.spec.codec.config,
        vocab_size=store.spec.vocab_size,
        samples_a_batch=len(batches[0]),
        distinct_batches=len(batches),
        student=args.student,
        student_parameters=sum(parameter.numel() for parameter in work.student.parameters()),
        device=str(work.device),
        temperature=work.temperature,
        tail=work.tail,
        alpha=ALPHA,
        bottleneck=verdict,
    )
    write_json(out / "results.json", results)
    write_json(out / "environment.json", facts)
    headers, rows = result_table(results)
    report = _write_report(out / "report.html", headers, rows, results, facts)
    print(format_table(headers, rows))
    print(verdict)
    print(f"report: {report}")
    return 0


def bottleneck(times: dict[str, Times]) -> str:
    """One sentence: which of the step and the stages before it takes longer, and which part of it most."""
    data_ms = {stage: times[stage].quantile_ms(50) for stage in _DATA_STAGES}
    total_ms, step_ms = sum(data_ms.values()), times["step"].quantile_ms(50)
    slowest = max(data_ms, key=data_ms.__getitem__)
    loss_share = times["loss"].quantile_ms(50) / step_ms
    data = f"reading, decoding and collating its batch on one core takes {cell_text(total_ms)} ms"
    if total_ms >= step_ms:
        return (
            f"The bottleneck is the data: {data} ({slowest} most, {cell_text(data_ms[slowest])} ms), the step "
            f"{cell_text(step_ms)} ms; prefetch with workers or threads."
        )
    return (
        f"The bottleneck is the step: {cell_text(step_ms)} ms, of which the loss is {loss_share:.0%}; {data}, "
        f"{total_ms / step_ms:.1%} of the step."
    )


def result_table(results: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[Any]]]:
    """(headers, rows), one row for each stage."""
    headers = ("stage", "p20 (ms)", "p50 (ms)", "p80 (ms)", "rows/s", "MB/s", "bytes counted")
    rows = []
    for row in results:
        times_ms = [row[f"p{percent}_ms"] for percent in (20, 50, 80)]
        rows.append([row["stage"], *times_ms, row["tokens_per_s"], row["bytes_per_s"] / 1e6, row["bytes_counted"]])
    return headers, rows


def _sample_batches(store: LogitStore, batch_size: int) -> list[list[int]]:
    """Up to eight batches of the store's first samples; smaller ones if a batch's logits would exceed 1 GiB."""
    n_samples = min(len(store), 8 * batch_size)
    longest = max(len(store.read_stored(index)[0].input_ids) for index in range(n_samples))
    while batch_size > 1 and batch_size * longest * store.spec.vocab_size * 4 > _MAX_LOGITS_BYTES:
        batch_size //= 2
    batch_size = min(batch_size, n_samples)
    return [list(range(i, i + batch_size)) for i in range(0, n_samples - batch_size + 1, batch_size)]


def _result_row(stage: str, times: Times, work: Stages, repeats: int) -> dict[str, Any]:
    # round 0 was the warm-up; the batches of the rounds that count follow it
    batches = [work.batch(round_index) for round_index in range(1, repeats + 1)]
    total_s = sum(times.seconds)
    return {
        "stage": stage,
        **times.as_json(),
        "tokens_per_s": sum(batch.n_present for batch in batches) / total_s,
        "bytes_per_s": sum(work.bytes_of(stage, batch) for batch in batches) / total_s,
        "bytes_counted": BYTES_COUNTED[stage],
    }


def _write_report(
    path: Path, headers: tuple[str, ...], rows: list[list[Any]], results: list[dict[str, Any]], facts: dict[str, Any]
) -> Path:
    stages = [row["stage"] for row in results]
    speed = bar_plot(
        stages, {"rows": [row["tokens_per_s"] for row in results]}, value_label="rows per second", log=True
    )
    caption = "One call is one batch. rows/s: rows with a stored distribution. read, decode and collate: one core."
    sections = [
        Section(
            "Speed of each stage",
            [
                Paragraph(facts["bottleneck"]),
                Plot(speed, "Rows per second; longer is faster."),
                Table(headers, rows, caption),
            ],
        ),
        Section("How this was measured", [Table(("what", "value"), environment_rows(facts))]),
    ]
    subtitle = f"Store {facts['store']}, batches of {facts['samples_a_batch']} samples, device {facts['device']}."
    return write_report(path, "How fast the store feeds training", sections, subtitle)
