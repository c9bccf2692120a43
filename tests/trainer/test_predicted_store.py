"""Training from a store of predicted tails: the loss sees the very distribution that the store stands for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from logitstore_kernels import distillation_loss
from logitstore_trainer import TeacherDecoder, collate, collate_packed, distill
from logitstore_trainer.collator import next_token_labels
from logitstore_trainer.decoder import default_tail
from logitstore_trainer.packing import SAMPLE_PLACES
from made_up_teacher import SETTINGS, V, teacher_samples
from transformers import Trainer, TrainingArguments

import logitstore
from logitstore.fit_codec import fitted_on_rows
from logitstore.tail_fit import fit_tail_model
from logitstore.tail_rows import tail_rows


@pytest.fixture(scope="module")
def fitted_rows():
    rows = tail_rows(teacher_samples(0, 60), V)
    return rows, fit_tail_model(rows, replace(SETTINGS, rows_seen=5000))


@pytest.fixture(scope="module", params=[None, 0.2], ids=["predicted", "corrected"])
def store(request, fitted_rows, tmp_path_factory) -> logitstore.LogitStore:
    rows, tail = fitted_rows
    codec = logitstore.make_codec(
        "topk", vocab_size=V, k=40, min_prob=0.01, head="log", tail="predicted", tail_step=request.param
    )
    codec = fitted_on_rows(codec, rows, tail)
    path = tmp_path_factory.mktemp("store") / "x.parquet"
    rng = np.random.default_rng(1)
    with logitstore.create(path, logitstore.StoreSpec(codec=codec, vocab_size=V)) as writer:
        for number, length in enumerate((30, 17, 2)):
            ((logits, ids, _),) = teacher_samples(number + 5, 1, length)
            keep = rng.random(length - 1) < 0.8
            mask = np.concatenate([[False], keep])
            writer.append(number, ids, codec.targets_from_logits(logits, ids, keep), mask)
    return logitstore.open(path)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
def test_the_loss_is_the_kl_to_dense_logprobs(store: logitstore.LogitStore, temperature: float) -> None:
    samples = list(store)
    batch = collate(samples)
    assert ("teacher_corrections" in batch) == (store.spec.codec.tail_step is not None)
    decoder = TeacherDecoder(store)
    assert default_tail(decoder) == "dense"
    n_batch, length = batch["input_ids"].shape
    logits = 3 * torch.randn(n_batch, length, V, generator=torch.Generator().manual_seed(0))
    loss = distillation_loss(
        logits.flatten(0, 1),
        decoder(batch),
        next_token_labels(batch["labels"]),
        temperature=temperature,
        alpha=1.0,
        tail="dense",
    )
    total, n_rows = 0.0, 0
    log_q = (logits.double() / temperature).log_softmax(-1).numpy()
    for b, sample in enumerate(samples):
        log_p = sample.targets.dense_logprobs(temperature).astype(np.float64)
        for t in np.flatnonzero(sample.targets.present):
            total += float((np.exp(log_p[t]) * (log_p[t] - log_q[b, t])).sum())
            n_rows += 1
    assert float(loss) == pytest.approx(temperature**2 * total / n_rows, rel=1e-5)


def test_the_model_travels_with_the_decoder_and_not_with_checkpoints(store: logitstore.LogitStore) -> None:
    decoder = TeacherDecoder(store)
    assert dict(decoder.state_dict()) == {}
    assert list(decoder.parameters()) == []
    moved = decoder.to("meta")
    assert all(buffer.device.type == "meta" for buffer in moved.buffers())
    assert len(list(moved.buffers())) > 10


def test_the_hook_refuses_a_store_whose_decoder_needs_the_tokens(store: logitstore.LogitStore, new_student, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(new_student(2, vocab_size=V), args, train_dataset=store)
    with pytest.raises(ValueError, match=r"does not see the tokens.*DistillationTrainer"):
        distill(trainer, temperature=1.0)


def test_packed_samples_have_the_tails_of_separate_ones(store: logitstore.LogitStore) -> None:
    """A prediction reads the rows around it, so one that saw a neighbour in the row would be another."""
    samples = [store[0], store[1], store[2], store[1]]
    packed, decoder = collate_packed(samples), TeacherDecoder(store)
    assert packed["input_ids"].shape[0] == 3
    got_Nr = decoder(packed).dense_tail.coefs_Nr
    for s, sample in enumerate(samples):
        own = packed[SAMPLE_PLACES][s, : len(sample.input_ids)]
        expected_Lr = decoder(collate([sample])).dense_tail.coefs_Nr
        assert torch.allclose(got_Nr[own], expected_Lr, rtol=1e-5, atol=1e-5)
