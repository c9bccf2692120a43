"""From a store of samples to a trained student: the batch, the loss of a step, evaluation, and what is refused."""

import numpy as np
import pytest
import torch
from logitstore_trainer import DistillationTrainer, TeacherDecoder, collate
from logitstore_trainer.cli import main
from logitstore_trainer.decoder import default_tail
from logitstore_trainer.evaluate import evaluate_student
from torch.utils.data import Subset
from transformers import TrainingArguments

import logitstore

OPTIONS = {"varopt": {"k": 6, "seed": 2}, "rskd": {"draws": 20}}


@pytest.fixture(scope="module", params=sorted(OPTIONS))
def sampled_store(request, tmp_path_factory, store_path, teacher_model) -> logitstore.LogitStore:
    """The samples of the tiny teacher over the texts of the top-k store, which lies beside it with its tokenizer."""
    texts = logitstore.open(store_path)
    codec = logitstore.make_codec(request.param, vocab_size=97, **OPTIONS[request.param])
    path = store_path.with_name(f"{request.param}.parquet")
    tables = store_path.with_name(store_path.name + ".tables")
    if not path.with_name(path.name + ".tables").exists():
        path.with_name(path.name + ".tables").symlink_to(tables)
    spec = logitstore.StoreSpec(
        codec=codec,
        vocab_size=97,
        teacher="tiny-teacher",
        tokenizer_sha256=texts.spec.tokenizer_sha256,
        tokenizer_files_sha256=texts.spec.tokenizer_files_sha256,
    )
    with logitstore.create(path, spec) as writer:
        for sample in texts:
            with torch.no_grad():
                logits_LV = teacher_model(torch.from_numpy(sample.input_ids)[None].long()).logits[0]
            targets = codec.targets_from_logits(logits_LV, sample.input_ids, sample.loss_mask[1:])
            writer.append(sample.sample_id, sample.input_ids, targets, sample.loss_mask)
    return logitstore.open(path)


def slow_loss(model: torch.nn.Module, samples, alpha: float) -> tuple[float, float, float]:
    """(loss, KL, cross-entropy) at T = 1, means over the valid tokens, from dense weights in plain float64."""
    kls, ces = [], []
    for sample in samples:
        with torch.no_grad():
            logq_LV = model(torch.from_numpy(sample.input_ids)[None].long()).logits[0].double().log_softmax(1).numpy()
        dense_RV = sample.targets.dense_logprobs().astype(np.float64)
        for t in np.flatnonzero(sample.targets.present):
            kept = np.isfinite(dense_RV[t])
            kls.append((np.exp(dense_RV[t][kept]) * (dense_RV[t] - logq_LV[t])[kept]).sum())
            ces.append(-logq_LV[t, sample.input_ids[t + 1]])
    kl, ce = float(np.mean(kls)), float(np.mean(ces))
    return alpha * kl + (1 - alpha) * ce, kl, ce


def arguments(tmp_path, **settings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, **settings,
    )  # fmt: skip


def test_the_decoder_makes_a_batch_of_samples(sampled_store):
    decoder = TeacherDecoder(sampled_store)
    assert default_tail(decoder) == "sampled"
    samples = [sampled_store[0], sampled_store[1]]
    batch = collate(samples)
    teacher = decoder(batch)
    assert teacher.is_sampled
    length = batch["input_ids"].shape[1]
    targets = samples[1].targets
    t = int(targets.present.nonzero()[0][0])
    entries = slice(int(targets.offsets[t]), int(targets.offsets[t + 1]))
    used = teacher.ids_NK[length + t] >= 0
    assert teacher.ids_NK[length + t][used].tolist() == targets.ids[entries].tolist()
    assert teacher.logprobs_NK[length + t][used].tolist() == targets.logps[entries].tolist()
    assert teacher.present_N.sum() == sum(sample.targets.present.sum() for sample in samples)


@pytest.mark.parametrize("alpha", [0.7, 1.0])
@pytest.mark.parametrize("tail", [None, "sampled"])
def test_first_steps_loss_is_the_slow_one(tmp_path, sampled_store, new_student, alpha, tail):
    student = new_student(2)
    expected = slow_loss(student, [sampled_store[i] for i in range(4)], alpha)
    trainer = DistillationTrainer(
        model=student, args=arguments(tmp_path), train_dataset=Subset(sampled_store, range(4)), temperature=1.0,
        alpha=alpha, tail=tail,
    )  # fmt: skip
    assert trainer.tail == "sampled"
    trainer.train()
    logged = trainer.state.log_history[0]
    assert [logged[part] for part in ("loss", "kl", "ce")] == pytest.approx(expected, rel=2e-6)


def test_evaluation_takes_the_store_s_own_tail(sampled_store, new_student):
    student = new_student(2)
    got = evaluate_student(student, sampled_store, batch_size=5)
    _, kl, ce = slow_loss(student, list(sampled_store), 0.5)
    assert got.tail == "sampled"
    assert got.kl_store_nats == pytest.approx(kl, rel=2e-6)
    assert got.loss_nats == pytest.approx(ce, rel=2e-6)


def test_another_temperature_is_refused_before_the_first_step(tmp_path, sampled_store, new_student):
    name = sampled_store.spec.codec.config["name"]
    with pytest.raises(ValueError, match=rf"store of codec '{name}' holds samples.*got 2\.0; pass temperature=1"):
        DistillationTrainer(model=new_student(2), args=arguments(tmp_path), train_dataset=sampled_store)
    with pytest.raises(ValueError, match="for temperature 1 alone, got 2"):
        evaluate_student(new_student(2), sampled_store, temperature=2)


def test_a_tail_of_another_kind_of_store_is_refused(tmp_path, store, sampled_store, new_student):
    settings = {"model": new_student(2), "args": arguments(tmp_path), "temperature": 1.0}
    with pytest.raises(ValueError, match="tail='bucket' is not for a store of codec '.*'; use tail='sampled'"):
        DistillationTrainer(train_dataset=sampled_store, tail="bucket", **settings)
    with pytest.raises(ValueError, match="tail='sampled' is not for a store of codec 'topk'; use tail='bucket'"):
        DistillationTrainer(train_dataset=store, tail="sampled", **settings)


def test_the_train_command_trains_from_it_and_says_which_temperature(tmp_path, sampled_store, capsys):
    out = tmp_path / "student"
    command = ["train", "--student", "llama:layers=1,width=32,heads=1", "--data", str(sampled_store.path), "--device",
               "cpu", "--steps", "3", "--eval-fraction", "0.25", "--out", str(out)]  # fmt: skip
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("logitstore: a store of codec")
    assert "--temperature 1" in error
    assert not out.exists()
    assert main([*command, "--temperature", "1"]) == 0
    assert "held out: cross-entropy" in capsys.readouterr().out
    assert (out / "model.safetensors").is_file()
