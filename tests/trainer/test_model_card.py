"""The model card beside a trained student: a head that hubs read, and what the run and its store know, no more."""

import dataclasses
import re

import numpy as np
import pytest
import yaml
from logitstore_trainer.model_card import model_card
from logitstore_trainer.train import TrainConfig, train

import logitstore

STUDENT = "llama:layers=2,width=32,heads=2,mlp=64"


@pytest.fixture
def config(store_path, tmp_path):
    return TrainConfig(
        student=STUDENT, data=[str(store_path)], out=str(tmp_path / "my-student"), steps=2, batch_size=2, grad_accum=3,
        device="cpu", eval_fraction=0.25, lr=3e-3,
    )  # fmt: skip


def head_of(card):
    start, head, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(head)


def test_the_card_beside_a_student_says_what_the_run_knows(config, store, tmp_path):
    metrics = train(config)
    card = (tmp_path / "my-student" / "README.md").read_text(encoding="utf-8")
    assert head_of(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "knowledge-distillation", "logitstore"],
    }
    held_out = metrics["held_out"]
    for line in (
        "# my-student",
        "| teacher | tiny-teacher |",
        "| data set | not known |",
        "| stores | teacher.parquet |",
        f"| samples | {len(store)} |",
        f"- Size: {store.blob_bytes / store.n_present_rows:.1f} bytes a token; all logits in fp16 would take 194.",
        "- Codec: topk, fp16 k=8, tail residual.",
        f"| student | {STUDENT} |",
        "| loss | 0.7 * T^2 * KL + 0.3 * cross-entropy, T = 2 |",
        "| tail of the teacher | bucket |",
        "| optimizer steps | 2 |",
        "| samples a step | 6 |",
        "| peak learning rate | 0.003, cosine to 0 |",
        f"| tokens trained on | {metrics['n_tokens']:,} |",
        "On text that was held out of training (25.0% of the samples):",
        f"| loss (nats per token) | {metrics['eval_loss']:.4f} |",
        f"| KL at T = 2 (nats per token) | {metrics['eval_kl']:.4f} |",
        f"| KL(stored teacher \\|\\| student) at T = 1 (nats per token) | {held_out['kl_store_nats']:.4f} |",
        f"| top-1 agreement with the store | {held_out['top1_agreement']:.1%} |",
        f"| tokens measured | {held_out['n_tokens']} |",
    ):
        assert f"{line}\n" in card, line
    assert "neither the store nor the run records a licence" in card
    assert "The terms of the teacher (tiny-teacher) and of the data set (not known) bind this model too" in card
    assert str(tmp_path) not in card
    assert str(store.path.parent) not in card


def test_what_the_store_keeps_is_the_mean_over_its_rows(config, store):
    targets = [sample.targets for sample in store]
    tails = np.concatenate([np.exp(each.tail_logmass.astype(np.float64)) for each in targets])
    tails = tails[~np.isnan(tails)]
    card = model_card(train(config), [store], from_scratch=True)
    line = (
        f"- The tokens that it keeps one by one hold {1 - tails.mean():.2%} of the teacher's probability (mean over "
        f"{store.n_present_rows:,} tokens of the store); of all others it keeps the mass, not the shape.\n"
    )
    assert line in card
    assert 0.01 < tails.mean() < 0.99
    assert "KL(teacher || store) of this very store is not known" in card


def test_goals_hashes_and_hub_names_are_taken_from_the_store(config, new_store, tmp_path):
    metrics = train(config)
    path = new_store(
        tmp_path / "b.parquet", teacher="org/big-teacher", teacher_sha256="ab" * 32, dataset="text.jsonl",
        dataset_sha256="cd" * 32, teacher_dtype="bfloat16", head_width=112,
        collection={"max_kl": 0.2, "max_bytes_per_token": 24.0, "goal_temperature": 2.0},
    )  # fmt: skip
    stores = [logitstore.open(path)]
    card = model_card(metrics, stores, from_scratch=True)
    assert head_of(card)["base_model"] == "org/big-teacher"
    for line in (
        "| teacher | org/big-teacher (SHA-256 abababababab) |",
        "| data set | text.jsonl (SHA-256 cdcdcdcdcdcd) |",
        "| its dtype when it was stored | bfloat16 |",
        "- The codec was chosen for KL(teacher || store) of at most 0.2 nats at T = 2.",
        "- The codec was chosen for at most 24 bytes a token.",
    ):
        assert f"{line}\n" in card, line
    assert "all logits in fp16 would take 224." in card
    assert "and of the data set (text.jsonl) bind this model too" in card
    loaded = dataclasses.asdict(config) | {"student": "org/small", "data": [str(path)]}
    card = model_card({**metrics, "config": loaded}, stores, from_scratch=False)
    assert head_of(card)["base_model"] == "org/small"
    assert "parameters, trained from org/small, distilled with logitstore" in card
    assert "the teacher (org/big-teacher), the model that the student started from (org/small) and of" in card


def test_a_teacher_or_student_in_a_folder_is_called_by_its_last_part_and_is_no_base_model(config, new_store, tmp_path):
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    path = new_store(tmp_path / "c.parquet", teacher=str(folder))
    metrics = train(config)
    card = model_card(metrics, [logitstore.open(path)], from_scratch=True)
    assert "base_model" not in head_of(card)
    assert "| teacher | mine |\n" in card
    assert str(tmp_path) not in card


def test_without_held_out_text_the_card_says_that_there_is_no_figure(config, tmp_path):
    train(dataclasses.replace(config, eval_fraction=0.0))
    card = (tmp_path / "my-student" / "README.md").read_text(encoding="utf-8")
    assert "Nothing was held out: there is no figure" in card


def test_a_store_of_samples_has_no_mass_that_it_keeps(config, store, tmp_path):
    codec = logitstore.make_codec("varopt", vocab_size=97, k=6)
    spec = dataclasses.replace(store.spec, codec=codec, tokenizer_files_sha256=None)
    with logitstore.create(tmp_path / "s.parquet", spec) as writer:
        for sample in store:
            kept = sample.targets.present
            logits = np.zeros((len(sample.input_ids), 97), np.float32)
            logits[:-1][kept] = sample.targets.dense_logprobs()[kept]
            targets = codec.targets_from_logits(logits, sample.input_ids, kept)
            writer.append(sample.sample_id, sample.input_ids, targets, sample.loss_mask)
    card = model_card(train(config), [logitstore.open(tmp_path / "s.parquet")], from_scratch=True)
    assert "It keeps a random sample of each distribution, whose expectation is the whole one, at T = 1." in card
    assert "one by one" not in card
    assert re.search(r"- Codec: varopt, .*\bk=6, tail sampled\.\n", card)
