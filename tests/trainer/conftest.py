"""A tiny teacher with its tokenizer and store, tiny students, and the loss in plain float64 loops."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import logitstore
from logitstore.tables import put_tokenizer_folder

VOCAB_SIZE = 97
N_SAMPLES = 12


class SlowLoss(NamedTuple):
    loss: float
    kl: float
    ce: float
    n_tokens: int


def make_llama(seed: int, *, vocab_size: int = VOCAB_SIZE, width: int = 32) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def make_tokenizer(n_tokens: int = VOCAB_SIZE, prefix: str = "w") -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "</s>": 1, **{f"{prefix}{i}": i for i in range(2, n_tokens)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def write_store(
    path: Path, teacher_model: LlamaForCausalLM, *, seed: int = 0, k: int = 8, head: str = "fp16", **spec_fields
) -> Path:
    """N_SAMPLES sequences of 5 to 13 tokens; the first third of each is a prompt, not learned and absent."""
    rng = np.random.default_rng(seed)
    codec = logitstore.make_codec("topk", vocab_size=VOCAB_SIZE, k=k, head=head, tail="residual")
    spec = logitstore.StoreSpec(codec=codec, vocab_size=VOCAB_SIZE, **{"teacher": "tiny-teacher", **spec_fields})
    with logitstore.create(path, spec) as writer:
        for i in range(N_SAMPLES):
            input_ids = rng.integers(2, VOCAB_SIZE, size=5 + (5 * i) % 9).astype(np.int32)
            loss_mask = np.arange(len(input_ids)) >= len(input_ids) // 3
            with torch.no_grad():
                logits_LV = teacher_model(torch.from_numpy(input_ids)[None].long()).logits[0]
            targets = codec.targets_from_logits(logits_LV, input_ids, keep_mask=loss_mask[1:])
            writer.append(i, input_ids, targets, loss_mask=loss_mask, source_row=i)
    return path


@pytest.fixture(scope="session")
def teacher_model() -> LlamaForCausalLM:
    return make_llama(seed=1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def other_tokenizer() -> PreTrainedTokenizerFast:
    """As many tokens, other ids."""
    return make_tokenizer(prefix="x")


@pytest.fixture(scope="session")
def store_path(tmp_path_factory, teacher_model, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    path = folder / "teacher.parquet"
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    return write_store(
        path,
        teacher_model,
        tokenizer_sha256=logitstore.tokenizer_sha256(tokenizer.get_vocab()),
        tokenizer_files_sha256=put_tokenizer_folder(folder / "tokenizer", path),
    )


@pytest.fixture
def store(store_path) -> logitstore.LogitStore:
    return logitstore.open(store_path)


@pytest.fixture(scope="session")
def new_store(teacher_model) -> Callable[..., Path]:
    """Writes another store of the tiny teacher: new_store(path, k=..., head=..., **fields of its spec)."""
    return lambda path, **settings: write_store(path, teacher_model, **settings)


@pytest.fixture(scope="session")
def new_student() -> Callable[..., LlamaForCausalLM]:
    """A tiny student with random weights: new_student(seed, vocab_size=...)."""
    return make_llama


@pytest.fixture(scope="session")
def slow_loss() -> Callable[..., SlowLoss]:
    return _slow_loss


def _slow_loss(
    model: torch.nn.Module, samples: Sequence[logitstore.Sample], *, temperature: float = 2.0, alpha: float = 0.7
) -> SlowLoss:
    """Means over the valid tokens of samples, one row at a time, at T = 1 or 2, with the tail as one bucket."""
    kls, ces = [], []
    for sample in samples:
        with torch.no_grad():
            logits_LV = model(torch.from_numpy(sample.input_ids)[None].long()).logits[0].double()
        targets = sample.targets
        for t in range(targets.n_rows):
            label = int(sample.input_ids[t + 1])
            entries = slice(int(targets.offsets[t]), int(targets.offsets[t + 1]))
            if not sample.loss_mask[t + 1] or entries.start == entries.stop:
                continue
            mass = float(targets.tail_logmass[t])
            rho = {1.0: mass, 2.0: float(targets.tail_logmoment_half[t])}[temperature]
            head = torch.from_numpy(targets.logps[entries]).double()
            head = (head - head.logsumexp(0) + math.log(-math.expm1(mass))) / temperature
            logt = torch.cat([head, torch.tensor([rho], dtype=torch.float64)]).log_softmax(0)
            logq_V = (logits_LV[t, :VOCAB_SIZE] / temperature).log_softmax(0)
            in_head = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
            in_head[torch.from_numpy(targets.ids[entries]).long()] = True
            logq = torch.cat(
                [logq_V[torch.from_numpy(targets.ids[entries]).long()], logq_V[~in_head].logsumexp(0, keepdim=True)]
            )
            kls.append(float((logt.exp() * (logt - logq)).sum()))
            ces.append(-float(logits_LV[t, :VOCAB_SIZE].log_softmax(0)[label]))
    kl, ce = sum(kls) / len(kls), sum(ces) / len(ces)
    return SlowLoss(alpha * temperature**2 * kl + (1 - alpha) * ce, kl, ce, len(kls))
