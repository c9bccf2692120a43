"""Files of codec 2 and its tables are read for ever: those in golden/ are never written again.

They hold rows of adaptive length, a flat row with many equal codes, a one-hot row, a row with five tokens, absent rows,
and ids that stand in no list. They are read by logitstore, and by a slow reader made from the text of FORMAT.md alone.
"""

import hashlib
import json
import math
import struct
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from safetensors.numpy import load_file

import logitstore
from logitstore.codecs.registry import with_tables_of

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected_fitted.json").read_text())
INPUT_IDS = EXPECTED["input_ids"]
N_ROWS = len(INPUT_IDS) - 1


def numbers(values: list) -> np.ndarray:
    """float32 of JSON numbers, with null for NaN and "-inf"."""
    return np.array([np.nan if value is None else float(value) for value in values], np.float32)


@pytest.mark.parametrize("head", ["log", "int8"])
def test_blobs_of_fitted_codecs(head: str) -> None:
    expected = EXPECTED["targets"][head]
    codec = with_tables_of(logitstore.make_codec(**expected["config"]), GOLDEN)
    assert codec.config == expected["config"]
    blob = (GOLDEN / f"topk-fitted-{head}.blob").read_bytes()
    targets = codec.decode(blob, INPUT_IDS)
    assert targets.offsets.tolist() == expected["offsets"]
    assert targets.ids.tolist() == expected["ids"]
    assert targets.codes.tolist() == expected["codes"]
    # the offset of a log head is a logarithm in float64, the same to the last bit but one everywhere
    np.testing.assert_array_max_ulp(targets.logps, numbers(expected["logps"]), maxulp=1 if head == "log" else 0)
    for name in ("tail_logmass", "tail_logmoment_half"):
        np.testing.assert_array_equal(getattr(targets, name), numbers(expected[name]), err_msg=name)
    # the bytes of the frame are zstd's affair, its content is ours
    again = codec.encode(targets, INPUT_IDS)
    assert zstandard.ZstdDecompressor().decompress(again) == zstandard.ZstdDecompressor().decompress(blob)


class Stream:
    """The ANS stream and the raw bits of a blob, one number at a time, in plain integers."""

    def __init__(self, words: list[int], raw: bytes) -> None:
        self.words, self.state = words[:-2], (words[-1] << 32) + words[-2] if len(words) > 1 else sum(words)
        self.bits = [byte >> i & 1 for byte in raw for i in range(8)]

    def symbol(self, frequencies: list[int]) -> int:
        left, total = [], 0
        for i, frequency in enumerate(frequencies):
            left.append(math.floor(total * (2**24 - 272) / 2**16) + i)
            total += frequency
        left.append(1 << 24)
        q = self.state % (1 << 24)
        i = bisect_right(left, q) - 1
        self.state = (self.state >> 24) * (left[i + 1] - left[i]) + q - left[i]
        if self.state < 1 << 32 and self.words:
            self.state = (self.state << 32) + self.words.pop()
        return i

    def numbers(self, table: list[list[int]], contexts: list[int]) -> list[int]:
        symbols = [0] * len(contexts)
        for context in sorted(set(contexts)):
            for place in (place for place, c in enumerate(contexts) if c == context):
                symbols[place] = self.symbol(table[context])
        found = []
        for symbol in symbols:
            if symbol < 128:
                found.append(symbol)
                continue
            b, high = (symbol - 128) // 8 + 4, (symbol - 128) % 8 + 8
            found.append((high << b) + sum(bit << i for i, bit in enumerate(self.bits[:b])))
            self.bits = self.bits[b:]
        return found


def rank_group(rank: int) -> int:
    return rank if rank < 4 else min(2 + int(math.log2(rank)), 9)


def id_contexts(codes: list[int], first_context: int = 30) -> tuple[list[int], list[bool]]:
    """(context of each id, whether it is tied) of one row."""
    tied = [rank >= 2 and codes[rank] == codes[rank - 1] for rank in range(len(codes))]
    starts = [rank for rank in range(len(codes)) if not tied[rank]] + [len(codes)]
    contexts = []
    for start, end in pairwise(starts):
        z = min(math.ceil(math.log2(end - start)), 5)
        contexts += [3 * rank_group(start) + min(z, 2)] + [first_context + z - 1] * (end - start - 1)
    return contexts, tied


def id_of(code: int, first: list[int], second: list[int], by_frequency: list[int]) -> int:
    if code >= 1024:
        return by_frequency[code - 1024]
    return (second if code % 2 else first)[code // 2]


@pytest.mark.parametrize("head", ["log", "int8"])
def test_the_text_of_the_format_reads_codec_2(head: str) -> None:
    expected = EXPECTED["targets"][head]
    digest = expected["config"]["tables"]
    path = GOLDEN / f"{digest}.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    tables: dict[str, Any] = {name: array.tolist() for name, array in load_file(path).items()}

    content = zstandard.ZstdDecompressor().decompress((GOLDEN / f"topk-fitted-{head}.blob").read_bytes())
    assert struct.unpack_from("<4sHHIIIIII", content)[:7] == (b"LGTS", 1, 2, N_ROWS, 9, len(expected["ids"]), 300)
    at = 32
    present = [t for t in range(N_ROWS) if content[at + t // 8] >> t % 8 & 1]
    assert len(present) == 9
    at += 2
    scale_offset = []
    if head == "int8":
        scale_offset = [struct.unpack_from("<9e", content, at + 18 * i) for i in range(2)]
        at += 36
    (n_words,) = struct.unpack_from("<I", content, at)
    words = list(struct.unpack_from(f"<{n_words}I", content, at + 4))
    stream = Stream(words, content[at + 4 + 4 * n_words :])

    odds = stream.numbers(tables["symbols.odds"], [0] * 9)
    distance = [(o - 1) // 2 if o % 2 else -o // 2 for o in odds]
    context = [0 if o == 0 else 1 + min(max((d / 16 - 2) // 2 + 4, 0), 7) for o, d in zip(odds, distance, strict=True)]
    context = [int(c) for c in context]
    excess = stream.numbers(tables["symbols.excess"], context)
    counts = [n + 1 for n in stream.numbers(tables["symbols.counts"], context)]
    steps = iter(stream.numbers(tables["symbols.values"], [rank_group(r) for n in counts for r in range(n)]))
    codes = []
    for n in counts:
        row = np.cumsum([next(steps) for _ in range(n)]) % 256
        codes.append([255 - int(c) if head == "int8" else int(c) for c in row])
    contexts, tied = zip(*map(id_contexts, codes), strict=True)
    differences = iter(stream.numbers(tables["symbols.ids"], [c for row in contexts for c in row]))
    assert stream.state == 0
    assert not stream.words
    assert not any(stream.bits)
    assert len(stream.bits) < 8

    def list_of(name: str, token: int) -> list[int]:
        offsets = tables[f"{name}.offsets"]
        return tables[f"{name}.members"][offsets[token] : offsets[token + 1]]

    ids, escaped = [], 0
    for t, row_tied in zip(present, tied, strict=True):
        row: list[int] = []
        code = -1
        for rank, is_tied in enumerate(row_tied):
            code = next(differences) + (code + 1 if is_tied else 0)
            first = list_of("together", row[0]) if rank else list_of("beside", INPUT_IDS[t + 1])
            row.append(id_of(code, first, list_of("after", INPUT_IDS[t]), tables["by_frequency"]))
            escaped += code >= 1024
        ids.append(row)
    assert escaped > 0
    assert any(any(row) for row in tied)
    offsets = [0] * (N_ROWS + 1)
    for t, n in zip(present, counts, strict=True):
        offsets[t + 1] = n
    assert np.cumsum(offsets).tolist() == expected["offsets"]
    assert [i for row in ids for i in row] == expected["ids"]
    assert [c for row in codes for c in row] == expected["codes"]
    mass, half, logps = [], [], []
    for number, t in enumerate(present):
        odds_t = (distance[number] + 992) / 16 - 64
        mass.append(-math.log1p(math.exp(-odds_t)) if odds[number] else -math.inf)
        half.append(mass[-1] / 2 + excess[number] / 16)
        assert np.float32(mass[-1]) == numbers(expected["tail_logmass"])[t]
        np.testing.assert_allclose(half[-1], numbers(expected["tail_logmoment_half"])[t], rtol=1e-6)
        if head == "int8":
            logps += [scale_offset[0][number] * (c - 255) + scale_offset[1][number] for c in codes[number]]
        else:
            total = sum(math.exp(-c / 2) for c in codes[number])
            kept = math.log1p(-math.exp(mass[-1])) if odds[number] else 0.0
            logps += [kept - math.log(total) - c / 2 for c in codes[number]]
    np.testing.assert_allclose(logps, numbers(expected["logps"]), rtol=1e-5, atol=1e-6)
