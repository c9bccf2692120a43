"""A small store to read, write and damage."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import logitstore

VOCAB_SIZE = 400


class Written(NamedTuple):
    """A sample as it was given to the writer."""

    sample_id: int
    source_row: int
    input_ids: np.ndarray
    loss_mask: np.ndarray
    targets: logitstore.TeacherTargets


def make_spec(**changes: object) -> logitstore.StoreSpec:
    codec = logitstore.make_codec("topk", vocab_size=VOCAB_SIZE, k=6)
    return logitstore.StoreSpec(**{"codec": codec, "vocab_size": VOCAB_SIZE, "teacher": "t", **changes})


def make_samples(n: int, seed: int = 0) -> list[Written]:
    """Samples of 1 to 30 tokens whose teacher gives the true next token most of its mass."""
    rng = np.random.default_rng(seed)
    codec = make_spec().codec
    samples = []
    for i in range(n):
        input_ids = rng.integers(0, VOCAB_SIZE, rng.integers(1, 31)).astype(np.int32)
        logits = rng.standard_normal((len(input_ids), VOCAB_SIZE)).astype(np.float32)
        logits[np.arange(len(input_ids) - 1), input_ids[1:]] += 6
        loss_mask = rng.random(len(input_ids)) < 0.7
        targets = codec.targets_from_logits(logits, input_ids, loss_mask[1:])
        samples.append(Written(1000 + 3 * i, i // 2, input_ids, loss_mask, targets))
    return samples


def write(path: Path, samples: list[Written], spec: logitstore.StoreSpec | None = None, **options: object) -> None:
    with logitstore.create(path, spec or make_spec(), **options) as writer:
        for s in samples:
            writer.append(s.sample_id, s.input_ids, s.targets, s.loss_mask, source_row=s.source_row)


def assert_same(sample: logitstore.Sample, written: Written) -> None:
    assert (sample.sample_id, sample.source_row) == (written.sample_id, written.source_row)
    np.testing.assert_array_equal(sample.input_ids, written.input_ids)
    np.testing.assert_array_equal(sample.loss_mask, written.loss_mask)
    for name in ("offsets", "ids", "logps", "codes", "tail_logmass", "tail_logmoment_half"):
        np.testing.assert_array_equal(getattr(sample.targets, name), getattr(written.targets, name), err_msg=name)


@pytest.fixture(scope="session")
def samples() -> list[Written]:
    return make_samples(150)


@pytest.fixture(scope="session")
def store_path(tmp_path_factory: pytest.TempPathFactory, samples: list[Written]) -> Path:
    path = tmp_path_factory.mktemp("a store") / "x.parquet"
    write(path, samples)
    return path
