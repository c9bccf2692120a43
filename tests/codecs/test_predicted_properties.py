"""Predicted tails on rows that no fit has seen the like of: one-hot, ties, ruled-out tokens, ragged and absent rows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_teacher import SETTINGS, V, teacher_samples

import logitstore
from logitstore.codecs.conformance import require_same
from logitstore.errors import LogitStoreError
from logitstore.fit_codec import fit_tail, fitted_on_rows
from logitstore.tail_rows import tail_rows

OPTIONS = (
    {"k": 1, "head": "log", "tail_step": 0.1},
    {"k": 9, "head": "int8", "tail_step": None},
    {"k": 40, "head": "sqrtp", "min_prob": 0.01, "tail_step": 0.1},
)


@pytest.fixture(scope="module")
def codecs() -> list:
    """One codec for each of OPTIONS."""
    rows = tail_rows(teacher_samples(0, 40), V)
    tail = fit_tail(rows, SETTINGS)
    made = (logitstore.make_codec("topk", vocab_size=V, tail="predicted", **options) for options in OPTIONS)
    return [fitted_on_rows(codec, rows, tail) for codec in made]


@st.composite
def texts(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits [L, V], input_ids [L], keep_mask [L-1]) of up to eight tokens, rows of every kind."""
    length = draw(st.integers(2, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = (draw(st.sampled_from([0.1, 3.0, 30.0])) * rng.standard_normal((length, V))).astype(np.float32)
    for row in range(length):
        kind = draw(st.sampled_from(["plain", "one-hot", "ties", "ruled out", "two tokens"]))
        if kind == "one-hot":
            logits[row] = np.where(np.arange(V) == rng.integers(V), 0, -np.inf)
        elif kind == "ties":
            logits[row] = np.round(logits[row] / 4) * 4
        elif kind == "ruled out":
            logits[row, rng.permutation(V)[: V // 2]] = -np.inf
        elif kind == "two tokens":
            logits[row, 2:] = -np.inf
    keep = np.array(draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1)), bool)
    return logits, rng.integers(0, V, length), keep


@settings(max_examples=40, deadline=None)
@given(text=texts(), number=st.integers(0, len(OPTIONS) - 1))
def test_bytes_give_back_the_targets_and_their_mass_is_one(codecs: list, text: tuple, number: int) -> None:
    codec = codecs[number]
    targets = codec.targets_from_logits(*text)
    blob = codec.encode(targets, text[1])
    decoded = codec.decode(blob, text[1])
    require_same(decoded, replace(targets, teacher_coefs=None), "targets")
    assert np.array_equal(decoded.present, text[2])
    for temperature in (1.0, 2.0):
        dense = decoded.dense_logprobs(temperature)
        assert np.isnan(dense[~text[2]]).all()
        mass = np.exp(dense[text[2]].astype(np.float64)).sum(axis=1)
        np.testing.assert_allclose(mass, 1, atol=2e-5)
        np.testing.assert_array_equal(dense, targets.dense_logprobs(temperature))


@settings(max_examples=40, deadline=None)
@given(
    text=texts(),
    number=st.integers(0, len(OPTIONS) - 1),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_a_damaged_blob_is_an_error_of_ours_or_harmless(
    codecs: list, text: tuple, number: int, place: float, bit: int
) -> None:
    codec = codecs[number]
    whole = codec.encode(codec.targets_from_logits(*text), text[1])
    blob = bytearray(whole)
    blob[int(place * len(blob))] ^= 1 << bit
    try:
        decoded = codec.decode(bytes(blob), text[1])
    except LogitStoreError:
        return
    require_same(decoded, codec.decode(whole, text[1]), "targets")  # a bit that zstd's format leaves unused


def test_a_bit_that_zstd_does_not_use_is_the_only_harmless_one(codecs: list) -> None:
    logits, ids, _ = teacher_samples(5, 1, 6)[0]
    blob = codecs[0].encode(codecs[0].targets_from_logits(logits, ids), ids)
    harmless = []
    for number in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[number // 8] ^= 1 << number % 8
        try:
            codecs[0].decode(bytes(damaged), ids)
        except LogitStoreError:
            continue
        harmless.append(number)
    assert harmless in ([], [8 * 4 + 4])  # bit 4 of the frame header descriptor: "unused bit"
