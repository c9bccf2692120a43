"""`logitstore bench storage`: bytes a token, fidelity and speed of every codec, next to what people store today.

What is measured: presets, the codec that `plan` picks for each of a few budgets of bytes, and rivals; on one or more
kinds of text, whose rows count together, and on kinds that no fit has seen, which are reported apart. A candidate whose
blobs do not decode to what was encoded gives no number: the run stops.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import logitstore
from logitstore.errors import SpecMismatchError
from logitstore.fit_cache import FitCache, default_cache_folder
from logitstore.fit_codec import fitted_on_rows
from logitstore_trainer.bench.budgets import LEAST_ROWS, planned_codecs, prepared
from logitstore_trainer.bench.candidates import Candidate, StoreCandidate
from logitstore_trainer.bench.environment import environment, output_folder, write_json
from logitstore_trainer.bench.full_vocabulary_rivals import HeadDirections, head_directions
from logitstore_trainer.bench.logits_file import LogitsFile
from logitstore_trainer.bench.measure import Kind, measure, within_row_limit
from logitstore_trainer.bench.rivals import rivals
from logitstore_trainer.bench.storage_report import result_table, write_storage_report
from logitstore_trainer.bench.synthetic_logits import SEED, write_synthetic_logits
from logitstore_trainer.plan.plan import Prepared
from logitstore_trainer.report import format_table


@dataclass(frozen=True)
class Preset:
    """A codec to measure: the options of make_codec without the vocabulary, and whether it is fitted first."""

    options: dict[str, Any]
    fitted: bool = False


_FLAT = tuple(
    Preset({"name": "topk", "head": head, "k": k})
    for head, k in (*(("int8", k) for k in (8, 16, 32, 64, 128)), ("fp8", 64), ("fp16", 64))
)
_FITTED = tuple(Preset({"name": "topk", "head": "log", "head_step": 0.5, "k": k}, fitted=True) for k in (16, 64))
_SQRTP = Preset({"name": "topk", "head": "sqrtp", "head_step": 1 / 128, "k": 64}, fitted=True)
_SAMPLED = (
    Preset({"name": "varopt", "k": 12}),
    Preset({"name": "varopt", "max_weight": 0.035}),  # about the bytes of 50 draws
    Preset({"name": "rskd", "draws": 50}),
)
PRESETS = (*_FLAT, *_FITTED, _SQRTP, *_SAMPLED)
QUICK_PRESETS = (*(preset for preset in _FLAT if preset.options["k"] in (16, 64)), *_FITTED, *_SAMPLED)
QUICK_ROWS = 1024  # of each kind of text
BUDGETS = (16.0, 24.0, 40.0, 64.0, 104.0)

EXAMPLES = """examples:
  logitstore bench storage --out bench-storage                     made-up logits: shows that it runs
  logitstore bench storage --logits teacher.safetensors --out bench-storage
  logitstore bench storage --logits maths.safetensors chat.safetensors --unseen code.safetensors \\
      --calibration train.safetensors --choose-on other-maths.safetensors other-chat.safetensors --out bench-storage

FILE.safetensors holds input_ids [N] and sample_lengths [S] (integers) and either logits [N, V] or hidden [N, D] with
lm_head [V, D], float16, bfloat16 or float32. Row i of the logits is the teacher's distribution after token i.
DistillKit is measured too where it can be imported: PYTHONPATH=path/to/DistillKit logitstore bench storage ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `logitstore bench storage`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--logits",
        metavar="FILE",
        nargs="+",
        help="full teacher logits (.safetensors), one file a kind of text, measured together; default: made up",
    )
    parser.add_argument(
        "--unseen", metavar="FILE", nargs="+", default=[], help="the same of text of other kinds, reported apart"
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="logits to fit codecs on; all of --logits is then measured (default: the first half of the samples of "
        "the one file fits, the second half is measured)",
    )
    parser.add_argument(
        "--choose-on",
        metavar="FILE",
        nargs="+",
        default=[],
        help="logits of text that is neither fitted on nor measured, one file a kind: these decide which codec a "
        "budget gets (default: every fifth sample of those to fit on)",
    )
    parser.add_argument(
        "--budgets",
        metavar="BYTES",
        nargs="*",
        type=float,
        default=list(BUDGETS),
        help=f"measure what `plan` picks for these bytes a token, where at least {LEAST_ROWS:,} rows can be fitted on; "
        f"none to leave them out (default: {' '.join(f'{budget:g}' for budget in BUDGETS)})",
    )
    parser.add_argument("--no-cache", action="store_true", help="fit the tail model anew, and keep it nowhere")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for results.json and report.html")
    parser.add_argument(
        "--quick", action="store_true", help=f"fewer codecs, fits on fewer rows, and {QUICK_ROWS} rows a kind at most"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, writes results.json, environment.json and report.html into args.out, prints the table; returns 0."""
    start_s = time.perf_counter()
    _check(args)
    out = output_folder(args.out)
    with tempfile.TemporaryDirectory(dir=out, prefix=".measuring-") as scratch:
        folder = Path(scratch)
        names = args.logits
        if names is None:
            names = [str(write_synthetic_logits(folder / "synthetic.safetensors"))]
            source = f"SYNTHETIC logits (seed {SEED}), not those of any model; pass --logits for your own teacher's"
        else:
            source = ", ".join(Path(name).name for name in (*names, *args.unseen))
        files = [LogitsFile(name) for name in names]
        split = split_samples(files[0], None if args.calibration is None else LogitsFile(args.calibration))
        kinds = _kinds(files, [LogitsFile(name) for name in args.unseen], split, QUICK_ROWS if args.quick else None)
        notes: list[str] = []
        sample_start_s = time.perf_counter()
        sample = _sample(args, split, notes)
        sample_s = time.perf_counter() - sample_start_s
        candidates = _candidates(args, split, sample, notes)
        results = measure(kinds, candidates, folder)
    facts = environment(
        logits=source,
        logits_dtype=files[0].source_dtype,
        vocab_size=files[0].vocab_size,
        samples_measured=sum(len(kind.samples) for kind in kinds),
        rows_measured=sum(sum(kind.rows) for kind in kinds if not kind.unseen),
        samples_fitted_on=len(split.fitting),
        fitted_on=split.fitting_name,
        chosen_on=[Path(name).name for name in args.choose_on],
        rows_fitted=None if sample is None else sample.rows.n_rows,
        threads_per_candidate=1,
        seconds_of_fit=sample_s,  # reading the rows included; short where the cache had the tail model
        seconds=time.perf_counter() - start_s,
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


def _check(args: argparse.Namespace) -> None:
    if args.logits is None and (args.calibration is not None or args.unseen or args.choose_on):
        option = "--calibration" if args.calibration is not None else "--unseen" if args.unseen else "--choose-on"
        raise ValueError(f"{option} needs --logits: made-up logits are split into halves")
    if args.logits is not None and len(args.logits) + len(args.unseen) > 1 and args.calibration is None:
        raise ValueError(
            "several files of logits need --calibration, the file to fit on; one alone is split into halves"
        )
    names = [Path(name).stem for name in (*(args.logits or []), *args.unseen)]
    if len(set(names)) < len(names):
        raise ValueError(f"files of logits need different names, they name the kinds of text; got {', '.join(names)}")
    for budget in args.budgets:
        if not 0 < budget < float("inf"):
            raise ValueError(f"--budgets are bytes a token, above 0; got {budget:g}")


def _kinds(
    files: Sequence[LogitsFile], unseen: Sequence[LogitsFile], split: "Split", row_limit: int | None
) -> list[Kind]:
    kinds = []
    for file in (*files, *unseen):
        if file.vocab_size != files[0].vocab_size:
            raise _of_another_teacher(file, files[0])
        samples = split.measured if file is files[0] else range(len(file))
        kinds.append(Kind(file.path.stem, file, within_row_limit(file, samples, row_limit), file in unseen))
    return kinds


def _sample(args: argparse.Namespace, split: "Split", notes: list[str]) -> Prepared | None:
    """What budgets are planned on; None, and a note, where there is nothing to plan on."""
    if not args.budgets:
        return None
    rows = int((split.fitting_file.sample_lengths[list(split.fitting)] - 1).sum())
    if args.logits is None or rows < LEAST_ROWS:
        why = "made-up logits have no tail to learn" if args.logits is None else f"there are {rows:,} rows to fit on"
        notes.append(f"No codec was planned for a budget: {why}; it takes {LEAST_ROWS:,} rows of a teacher.")
        return None
    cache = None if args.no_cache else FitCache(default_cache_folder(), print)
    choose_on = [LogitsFile(name) for name in args.choose_on]
    return prepared(split.fitting_file, split.fitting, choose_on, quick=args.quick, cache=cache)


def _candidates(args: argparse.Namespace, split: "Split", sample: Prepared | None, notes: list[str]) -> list[Candidate]:
    vocab_size = split.fitting_file.vocab_size
    presets = QUICK_PRESETS if args.quick else PRESETS
    made: list[Candidate] = list(codec_candidates(vocab_size, presets, split, sample))
    found, said = rivals(vocab_size, quick=args.quick)
    notes += said
    directions = head_directions(split.fitting_file) if args.budgets else None
    if args.budgets and directions is None:
        notes.append("The SVD of the head was not measured: the file to fit on holds logits, not hidden states.")
    if sample is not None:
        for planned in planned_codecs(sample, args.budgets):
            made.append(StoreCandidate(planned.codec, budget=planned.budget))
    if directions is not None:
        width = directions.to_coefs.shape[1]
        ranks = {budget: int(budget) - HeadDirections.side_bytes for budget in args.budgets}
        found += [HeadDirections(vocab_size, directions, r, b) for b, r in ranks.items() if 0 < r <= width]
    return [*made, *found]


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
            raise _of_another_teacher(calibration, measured)
        return Split(calibration, range(len(calibration)), range(n_samples), str(calibration.path))
    if n_samples < 2:
        raise ValueError(
            f"{measured.path} holds one sample, which cannot be split into a half to fit on and a half to measure; "
            "pass --calibration or a file with more samples"
        )
    return Split(measured, range(n_samples // 2), range(n_samples // 2, n_samples), "the first half of the samples")


def _of_another_teacher(file: LogitsFile, first: LogitsFile) -> SpecMismatchError:
    return SpecMismatchError(
        f"{file.path} has a vocabulary of {file.vocab_size}, {first.path} of {first.vocab_size}; "
        "both must come from one teacher"
    )


def codec_candidates(
    vocab_size: int, presets: Sequence[Preset], split: Split, sample: Prepared | None = None
) -> Iterator[StoreCandidate]:
    """The presets whose k fits the vocabulary, those that want it fitted: on the sample, else the fitting samples."""
    logits = _LogitsOf(split.fitting_file, split.fitting)
    input_ids = [split.fitting_file[index].input_ids for index in split.fitting]
    for preset in presets:
        if preset.options.get("k", 0) > vocab_size:
            continue
        codec = logitstore.make_codec(vocab_size=vocab_size, **preset.options)
        if preset.fitted:
            codec = fitted_on_rows(codec, sample.rows) if sample else logitstore.calibrate(codec, logits, input_ids)
        yield StoreCandidate(codec)


class _LogitsOf:
    """The logits of some samples of a file, read one at a time, as often as they are iterated over."""

    def __init__(self, file: LogitsFile, indices: range) -> None:
        self._file, self._indices = file, indices

    def __iter__(self) -> Iterator[Any]:
        return (self._file[index].logits for index in self._indices)
