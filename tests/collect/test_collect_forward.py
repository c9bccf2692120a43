"""The chunked forward gives the model's own logits, for every kind of head, without ever holding [L,V]."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from logitstore_kernels import topk_with_tail
from logitstore_trainer.collect import forward as forward_module
from logitstore_trainer.collect.forward import LogitTransform, choose_forward
from logitstore_trainer.collect.teacher import Teacher, TeacherInfo
from logitstore_trainer.collect.teacher_source import TeacherSource
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

V = 263
SIZES = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)


class SquashedLlama(LlamaForCausalLM):
    """A head that no configuration names."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, logits_to_keep=0):
        kept = dict(use_cache=use_cache, logits_to_keep=logits_to_keep)
        out = super().forward(input_ids, attention_mask, position_ids, **kept)
        return CausalLMOutputWithPast(logits=3 * torch.tanh(out.logits * 2))


class WholeLlama(LlamaForCausalLM):
    """The same, without logits_to_keep."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        out = super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache)
        return CausalLMOutputWithPast(logits=3 * torch.tanh(out.logits * 2))


class HeadlessLlama(LlamaForCausalLM):
    def get_output_embeddings(self):
        return None


def build(kind, tiny_llama_config):
    llama = tiny_llama_config(vocab_size=V)
    gemma = {**SIZES, "query_pre_attn_scalar": 8, "sliding_window": 16}
    small = {key: SIZES[key] for key in ("vocab_size",)}
    builders = {
        "llama": lambda: LlamaForCausalLM(llama),
        "qwen2, tied": lambda: Qwen2ForCausalLM(
            Qwen2Config(**{key: SIZES[key] for key in SIZES if key != "head_dim"}, tie_word_embeddings=True)
        ),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**small, n_embd=32, n_layer=2, n_head=4, n_positions=256)),
        "bloom": lambda: BloomForCausalLM(BloomConfig(**small, hidden_size=32, n_layer=2, n_head=4)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**gemma, final_logit_softcapping=0.5)),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**gemma)),
        "cohere": lambda: CohereForCausalLM(
            CohereConfig(**{key: SIZES[key] for key in SIZES if key != "head_dim"}, logit_scale=0.25)
        ),
        "granite": lambda: GraniteForCausalLM(
            GraniteConfig(**{key: SIZES[key] for key in SIZES if key != "head_dim"}, logits_scaling=0.125)
        ),
        "squashed": lambda: SquashedLlama(llama),
        "whole": lambda: WholeLlama(llama),
        "headless": lambda: HeadlessLlama(llama),
    }
    torch.manual_seed(1)
    model = builders[kind]()
    with torch.no_grad():  # large enough logits for a cap or a scale to matter
        model.get_input_embeddings().weight.mul_(10)
        if (
            head := model.get_output_embeddings()
        ) is not None and head.weight is not model.get_input_embeddings().weight:
            head.weight.mul_(10)
    return model


def teacher_of(model, dtype=torch.float32):
    model = model.to(dtype).eval().requires_grad_(False)
    model.config.use_cache = False
    width = model.config.vocab_size
    info = TeacherInfo(TeacherSource("tiny", "tiny"), model.config, None, width, width, 256, "0" * 64)
    return Teacher(info, model, str(dtype).removeprefix("torch."), torch.device("cpu"))


def random_ids(*lengths, width=V):
    rng = np.random.default_rng(0)
    return [rng.integers(0, width, size=length, dtype=np.int32) for length in lengths]


def own_logits(teacher, ids):
    with torch.inference_mode():
        return teacher.model(torch.from_numpy(ids).long()[None]).logits[0, :-1]


EXPECTED = {
    "llama": ("head", LogitTransform()),
    "qwen2, tied": ("head", LogitTransform()),
    "gpt2": ("head", LogitTransform()),
    "bloom": ("head", LogitTransform()),
    "gemma2": ("head", LogitTransform(1.0, 0.5)),
    "gemma3": ("head", LogitTransform()),
    "cohere": ("head", LogitTransform(0.25)),
    "granite": ("head", LogitTransform(8.0)),
    "squashed": ("logits_to_keep", LogitTransform()),
    "headless": ("logits_to_keep", LogitTransform()),
    "whole": ("whole", LogitTransform()),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_each_kind_of_head_gives_the_models_own_logits(kind, tiny_llama_config):
    teacher = teacher_of(build(kind, tiny_llama_config))
    sequences = random_ids(70, 2, 33, 70)
    forward = choose_forward(teacher, sequences[0])
    assert (forward.how, forward.transform) == EXPECTED[kind]
    keep_masks = [np.arange(69) % 3 == 0, None, np.zeros(32, dtype=bool), np.arange(69) >= 60]
    results = forward.reduced(sequences, keep_masks, lambda logits: (logits.clone(), logits.argmax(1)))
    for ids, keep_mask, (logits, top) in zip(sequences, keep_masks, results, strict=True):
        expected = own_logits(teacher, ids)
        expected = expected if keep_mask is None else expected[keep_mask]
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
        assert top.tolist() == logits.argmax(1).tolist()


def test_the_cap_and_the_scale_are_really_there(tiny_llama_config):
    """Without them these models would differ by far more than is allowed."""
    for kind in ("gemma2", "cohere", "granite"):
        teacher = teacher_of(build(kind, tiny_llama_config))
        found = choose_forward(teacher, random_ids(64)[0])
        plain = forward_module.ChunkedForward(teacher, "head", LogitTransform(), 0.0, 1e-3)
        ids = random_ids(20)
        (capped,), (uncapped,) = (each.reduced(ids, [None], lambda x: (x.clone(),))[0] for each in (found, plain))
        assert float((capped - uncapped).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "squashed"])
def test_half_precision_is_compared_in_its_own_steps(kind, dtype, tiny_llama_config):
    teacher = teacher_of(build(kind, tiny_llama_config), dtype)
    ids = random_ids(70)[0]
    forward = choose_forward(teacher, ids)
    assert forward.how == EXPECTED[kind][0]
    largest = float(own_logits(teacher, ids[:64]).abs().max())
    step = torch.finfo(dtype).eps * 2.0 ** max(math.floor(math.log2(largest)), 0)
    assert forward.tolerance == pytest.approx(4 * step, rel=1.1)


def test_a_batch_gives_what_each_sequence_gives_alone(tiny_llama_config):
    teacher = teacher_of(build("llama", tiny_llama_config))
    sequences = random_ids(5, 50, 17, 50, 2)
    forward = choose_forward(teacher, sequences[0])
    keep_masks = [np.arange(len(ids) - 1) % 2 == 0 for ids in sequences]
    reduce = lambda logits: topk_with_tail(logits, 8, vocab_size=250)  # noqa: E731
    together = forward.reduced(sequences, keep_masks, reduce)
    for ids, keep_mask, result in zip(sequences, keep_masks, together, strict=True):
        alone = forward.reduced([ids], [keep_mask], reduce)[0]
        assert result.ids_NK.tolist() == alone.ids_NK.tolist()
        for got, expected in zip(result[1:], alone[1:], strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "squashed"])
def test_in_float64_a_batch_is_each_sequence_alone_to_1e_10(kind, tiny_llama_config):
    """Nothing of a neighbour in the batch, nor of pads, reaches a row."""
    teacher = teacher_of(build(kind, tiny_llama_config), torch.float64)
    sequences = random_ids(70, 50, 17, 2)
    forward = choose_forward(teacher, sequences[0])
    together = forward.reduced(sequences, [None] * 4, lambda logits: (logits.clone(),))
    for ids, (logits_LV,) in zip(sequences, together, strict=True):
        assert logits_LV.dtype == torch.float64
        torch.testing.assert_close(logits_LV, own_logits(teacher, ids), atol=1e-10, rtol=1e-10)


def test_the_named_tuple_of_the_reduction_comes_back(tiny_llama_config):
    class Top(NamedTuple):
        largest_N: torch.Tensor

    teacher = teacher_of(build("llama", tiny_llama_config))
    ids = random_ids(9)
    (result,) = choose_forward(teacher, ids[0]).reduced(ids, [None], lambda logits: Top(logits.amax(1)))
    assert isinstance(result, Top)
    torch.testing.assert_close(result.largest_N, own_logits(teacher, ids[0]).amax(1))


def test_padded_columns_are_in_the_logits_and_left_to_the_reduction(tiny_llama_config):
    teacher = teacher_of(build("llama", tiny_llama_config))
    with torch.no_grad():
        teacher.model.lm_head.weight[250:] = 100 * teacher.model.lm_head.weight[:13]
    ids = random_ids(30, width=250)
    forward = choose_forward(teacher, ids[0])
    (result,) = forward.reduced(ids, [None], lambda logits: topk_with_tail(logits, 250, vocab_size=250))
    expected = own_logits(teacher, ids[0])[:, :250].log_softmax(1)
    assert int(result.ids_NK.max()) == 249
    torch.testing.assert_close(result.logps_NK, expected.gather(1, result.ids_NK.long()), atol=2e-5, rtol=2e-5)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest result with V columns (the weights, which have V rows, apart)."""

    n_elements = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() and V - 16 <= tensor.shape[-1] <= V:
                self.n_elements = max(self.n_elements, tensor.numel())
        return results


@pytest.mark.parametrize("kind", ["llama", "gemma2", "squashed"])
@pytest.mark.parametrize("lengths", [(120,), (120, 120, 90), (300, 300)])
def test_no_tensor_of_length_times_vocabulary_is_made(kind, lengths, tiny_llama_config):
    teacher = teacher_of(build(kind, tiny_llama_config))
    sequences, length = random_ids(*lengths), lengths[0]
    with LargestTensor() as seen:
        forward = choose_forward(teacher, sequences[0])
        forward.reduced(sequences, [None] * len(sequences), lambda logits: topk_with_tail(logits, 4))
    assert seen.n_elements < (length - 1) * V
    with LargestTensor() as seen:
        forward.reduced(sequences, [None] * len(sequences), lambda logits: topk_with_tail(logits, 4))
    chunk_rows = {("head", 120): 118, ("head", 300): 150, ("logits_to_keep", 120): 60, ("logits_to_keep", 300): 150}
    assert seen.n_elements == chunk_rows[forward.how, length] * V
    with LargestTensor() as seen:  # the instrument sees what it should
        teacher.model(torch.from_numpy(sequences[0]).long()[None])
    assert seen.n_elements == length * V


@pytest.mark.parametrize(
    ("head_width", "length", "n_rows"),
    [
        *((49152, 2, 1), (49152, 3, 1), (49152, 64, 62), (49152, 256, 128), (49152, 300, 150), (49152, 1024, 170)),
        *((151936, 1024, 110), (262144, 1024, 64), (2048, 8192, 4096)),
    ],
)
def test_rows_of_a_chunk(head_width, length, n_rows, tiny_llama_config):
    teacher = teacher_of(build("llama", tiny_llama_config))
    info = replace(teacher.info, head_width=head_width)
    forward = forward_module.ChunkedForward(replace(teacher, info=info), "head", LogitTransform(), 0.0, 1e-3)
    assert forward._rows_per_chunk(length) == n_rows
    assert n_rows * head_width * 4 <= 64 << 20


def test_chunks_are_bounded_in_bytes(monkeypatch, tiny_llama_config):
    monkeypatch.setattr(forward_module, "CHUNK_BYTES", 7 * 4 * V)
    teacher = teacher_of(build("llama", tiny_llama_config))
    sequences, rows = random_ids(40, 31), []
    forward = choose_forward(teacher, sequences[0])
    forward.reduced(sequences, [None, None], lambda logits: (rows.append(len(logits)) or logits[:, 0],))
    assert rows == [7] * 9 + [6]
    assert sum(rows) == 39 + 30


def test_the_fallback_says_how_often_it_runs_the_backbone(monkeypatch, tiny_llama_config):
    teacher = teacher_of(build("squashed", tiny_llama_config))
    forward = choose_forward(teacher, random_ids(64)[0])
    monkeypatch.setattr(forward_module, "REPEATED_CHUNK_BYTES", 10 * 4 * V)
    assert forward.backbone_passes(41) == 4
    calls = []
    teacher.model.model.register_forward_hook(lambda *_: calls.append(1))
    forward.reduced(random_ids(41), [None], lambda logits: (logits[:, 0],))
    assert len(calls) == 4
    note = forward.note(41)
    assert note.startswith("tiny: backbone and head differ from its own logits by ")
    assert note.endswith(
        "(allowed 0.001), so its own forward is used with logits_to_keep; "
        "at 41 tokens a sequence that runs the backbone 4 times"
    )
    assert choose_forward(teacher_of(build("llama", tiny_llama_config)), random_ids(9)[0]).note(41) is None
    headless = choose_forward(teacher_of(build("headless", tiny_llama_config)), random_ids(9)[0])
    assert headless.note(41).startswith("tiny: has no backbone and head of its own, so its own forward is used")
    whole = choose_forward(teacher_of(build("whole", tiny_llama_config)), random_ids(64)[0])
    assert whole.note(41).endswith("and no logits_to_keep, so all logits of one sequence are made at once")


@pytest.mark.parametrize("length", [2, 3, 5, 64, 65])
def test_short_first_sequences_can_be_checked(length, tiny_llama_config):
    for kind in ("llama", "squashed"):
        forward = choose_forward(teacher_of(build(kind, tiny_llama_config)), random_ids(length)[0])
        assert forward.how == EXPECTED[kind][0]


def test_a_model_that_looks_ahead_is_refused():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=V, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = BertLMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    with pytest.raises(ValueError, match="not a causal language model: later tokens change earlier logits by"):
        choose_forward(teacher_of(model), random_ids(64)[0])


def test_logits_that_are_not_finite_are_refused(tiny_llama_config):
    teacher = teacher_of(build("llama", tiny_llama_config))
    with torch.no_grad():
        teacher.model.lm_head.weight[3, 0] = math.nan
    with pytest.raises(ValueError, match="tiny: its logits are NaN or infinite in float32; try --dtype float32"):
        choose_forward(teacher, random_ids(64)[0])
