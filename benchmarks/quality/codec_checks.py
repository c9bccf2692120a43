"""Five questions to fitted codecs on real rows that `bench storage` does not ask.

    python benchmarks/quality/codec_checks.py --rows codec-rows --out codec-checks.json

- ids: bits an id in our candidate lists, against the rank of its frequency in planes under zstd.
- length: bytes a token of sequences of 64 tokens against 1,024; fewer rows share what a blob costs.
- rank: bytes and KL of predicted tails with 128, 256 and all coefficients, without corrections and by their step; and
  at three budgets of bytes, what share of KL all coefficients save over 256 (log-log between the steps).
- heads: bytes and KL of how log-probs are kept, behind the same selection and predicted tail.
- sampling: what a sample of the tail adds to the squared error of the loss's gradient at T = 1 as variance, drawn from
  the teacher's tail (varopt) or from what the prediction leaves over (a control variate, unbiased as well), and what
  the prediction alone leaves as squared bias.

codec_rows.py makes the rows. The fit of the tail model takes ten minutes and more, and is kept in the cache.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from logitstore_trainer.bench.budgets import QUICK_FITTED_ROWS, prepared
from logitstore_trainer.bench.environment import environment, write_json
from logitstore_trainer.bench.fidelity import TeacherRows, divergences_from
from logitstore_trainer.bench.logits_file import LogitsFile, LogitsSample
from logitstore_trainer.cli import one_line_errors
from logitstore_trainer.plan.plan import Prepared

import logitstore
from logitstore.codecs.byte_split import byte_split
from logitstore.codecs.topk import TopKCodec
from logitstore.fit_cache import FitCache, default_cache_folder
from logitstore.fit_codec import fitted_on_rows, fitted_steps
from logitstore.logits_source import FactoredLogits
from logitstore.tail_rank import with_rank

SHORT, LONG = 64, 1024
RANKS = (128, 256, None)
STEPS = (None, 0.15, 0.12, 0.1, 0.085, 0.07, 0.0585)
RANK_BUDGETS = (24.0, 40.0, 56.0)
HEADS = (
    *(("log", step) for step in (0.25, 0.5, 1.0)),
    *(("sqrtp", 1 / parts) for parts in (128, 64, 32)),
    *((name, None) for name in ("int8", "fp8", "fp16")),
)
KINDS = ("gsm8k", "instructions", "documentation")
KLS = ("kl_t1", "kl_t2")
LEAST_P = 0.01
DRAWN = (4, 8, 12, 16)
TEXTS_OF_A_KIND = 6  # for the questions whose answers need full distributions


def main() -> int:
    """Answers, prints and writes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("codec-rows"), help="folder that codec_rows.py wrote")
    parser.add_argument("--out", type=Path, default=Path("codec-checks.json"), help="file for the answers")
    parser.add_argument("--append", type=Path, help="also add the answers as one line to this .jsonl file")
    parser.add_argument("--quick", action="store_true", help=f"fit on {QUICK_FITTED_ROWS:,} rows")
    args = parser.parse_args()
    return one_line_errors(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Fits once and answers one question after the other."""
    fit = LogitsFile(args.rows / "fit.safetensors")
    kinds = {name: LogitsFile(args.rows / f"measured-{name}.safetensors") for name in KINDS}
    choose_on = [LogitsFile(args.rows / f"choose-{name}.safetensors") for name in KINDS]
    sample = prepared(fit, range(len(fit)), choose_on, quick=args.quick, cache=FitCache(default_cache_folder(), print))
    answers: dict[str, Any] = {
        "rows_fitted": sample.rows.n_rows,
        "ids": ids_answer(sample, kinds),
        "length": length_answer(sample, kinds),
        "rank": rank_answer(sample, kinds),
        "heads": heads_answer(sample, kinds),
        "sampling": sampling_answer(sample, kinds),
        "environment": environment(command=f"python benchmarks/quality/codec_checks.py {' '.join(sys.argv[1:])}"),
    }
    write_json(args.out, answers)
    if args.append:
        with args.append.open("a") as rows:
            rows.write(json.dumps(answers, allow_nan=False) + "\n")
    print(json.dumps({name: answers[name] for name in ("ids", "length", "rank", "heads", "sampling")}, indent=1))
    return 0


def ids_answer(sample: Prepared, kinds: dict[str, LogitsFile]) -> dict[str, Any]:
    """Bits an id of entries with p >= 0.01, by kind and their mean: ours, and frequency rank with zstd at level 19."""
    codec = fitted_on_rows(_codec(sample, min_prob=LEAST_P, tail="residual"), sample.rows)
    counts = np.bincount(sample.rows.ids[sample.rows.logps >= np.log(LEAST_P)].numpy(), minlength=codec.vocab_size)
    rank_of = np.empty(codec.vocab_size, np.uint16 if codec.vocab_size <= 1 << 16 else np.uint32)
    rank_of[np.argsort(-counts, kind="stable")] = np.arange(codec.vocab_size)
    compressor = zstandard.ZstdCompressor(level=19)
    found = {}
    for name, file in kinds.items():
        ours = theirs = n_entries = 0.0
        for number in range(len(file)):
            text = file[number]
            targets = codec.targets_from_logits(text.logits, text.input_ids)
            ours += 8 * byte_split(codec, targets, codec.encode(targets, text.input_ids))["ids"]
            rank = np.arange(len(targets.ids)) - np.repeat(targets.offsets[:-1], targets.counts)
            ranks = rank_of[targets.ids[np.argsort(rank, kind="stable")]]
            planes = ranks[:, None].view(np.uint8).T.tobytes()  # byte by byte, rank by rank
            theirs += 8 * len(compressor.compress(planes))
            n_entries += len(targets.ids)
        found[name] = {"ours": ours / n_entries, "frequency_rank_zstd": theirs / n_entries}
    mean = {what: float(np.mean([row[what] for row in found.values()])) for what in ("ours", "frequency_rank_zstd")}
    return {"kinds": found, "mean": mean, "saved": 1 - mean["ours"] / mean["frequency_rank_zstd"]}


def length_answer(sample: Prepared, kinds: dict[str, LogitsFile]) -> list[dict[str, Any]]:
    """Bytes a token of texts cut to 64 tokens and joined to 1,024, for a codec of few and one of more bytes."""
    answers = []
    for options in ({"min_prob": 0.01}, {"min_prob": 0.005, "tail_step": 0.1}):
        codec = fitted_on_rows(_codec(sample, tail="predicted", **options), sample.rows, sample.tail)
        sizes = {}
        for length in (SHORT, LONG):
            n_bytes = n_rows = 0
            for file in kinds.values():
                for text in _of_length(file, length):
                    targets = codec.targets_from_logits(text.logits, text.input_ids)
                    n_bytes += len(codec.encode(targets, text.input_ids))
                    n_rows += targets.n_rows
            sizes[str(length)] = n_bytes / n_rows
        answers.append({**options, "bytes_per_token": sizes, "ratio": sizes[str(SHORT)] / sizes[str(LONG)]})
    return answers


def _of_length(file: LogitsFile, length: int) -> Iterator[LogitsSample]:
    """The texts of a file cut into texts of this length, or joined to such: at a seam one row has another label."""
    parts = [file[number] for number in range(len(file))]
    tokens = np.concatenate([part.input_ids for part in parts])
    hidden = np.concatenate([part.logits.hidden.numpy() for part in parts])
    for start in range(0, len(tokens) - length + 1, length):
        rows = slice(start, start + length)
        yield LogitsSample(tokens[rows], FactoredLogits(hidden[rows], parts[0].logits.lm_head))


def rank_answer(sample: Prepared, kinds: dict[str, LogitsFile]) -> dict[str, Any]:
    """The rows, by rank and step, and by budget the share of KL that all coefficients save over the rank before."""
    codecs = {}
    for rank in RANKS:
        tail = sample.tail if rank is None else with_rank(sample.tail, sample.rows, min(rank, sample.tail.rank))
        head = _codec(sample, min_prob=0.005, tail="predicted")
        codecs |= {(tail.rank, codec.tail_step): codec for codec in fitted_steps(head, sample.rows, tail, STEPS)}
    rows = [
        {"rank": rank, "tail_step": step, **measured, "tail_macs": codecs[rank, step].tables.tail.row_macs(16)}
        for (rank, step), measured in _measured(codecs, kinds).items()
    ]
    few, full = sorted({row["rank"] for row in rows})[-2:]
    return {"rows": rows, "saved_by_all_over": few, "saved": saved_shares(rows, few, full)}


def saved_shares(rows: list[dict[str, Any]], few: int, full: int) -> dict[str, dict[str, float]]:
    """By budget and KL, the share that the rank `full` saves over `few`; no budget that the steps of either miss."""
    return {
        f"{budget:g}": {name: 1 - _at(rows, full, budget, name) / _at(rows, few, budget, name) for name in KLS}
        for budget in RANK_BUDGETS
        if all(sizes[0] <= budget <= sizes[-1] for sizes in (_sizes(rows, few), _sizes(rows, full)))
    }


def _sizes(rows: list[dict[str, Any]], rank: int) -> list[float]:
    return sorted(row["bytes_per_token"] for row in rows if row["rank"] == rank and row["tail_step"])


def _at(rows: list[dict[str, Any]], rank: int, budget: float, kl_name: str) -> float:
    """KL at a budget of bytes, log-log between the steps of corrections."""
    points = sorted((row["bytes_per_token"], row[kl_name]) for row in rows if row["rank"] == rank and row["tail_step"])
    sizes, kls = np.log(np.array(points)).T
    return float(np.exp(np.interp(np.log(budget), sizes, kls)))


def heads_answer(sample: Prepared, kinds: dict[str, LogitsFile]) -> list[dict[str, Any]]:
    """Rows by head and step, of entries with p >= 0.005 and a predicted tail without corrections."""
    codecs = {}
    for head, step in HEADS:
        codec = _codec(sample, head=head, head_step=step, min_prob=0.005, tail="predicted")
        codecs[head, step] = fitted_on_rows(codec, sample.rows, sample.tail_for(None))
    measured = _measured(codecs, kinds)
    return [{"head": head, "head_step": step, **row} for (head, step), row in measured.items()]


def _measured(codecs: dict[Any, TopKCodec], kinds: dict[str, LogitsFile]) -> dict[Any, dict[str, float]]:
    """Bytes a token, those of values among them, and KL at T = 1 and T = 2 of each codec on the same rows."""
    sums = {key: np.zeros(5) for key in codecs}
    for file in kinds.values():
        for number in np.linspace(0, len(file) - 1, TEXTS_OF_A_KIND).astype(int).tolist():
            text = file[number]
            n_rows = len(text.input_ids) - 1
            teacher = {t: TeacherRows.of(text.logits, n_rows, file.vocab_size, t) for t in (1.0, 2.0)}
            for key, codec in codecs.items():
                targets = codec.targets_from_logits(text.logits, text.input_ids)
                blob = codec.encode(targets, text.input_ids)
                values = byte_split(codec, targets, blob)["values"]
                kls = [divergences_from(of, targets.dense_logprobs(t)).kl.sum() for t, of in teacher.items()]
                sums[key] += (len(blob), values, *kls, n_rows)
    names = ("bytes_per_token", "value_bytes_per_token", *KLS)
    return {key: dict(zip(names, (total[:4] / total[4]).tolist(), strict=True)) for key, total in sums.items()}


def sampling_answer(sample: Prepared, kinds: dict[str, LogitsFile]) -> dict[str, Any]:
    """E||t_hat - t||^2 over the vocabulary at T = 1, mean over rows, by entries drawn of a tail; the head has p >= 1 %.

    Threshold sampling of weights w with threshold tau has the variance sum |w| (tau - |w|) over |w| < tau, where tau
    makes sum min(1, |w| / tau) the number of entries.
    """
    codec = fitted_on_rows(_codec(sample, min_prob=LEAST_P, tail="predicted"), sample.rows, sample.tail)
    varopt, control, bias, n_rows = dict.fromkeys(DRAWN, 0.0), dict.fromkeys(DRAWN, 0.0), 0.0, 0
    for file in kinds.values():
        for number in np.linspace(0, len(file) - 1, TEXTS_OF_A_KIND).astype(int).tolist():
            text = file[number]
            targets = codec.targets_from_logits(text.logits, text.input_ids)
            p_RV = TeacherRows.of(text.logits, targets.n_rows, file.vocab_size, 1.0).p.numpy()
            left_RV = p_RV - np.exp(targets.dense_logprobs(), dtype=np.float64)
            row = np.repeat(np.arange(targets.n_rows), targets.counts)
            p_RV[row, targets.ids] = left_RV[row, targets.ids] = 0  # both keep the head
            bias += float(np.square(left_RV).sum())
            n_rows += targets.n_rows
            tails = np.sort(p_RV, axis=1)[:, ::-1], np.sort(np.abs(left_RV), axis=1)[:, ::-1]
            for drawn in DRAWN:
                varopt[drawn] += float(_sampling_variance(tails[0], drawn).sum())
                control[drawn] += float(_sampling_variance(tails[1], drawn).sum())
    return {
        "squared_bias_of_the_prediction": bias / n_rows,
        "variance_of_varopt": {str(drawn): total / n_rows for drawn, total in varopt.items()},
        "variance_of_the_control_variate": {str(drawn): total / n_rows for drawn, total in control.items()},
    }


def _sampling_variance(falling_RV: np.ndarray, drawn: int) -> np.ndarray:
    """Variance [R] of a threshold sample of `drawn` entries of weights [R, V] that do not rise along a row."""
    rest_RV = falling_RV[:, ::-1].cumsum(axis=1)[:, ::-1]
    thresholds = rest_RV[:, :drawn] / (drawn - np.arange(drawn))  # with the first 0, 1, ... entries kept for sure
    n_sure = (falling_RV[:, :drawn] <= thresholds).argmax(axis=1)
    tau_R1 = np.take_along_axis(thresholds, n_sure[:, None], axis=1)
    return (falling_RV * np.maximum(tau_R1 - falling_RV, 0)).sum(axis=1)


def _codec(sample: Prepared, **options: Any) -> TopKCodec:
    common: dict[str, Any] = {"head": "log", "head_step": 0.5, "k": 64}
    return logitstore.make_codec("topk", vocab_size=sample.tail.vocab_size, **common | options)


if __name__ == "__main__":
    sys.exit(main())
