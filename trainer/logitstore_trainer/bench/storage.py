"""`logitstore bench storage`: bytes a token, fidelity and speed of every codec, next to what people store today.

One pass over the samples: each candidate encodes and decodes each sample, and what it decodes is compared with the
teacher's full distribution. A candidate whose blobs do not decode to what was encoded gives no number: the run stops.
One sample's logits [L, V] are in memory at a time; L * V * 16 bytes is about what the run takes.

Letters: L sequence length, R = L - 1 rows, V vocabulary. T is the temperature.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import logitstore
from logitstore.errors import SpecMismatchError
from logitstore_trainer.bench.candidates import Candidate, StoreCandidate
from logitstore_trainer.bench.environment import environment, output_folder, write_json
from logitstore_trainer.bench.fidelity import Estimate, estimate, row_divergences
from logitstore_trainer.bench.list_file import Totals
from logitstore_trainer.bench.logits_file import LogitsFile
from logitstore_trainer.bench.rivals import rivals
from logitstore_trainer.bench.storage_report import result_table, write_storage_report
from logitstore_trainer.bench.synthetic_logits import SEED, write_synthetic_logits
from logitstore_trainer.progress import Progress
from logitstore_trainer.report import format_table


@dataclass(frozen=True)
class Preset:
    """A codec to measure: the options of make_codec without the vocabulary, and whether it is fitted first."""

    options: dict[str, Any]
    fitted: bool = False


_FLAT = tuple(
    Preset({"name": "topk", "head": head, "k": k}) for k in (8, 16, 32, 64, 128) for head in ("int8", "fp8", "fp16")
)
_FITTED = tuple(Preset({"name": "topk", "head": "log", "head_step": 0.5, "k": k}, fitted=True) for k in (16, 64))
_SAMPLED = (
    Preset({"name": "varopt", "k": 12}),
    Preset({"name": "varopt", "max_weight": 0.035}),  # about the bytes of 50 draws
    Preset({"name": "rskd", "draws": 50}),
)
PRESETS = (*_FLAT, *_FITTED, *_SAMPLED)
QUICK_PRESETS = (*(preset for preset in _FLAT if preset.options["k"] in (16, 64)), *_FITTED, *_SAMPLED)
QUICK_ROWS = 1024

Sums = dict[tuple[str, float], list[float]]  # (quantity, temperature) -> one sum over the rows of each sample

EXAMPLES = """examples:
  logitstore bench storage --out bench-storage                     made-up logits: shows that it runs
  logitstore bench storage --logits teacher.safetensors --out bench-storage
  logitstore bench storage --logits eval.safetensors --calibration train.safetensors --out bench-storage

FILE.safetensors holds input_ids [N] and sample_lengths [S] (integers) and either logits [N, V] or hidden [N, D] with
lm_head [V, D], float16, bfloat16 or float32. Row i of the logits is the teacher's distribution after token i.
DistillKit is measured too where it can be imported: PYTHONPATH=path/to/DistillKit logitstore bench storage ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `logitstore bench storage`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("--logits", metavar="FILE", help="full teacher logits (.safetensors); default: made up")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="logits to fit codecs on; all of --logits is then measured (default: its first half of samples fits, "
        "the second half is measured)",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for results.json and report.html")
    parser.add_argument("--quick", action="store_true", help=f"fewer codecs, and {QUICK_ROWS} rows at most")


def run(args: argparse.Namespace) -> int:
    """Measures, writes results.json, environment.json and report.html into args.out, prints the table; returns 0."""
    out = output_folder(args.out)
    with tempfile.TemporaryDirectory(dir=out, prefix=".measuring-") as scratch:
        folder = Path(scratch)
        if args.logits is None:
            if args.calibration is not None:
                raise ValueError("--calibration needs --logits: made-up logits are split into halves")
            measured = LogitsFile(write_synthetic_logits(folder / "synthetic.safetensors"))
            source = f"SYNTHETIC logits (seed {SEED}), not those of any model; pass --logits for your own teacher's"
        else:
            measured = LogitsFile(args.logits)
            source = str(args.logits)
        split = split_samples(measured, None if args.calibration is None else LogitsFile(args.calibration))
        indices = _within_row_limit(measured, split.measured, QUICK_ROWS if args.quick else None)
        presets = QUICK_PRESETS if args.quick else PRESETS
        candidates: list[Candidate] = list(codec_candidates(measured.vocab_size, presets, split))
        found, notes = rivals(measured.vocab_size, quick=args.quick)
        results = measure(measured, indices, [*candidates, *found], folder)
    facts = environment(
        logits=source,
        logits_dtype=measured.source_dtype,
        vocab_size=measured.vocab_size,
        samples_measured=len(indices),
        rows_measured=int((measured.sample_lengths[indices] - 1).sum()),
        samples_fitted_on=len(split.fitting),
        fitted_on=split.fitting_name,
        threads_per_candidate=1,
        notes=notes,
    )
    write_json(out / "results.json", results)
    write_json(out / "environment.json", facts)
    report = write_storage_report(out / "report.html", results, facts)
    headers, rows = result_table(results)
    print(format_table(headers, rows))
    print(f"logits: {source}")
    for note in notes:
        print(note)
    print(f"report: {report}")
    return 0


@dataclass(frozen=True)
class Split:
    """Which samples are fitted on and which are measured; fitting_file is the file that `fitting` indexes."""

    fitting_file: LogitsFile
    fitting: range
    measured: range
    fitting_name: str


def split_samples(measured: LogitsFile, calibration: LogitsFile | None) -> Split:
    """Fit on all of the calibration file and measure all samples; without one, the first half of the samples fits.

    Raises ValueError if there is only one sample to split, SpecMismatchError if the vocabularies differ.
    """
    n_samples = len(measured)
    if calibration is not None:
        if calibration.vocab_size != measured.vocab_size:
            raise SpecMismatchError(
                f"{calibration.path} has a vocabulary of {calibration.vocab_size}, {measured.path} of "
                f"{measured.vocab_size}; both must come from one teacher"
            )
        return Split(calibration, range(len(calibration)), range(n_samples), str(calibration.path))
    if n_samples < 2:
        raise ValueError(
            f"{measured.path} holds one sample, which cannot be split into a half to fit on and a half to measure; "
            "pass --calibration or a file with more samples"
        )
    return Split(measured, range(n_samples // 2), range(n_samples // 2, n_samples), "the first half of the samples")


def codec_candidates(vocab_size: int, presets: Sequence[Preset], split: Split) -> Iterator[StoreCandidate]:
    """The presets whose k fits the vocabulary, those that want it fitted on the fitting samples."""
    logits = _LogitsOf(split.fitting_file, split.fitting)
    input_ids = [split.fitting_file[index].input_ids for index in split.fitting]
    for preset in presets:
        if preset.options.get("k", 0) <= vocab_size:
            codec = logitstore.make_codec(vocab_size=vocab_size, **preset.options)
            yield StoreCandidate(logitstore.calibrate(codec, logits, input_ids) if preset.fitted else codec)


def measure(
    measured: LogitsFile, indices: Sequence[int], candidates: Sequence[Candidate], folder: Path
) -> list[dict[str, Any]]:
    """One row of results.json for each candidate, over the samples `indices`; containers are written below `folder`."""
    rows_S = [int(measured.sample_lengths[index]) - 1 for index in indices]
    sums: list[Sums] = [{} for _ in candidates]
    for number, candidate in enumerate(candidates):
        place = folder / str(number)
        place.mkdir()
        candidate.open(place)
    total = sum(rows_S) * len(candidates)
    with Progress(total=total, desc="encode, decode, compare", unit="rows") as display:
        for index in indices:
            sample = measured[index]
            for candidate, sums_of in zip(candidates, sums, strict=True):
                reconstruct = candidate.add(index, sample)
                for temperature in candidate.temperatures:
                    divergences = row_divergences(sample.logits, reconstruct(temperature), temperature=temperature)
                    for what, rows in divergences._asdict().items():
                        sums_of.setdefault((what, temperature), []).append(float(rows.sum()))
                display.update(len(sample.input_ids) - 1)
    return [
        _result_row(candidate, candidate.close(), sums_of, rows_S)
        for candidate, sums_of in zip(candidates, sums, strict=True)
    ]


def _result_row(candidate: Candidate, totals: Totals, sums: Sums, rows_S: list[int]) -> dict[str, Any]:
    def mean(what: str, temperature: float) -> Estimate:
        sums_S = sums.get((what, temperature))
        return Estimate(None, None) if sums_S is None else estimate(sums_S, rows_S)

    kl_t1, kl_t2, squared_t1 = mean("kl", 1.0), mean("kl", 2.0), mean("squared", 1.0)
    n_rows = totals.n_rows
    return {
        "codec": candidate.codec,
        "config": candidate.config,
        "bytes_per_token": totals.blob_bytes / n_rows,
        "container_bytes_per_token": totals.container_bytes / n_rows,
        "table_bytes": candidate.table_bytes,
        "kl_t1": kl_t1.mean,
        "kl_t2": kl_t2.mean,
        "kl_t1_se": kl_t1.se,
        "kl_t2_se": kl_t2.se,
        "tv_t1": mean("tv", 1.0).mean,
        "tv_t2": mean("tv", 2.0).mean,
        "gradient_error_t1": squared_t1.mean,
        "gradient_error_t1_se": squared_t1.se,
        "encode_tokens_per_s": n_rows / totals.encode_s,
        "decode_tokens_per_s": n_rows / totals.decode_s,
        "tail_rows_per_s": None,  # speed of the tail model; no codec here has one
    }


class _LogitsOf:
    """The logits of some samples of a file, read one at a time, as often as they are iterated over."""

    def __init__(self, file: LogitsFile, indices: range) -> None:
        self._file, self._indices = file, indices

    def __iter__(self) -> Iterator[Any]:
        return (self._file[index].logits for index in self._indices)


def _within_row_limit(file: LogitsFile, indices: range, row_limit: int | None) -> list[int]:
    """The first of the samples, up to the one that reaches the limit; two at least, for an error bar."""
    if row_limit is None:
        return list(indices)
    reached = np.cumsum(file.sample_lengths[indices] - 1) >= row_limit
    n_kept = int(reached.argmax()) + 1 if reached.any() else len(indices)
    return list(indices)[: max(n_kept, 2)]
