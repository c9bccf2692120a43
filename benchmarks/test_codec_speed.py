"""Speed of fitted codecs on one core: blobs to ragged head arrays, and top-k arrays to blobs.

Run: make bench, or pytest benchmarks/test_codec_speed.py --benchmark-only. V = 49,152, 255 rows a blob, 16 blobs in
turn, 16 entries a row or those with p >= 0.01; the teacher's rows are made up (seeded): ids from a list of their
current token, from one of their next token, or from anywhere, of Zipf's frequencies, which is less predictable than a
real teacher's. extra_info: rows/s of the median round, entries and bytes a row. Beside it the same symbols
through constriction's AnsCoder, which does nothing else: no look-up of an id, no check, no value.
"""

import itertools
from typing import NamedTuple

import constriction
import numpy as np
import pytest

import logitstore
from logitstore.codecs import ranked_layout
from logitstore.codecs.topk import TopKCodec
from logitstore.entropy_code import NumberEncoder, StaticTables, symbols_of
from logitstore.fit_tables import fit_tables, joined

VOCAB_SIZE, N_ROWS, GIVEN, DRAWN, N_BLOBS, N_FITTED = 49_152, 255, 32, 400, 16, 160
OPTIONS = {"16 entries a row": {"k": 16}, "entries with p >= 0.01": {"k": 32, "min_prob": 0.01}}


class Sample(NamedTuple):
    """What topk_with_tail returns, and the text; then what the codec makes of it."""

    topk: tuple[np.ndarray, ...]
    input_ids: np.ndarray


def made_up_samples(n_samples: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    zipf = 1 / np.arange(2.0, VOCAB_SIZE + 2)
    cumulative = np.cumsum(zipf / zipf.sum())

    def tokens(*shape: int) -> np.ndarray:
        return np.searchsorted(cumulative, rng.random(shape)).clip(max=VOCAB_SIZE - 1)

    after, beside = tokens(VOCAB_SIZE, 100), tokens(VOCAB_SIZE, 100)
    samples = []
    for _ in range(n_samples):
        input_ids = tokens(N_ROWS + 1)
        place = (100 * rng.random((N_ROWS, DRAWN)) ** 6).astype(int)
        source = rng.random((N_ROWS, DRAWN))
        ids = np.where(source < 0.4, after[input_ids[:-1, None], place], beside[input_ids[1:, None], place])
        ids = np.where(source > 0.95, tokens(N_ROWS, DRAWN), ids)
        ids = np.array([np.fromiter(itertools.islice(dict.fromkeys(row), GIVEN), np.int64, GIVEN) for row in ids])
        weights = -np.cumsum(rng.exponential(1.6 / np.arange(1, GIVEN + 1), (N_ROWS, GIVEN)), axis=1)
        tail = rng.normal(-1.5, 1, N_ROWS)
        logps = weights - np.log(np.exp(weights).sum(axis=1, keepdims=True)) - np.log1p(np.exp(tail))[:, None]
        logmass = tail - np.log1p(np.exp(tail))
        topk = (ids, logps, logmass, logmass / 2 + rng.uniform(1, 4, N_ROWS))
        samples.append(
            Sample(tuple(array.astype(np.float32) if array is not ids else ids for array in topk), input_ids)
        )
    return samples


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return made_up_samples(N_FITTED + N_BLOBS)


@pytest.fixture(scope="module", params=OPTIONS)
def fitted(request, samples) -> tuple[str, TopKCodec, list[Sample]]:
    """(what it keeps, the codec fitted to all samples but 16, those with as many entries given as it keeps)."""
    codec = logitstore.make_codec("topk", vocab_size=VOCAB_SIZE, head="log", **OPTIONS[request.param])
    cut = [
        Sample((*(np.ascontiguousarray(array[:, : codec.k]) for array in s.topk[:2]), *s.topk[2:]), s.input_ids)
        for s in samples
    ]
    targets = (codec.targets_from_topk(*s.topk, s.input_ids) for s in cut[:N_FITTED])
    codec = codec.refitted(fit_tables(joined(targets), codec.head_format, VOCAB_SIZE))
    return request.param, codec, cut[N_FITTED:]


@pytest.fixture(scope="module")
def coded(fitted):
    """(targets, blob, groups of numbers in the blob's stream) of each sample, which decoding gives back."""
    groups: list[list[tuple[StaticTables, np.ndarray, np.ndarray]]] = []

    class Recorder(NumberEncoder):
        def put(self, *group) -> None:
            groups[-1].append(group)
            super().put(*group)

    _, codec, samples = fitted
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranked_layout, "NumberEncoder", Recorder)
        for sample in samples:
            groups.append([])
            targets = codec.targets_from_topk(*sample.topk, sample.input_ids)
            found.append((targets, codec.encode(targets, sample.input_ids), groups[-1]))
            decoded = codec.decode(found[-1][1], sample.input_ids)
            for name in ("offsets", "ids", "codes", "logps", "tail_logmass", "tail_logmoment_half"):
                np.testing.assert_array_equal(getattr(decoded, name), getattr(targets, name))
    return found


def _measure(benchmark, group: str, calls: list, coded) -> None:
    turn = itertools.cycle(calls)
    benchmark.group = group
    benchmark.pedantic(lambda: next(turn)(), rounds=20 * len(calls), warmup_rounds=2 * len(calls))
    benchmark.extra_info["rows_per_s"] = N_ROWS / benchmark.stats["median"]
    benchmark.extra_info["entries_per_row"] = np.mean([len(targets.ids) for targets, _, _ in coded]) / N_ROWS
    benchmark.extra_info["bytes_per_row"] = np.mean([len(blob) for _, blob, _ in coded]) / N_ROWS


def _models(codec: TopKCodec) -> dict[int, list]:
    tables = codec.tables
    return {
        id(static): [
            constriction.stream.model.Categorical(frequencies.astype(np.float64), perfect=False, lazy=False)
            for frequencies in static.frequencies
        ]
        for static in (tables.odds, tables.excess, tables.counts, tables.values, tables.ids)
    }


def _runs(codec: TopKCodec, groups) -> list[tuple[np.ndarray, object]]:
    """(symbols, model) of each context of each group, in the order of the stream."""
    models, runs = _models(codec), []
    for tables, numbers, contexts in groups:
        symbols = symbols_of(numbers).astype(np.int32)
        for context, model in enumerate(models[id(tables)]):
            chosen = np.ascontiguousarray(symbols[contexts == context])
            runs += [(chosen, model)] if len(chosen) else []
    return runs


def _encoded(runs) -> np.ndarray:
    coder = constriction.stream.stack.AnsCoder()
    for symbols, model in reversed(runs):
        coder.encode_reverse(symbols, model)
    return coder.get_compressed()


def _decoded(words: np.ndarray, runs) -> list[np.ndarray]:
    coder = constriction.stream.stack.AnsCoder(words, False)
    return [coder.decode(model, len(symbols)) for symbols, model in runs]


def test_decode(benchmark, fitted, coded):
    name, codec, samples = fitted
    calls = [
        lambda blob=blob, s=s: codec.decode(blob, s.input_ids) for (_, blob, _), s in zip(coded, samples, strict=True)
    ]
    _measure(benchmark, f"decode a blob, {name}", calls, coded)


def test_decode_symbols_with_constriction(benchmark, fitted, coded):
    name, codec, _ = fitted
    calls = []
    for _, _, groups in coded:
        runs = _runs(codec, groups)
        words = _encoded(runs)
        for found, (symbols, _) in zip(_decoded(words, runs), runs, strict=True):
            np.testing.assert_array_equal(found, symbols)
        calls.append(lambda words=words, runs=runs: _decoded(words, runs))
    _measure(benchmark, f"decode a blob, {name}", calls, coded)


def test_targets_and_encode(benchmark, fitted, coded):
    name, codec, samples = fitted
    calls = [lambda s=s: codec.encode(codec.targets_from_topk(*s.topk, s.input_ids), s.input_ids) for s in samples]
    _measure(benchmark, f"top-k arrays to a blob, {name}", calls, coded)


def test_encode_symbols_with_constriction(benchmark, fitted, coded):
    name, codec, _ = fitted
    runs_of_blobs = [_runs(codec, groups) for _, _, groups in coded]
    calls = [lambda runs=runs: _encoded(runs) for runs in runs_of_blobs]
    _measure(benchmark, f"top-k arrays to a blob, {name}", calls, coded)
