"""Students from scratch and by name, and the tokenizers that are refused."""

import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from logitstore_trainer.student import LlamaShape, build_student, parse_shape, shape_of_size

import logitstore


@pytest.mark.parametrize(("size", "vocab_size"), [("2M", 97), ("5M", 4096), ("20M", 49152), ("0.5M", 97)])
def test_a_size_counts_all_parameters(size, vocab_size):
    shape = shape_of_size(size, vocab_size)
    assert shape.n_parameters(vocab_size) == pytest.approx(float(size[:-1]) * 1e6, rel=0.35)
    assert shape.width % (2 * shape.heads) == 0


def test_shapes_of_sizes_stay_what_they_are():
    """Runs name a size, so it must go on meaning the same model."""
    assert shape_of_size("5M", 4096) == LlamaShape(layers=4, width=288, heads=9, mlp=768)
    assert shape_of_size("20M", 49152) == LlamaShape(layers=4, width=288, heads=9, mlp=768)
    assert shape_of_size("100M", 49152) == LlamaShape(layers=11, width=704, heads=11, mlp=1888)


def test_a_size_below_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"no student of 0.5M parameters over 128256 tokens.*llama:layers="):
        shape_of_size("0.5M", 128256)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llama:layers=3,width=192", "lacks heads"),
        ("llama:layers=3,width=192,heads=x", "cannot read 'heads=x'"),
        ("llama:layers=3,width=192,heads=0", "cannot read 'heads=0'"),
        ("llama:layers=3,width=192,heads=3,depth=2", "cannot read 'depth=2'"),
        ("llama:layers=3,width=100,heads=3", "multiple of twice its 3 heads"),
    ],
)
def test_a_shape_that_makes_no_model_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_shape(text)


def test_from_scratch_has_the_shape_the_vocabulary_and_tied_embeddings(store):
    student = build_student("llama:layers=3,width=48,heads=2,mlp=80", store, seed=3)
    config = student.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 48, 2)
    assert (config.intermediate_size, config.vocab_size) == (80, 97)
    assert student.model.lm_head.weight is student.model.model.embed_tokens.weight
    n_parameters = sum(parameter.numel() for parameter in student.model.parameters())
    assert n_parameters == LlamaShape(3, 48, 2, 80).n_parameters(97)
    assert {parameter.dtype for parameter in student.model.parameters()} == {torch.float32}
    assert student.from_scratch


def test_from_scratch_has_the_teachers_tokenizer(store, tokenizer):
    student = build_student("llama:layers=1,width=16,heads=1", store)
    assert student.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert student.model.config.pad_token_id == tokenizer.pad_token_id
    assert student.model.config.eos_token_id == tokenizer.eos_token_id


def test_equal_seeds_give_equal_weights_and_leave_the_generator_alone(store):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again, other = (
        build_student("llama:layers=1,width=16,heads=1", store, seed=seed).model.state_dict() for seed in (5, 5, 6)
    )
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_loads_a_folder_in_float32(store, new_student, tokenizer, tmp_path):
    model = new_student(4).to(torch.bfloat16)
    model.save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(str(tmp_path))
    student = build_student(str(tmp_path), store)
    weight = student.model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, model.model.layers[0].mlp.up_proj.weight.float())
    assert weight.dtype == torch.float32
    assert not student.from_scratch


def test_a_student_of_another_family_is_refused_before_its_weights_are_read(store, other_tokenizer, tmp_path):
    """There are no weights in the folder at all."""
    other_tokenizer.save_pretrained(str(tmp_path))
    with pytest.raises(logitstore.SpecMismatchError) as caught:
        build_student(str(tmp_path), store)
    message = str(caught.value)
    assert logitstore.tokenizer_sha256(other_tokenizer.get_vocab())[:12] in message
    assert store.spec.tokenizer_sha256[:12] in message
    assert "\n" not in message


def test_a_loaded_student_with_a_narrow_head_is_refused(store, new_student, tokenizer, tmp_path):
    new_student(4, vocab_size=90).save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(str(tmp_path))
    with pytest.raises(logitstore.SpecMismatchError, match="predicts 90 tokens"):
        build_student(str(tmp_path), store)


@pytest.mark.parametrize("name", ["./no-such-folder", "~/no-such-folder", "/no/such/folder", __file__])
def test_a_student_that_is_not_there_is_one_line(store, name):
    with pytest.raises(ValueError, match=r"is (not there|a file), expected a model folder") as caught:
        build_student(name, store)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_one_line(store, tokenizer, tmp_path):
    tokenizer.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="cannot load student") as caught:
        build_student(str(tmp_path), store)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_nowhere_is_one_line_without_retries(store_path, tmp_path):
    """The hub is a port that nobody listens on; huggingface_hub's own retries would take half a minute a file."""
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    arguments = ["train", "--student", "nosuchmodel", "--data", str(store_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "logitstore_trainer", *arguments],
        env={**os.environ, **unreachable}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "logitstore: nosuchmodel: no such folder here, not in the local cache, and the hub cannot be reached; "
        "check the name or the connection\n"
    )


def test_a_hub_name_in_the_cache_works_without_the_hub(store, new_student, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--some--student", "0123456789abcdef0123456789abcdef01234567"
    new_student(4).save_pretrained(str(repository / "snapshots" / commit))
    tokenizer.save_pretrained(str(repository / "snapshots" / commit))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    student = build_student("some/student", store)
    assert torch.equal(student.model.lm_head.weight, new_student(4).lm_head.weight)
    shutil.rmtree(repository)
    with pytest.raises(FileNotFoundError, match="some/student: no such folder here, not in the local cache"):
        build_student("some/student", store)


class Found:
    sha = "f" * 40


def asked_for(name, **arguments):
    raise OSError(f"asked for {name} {arguments}")


def test_a_hub_that_answers_pins_the_students_commit(store, monkeypatch):
    """The commit found in one question goes with every file that is asked for."""
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: Found)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", asked_for)
    with pytest.raises(ValueError, match=r"asked for some/student \{'revision': 'f{40}'\}"):
        build_student("some/student", store)
