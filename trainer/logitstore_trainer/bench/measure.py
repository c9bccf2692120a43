"""Drives the candidates of `bench storage` over kinds of text, and sums up what came out.

Each candidate encodes and decodes each sample, and what it decodes is compared with the teacher's full distribution;
the teacher's softmax is taken once a sample and temperature. One sample is in memory at a time: L * V * 40 bytes is
about what a run takes.

Letters: L sequence length, R = L - 1 rows, V vocabulary. T is the temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from logitstore.logits_source import full_logits
from logitstore_trainer.bench.candidates import TEMPERATURES, Candidate
from logitstore_trainer.bench.fidelity import Estimate, TeacherRows, divergences_from, estimate
from logitstore_trainer.bench.list_file import Totals
from logitstore_trainer.bench.logits_file import LogitsFile
from logitstore_trainer.bench.tail_measures import TailErrors, TeacherTail
from logitstore_trainer.progress import Progress

TAIL_ROWS = 1024  # of a kind, on which tails are asked for more than their KL
Sums = dict[tuple[str, float], list[float]]  # (quantity, temperature) -> one sum over the rows of each sample


@dataclass(frozen=True, eq=False)
class Kind:
    """Samples of one kind of text: numbers of samples in a file. unseen: no fit has seen text of its kind."""

    name: str
    file: LogitsFile
    samples: Sequence[int]
    unseen: bool = False

    @property
    def rows(self) -> list[int]:
        """R of each sample."""
        return [int(self.file.sample_lengths[number]) - 1 for number in self.samples]


@dataclass
class _Found:
    """What a candidate did on one kind."""

    totals: Totals
    sums: Sums = field(default_factory=dict)
    tail: TailErrors = field(default_factory=TailErrors)


def measure(kinds: Sequence[Kind], candidates: Sequence[Candidate], folder: Path) -> list[dict[str, Any]]:
    """One row of results.json for each candidate; containers are written below `folder`."""
    fitted = [candidate for candidate in candidates if candidate.table_bytes]
    wanted = {kind: fitted if kind.unseen else candidates for kind in kinds}  # unseen is a question to what is fitted
    total = sum(sum(kind.rows) * len(of_kind) for kind, of_kind in wanted.items())
    with Progress(total=total, desc="encode, decode, compare", unit="rows") as display:
        found = [_measured_kind(kind, wanted[kind], folder / str(i), display) for i, kind in enumerate(kinds)]
    return [
        result_row(
            candidate,
            {kind: of_kind[candidate] for kind, of_kind in zip(kinds, found, strict=True) if candidate in of_kind},
        )
        for candidate in candidates
    ]


def _measured_kind(
    kind: Kind, candidates: Sequence[Candidate], folder: Path, display: Progress
) -> dict[Candidate, _Found]:
    sums: list[Sums] = [{} for _ in candidates]
    tails = [TailErrors() for _ in candidates]
    for number, candidate in enumerate(candidates):
        place = folder / str(number)
        place.mkdir(parents=True)
        candidate.open(place)
    n_rows_done = 0
    for number in kind.samples:
        sample = kind.file[number]
        n_rows = len(sample.input_ids) - 1
        full = sample._replace(logits=full_logits(sample.logits, kind.file.vocab_size))
        readings = [candidate.add(number, sample if candidate.reads_hidden else full) for candidate in candidates]
        for temperature in TEMPERATURES:
            teacher = TeacherRows.of(full.logits, n_rows, kind.file.vocab_size, temperature)
            asks_tails = temperature == 1 and n_rows_done < TAIL_ROWS
            teacher_tail = TeacherTail.of(teacher.logp.numpy()) if asks_tails else None
            for candidate, reconstruct, sums_of, tail in zip(candidates, readings, sums, tails, strict=True):
                if temperature not in candidate.temperatures:
                    continue
                q_RV = reconstruct(temperature)
                for what, rows in divergences_from(teacher, q_RV)._asdict().items():
                    sums_of.setdefault((what, temperature), []).append(float(rows.sum()))
                if teacher_tail is not None and candidate.decoded is not None:
                    tail.add(candidate.decoded, q_RV, teacher_tail)
        n_rows_done += n_rows
        display.update(n_rows * len(candidates))
    parts = zip(candidates, sums, tails, strict=True)
    return {candidate: _Found(candidate.close(), of_sums, tail) for candidate, of_sums, tail in parts}


def result_row(candidate: Candidate, found: dict[Kind, _Found]) -> dict[str, Any]:
    """The row of results.json: the kinds that are not unseen together, and each kind apart in "kinds"."""
    seen = [(kind, of_kind) for kind, of_kind in found.items() if not kind.unseen]
    rows_S = [n_rows for kind, _ in seen for n_rows in kind.rows]

    def mean(what: str, temperature: float) -> Estimate:
        sums_S = [x for _, of_kind in seen for x in of_kind.sums.get((what, temperature), [])]
        return estimate(sums_S, rows_S) if len(sums_S) == len(rows_S) else Estimate(None, None)

    totals = [of_kind.totals for _, of_kind in seen]
    n_rows = sum(part.n_rows for part in totals)
    blob_bytes = sum(part.blob_bytes for part in totals)
    container_bytes = sum(part.container_bytes - candidate.table_bytes for part in totals) + candidate.table_bytes
    kl_t1, kl_t2, squared_t1 = mean("kl", 1.0), mean("kl", 2.0), mean("squared", 1.0)
    row = {
        "codec": candidate.codec,
        "config": candidate.config,
        "bytes_per_token": blob_bytes / n_rows,
        "container_bytes_per_token": container_bytes / n_rows,
        "table_bytes": candidate.table_bytes,
        "kl_t1": kl_t1.mean,
        "kl_t2": kl_t2.mean,
        "kl_t1_se": kl_t1.se,
        "kl_t2_se": kl_t2.se,
        "tv_t1": mean("tv", 1.0).mean,
        "tv_t2": mean("tv", 2.0).mean,
        "gradient_error_t1": squared_t1.mean,
        "gradient_error_t1_se": squared_t1.se,
        "encode_tokens_per_s": n_rows / sum(part.encode_s for part in totals),
        "decode_tokens_per_s": n_rows / sum(part.decode_s for part in totals),
        "tail_rows_per_s": _rate(n_rows, sum(part.tail_s for part in totals)),
        "budget": candidate.budget,
        "bytes_of": _bytes_of([part.bytes_of for part in totals], n_rows),
        **TailErrors.joined([of_kind.tail for _, of_kind in seen]).as_json(),
    }
    row["kinds"] = {kind.name: _of_kind(kind, of_kind) for kind, of_kind in found.items()}
    return row


def _rate(n_rows: int, seconds: float) -> float | None:
    return n_rows / seconds if seconds else None


def _bytes_of(parts: Sequence[dict[str, float]], n_rows: int) -> dict[str, float] | None:
    """Bytes a token by what they are for, None where a candidate does not say."""
    if not all(parts):
        return None
    return {name: sum(part[name] for part in parts) / n_rows for name in parts[0]}


def _of_kind(kind: Kind, found: _Found) -> dict[str, Any]:
    kl = {t: estimate(found.sums[("kl", t)], kind.rows) for t in TEMPERATURES if ("kl", t) in found.sums}
    named = {f"kl_t{t:.0f}": kl[t].mean if t in kl else None for t in TEMPERATURES}
    errors = {f"kl_t{t:.0f}_se": kl[t].se if t in kl else None for t in TEMPERATURES}
    totals = found.totals
    return {
        "unseen": kind.unseen,
        "rows": totals.n_rows,
        "bytes_per_token": totals.blob_bytes / totals.n_rows,
        **named,
        **errors,
    }


def within_row_limit(file: LogitsFile, samples: Sequence[int], row_limit: int | None) -> list[int]:
    """The first of the samples, up to the one that reaches the limit; two at least, for an error bar."""
    if row_limit is None:
        return list(samples)
    reached = np.cumsum(file.sample_lengths[list(samples)] - 1) >= row_limit
    n_kept = int(reached.argmax()) + 1 if reached.any() else len(samples)
    return list(samples)[: max(n_kept, 2)]
