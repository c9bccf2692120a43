"""Rows into tokens and loss masks, counted by hand with a tokenizer of one token per byte."""

import numpy as np
import pytest
from logitstore_trainer.collect.rows import Row
from logitstore_trainer.collect.tokenise import Counts, Tokeniser

EOS, BOS = 0, 1


def row(source_row=0, **columns):
    return Row(source_row, f"data.jsonl:{source_row + 1}", columns)


def run(tokeniser, *rows):
    counts = Counts()
    return list(tokeniser.samples(rows, counts)), counts


def shown(tokenizer, sample):
    """The sample as text, its learned part in brackets: "ab[cd]"."""
    text, inside = "", False
    for token, learned in zip(sample.input_ids, sample.loss_mask, strict=True):
        if learned != inside:
            text += "[" if learned else "]"
            inside = learned
        text += tokenizer.decode([int(token)])
    return text + ("]" if inside else "")


def test_text_is_learned_and_closed_by_eos(byte_tokenizer):
    tokenizer = byte_tokenizer()
    samples, counts = run(Tokeniser(tokenizer, "text", 16), row(text="abc"))
    assert [shown(tokenizer, sample) for sample in samples] == ["a[bc<eos>]"]
    assert samples[0].input_ids.dtype == np.int32
    assert samples[0].loss_mask.dtype == bool
    assert (counts.rows, counts.samples, counts.tokens, counts.learned_tokens) == (1, 1, 4, 3)


@pytest.mark.parametrize("n_chars", range(1, 24))
@pytest.mark.parametrize("adds_bos", [False, True])
def test_windows_learn_every_token_exactly_once(byte_tokenizer, n_chars, adds_bos):
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    text = "abcdefghijklmnopqrstuvwxyz"[:n_chars]
    samples, counts = run(Tokeniser(tokenizer, "text", 8), row(text=text))
    learned = np.concatenate([sample.input_ids[sample.loss_mask] for sample in samples])
    everything = tokenizer(text, add_special_tokens=False)["input_ids"] + [EOS]
    assert learned.tolist() == (everything if adds_bos else everything[1:])
    assert all(2 <= len(sample.input_ids) <= 8 for sample in samples)
    assert all(len(sample.input_ids) == 8 for sample in samples[:-1])
    assert counts.windows == (len(samples) if len(samples) > 1 else 0)
    assert counts.tokens == sum(len(sample.input_ids) for sample in samples)


def test_windows_overlap_by_one_token_and_begin_with_bos(byte_tokenizer):
    tokenizer = byte_tokenizer()
    samples, _ = run(Tokeniser(tokenizer, "text", 4), row(text="abcdef"))
    assert [shown(tokenizer, sample) for sample in samples] == ["a[bcd]", "d[ef<eos>]"]
    tokenizer = byte_tokenizer(adds_bos=True)
    samples, _ = run(Tokeniser(tokenizer, "text", 4), row(text="abcdef"))
    assert [shown(tokenizer, sample) for sample in samples] == ["<bos>[abc]", "<bos>c[de]", "<bos>e[f<eos>]"]


def test_text_that_already_ends_in_eos_gets_no_second_one(byte_tokenizer):
    tokenizer = byte_tokenizer()
    samples, _ = run(Tokeniser(tokenizer, "text", 16), row(text="ab<eos>"))
    assert shown(tokenizer, samples[0]) == "a[b<eos>]"


def test_a_text_that_is_one_token_is_skipped_and_counted(byte_tokenizer):
    samples, counts = run(Tokeniser(byte_tokenizer(), "text", 16), row(text="<eos>"), row(1, text="ab"))
    assert [sample.source_row for sample in samples] == [1]
    assert (counts.rows, counts.too_short) == (2, 1)


def test_prompt_and_completion(byte_tokenizer):
    tokenizer = byte_tokenizer(adds_bos=True)
    tokeniser = Tokeniser(tokenizer, "prompt+completion", 8)
    rows = [
        row(0, prompt="ab", completion="cd"),
        row(1, prompt="ab", completion="cdefgh"),
        row(2, prompt="abcdefg", completion="h"),
        row(3, prompt="abcdef", completion="h"),
        row(4, prompt="abcd", completion="ef"),
    ]
    samples, counts = run(tokeniser, *rows)
    assert [(sample.source_row, shown(tokenizer, sample)) for sample in samples] == [
        (0, "<bos>ab[cd<eos>]"),
        (1, "<bos>ab[cdefg]"),
        (3, "<bos>abcdef[h]"),
        (4, "<bos>abcd[ef<eos>]"),
    ]
    assert (counts.truncated, counts.prompt_too_long, counts.samples) == (2, 1, 4)
    assert counts.learned_tokens == 3 + 5 + 1 + 3
    assert counts.summary() == (
        "5 rows -> 4 samples; 30 tokens, 12 of them learned; 2 truncated; 1 rows skipped: the prompt fills the window"
    )


def test_an_empty_completion_is_skipped_and_counted(byte_tokenizer):
    rows = [row(i, prompt="ab", completion=completion) for i, completion in enumerate(["", "c", " \n"])]
    samples, counts = run(Tokeniser(byte_tokenizer(), "prompt+completion", 8), *rows)
    assert [sample.source_row for sample in samples] == [1]
    assert (counts.rows, counts.samples, counts.empty_completion) == (3, 1, 2)
    assert counts.summary() == (
        "3 rows -> 1 samples; 4 tokens, 2 of them learned; 2 rows skipped: the completion is empty"
    )


def test_prompt_and_completion_are_tokenised_apart():
    """With a merge of a and b, "a" + "b" stays two tokens, as when the model completes "a"."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"<eos>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    samples, _ = run(Tokeniser(tokenizer, "prompt+completion", 8), row(prompt="a", completion="b"))
    assert samples[0].input_ids.tolist() == [1, 2, 0]
    samples, _ = run(Tokeniser(tokenizer, "text", 8), row(text="ab"))
    assert samples[0].input_ids.tolist() == [3, 0]


def test_generated_completions_are_fitted_like_written_ones(byte_tokenizer):
    tokenizer = byte_tokenizer(adds_bos=True)
    tokeniser, counts = Tokeniser(tokenizer, "prompt", 5), Counts()
    prompt_ids = tokeniser.prompt_ids("ab")
    assert prompt_ids[0] == BOS
    completion = tokenizer("cd", add_special_tokens=False)["input_ids"]
    (unfinished,) = tokeniser.completed(row(), prompt_ids, completion, counts)
    assert shown(tokenizer, unfinished) == "<bos>ab[cd]"
    assert tokeniser.completed(row(), tokeniser.prompt_ids("abcd"), completion, counts) == []
    assert tokeniser.completed(row(), prompt_ids, [], counts) == []
    assert (counts.prompt_too_long, counts.too_short) == (1, 1)


TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "again"},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "yes"},
]
LEARNED_TALK = (
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[ho<|im_end|>]\n<|im_start|>user\nagain<|im_end|>\n"
    "<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n[yes<|im_end|>]\n"
)


def test_messages_every_assistant_turn_is_learned_with_its_end(byte_tokenizer, chatml):
    tokenizer = byte_tokenizer(adds_bos=True, chat_template=chatml)
    samples, counts = run(Tokeniser(tokenizer, "messages", 200), row(messages=TALK))
    assert [shown(tokenizer, sample) for sample in samples] == [LEARNED_TALK]
    assert counts.learned_tokens == 3 + 4
    assert samples[0].input_ids.tolist() == tokenizer.apply_chat_template(TALK, return_dict=False)


def test_an_empty_system_message_is_rendered_as_it_stands(byte_tokenizer, chatml):
    tokenizer = byte_tokenizer(chat_template=chatml)
    talk = [{"role": "system", "content": ""}, {"role": "user", "content": ""}, TALK[1]]
    samples, _ = run(Tokeniser(tokenizer, "messages", 200), row(messages=talk))
    assert [shown(tokenizer, sample) for sample in samples] == [
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n[ho<|im_end|>]\n"
    ]


def test_messages_too_long_are_truncated_or_skipped(byte_tokenizer, chatml):
    tokenizer = byte_tokenizer(chat_template=chatml)
    n_first = len(tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=False))
    samples, counts = run(Tokeniser(tokenizer, "messages", n_first + 1), row(messages=TALK))
    assert shown(tokenizer, samples[0]).endswith("assistant\n[h]")
    assert (counts.truncated, counts.prompt_too_long) == (1, 0)
    samples, counts = run(Tokeniser(tokenizer, "messages", n_first), row(messages=TALK))
    assert samples == []
    assert (counts.truncated, counts.prompt_too_long) == (0, 1)


@pytest.mark.parametrize(
    "closing",
    ["{{ m['content'] + '<eos>' }}{% endgeneration %}", "{{ m['content'] }}{% endgeneration %}<eos>"],
)
def test_messages_with_generation_tags(byte_tokenizer, closing):
    template = (
        "{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}{% generation %}"
        + closing
        + "{% else %}{{ m['content'] + '<eos>' }}{% endif %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(chat_template=template)
    samples, _ = run(Tokeniser(tokenizer, "messages", 200), row(messages=TALK))
    assert [shown(tokenizer, sample) for sample in samples] == [
        "user:hi<eos>assistant:[ho<eos>]user:again<eos>tool:42<eos>assistant:[yes<eos>]"
    ]


def test_messages_under_a_template_that_rewrites_the_past(byte_tokenizer):
    """The last assistant turn is shown with its thought, earlier ones without: one sample for each turn."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' }}"
        "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'].split('|')[-1] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_tokenizer(chat_template=template)
    talk = [
        TALK[0],
        {"role": "assistant", "content": "hm|ho"},
        TALK[2],
        {"role": "assistant", "content": "so|yes"},
    ]
    samples, counts = run(Tokeniser(tokenizer, "messages", 200), row(messages=talk))
    first = "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"
    assert [shown(tokenizer, sample) for sample in samples] == [
        f"{first}[hm|ho<|im_end|>]",
        f"{first}ho<|im_end|><|im_start|>user\nagain<|im_end|><|im_start|>assistant\n[so|yes<|im_end|>]",
    ]
    assert (counts.rows, counts.samples) == (1, 2)


def test_messages_whose_generation_prompt_opens_a_thought(byte_tokenizer, chatml):
    tokenizer = byte_tokenizer(chat_template=chatml.replace("assistant\\n' }}", "assistant\\n<think>' }}"))
    samples, _ = run(Tokeniser(tokenizer, "messages", 200), row(messages=TALK))
    assert shown(tokenizer, samples[0]) == LEARNED_TALK


def test_messages_that_begin_with_the_assistant(byte_tokenizer, chatml):
    tokenizer = byte_tokenizer(chat_template=chatml)
    samples, _ = run(Tokeniser(tokenizer, "messages", 200), row(messages=TALK[1:3]))
    assert shown(tokenizer, samples[0]) == (
        "<|im_start|>assistant\n[ho<|im_end|>]\n<|im_start|>user\nagain<|im_end|>\n"
    )


def test_messages_that_the_template_refuses(byte_tokenizer):
    template = "{% for m in messages %}{{ raise_exception('no tools') if m['role'] == 'tool' }}{% endfor %}"
    tokeniser = Tokeniser(byte_tokenizer(chat_template=template), "messages", 99)
    with pytest.raises(ValueError, match=r"data.jsonl:4: the teacher's chat template refuses .*: no tools; correct"):
        run(tokeniser, row(3, messages=TALK))


def test_tokenizers_that_lack_what_a_shape_needs(byte_tokenizer):
    with pytest.raises(ValueError, match="has no chat template, which `messages` rows need; use an instruction"):
        Tokeniser(byte_tokenizer(), "messages", 99)
    with pytest.raises(ValueError, match="has no EOS token, which closes every `text` row; set eos_token"):
        Tokeniser(byte_tokenizer(eos=None), "text", 99)
    with pytest.raises(ValueError, match="max_length is 2, expected at least 3"):
        Tokeniser(byte_tokenizer(adds_bos=True), "text", 2)


def test_consecutive_assistant_turns_under_a_template_that_rewrites_history(byte_tokenizer):
    """The last turn alone gets a <think>, so the turn before is rendered in two ways; each turn is learned once."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = byte_tokenizer(chat_template=template)
    messages = [{"role": "user", "content": "Hi"}]
    messages += [{"role": "assistant", "content": text} for text in ("Hello you", "again")]
    row = Row(0, "x:1", {"messages": messages})
    samples = list(Tokeniser(tokenizer, "messages", 512).samples([row], Counts()))
    learned = [tokenizer.decode(sample.input_ids[sample.loss_mask]) for sample in samples]
    assert learned == ["<think></think>Hello you<|im_end|>", "<think></think>again<|im_end|>"]
