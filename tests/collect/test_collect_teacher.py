"""Teachers are found, described without their weights, and refused in one line where they cannot be one."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from logitstore_trainer.collect.teacher import (
    choose_dtype,
    cpu_computes_bf16,
    inspect_teacher,
    load_teacher,
    load_tokenizer,
)
from logitstore_trainer.collect.teacher_source import locate_teacher, teacher_fingerprint
from logitstore_trainer.devices import choose_device
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

CPU = torch.device("cpu")


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """The hub is switched off, and the local cache is an empty folder, which is returned."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_inspect_tells_both_widths(teacher_folder):
    info = inspect_teacher(str(teacher_folder))
    assert (info.vocab_size, info.head_width, info.max_positions) == (260, 284, 512)
    assert info.widths_note() == (
        f"{teacher_folder}: the head has 284 columns, the tokenizer 260 ids; the 24 padded columns are masked"
    )
    assert info.sha256 == teacher_fingerprint(str(teacher_folder))


def test_equal_widths_need_no_word(tmp_path, tiny_llama_config, byte_tokenizer):
    LlamaForCausalLM(tiny_llama_config(vocab_size=260)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert inspect_teacher(str(tmp_path)).widths_note() is None


def test_ids_beyond_the_head_are_refused(tmp_path, tiny_llama_config, byte_tokenizer):
    LlamaForCausalLM(tiny_llama_config(vocab_size=250)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    info = inspect_teacher(str(tmp_path))
    assert (info.vocab_size, info.head_width) == (250, 250)
    assert "has ids up to 259, the head only 250 columns" in info.widths_note()
    info.require_ids_in_head(np.array([0, 249]), "data.jsonl:1")
    with pytest.raises(ValueError, match=r"data.jsonl:2: token '.*' has id 250, but the head of .* has 250 columns"):
        info.require_ids_in_head(np.array([3, 250]), "data.jsonl:2")


def test_load_teacher(teacher_folder):
    teacher = load_teacher(str(teacher_folder), device="cpu", dtype="float32")
    assert (teacher.dtype_name, teacher.device, teacher.vocab_size) == ("float32", CPU, 260)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert teacher.model.config.use_cache is False
    expected = LlamaForCausalLM.from_pretrained(teacher_folder).eval()
    ids = torch.tensor([[1, 70, 80, 90]])
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(ids).logits, expected(ids).logits)
    assert load_teacher(str(teacher_folder), device="cpu", dtype="bf16").model.lm_head.weight.dtype == torch.bfloat16


def test_load_tokenizer_alone(teacher_folder):
    assert load_tokenizer(str(teacher_folder))("ab")["input_ids"] == load_tokenizer(str(teacher_folder)).encode("ab")


def test_the_fingerprint_is_of_the_contents(teacher_folder, tmp_path):
    copy = copied(teacher_folder, tmp_path)
    assert teacher_fingerprint(str(copy)) == teacher_fingerprint(str(teacher_folder))
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert teacher_fingerprint(str(copy)) != teacher_fingerprint(str(teacher_folder))


def test_the_fingerprint_of_a_large_file_sees_each_of_its_tensors(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(64 << 20))
    seen = {teacher_fingerprint(str(tmp_path))}
    for where in (0, 10 << 20, 33 << 20, (64 << 20) - (1 << 19)):
        data = bytearray(64 << 20)
        data[where : where + (1 << 19)] = b"\1" * (1 << 19)  # a tensor of 512 KiB
        weights.write_bytes(data)
        seen.add(teacher_fingerprint(str(tmp_path)))
    assert len(seen) == 5


def saved_kind(kind, folder, config):
    if kind == "encoder":
        BertForMaskedLM(
            BertConfig(vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        ).save_pretrained(folder)
    elif kind == "encoder-decoder":
        T5ForConditionalGeneration(
            T5Config(vocab_size=260, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
        ).save_pretrained(folder)
    elif kind == "classifier":
        LlamaForSequenceClassification(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("encoder", "it is BertForMaskedLM, expected a decoder"),
        ("encoder-decoder", "it is T5ForConditionalGeneration, expected a decoder"),
        ("classifier", "it is LlamaForSequenceClassification, expected a decoder"),
    ],
)
def test_models_that_are_not_causal_are_refused(tmp_path, byte_tokenizer, tiny_llama_config, kind, expected):
    saved_kind(kind, tmp_path, tiny_llama_config(pad_token_id=0))
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: not a causal language model: {expected}"):
        inspect_teacher(str(tmp_path))


def test_a_checkpoint_without_a_head_is_refused(tmp_path, byte_tokenizer, tiny_llama_config):
    """transformers would give it a random head."""
    LlamaModel(tiny_llama_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not a causal language model: its files lack lm_head.weight; use the whole"):
        load_teacher(str(tmp_path), device="cpu")


def break_config(folder):
    (folder / "config.json").write_text('{"model_type":')


def break_model_type(folder):
    (folder / "config.json").write_text('{"model_type": "nonesuch"}')


def remove_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def break_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "BPE", "merges": 3}}')


def break_weights(folder):
    (folder / "model.safetensors").write_bytes(b"xx" * 100)


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("breaks", "expected"),
    [
        (break_config, "not a model that can be loaded: .*not a valid JSON file"),
        (break_model_type, "not a model that can be loaded: .*nonesuch"),
        (remove_tokenizer, "its tokenizer cannot be loaded: .*put the tokenizer's files"),
        (break_tokenizer, "its tokenizer cannot be loaded: .*put the tokenizer's files"),
        (break_weights, "its weights cannot be loaded: .*header"),
        (remove_weights, "its weights cannot be loaded: .*no file named model.safetensors"),
    ],
)
def test_broken_folders(teacher_folder, tmp_path, breaks, expected):
    copy = copied(teacher_folder, tmp_path)
    breaks(copy)
    with pytest.raises(ValueError, match=expected) as caught:
        load_teacher(str(copy), device="cpu")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{copy}: ")


def test_a_broken_gguf_file(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\7" * 100)
    with pytest.raises(ValueError, match=r"x.gguf: not a model that can be loaded: ") as caught:
        load_teacher(str(tmp_path / "x.gguf"), device="cpu")
    assert "\n" not in str(caught.value)


def test_places_without_a_model(tmp_path, no_hub):
    (tmp_path / "model.Q4.gguf").write_bytes(b"GGUF")
    (tmp_path / "notes.md").write_text("hello")
    cases = [
        (tmp_path / "absent", FileNotFoundError, "no such folder or .gguf file; check --teacher"),
        ("absent.gguf", FileNotFoundError, "no such folder or .gguf file; check --teacher"),
        (tmp_path, FileNotFoundError, f"name the file: {tmp_path / 'model.Q4.gguf'}"),
        (tmp_path / "notes.md", ValueError, "expected a folder, a .gguf file or a name on the hub"),
        ("a b c", ValueError, "not a name that the hub could have"),
        ("nobody/nothing", FileNotFoundError, "not in the local cache, and the hub cannot be reached"),
    ]
    for name, error, expected in cases:
        with pytest.raises(error) as caught:
            locate_teacher(str(name))
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_hub_name_in_the_cache_works_without_the_hub(teacher_folder, no_hub):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = no_hub / "models--some--teacher"
    shutil.copytree(teacher_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    source = locate_teacher("some/teacher")
    assert (source.revision, source.cached_only) == (commit, True)
    assert teacher_fingerprint("some/teacher") != teacher_fingerprint(str(teacher_folder))
    info = inspect_teacher("some/teacher")
    assert (info.vocab_size, info.head_width) == (260, 284)


def test_a_hub_that_answers_pins_the_commit(monkeypatch):
    def model_info(self, name, timeout):
        return huggingface_hub.ModelInfo(id=name, sha="f" * 40)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    source = locate_teacher("some/teacher")
    assert source.from_pretrained_arguments() == {"revision": "f" * 40}


@pytest.mark.parametrize(
    ("bf16", "device", "saved", "expected"),
    [
        (False, "cpu", None, "float32"),
        (False, "cpu", torch.float16, "float32"),
        (True, "cpu", None, "bfloat16"),
        (True, "cuda", torch.float32, "bfloat16"),
        (False, "cuda", torch.bfloat16, "float16"),
        (True, "cuda", torch.float16, "float16"),
        (True, "mps", torch.bfloat16, "bfloat16"),
        (False, "mps", torch.bfloat16, "float32"),
    ],
)
def test_auto_dtype(monkeypatch, bf16, device, saved, expected):
    monkeypatch.setattr("logitstore_trainer.collect.teacher.cpu_computes_bf16", lambda: bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: bf16)
    assert choose_dtype("auto", torch.device(device), saved) == expected


def test_cpu_bf16_probe_survives_a_torch_without_it(monkeypatch):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, probe, raising=False)
    assert cpu_computes_bf16() is False
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert cpu_computes_bf16() is True


def test_explicit_dtypes_and_devices():
    assert choose_dtype("bf16", CPU) == "bfloat16"
    assert choose_dtype("float16", CPU) == "float16"
    assert choose_device("cpu") == CPU
    with pytest.raises(ValueError, match="--dtype is 'int8', expected auto, float32, bfloat16, float16"):
        choose_dtype("int8", CPU)
    with pytest.raises(ValueError, match="--device is 'gpu', expected auto, cpu, cuda"):
        choose_device("gpu")
    with pytest.raises(ValueError, match="--device is 'cuda:99', which this machine does not have"):
        choose_device("cuda:99")
