"""Tiny tokenizers and teachers, made on the spot."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<eos>", "<bos>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + (m['content'] or '') + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _byte_tokenizer(*, adds_bos: bool = False, chat_template: str | None = None, eos: str | None = "<eos>"):
    """One token per byte (ids 4..259, the byte plus 4 in byte-level order), so that counts can be done by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token="<bos>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = chat_template
    return tokenizer


def _tiny_llama_config(**changes):
    sizes = dict(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=0,
        bos_token_id=1,
    )
    return LlamaConfig(**{**sizes, **changes})


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Builds a tokenizer: byte_tokenizer(adds_bos=, chat_template=, eos=)."""
    return _byte_tokenizer


@pytest.fixture(scope="session")
def tiny_llama_config():
    return _tiny_llama_config


@pytest.fixture(scope="session")
def chatml():
    return CHATML


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """A saved Llama with 24 padded columns in its head."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    LlamaForCausalLM(_tiny_llama_config(vocab_size=284)).save_pretrained(folder)
    _byte_tokenizer(chat_template=CHATML).save_pretrained(folder)
    return folder
