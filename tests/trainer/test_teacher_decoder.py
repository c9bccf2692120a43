"""TeacherDecoder and the search for the stores in a dataset."""

import pytest
import torch
from logitstore_trainer import TeacherDecoder, collate
from logitstore_trainer.decoder import decoder_for_dataset
from torch.utils.data import ConcatDataset, Subset

import logitstore


def test_decodes_row_b_t_of_the_batch(store):
    samples = [store[0], store[1]]
    batch = collate(samples)
    length = batch["input_ids"].shape[1]
    teacher = TeacherDecoder(store)(batch)
    assert teacher.vocab_size == 97
    targets = samples[1].targets
    t = int(targets.present.nonzero()[0][0])
    entries = slice(int(targets.offsets[t]), int(targets.offsets[t + 1]))
    assert teacher.ids_NK[length + t].tolist() == targets.ids[entries].tolist()
    assert teacher.logprobs_NK[length + t].tolist() == targets.logps[entries].tolist()
    assert float(teacher.tail_logmass_N[length + t]) == float(targets.tail_logmass[t])
    assert float(teacher.tail_logmoment_half_N[length + t]) == float(targets.tail_logmoment_half[t])
    assert teacher.present_N.sum() == sum(sample.targets.present.sum() for sample in samples)


@pytest.mark.parametrize("head", ["int8", "fp8", "log", "sqrtp", "fp16"])
def test_the_batch_holds_what_every_head_format_decodes_to(new_store, tmp_path, head):
    store = logitstore.open(new_store(tmp_path / "b.parquet", head=head))
    decoder = TeacherDecoder(store)
    batch = collate([store[0], store[1]])
    teacher = decoder(batch)
    entry_NK = teacher.ids_NK >= 0
    expected = [logp for sample in (store[0], store[1]) for logp in sample.targets.logps.tolist()]
    assert teacher.logprobs_NK[entry_NK].tolist() == expected
    assert teacher.values_NK.dtype == (torch.float32 if head == "fp16" else torch.uint8)
    assert (teacher.values_NK.nbytes + teacher.ids_NK.nbytes) / teacher.ids_NK.numel() == (8 if head == "fp16" else 5)
    assert "value_table" not in decoder.state_dict()


def test_has_no_parameters_to_train(store):
    assert list(TeacherDecoder(store).parameters()) == []


def test_a_batch_without_teacher_is_refused(store):
    with pytest.raises(ValueError, match=r"no teacher_ids, only input_ids.*data_collator=logitstore_trainer.collate"):
        TeacherDecoder(store)({"input_ids": torch.zeros(1, 2)})


def test_found_through_subset_concat_list_and_dict(store, new_store, tmp_path):
    """The text may differ between stores; what decodes them may not."""
    other = logitstore.open(
        new_store(tmp_path / "b.parquet", seed=5, dataset="other.jsonl", tokenizer_sha256=store.spec.tokenizer_sha256)
    )
    nested = [ConcatDataset([Subset(store, [0, 2]), other]), {"held out": Subset(other, [1])}]
    assert decoder_for_dataset(nested).spec == store.spec


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"k": 4}, "codec"), ({"tokenizer_sha256": "00ff"}, "tokenizer_sha256"), ({"teacher": "another"}, "teacher")],
)
def test_stores_that_differ_are_refused_by_name(store, new_store, tmp_path, fields, named):
    fields = {"tokenizer_sha256": store.spec.tokenizer_sha256, **fields}
    other = logitstore.open(new_store(tmp_path / "b.parquet", **fields))
    with pytest.raises(logitstore.SpecMismatchError, match=rf"teacher\.parquet and store .*b\.parquet.*{named}"):
        decoder_for_dataset(ConcatDataset([store, other]))


def test_a_dataset_without_a_store_is_refused():
    with pytest.raises(TypeError, match=r"TensorDataset.*decoder=TeacherDecoder\(store\)"):
        decoder_for_dataset(torch.utils.data.TensorDataset(torch.zeros(3)))
    with pytest.raises(ValueError, match="holds no store"):
        decoder_for_dataset([])
