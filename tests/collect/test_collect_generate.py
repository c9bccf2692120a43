"""The teacher's completions: greedy ones are the argmax chain, sampled ones depend on the seed and the row alone."""

import numpy as np
import pytest
import torch
from logitstore_trainer.collect.generate import generate_completions, hash_seed
from logitstore_trainer.collect.teacher import load_teacher

PROMPTS = [[70, 71, 72], [80], [90, 91, 92, 93, 94]]


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    """A teacher with logits sharp enough for its choices not to hang on rounding, and a likely EOS."""
    teacher = load_teacher(str(teacher_folder), device="cpu", dtype="float32")
    with torch.no_grad():
        teacher.model.lm_head.weight.mul_(30)
    return teacher


def greedy_by_hand(teacher, prompt, n_tokens, stop_ids=(0,)):
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(n_tokens):
            logits = teacher.model(torch.tensor([ids])).logits[0, -1, : teacher.vocab_size]
            ids.append(int(logits.argmax()))
            if ids[-1] in stop_ids:
                break
    return ids[len(prompt) :]


def test_greedy_is_the_argmax_chain_in_a_padded_batch(teacher):
    got = generate_completions(teacher, PROMPTS, [0, 1, 2], max_new_tokens=12)
    assert got == [greedy_by_hand(teacher, prompt, 12) for prompt in PROMPTS]


def test_a_completion_ends_with_its_stop_token(teacher, monkeypatch):
    chain = greedy_by_hand(teacher, PROMPTS[0], 6)
    monkeypatch.setattr(teacher.model.generation_config, "eos_token_id", [chain[3]])
    first = chain.index(chain[3])
    short, *others = generate_completions(teacher, PROMPTS, [0, 1, 2], max_new_tokens=6)
    assert short == chain[: first + 1]
    assert others == [greedy_by_hand(teacher, prompt, 6, (0, chain[3])) for prompt in PROMPTS[1:]]


def test_the_models_own_sampling_settings_are_off(teacher, monkeypatch):
    expected = generate_completions(teacher, PROMPTS, [0, 1, 2], max_new_tokens=8)
    for name, value in {"repetition_penalty": 9.0, "do_sample": True, "top_k": 1, "max_length": 3}.items():
        monkeypatch.setattr(teacher.model.generation_config, name, value)
    assert generate_completions(teacher, PROMPTS, [0, 1, 2], max_new_tokens=8) == expected


def test_padded_columns_are_never_generated(teacher, monkeypatch):
    with torch.no_grad():
        original = teacher.model.lm_head.weight.clone()
        teacher.model.lm_head.weight[260:] = 5 * original[:24]
        teacher.model.lm_head.weight[260:264] = -5 * original[:4]
    try:
        for temperature in (0.0, 1.0):
            got = generate_completions(teacher, PROMPTS, [0, 1, 2], max_new_tokens=8, temperature=temperature)
            assert max(max(ids) for ids in got) < 260
    finally:
        with torch.no_grad():
            teacher.model.lm_head.weight.copy_(original)


def test_draws_depend_on_the_seed_and_the_row_alone(teacher):
    def drawn(prompts, rows, seed=3):
        return generate_completions(teacher, prompts, rows, max_new_tokens=10, temperature=1.0, seed=seed)

    together = drawn(PROMPTS, [7, 8, 9])
    assert together == drawn(PROMPTS, [7, 8, 9])
    assert [drawn([prompt], [row])[0] for prompt, row in zip(PROMPTS, [7, 8, 9], strict=True)] == together
    assert drawn(PROMPTS[::-1], [9, 8, 7]) == together[::-1]
    assert drawn(PROMPTS, [7, 8, 9], seed=4) != together
    same_prompt = drawn([PROMPTS[0]] * 3, [7, 8, 9])
    assert same_prompt[0] == together[0]
    assert len({tuple(ids) for ids in same_prompt}) == 3


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_draws_follow_the_teachers_distribution(teacher_folder, temperature):
    teacher = load_teacher(str(teacher_folder), device="cpu", dtype="float32")
    with torch.no_grad():
        teacher.model.lm_head.weight.mul_(15)
    n_draws = 4000
    prompt = PROMPTS[0]
    drawn = generate_completions(teacher, [prompt] * n_draws, range(n_draws), max_new_tokens=1, temperature=temperature)
    with torch.inference_mode():
        logits = teacher.model(torch.tensor([prompt])).logits[0, -1, :260].double()
    expected = (logits / temperature).softmax(0).numpy()
    observed = np.bincount([ids[0] for ids in drawn], minlength=260) / n_draws
    standard_error = np.sqrt(expected * (1 - expected) / n_draws)
    assert (np.abs(observed - expected) < 5 * standard_error + 1 / n_draws).all()
    assert expected.max() > 2.5 / 260  # far enough from uniform for the temperature to matter


def test_bad_temperature_is_refused(teacher):
    with pytest.raises(ValueError, match="temperature of generation is -1, expected 0"):
        generate_completions(teacher, PROMPTS, [0, 1, 2], max_new_tokens=1, temperature=-1)


def test_seeds_are_spread():
    seeds = {hash_seed(seed, row) for seed in range(30) for row in range(1000)}
    assert len(seeds) == 30_000
    assert all(0 <= seed < 2**63 for seed in seeds)
