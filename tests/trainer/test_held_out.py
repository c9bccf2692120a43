"""The split by source rows: nothing on both sides, the share that was asked for, the same for equal seeds."""

import dataclasses

import numpy as np
import pytest
from logitstore_trainer.held_out import split_by_source_row
from logitstore_trainer.train import TrainConfig, train

import logitstore


@pytest.fixture
def store_of_rows(tmp_path):
    """Writes a store with a sample for each of source_rows: store_of_rows(name, source_rows, **fields of its spec)."""

    def write(name, source_rows, **spec_fields):
        codec = logitstore.make_codec("topk", vocab_size=97, k=4)
        spec = logitstore.StoreSpec(codec=codec, vocab_size=97, **spec_fields)
        input_ids = np.array([5, 6, 7], np.int32)
        targets = codec.targets_from_logits(np.zeros((3, 97), np.float32), input_ids)
        with logitstore.create(tmp_path / name, spec) as writer:
            for i, row in enumerate(source_rows):
                writer.append(i, input_ids, targets, source_row=row)
        return logitstore.open(tmp_path / name)

    return write


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.8])
def test_no_row_is_on_both_sides(store_of_rows, fraction, seed):
    source_rows = np.repeat(np.arange(40), np.arange(40) % 5).tolist()
    split = split_by_source_row([store_of_rows("x.parquet", source_rows)], fraction, seed)
    rows = [{source_rows[i] for i in side} for side in split]
    assert not rows[0] & rows[1]
    assert sorted([*split.train, *split.held_out]) == list(range(80))
    wanted = max(round(80 * fraction), 1)
    assert wanted <= len(split.held_out) < wanted + 4


def test_a_split_is_that_of_its_seed(store_of_rows):
    store = store_of_rows("x.parquet", np.repeat(np.arange(20), 2).tolist())
    assert split_by_source_row([store], 0.25, 3) == split_by_source_row([store], 0.25, 3)
    assert len({tuple(split_by_source_row([store], 0.25, seed).held_out) for seed in range(10)}) > 5


def test_samples_of_unknown_rows_are_rows_of_their_own(store_of_rows):
    split = split_by_source_row([store_of_rows("x.parquet", [-1] * 30)], 0.5, 0)
    assert len(split.train) == len(split.held_out) == 15


@pytest.mark.parametrize(("sha256", "shared"), [("beef", True), (None, False)])
def test_stores_of_one_data_set_share_its_rows(store_of_rows, sha256, shared):
    stores = [store_of_rows(f"{name}.parquet", range(30), dataset_sha256=sha256) for name in "ab"]
    split = split_by_source_row(stores, 0.3, 0)
    first, second = ({i % 30 for i in split.held_out if i // 30 == number} for number in (0, 1))
    assert (first == second) is shared
    assert len(split.held_out) == 18


def test_one_row_leaves_nothing_to_train_on(store_of_rows):
    with pytest.raises(ValueError, match=r"--eval-fraction 0.1 leaves no sample.*9 samples come from 1; hold out less"):
        split_by_source_row([store_of_rows("x.parquet", [0] * 9)], 0.1, 0)


def test_training_holds_out_whole_rows(store_of_rows, tmp_path):
    """Two rows of six windows: half of the samples is one row, a tenth is too."""
    store = store_of_rows("x.parquet", [0] * 6 + [1] * 6)
    config = TrainConfig(
        student="llama:layers=1,width=16,heads=1",
        data=[str(store.path)],
        out=str(tmp_path / "a"),
        steps=1,
        device="cpu",
    )
    for fraction, out in [(0.5, "a"), (0.1, "b")]:
        metrics = train(dataclasses.replace(config, eval_fraction=fraction, out=str(tmp_path / out)))
        assert metrics["held_out"]["n_tokens"] == 6 * 2
