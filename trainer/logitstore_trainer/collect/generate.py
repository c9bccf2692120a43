"""Completions by a model in batches: the teacher's for rows that are prompts only (`--generate N`), and answers of
students (`logitstore eval --answers`).

Greedy by default. With a temperature, row r is sampled from the teacher's whole distribution by its own random
numbers, seeded by (seed, r): argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T). So what a row
gets does not depend on where a run was interrupted, nor on its neighbours in the batch beyond the rounding of the
logits. The model's own sampling defaults (top-p, repetition penalty and the like) are switched off: the student
should learn the teacher's distribution.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from logitstore_trainer.collect.teacher import Teacher


class _GumbelNoise(LogitsProcessor):
    """Turns the greedy argmax into a draw at a temperature, each row with its own generator."""

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids_BL: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        n_columns = scores_BV.shape[1]
        uniform_BV = torch.stack([torch.rand(n_columns, generator=each) for each in self.generators])
        # rand is in [0, 1): 0 would be a noise of -inf, and the tiny number makes it merely improbable
        noise_BV = -torch.log(-torch.log(uniform_BV.clamp_min(torch.finfo(torch.float32).tiny)))
        return scores_BV.float() / self.temperature + noise_BV.to(scores_BV.device)


class _TokenizerIdsOnly(LogitsProcessor):
    """Rules out the padded columns of the head, which no tokenizer can read."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids_BL: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        scores_BV = scores_BV.clone()
        scores_BV[:, self.vocab_size :] = -torch.inf
        return scores_BV


def generate_completions(
    teacher: Teacher,
    prompts: Sequence[Sequence[int]],
    source_rows: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Returns the new token ids of each prompt, one batch: ending in an EOS, or max_new_tokens long.

    prompts: B lists of at least one id. source_rows: their rows in the dataset, which with `seed` fix the draws.
    temperature 0 is greedy.
    """
    if temperature < 0:
        raise ValueError(f"the temperature of generation is {temperature}, expected 0 (greedy) or more")
    draws = [_GumbelNoise([hash_seed(seed, row) for row in source_rows], temperature)] if temperature > 0 else []
    return decoded_batch(
        teacher.model,
        prompts,
        vocab_size=teacher.vocab_size,
        stop_ids=end_of_text_ids(teacher.info.name, teacher.tokenizer, teacher.model),
        max_new_tokens=max_new_tokens,
        processors=draws,
    )


def decoded_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    processors: Sequence[LogitsProcessor] = (),
) -> list[list[int]]:
    """Returns the ids that the model writes behind each prompt, greedily: up to the first of stop_ids, which is kept,
    or max_new_tokens long.

    prompts: B lists of at least one id, run as one batch, padded on the left. Ids from vocab_size on are never written.
    `processors` see the scores [B, V] before the argmax. The model's own generation settings are left out.
    """
    length = max(len(prompt) for prompt in prompts)
    input_ids_BL = torch.zeros(len(prompts), length, dtype=torch.int64)
    attention_mask_BL = torch.zeros_like(input_ids_BL)
    for b, prompt in enumerate(prompts):
        input_ids_BL[b, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask_BL[b, length - len(prompt) :] = 1
    with torch.inference_mode():
        output_BL = model.generate(
            input_ids_BL.to(model.device),
            attention_mask=attention_mask_BL.to(model.device),
            generation_config=_greedy_config(max_new_tokens, list(stop_ids)),
            logits_processor=LogitsProcessorList([_TokenizerIdsOnly(vocab_size), *processors]),
        )
    return [_cut_at_stop(row[length:].tolist(), stop_ids) for row in output_BL]


def end_of_text_ids(name: str, tokenizer: Any, model: Any) -> list[int]:
    """Returns the tokenizer's EOS and those of the model's generation config (Llama 3 has three).

    Raises ValueError, calling the model `name`, where there is none.
    """
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    stop_ids = [token for token in dict.fromkeys([tokenizer.eos_token_id, *declared]) if token is not None]
    if not stop_ids:
        raise ValueError(f"{name}: no EOS token, so a completion could not end; set eos_token_id")
    return stop_ids


def hash_seed(seed: int, source_row: int) -> int:
    """Returns a 63-bit seed of (seed, source_row), well mixed (the finaliser of SplitMix64)."""
    x = (seed * 0x9E3779B97F4A7C15 + source_row + 1) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) >> 1


def _greedy_config(max_new_tokens: int, stop_ids: list[int]) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
    )


def _cut_at_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]
