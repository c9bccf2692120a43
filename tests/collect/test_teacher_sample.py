"""The sample that a codec is fitted on: which texts are drawn, and that its rows are the teacher's own."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from logitstore_trainer.collect import teacher_sample
from logitstore_trainer.collect.size import PlannedSize, planned_size
from logitstore_trainer.collect.source import Source, open_source
from logitstore_trainer.collect.source_settings import SourceSettings
from logitstore_trainer.collect.teacher_sample import default_rows, draw_sample, drawn_texts
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from logitstore.logits_source import FactoredLogits, iter_logit_chunks


def source_of(teacher: Path, tmp_path: Path, rows: list[dict], **settings) -> Source:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = {
        "teacher": str(teacher),
        "dataset": path,
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 3,
        **settings,
    }
    return open_source(SourceSettings(**wanted), lambda line: None)


def size_of(source: Source) -> PlannedSize:
    return planned_size(source.dataset, source.tokeniser, source.settings)


def chats(n: int) -> list[dict]:
    return [{"prompt": f"{i}: ", "completion": "abcdefgh"[: 1 + i % 8]} for i in range(n)]


def test_texts_come_from_every_stretch_of_the_data_set_and_hang_on_the_seed(
    teacher_folder: Path, tmp_path: Path
) -> None:
    source = source_of(teacher_folder, tmp_path, chats(800), seed=3)
    texts = drawn_texts(source, size_of(source), 400)
    n_rows = [teacher_sample.n_kept(text, False) for text in texts]
    assert 400 <= sum(n_rows) < 400 + 9
    rows = [text.source_row for text in texts]
    assert len(set(rows)) == len(rows)
    assert np.histogram(rows, bins=8, range=(0, 800))[0].min() >= 5  # of some 73 texts
    assert rows != sorted(rows)  # held-out texts are every fifth, so the order is drawn too
    again = drawn_texts(source, size_of(source), 400)
    assert [text.source_row for text in again] == rows
    other = source_of(teacher_folder, tmp_path, chats(800), seed=4)
    assert [text.source_row for text in drawn_texts(other, size_of(other), 400)] != rows


def test_a_small_data_set_is_taken_whole(teacher_folder: Path, tmp_path: Path) -> None:
    source = source_of(teacher_folder, tmp_path, chats(20))
    texts = drawn_texts(source, size_of(source), 10_000)
    assert sorted(text.source_row for text in texts) == list(range(20))


def test_a_run_that_stops_early_is_sampled_where_it_reads(teacher_folder: Path, tmp_path: Path) -> None:
    source = source_of(teacher_folder, tmp_path, chats(400), max_tokens=500)
    rows = [text.source_row for text in drawn_texts(source, size_of(source), 10_000)]
    assert max(rows) < 70  # 500 tokens are some 55 of its rows


def test_of_long_documents_one_window_is_taken_before_a_second(teacher_folder: Path, tmp_path: Path) -> None:
    documents = [{"text": chr(97 + i) * 300} for i in range(6)]
    source = source_of(teacher_folder, tmp_path, documents, max_length=64)
    size = size_of(source)
    few = drawn_texts(source, size, 300)
    assert sorted(text.source_row for text in few[:5]) == sorted({text.source_row for text in few[:5]})
    whole = drawn_texts(source, size, 10_000)
    assert len(whole) == size.n_samples
    assert sum(teacher_sample.n_kept(text, False) for text in whole) == size.n_stored_rows
    assert {text.source_row for text in whole[:6]} == set(range(6))


def test_prompts_alone_are_completed_as_the_collection_completes_them(teacher_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}"} for i in range(7)]
    source = source_of(teacher_folder, tmp_path, rows, generate=5, generate_temperature=1.0)
    texts = drawn_texts(source, size_of(source), 10_000)
    assert sorted(text.source_row for text in texts) == list(range(7))
    for text in texts:
        prompt = source.tokeniser.prompt_ids(f"say {text.source_row}")
        (completion,) = source.complete([prompt], [text.source_row], 5)
        assert text.input_ids.tolist() == [*prompt, *completion]


def truth(teacher: Path, input_ids: np.ndarray) -> np.ndarray:
    """ln p [L, 260] in float64 from the model's own forward."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.from_numpy(input_ids)[None].long()).logits[0, :, :260]
    return logits.log_softmax(dim=-1).numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits.astype(np.float64), axis=1, keepdims=True)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 4e-3), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("keep_prompt", [False, True])
def test_its_rows_are_the_teacher_s(
    teacher_folder: Path, tmp_path: Path, keep_prompt: bool, dtype: str, atol: float
) -> None:
    """Hidden states in float16, 284 columns of which 24 are padding."""
    source = source_of(teacher_folder, tmp_path, chats(20), keep_prompt=keep_prompt, dtype=dtype)
    sample = draw_sample(source, size_of(source), 10_000)
    assert sample.vocab_size == 260
    for number, text in enumerate(sample.texts):
        logits, input_ids, keep_mask = sample[number]
        assert isinstance(logits, FactoredLogits)
        assert logits.hidden.dtype == torch.float16
        keep = np.flatnonzero(text.loss_mask[1:]) if keep_mask is not None else np.arange(len(input_ids) - 1)
        assert (keep_mask is None) == keep_prompt
        assert sample.row_counts[number] == len(keep)
        got = np.concatenate(list(iter_logit_chunks(logits, keep, vocab_size=260)))
        np.testing.assert_allclose(log_softmax(got), truth(teacher_folder, input_ids)[keep], atol=atol)


def saved_teacher(model, teacher_folder: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((teacher_folder / name).read_bytes())
    return folder


@pytest.mark.parametrize("norm", [1.0, 3e6])
def test_hidden_states_beyond_float16_are_not_held_and_the_logits_are_made_instead(
    teacher_folder: Path, tmp_path: Path, norm: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    model.model.norm.weight.data *= norm
    model.lm_head.weight.data /= norm
    folder = saved_teacher(model, teacher_folder, tmp_path / "teacher")
    source = source_of(folder, tmp_path, chats(9))
    sample = draw_sample(source, size_of(source), 10_000)
    assert (sample.hidden is None) == (norm > 1)
    for number in range(9):
        logits, input_ids, keep_mask = sample[number]
        assert isinstance(logits, FactoredLogits) == (norm == 1)
        keep = np.flatnonzero(keep_mask)
        got = np.concatenate(list(iter_logit_chunks(logits, keep, vocab_size=260)))
        np.testing.assert_allclose(log_softmax(got), truth(folder, input_ids)[keep], atol=4e-3)


def test_a_soft_cap_and_a_scale_are_carried_along(teacher_folder: Path, tmp_path: Path) -> None:
    sizes = dict(vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(1)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            **sizes,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=2.0,
            eos_token_id=0,
            initializer_range=1.0,
        )
    )
    folder = saved_teacher(model, teacher_folder, tmp_path / "teacher")
    source = source_of(folder, tmp_path, chats(5))
    sample = draw_sample(source, size_of(source), 10_000)
    logits, input_ids, keep_mask = sample[2]
    assert logits.softcap == 2.0
    keep = np.flatnonzero(keep_mask)
    got = np.concatenate(list(iter_logit_chunks(logits, keep, vocab_size=260)))
    assert np.abs(got).max() <= 2
    np.testing.assert_allclose(log_softmax(got), truth(folder, input_ids)[keep], atol=4e-3)


def test_how_many_rows_are_drawn_by_default() -> None:
    def rows(n_stored_rows: int) -> int:
        return default_rows(PlannedSize(10, 10, n_stored_rows, n_stored_rows, True))

    assert [rows(n) for n in (100, 400_000, 10**9)] == [4_000, 20_000, 50_000]
    assert math.isclose(rows(500_000) / 500_000, 1 / 20)
