"""collate against a loop over every token, and what importing it costs."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from logitstore_trainer import collate
from logitstore_trainer.collator import next_token_labels

import logitstore


def collate_slowly(samples, pad_token_id):
    length = max(len(sample.input_ids) for sample in samples)
    n_entries = max(int(sample.targets.counts.max(initial=0)) for sample in samples) or 1
    shape = (len(samples), length)
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, -100),
        "teacher_ids": torch.full((*shape, n_entries), -1, dtype=torch.int32),
        "teacher_tail_logmass": torch.full(shape, math.nan),
        "teacher_tail_logmoment_half": torch.full(shape, math.nan),
    }
    holds_codes = samples[0].targets.codes is not None
    if holds_codes:
        batch["teacher_codes"] = torch.zeros((*shape, n_entries), dtype=torch.uint8)
        batch["teacher_code_scale"], batch["teacher_code_offset"] = torch.zeros(shape), torch.zeros(shape)
    else:
        batch["teacher_logprobs"] = torch.full((*shape, n_entries), -math.inf)
    for b, sample in enumerate(samples):
        targets = sample.targets
        for t, token in enumerate(sample.input_ids):
            batch["input_ids"][b, t] = int(token)
            batch["attention_mask"][b, t] = 1
            if t > 0 and sample.loss_mask[t] and targets.offsets[t] > targets.offsets[t - 1]:
                batch["labels"][b, t] = int(token)
        for t in range(targets.n_rows):
            start = int(targets.offsets[t])
            for j in range(int(targets.offsets[t + 1]) - start):
                batch["teacher_ids"][b, t, j] = int(targets.ids[start + j])
                if holds_codes:
                    batch["teacher_codes"][b, t, j] = int(targets.codes[start + j])
                else:
                    batch["teacher_logprobs"][b, t, j] = float(targets.logps[start + j])
            if holds_codes:
                batch["teacher_code_scale"][b, t] = float(targets.code_scale[t])
                batch["teacher_code_offset"][b, t] = float(targets.code_offset[t])
            batch["teacher_tail_logmass"][b, t] = float(targets.tail_logmass[t])
            batch["teacher_tail_logmoment_half"][b, t] = float(targets.tail_logmoment_half[t])
    return batch


def ragged_sample(counts, loss_mask, *, vocab_size=50, seed=0):
    """A sample whose row t has counts[t] entries."""
    rng = np.random.default_rng(seed)
    counts = np.array(counts, dtype=np.int64)
    n_entries = int(counts.sum())
    rows = [np.sort(rng.normal(-5, 2, n))[::-1] for n in counts]
    moments = rng.normal(-1, 0.2, (2, len(counts))).astype(np.float32)
    moments[:, counts == 0] = np.nan
    input_ids = rng.integers(0, vocab_size, len(counts) + 1).astype(np.int32)
    targets = logitstore.TeacherTargets(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        ids=np.concatenate([rng.permutation(vocab_size)[:n] for n in counts] + [np.zeros(0)]).astype(np.int32),
        logps=np.concatenate([*rows, np.zeros(0)]).astype(np.float32),
        tail_logmass=moments[0],
        tail_logmoment_half=moments[1],
        vocab_size=vocab_size,
        input_ids=input_ids,
    )
    assert len(targets.ids) == n_entries
    return logitstore.Sample(0, 0, input_ids, np.array(loss_mask, dtype=bool), targets)


def assert_same_batch(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype, name
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(("head", "slot_bytes"), [("int8", 5), ("fp16", 8)])
def test_equals_a_loop_on_a_store(new_store, tmp_path, head, slot_bytes):
    store = logitstore.open(new_store(tmp_path / "x.parquet", head=head))
    samples = [store[i] for i in (3, 0, 7, 11)]
    batch = collate(samples, pad_token_id=5)
    assert_same_batch(batch, collate_slowly(samples, 5))
    assert sum(batch[name][0, 0, 0].nbytes for name in batch if batch[name].dim() == 3) == slot_bytes


def test_one_sample_without_codes_makes_a_batch_of_log_probs(new_store, tmp_path):
    store = logitstore.open(new_store(tmp_path / "x.parquet", head="int8"))
    coded, other = store[0], store[1]
    without = dataclasses.replace(other.targets, codes=None, code_scale=None, code_offset=None)
    batch = collate([coded, other._replace(targets=without)])
    assert "teacher_codes" not in batch
    assert "teacher_code_scale" not in batch
    first = int(coded.targets.present.nonzero()[0][0])
    assert batch["teacher_logprobs"][0, first, 0] == float(coded.targets.logps[0])


@pytest.mark.parametrize(
    "counts",
    [
        [[3, 0, 1, 5], [2]],  # ragged rows, one absent in the middle
        [[0, 0, 0], [0]],  # every row absent
        [[1, 1], [1, 1]],  # one entry each, equal lengths
        [[], [4, 2]],  # a single token has no row
    ],
)
def test_equals_a_loop_on_ragged_rows(counts):
    samples = [ragged_sample(row, [True] * (len(row) + 1), seed=i) for i, row in enumerate(counts)]
    assert_same_batch(collate(samples), collate_slowly(samples, 0))


def test_labels_are_the_tokens_that_the_teacher_rows_describe():
    """loss_mask says learn tokens 0, 2, 3, 4; token 0 has no row, and the row of token 3 (row 2) is absent."""
    sample = ragged_sample([2, 1, 0, 3], [True, False, True, True, True])
    batch = collate([sample])
    ids = sample.input_ids.tolist()
    assert batch["labels"].tolist() == [[-100, -100, ids[2], -100, ids[4]]]
    assert next_token_labels(batch["labels"]).tolist() == [-100, ids[2], -100, ids[4], -100]
    first_entry_of_row_3 = int(sample.targets.ids[3])
    assert batch["teacher_ids"][0, 3, 0] == first_entry_of_row_3
    assert batch["teacher_ids"][0, 2].tolist() == [-1, -1, -1]
    assert batch["teacher_ids"][0, 4].tolist() == [-1, -1, -1]


def test_the_stored_teacher_puts_its_mass_where_the_model_does(store, teacher_model):
    """Row t is the model's distribution after token t: its first entry is the argmax of logits row t."""
    batch = collate([store[i] for i in range(4)])
    with torch.no_grad():
        logits = teacher_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    learned = next_token_labels(batch["labels"]) != -100
    assert torch.equal(batch["teacher_ids"][..., 0].flatten()[learned], logits.argmax(-1).flatten()[learned].int())


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="empty list"):
        collate([])


def test_what_is_no_sample_is_refused():
    with pytest.raises(TypeError, match=r"samples of a logitstore.LogitStore, got a dict"):
        collate([{"input_ids": [1, 2]}])


def test_samples_of_two_vocabularies_are_refused():
    samples = [ragged_sample([1], [True, True], vocab_size=50), ragged_sample([1], [True, True], vocab_size=60)]
    with pytest.raises(logitstore.SpecMismatchError, match="50 and 60 tokens"):
        collate(samples)


def test_collate_and_decoder_import_without_transformers():
    code = (
        "import sys, logitstore_trainer.collator; from logitstore_trainer import collate, TeacherDecoder; "
        "assert callable(collate) and callable(TeacherDecoder); "
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_unknown_names_are_attribute_errors():
    import logitstore_trainer

    assert {"collate", "TeacherDecoder", "DistillationTrainer"} <= set(dir(logitstore_trainer))
    with pytest.raises(AttributeError, match="no attribute 'collect_all'"):
        _ = logitstore_trainer.collect_all
