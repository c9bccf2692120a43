"""The demo's own tokenizer and teacher, made from the training text in about a minute and a half.

Byte-level BPE, so that every text has ids, and a Llama with tied embeddings, so that everything after this file sees
an ordinary transformers model and tokenizer. The teacher sees the text as one stream, cut at another offset in every
pass: with 90,000 tokens that costs nothing and makes it generalise better than fixed windows would.

Letters: B batch, L length.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from logitstore_trainer.progress import Progress
from logitstore_trainer.student import LlamaShape

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TeacherTraining:
    """AdamW over `steps` batches of batch_size sequences of `length` tokens.

    lr is the peak: linear warm-up over a twentieth of the steps, then a cosine to zero. weight_decay is for matrices.
    """

    steps: int
    batch_size: int
    length: int
    lr: float
    weight_decay: float = 0.1


@dataclass(frozen=True)
class TrainedTeacher:
    """What the training took: n_tokens are those seen, loss_by_step is (step, nats per token) of single batches."""

    n_tokens: int
    seconds: float
    loss_by_step: tuple[tuple[int, float], ...]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` tokens at most, end-of-text (id 0) and the 256 bytes among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def build_teacher(
    shape: LlamaShape, tokenizer: PreTrainedTokenizerFast, *, max_length: int, seed: int
) -> LlamaForCausalLM:
    """A Llama of that shape with random weights in float32; equal seeds give equal weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def token_stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The ids of all texts, each closed by end-of-text, as one int64 vector."""
    ids = [id for text in texts for id in (*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id)]
    return torch.tensor(ids)


def train_teacher(
    model: LlamaForCausalLM, stream: torch.Tensor, settings: TeacherTraining, *, seed: int
) -> TrainedTeacher:
    """Trains the model, which it mutates and leaves in eval mode, to predict the next token of the stream.

    Raises ValueError if the stream is too short for one batch.
    """
    optimizer = _optimizer(model, settings)
    batches = _batches(stream, settings, torch.Generator().manual_seed(seed))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step, settings.steps))
    losses = []
    start_s = time.perf_counter()
    model.train()
    with Progress(total=settings.steps, desc="train the teacher", unit="steps") as display:
        for step in range(1, settings.steps + 1):
            batch_BL = next(batches)
            logits = model(input_ids=batch_BL, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch_BL[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append((step, float(loss.detach())))
            display.update()
    model.eval()
    n_tokens = settings.steps * settings.batch_size * settings.length
    return TrainedTeacher(n_tokens, time.perf_counter() - start_s, tuple(losses))


def _batches(stream: torch.Tensor, settings: TeacherTraining, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches [B, L]: pass after pass over the stream, cut at a random offset and shuffled."""
    length, batch_size = settings.length, settings.batch_size
    n_sequences = len(stream) // length - 1
    if n_sequences < batch_size:
        raise ValueError(
            f"{len(stream):,} tokens of text are too few for a batch of {batch_size} sequences of {length}: "
            f"at least {(batch_size + 1) * length:,} are needed"
        )
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        sequences = stream[offset : offset + n_sequences * length].view(n_sequences, length)
        order = torch.randperm(n_sequences, generator=generator)
        for start in range(0, n_sequences - batch_size + 1, batch_size):
            yield sequences[order[start : start + batch_size]]


def _optimizer(model: torch.nn.Module, settings: TeacherTraining) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98))


def _lr_share(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
