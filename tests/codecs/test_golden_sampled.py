"""Files of codecs 3 and 4 are read for ever: those in golden/ are never written again.

They hold a row with exact entries, a flat row without, a one-hot row, a row with five tokens, absent rows, and ids of
more than 16 bits. Weights are held to the last bit but one: their last step is a logarithm in float64.
"""

import json
import math
import struct
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

import logitstore

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected_sampled.json").read_text())


def check(targets: logitstore.TeacherTargets, expected: dict[str, Any]) -> None:
    assert targets.is_sampled
    assert targets.offsets.tolist() == expected["offsets"]
    assert targets.ids.tolist() == expected["ids"]
    assert targets.samples.n_exact.tolist() == expected["n_exact"]
    np.testing.assert_array_max_ulp(targets.logps, np.array(expected["logweights"], np.float32), maxulp=1)


@pytest.mark.parametrize("file", sorted(EXPECTED["targets"]))
def test_blobs_of_the_sampled_codecs(file: str) -> None:
    expected = EXPECTED["targets"][file]
    codec = logitstore.make_codec(**expected["config"])
    assert codec.config == expected["config"]
    check(codec.decode((GOLDEN / f"{file}.blob").read_bytes(), EXPECTED["input_ids"]), expected)


def test_a_store_of_samples() -> None:
    store = logitstore.open(GOLDEN / "store_varopt.parquet")
    assert store.verify().ok
    assert store.spec.codec == logitstore.make_codec("varopt", vocab_size=70_000, k=12, head="fp16", seed=7)
    sample = store[0]
    assert sample.input_ids.tolist() == EXPECTED["input_ids"]
    check(sample.targets, EXPECTED["targets"]["varopt-fp16"])


class Planes:
    """The content of a blob behind its header, read as FORMAT.md says and with nothing of logitstore."""

    def __init__(self, file: str) -> None:
        content = zstandard.ZstdDecompressor().decompress((GOLDEN / f"{file}.blob").read_bytes())
        self.header = struct.unpack_from("<4sHHIIIIII", content)
        self.rest = content[32:]

    def take(self, kind: str, count: int) -> list:
        size = struct.calcsize(f"<{count}{kind}")
        taken, self.rest = self.rest[:size], self.rest[size:]
        return list(struct.unpack(f"<{count}{kind}", taken))

    def take_bytes(self, count: int, width: int) -> list[int]:
        planes = [self.take("B", count) for _ in range(width)]
        return [sum(byte << 8 * i for i, byte in enumerate(number)) for number in zip(*planes, strict=True)]

    def take_ranks(self, lengths: list[int], width: int) -> list[list[int]]:
        """Ragged rows that were stored rank by rank."""
        flat = iter(self.take_bytes(sum(lengths), width))
        rows: list[list[int]] = [[] for _ in lengths]
        for rank in range(max(lengths)):
            for row, length in zip(rows, lengths, strict=True):
                if rank < length:
                    row.append(next(flat))
        return rows


def test_the_text_of_the_format_reads_codec_3() -> None:
    planes, expected = Planes("varopt-int8"), EXPECTED["targets"]["varopt-int8"]
    assert planes.header[:7] == (b"LGTS", 1, 3, 8, 6, len(expected["ids"]), 70_000)
    counts = planes.take("H", 8)
    present = [t for t in range(8) if counts[t]]
    h, code = [0] * 8, [0] * 8
    for where, width in ((h, 1), (code, 2)):
        for t, number in zip(present, planes.take_bytes(len(present), width), strict=True):
            where[t] = number
    with_head = [t for t in range(8) if h[t]]
    scale, offset = (dict(zip(with_head, planes.take("e", len(with_head)), strict=True)) for _ in range(2))
    ids, codes = planes.take_ranks(counts, 3), planes.take_ranks(h, 1)
    assert planes.rest == b""
    assert list(chain.from_iterable(ids)) == expected["ids"]
    assert h == expected["n_exact"]
    logweights = []
    for t in present:
        m = -math.inf if code[t] == 65_535 else -math.log1p(math.exp(64 - code[t] / 512))
        threshold = m - math.log(counts[t] - h[t]) if h[t] < counts[t] else -math.inf
        values = [scale[t] * (sum(codes[t][: i + 1]) % 256 - 255) + offset[t] for i in range(h[t])]
        total = sum(map(math.exp, values))
        row = [max(v + math.log(-math.expm1(m)) - math.log(total), threshold) for v in values]
        row += [threshold] * (counts[t] - h[t])
        logweights += [w - math.log(sum(map(math.exp, row))) for w in row]
    np.testing.assert_allclose(logweights, expected["logweights"], rtol=0, atol=1e-6)


def test_the_text_of_the_format_reads_codec_4() -> None:
    planes, expected = Planes("rskd"), EXPECTED["targets"]["rskd"]
    assert planes.header[:7] == (b"LGTS", 1, 4, 8, 6, len(expected["ids"]), 70_000)
    counts = planes.take("B", 8)
    times, ids = planes.take_ranks(counts, 1), planes.take_ranks(counts, 3)
    assert planes.rest == b""
    assert list(chain.from_iterable(ids)) == expected["ids"]
    assert [sum(row) for row in times if row] == [50] * 6
    logweights = [math.log(c / 50) for c in chain.from_iterable(times)]
    np.testing.assert_allclose(logweights, expected["logweights"], rtol=0, atol=1e-6)
