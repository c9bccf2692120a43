"""Files written by released versions are read for ever: the files in golden/ are never written again.

They hold a row that is one-hot, a row with five tokens, absent rows, and ids of more than 16 bits.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import logitstore

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def numbers(values: list) -> np.ndarray:
    """float32 of JSON numbers, with null for NaN and "-inf"."""
    return np.array([np.nan if value is None else float(value) for value in values], np.float32)


def check(targets: logitstore.TeacherTargets, head: str) -> None:
    expected = EXPECTED["targets"][head]
    assert targets.offsets.tolist() == expected["offsets"]
    assert targets.ids.tolist() == expected["ids"]
    for name in ("logps", "tail_logmass", "tail_logmoment_half"):
        np.testing.assert_array_equal(getattr(targets, name), numbers(expected[name]), err_msg=name)


@pytest.mark.parametrize("head", ["int8", "fp8", "fp16"])
def test_blobs_of_version_1(head: str) -> None:
    codec = logitstore.make_codec("topk", vocab_size=EXPECTED["vocab_size"], k=EXPECTED["k"], head=head)
    check(codec.decode((GOLDEN / f"topk-{head}.blob").read_bytes(), EXPECTED["input_ids"]), head)


def test_store_of_format_direct_1() -> None:
    store = logitstore.open(GOLDEN / "store.parquet")
    assert store.verify().ok
    assert (store.spec.teacher, store.spec.codec.k) == ("golden", 12)
    sample = store[0]
    assert (sample.sample_id, sample.source_row) == (7, 3)
    assert sample.input_ids.tolist() == EXPECTED["input_ids"]
    assert sample.loss_mask.tolist() == [False, True, True, False, True, True, True, False, True]
    check(sample.targets, "int8")
    assert len(store[1].input_ids) == 1
