"""A teacher that is a .gguf file: written here, read without the network, equal to the model that it was made of."""

import json

import gguf
import pytest
import torch
from logitstore_trainer.cli import main
from logitstore_trainer.collect.teacher import inspect_teacher, load_teacher, load_tokenizer
from logitstore_trainer.collect.teacher_source import locate_teacher, teacher_fingerprint
from transformers import LlamaForCausalLM, modeling_gguf_pytorch_utils


def interleaved(weight, n_heads):
    """GGUF keeps the rows of q and k in the order of the original Llama release."""
    return weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, -1).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def model(tiny_llama_config):
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config(vocab_size=261, tie_word_embeddings=True)).eval()


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory, model, byte_tokenizer):
    path = tmp_path_factory.mktemp("gguf with a space") / "tiny.F32.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.get), "ab"])
    writer.add_token_types([3] * 4 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    layer_names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    weights = model.model.state_dict()
    writer.add_tensor("token_embd.weight", weights["embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["norm.weight"].numpy())
    for i in range(config.num_hidden_layers):
        for name, gguf_name in layer_names.items():
            weight = weights[f"layers.{i}.{name}.weight"]
            if name.endswith("q_proj"):
                weight = interleaved(weight, config.num_attention_heads)
            if name.endswith("k_proj"):
                weight = interleaved(weight, config.num_key_value_heads)
            writer.add_tensor(f"blk.{i}.{gguf_name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_teacher_is_the_model_that_it_was_made_of(gguf_path, model):
    teacher = load_teacher(str(gguf_path), device="cpu", dtype="float32")
    ids = torch.tensor([[70, 71, 5, 200, 9]])
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert (teacher.info.head_width, teacher.info.max_positions) == (261, 512)
    assert teacher.tokenizer.decode(teacher.tokenizer("xabz", add_special_tokens=False)["input_ids"]) == "xabz"
    assert teacher.tokenizer("ab", add_special_tokens=False)["input_ids"] == [260]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_bar_of_the_weights_is_drawn_on_terminals_only(gguf_path, capsys, monkeypatch, is_terminal):
    shown = modeling_gguf_pytorch_utils.tqdm
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    load_teacher(str(gguf_path), device="cpu", dtype="float32")
    assert ("GGUF tensors" in capsys.readouterr().err) is is_terminal
    assert modeling_gguf_pytorch_utils.tqdm is shown


def test_what_collect_takes_as_teacher_eval_takes_too(gguf_path, model, tmp_path, capsys):
    """The store's own file passes in silence; the same model in other files is said, its KL is 0 all the same."""
    dataset, store, out = tmp_path / "text.jsonl", tmp_path / "store.parquet", tmp_path / "eval"
    dataset.write_text("".join(json.dumps({"text": f"text {i} of some length"}) + "\n" for i in range(6)))
    collect = ["collect", "--teacher", str(gguf_path), "--dataset", str(dataset), "--out", str(store)]
    assert main([*collect, "--device", "cpu", "--dtype", "float32"]) == 0
    student = tmp_path / "student"
    model.save_pretrained(student)
    load_tokenizer(str(gguf_path)).save_pretrained(student)
    capsys.readouterr()
    evaluate = ["eval", str(student), "--data", str(store), "--device", "cpu"]
    for teacher, is_said in ((gguf_path, False), (student, True)):
        assert main([*evaluate, "--teacher", str(teacher), "--out", str(out)]) == 0
        result = json.loads((out / "results.json").read_text())["students"][str(student)]
        assert result["kl_teacher_nats"] == pytest.approx(0, abs=1e-6)
        assert ("is not the teacher that" in capsys.readouterr().err) is is_said


def test_a_gguf_teacher_is_described_without_its_weights(gguf_path):
    info = inspect_teacher(str(gguf_path))
    assert (info.vocab_size, info.head_width) == (261, 261)
    assert info.source.gguf_file == "tiny.F32.gguf"
    assert info.tokenizer.eos_token_id == 0


def test_the_fingerprint_of_a_gguf_file_is_of_that_file(gguf_path):
    before = teacher_fingerprint(str(gguf_path))
    (gguf_path.parent / "other.gguf").write_bytes(b"GGUF")
    assert teacher_fingerprint(str(gguf_path)) == before
    with pytest.raises(FileNotFoundError, match=r"a folder without a config\.json, so not a model; name the file: "):
        locate_teacher(str(gguf_path.parent))
