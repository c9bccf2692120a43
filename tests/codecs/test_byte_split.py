"""Where a blob's bytes go: parts that add up to it, and each grows with what it is for."""

import numpy as np
import pytest
from made_up_teacher import SETTINGS, V, teacher_samples

import logitstore
from logitstore.codecs.byte_split import PARTS, byte_split
from logitstore.fit_codec import fit_tail, fitted_on_rows
from logitstore.tail_rows import tail_rows


@pytest.fixture(scope="module")
def fitted() -> dict:
    """Codecs by name, fitted to a made-up teacher."""
    rows = tail_rows(teacher_samples(0, 60), V)
    tail = fit_tail(rows, SETTINGS)
    options = {
        "residual": {"head": "log"},
        "int8": {"head": "int8"},
        "predicted": {"head": "log", "tail": "predicted"},
        "corrected": {"head": "log", "tail": "predicted", "tail_step": 0.05},
    }
    codecs = {
        name: fitted_on_rows(logitstore.make_codec("topk", vocab_size=V, k=8, **of), rows, tail)
        for name, of in options.items()
    }
    return codecs | {"flat": logitstore.make_codec("topk", vocab_size=V, k=8)}


def split_of(codec, seed: int = 5) -> tuple[dict[str, float], int]:
    logits, ids, _ = teacher_samples(seed, 1, 200)[0]
    targets = codec.targets_from_logits(logits, ids)
    blob = codec.encode(targets, ids)
    return byte_split(codec, targets, blob), len(blob)


@pytest.mark.parametrize("name", ["residual", "int8", "predicted", "corrected", "flat"])
def test_parts_are_positive_and_add_up_to_the_blob(fitted: dict, name: str) -> None:
    parts, n_bytes = split_of(fitted[name])
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == pytest.approx(n_bytes)
    assert min(parts.values()) > 0
    assert 32 < parts["side"] < 0.1 * n_bytes + 64  # header, frame and checksum


def test_only_the_tail_grows_with_corrections(fitted: dict) -> None:
    without, _ = split_of(fitted["predicted"])
    with_steps, _ = split_of(fitted["corrected"])
    assert with_steps["tail"] > 2 * without["tail"]
    for part in ("ids", "values"):
        assert with_steps[part] == pytest.approx(without[part])


def test_scale_and_offset_of_int8_are_values(fitted: dict) -> None:
    parts, _ = split_of(fitted["int8"])
    log_parts, _ = split_of(fitted["residual"])
    assert parts["values"] > log_parts["values"] + 199 * 4
    # without the order of ties to save on, ids cost more where fewer values are equal
    assert parts["ids"] >= log_parts["ids"]


def test_ids_of_a_flat_blob_are_what_zstd_makes_of_two_bytes_each(fitted: dict) -> None:
    parts, n_bytes = split_of(fitted["flat"])
    assert 0.3 * n_bytes < parts["ids"] < 199 * 8 * 2
    assert np.isclose(sum(parts.values()), n_bytes)
