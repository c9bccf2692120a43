"""A blob with a predicted tail is read for ever: the files in golden/ are never written again.

What is read back is compared with the numbers that were stored, and the tail with a prediction made from the text of
FORMAT.md alone, row by row in float64.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import zstandard
from safetensors.numpy import load_file

import logitstore
from logitstore.codecs.registry import with_tables_of

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected_predicted.json").read_text())
INPUT_IDS = EXPECTED["input_ids"]


def numbers(values: list) -> np.ndarray:
    """float32 of JSON numbers, with null for NaN."""
    return np.array([np.nan if value is None else value for value in values], np.float32)


@pytest.fixture(scope="module")
def decoded() -> logitstore.TeacherTargets:
    codec = with_tables_of(logitstore.make_codec(**EXPECTED["config"]), GOLDEN)
    return codec.decode((GOLDEN / "topk-predicted.blob").read_bytes(), INPUT_IDS)


def test_the_stored_numbers_are_those_that_were_written(decoded: logitstore.TeacherTargets) -> None:
    assert decoded.offsets.tolist() == EXPECTED["offsets"]
    assert decoded.ids.tolist() == EXPECTED["ids"]
    assert decoded.codes.tolist() == EXPECTED["codes"]
    np.testing.assert_array_max_ulp(decoded.logps, numbers(EXPECTED["logps"]), maxulp=1)
    for name in ("tail_logmass", "tail_logmoment_half"):
        np.testing.assert_array_equal(getattr(decoded, name), numbers(EXPECTED[name]), err_msg=name)
    corrections = np.stack([numbers(row) for row in EXPECTED["corrections"]])
    np.testing.assert_allclose(decoded.corrections, corrections, rtol=1e-6)
    assert np.count_nonzero(corrections) > 10


def test_encoding_what_was_read_gives_the_same_content(decoded: logitstore.TeacherTargets) -> None:
    codec = with_tables_of(logitstore.make_codec(**EXPECTED["config"]), GOLDEN)
    blob = (GOLDEN / "topk-predicted.blob").read_bytes()
    content = zstandard.ZstdDecompressor().decompress(blob)
    assert zstandard.ZstdDecompressor().decompress(codec.encode(decoded, INPUT_IDS)) == content


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


class Reader:
    """The prediction of FORMAT.md for one sequence, from the arrays of the tables and the stored rows."""

    def __init__(self, arrays: dict[str, np.ndarray], rows: logitstore.TeacherTargets) -> None:
        self.a, self.rows = arrays, rows
        self.present = [t for t in range(len(INPUT_IDS) - 1) if rows.offsets[t + 1] > rows.offsets[t]]
        self.prior, self.posterior = {}, {}
        for t in self.present:
            self.prior[t], self.posterior[t] = self.posterior_of(t)
        self.context = {t: self.posterior[t] @ self.a["context_map"] for t in self.present}

    def entries(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, head-shifted log-probs y) of a row: moved so that their mass is 1 - tail mass."""
        at = slice(self.rows.offsets[t], self.rows.offsets[t + 1])
        y = self.rows.logps[at].astype(np.float64)
        mass = float(self.rows.tail_logmass[t])
        return self.rows.ids[at], y + np.log(-np.expm1(mass)) - np.log(np.exp(y).sum())

    def posterior_of(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        a, (ids, y) = self.a, self.entries(t)
        e = a["embedding"][ids[:32]]
        current, following = a["embedding"][INPUT_IDS[t]], a["embedding"][INPUT_IDS[t + 1]]
        m = a["prior"] + current @ a["current_map"] + following @ a["next_map"]
        d = y[:32] - e @ m - a["embedding_bias"][ids[:32]]
        d = d - d.mean()
        n, u = np.exp(a["noise"])
        z = e @ a["factor"]
        g = z @ z.T + u + n * np.eye(len(z))
        return m, m + a["factor"] @ (z.T @ np.linalg.solve(g, d))

    def around(self, t: int) -> list[np.ndarray]:
        """Contexts of the rows before and behind, and means over 8 and 64 rows before and over all."""
        none = np.zeros(self.a["context_map"].shape[1])
        parts = [self.context.get(t - 1, none), self.context.get(t + 1, none)]
        for first in (t - 8, t - 64):
            before = [self.context[s] for s in self.present if first <= s < t]
            parts.append(np.mean(before, axis=0) if before else none)
        return [*parts, np.mean(list(self.context.values()), axis=0)]

    def coefficients(self, t: int) -> np.ndarray:
        a, (_, y) = self.a, self.entries(t)
        mass, half = float(self.rows.tail_logmass[t]), float(self.rows.tail_logmoment_half[t])
        held = max(mass, -40.0)
        odds = held - np.log(-np.expm1(held))
        scalars = [held / 4, (half - mass / 2) / 2, np.exp(held), odds / 4, y[0] / 2, y[-1] / 4, np.log(len(y)) / 2]
        features = np.concatenate([self.posterior[t], self.prior[t], scalars, *self.around(t)])
        hidden = silu(features @ a["hidden_map"] + a["hidden_bias"])
        latent = self.posterior[t] + hidden @ a["output_map"] + a["output_bias"]
        c = latent @ a["coefs_map"] + a["coefs_bias"]
        c[: self.rows.corrections.shape[1]] += self.rows.corrections[t]
        return c


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_tail_is_the_one_that_format_md_describes(decoded: logitstore.TeacherTargets, temperature: float) -> None:
    tables = load_file(GOLDEN / f"{EXPECTED['config']['tables']}.safetensors")
    arrays = {
        name.removeprefix("tail."): x.astype(np.float64) for name, x in tables.items() if name.startswith("tail.")
    }
    reader = Reader(arrays, decoded)
    dense = decoded.dense_logprobs(temperature)
    assert len(reader.present) == 10
    for t in range(len(INPUT_IDS) - 1):
        if t not in reader.present:
            assert np.isnan(dense[t]).all()
            continue
        ids, y = reader.entries(t)
        z = arrays["basis"] @ reader.coefficients(t) + arrays["bias"]
        tail = np.setdiff1d(np.arange(len(z)), ids)
        rho = float(decoded.tail_logmass[t] if temperature == 1 else decoded.tail_logmoment_half[t])
        a = np.log(np.exp(y / temperature).sum() + np.exp(rho))
        spread = z[tail] / temperature - np.log(np.exp(z[tail] / temperature).sum())
        np.testing.assert_allclose(dense[t, ids], y / temperature - a, atol=2e-5)
        np.testing.assert_allclose(dense[t, tail], rho - a + spread, atol=2e-3)
        assert np.ptp(spread) > 1  # no uniform tail
