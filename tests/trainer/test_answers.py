"""`logitstore eval --answers`: a tiny model that has learned some answers gets those right; batches change nothing."""

import json
import re

import pytest
import torch
from logitstore_trainer.answers import answer_questions, exact_match, read_questions
from logitstore_trainer.cli import main
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import logitstore

WORDS = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>", "####", "Question:", "Answer:", "user", "assistant", "so", "\n"]
N_WORDS = 97
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
# (question, what the model is taught to say, right answer): six of the eight are taught rightly.
TAUGHT = [
    ("Question: 3 4 Answer:", "so #### 7", "7"),
    ("Question: 9 9 Answer:", "#### 18", "18"),
    ("Question: 2 5 6 7 Answer:", "so 9 so #### 20", "20"),
    ("Question: 1 Answer:", "so so 1", "1"),
    ("Question: 8 8 Answer:", "16 so #### 17", "16"),
    ("Question: 5 Answer:", "so so so so", "5"),
    ("Question: 20 3 4 5 1 Answer:", "#### 33", "33"),
    ("Question: 11 11 Answer:", "so #### 22", "22"),
]


@pytest.fixture(scope="module")
def word_tokenizer():
    """One token a word: the words above and the numbers from 0 on."""
    words = [*WORDS, *map(str, range(N_WORDS - len(WORDS)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def as_words(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def taught_model(new_student, sequences, *, n_steps=150):
    """A tiny Llama trained until it says each sequence of (prompt ids, completion ids) by heart."""
    model = new_student(11, vocab_size=N_WORDS, width=64)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    length = max(len(prompt) + len(completion) for prompt, completion in sequences)
    input_ids, labels = (
        torch.zeros(len(sequences), length, dtype=torch.long),
        torch.full((len(sequences), length), -100),
    )
    for b, (prompt, completion) in enumerate(sequences):
        n = len(prompt) + len(completion)
        input_ids[b, :n] = torch.tensor([*prompt, *completion])
        labels[b, len(prompt) : n] = torch.tensor(completion)
    mask = (torch.arange(length) < torch.tensor([len(p) + len(c) for p, c in sequences])[:, None]).long()
    for _ in range(n_steps):
        loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.02
    return model.eval()


@pytest.fixture(scope="module")
def model(new_student, word_tokenizer):
    return taught_model(
        new_student,
        [(as_words(word_tokenizer, q), as_words(word_tokenizer, f"{said} </s>")) for q, said, _ in TAUGHT],
    )


@pytest.fixture(scope="module")
def untaught(new_student):
    return new_student(12, vocab_size=N_WORDS, width=64)


@pytest.fixture(scope="module")
def questions_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [{"prompt": question, "completion": f"because\n#### {right}"} for question, _, right in TAUGHT]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers_by_hand(model, tokenizer, prompt, n_tokens, stop_ids):
    """The argmax chain behind a prompt, one whole forward pass a token."""
    ids = list(prompt)
    for _ in range(n_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop_ids:
            return tokenizer.decode(ids[len(prompt) : -1], skip_special_tokens=True)
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_batch_gives_what_each_question_gives_alone(model, untaught, word_tokenizer, questions_path, batch_size):
    questions = read_questions(questions_path)
    for each, n_tokens in ((model, 12), (untaught, 7)):
        got = answer_questions(
            "tiny", each, word_tokenizer, questions, vocab_size=N_WORDS, max_new_tokens=n_tokens, batch_size=batch_size
        )
        prompts = [as_words(word_tokenizer, question) for question, _, _ in TAUGHT]
        assert [a.text for a in got] == [answers_by_hand(each, word_tokenizer, p, n_tokens, {1}) for p in prompts]
        assert [a.source_row for a in got] == list(range(len(TAUGHT)))


def test_what_was_learned_is_right_and_what_was_learned_wrongly_is_not(model, word_tokenizer, questions_path):
    got = answer_questions(
        "tiny", model, word_tokenizer, read_questions(questions_path), vocab_size=N_WORDS, max_new_tokens=12
    )
    assert [answer.is_right for answer in got] == [True, True, True, True, False, False, True, True]
    assert [answer.number is None for answer in got] == [False] * 5 + [True] + [False] * 2
    score = exact_match(got)
    assert (score.n, score.n_right, score.share, score.n_without_number, score.n_cut) == (8, 6, 0.75, 1, 0)
    assert score.interval == pytest.approx((0.409, 0.929), abs=1e-3)


def test_an_answer_that_does_not_end_in_time_is_cut_and_still_counts(model, word_tokenizer, questions_path):
    questions = read_questions(questions_path, 2)
    got = answer_questions("tiny", model, word_tokenizer, questions, vocab_size=N_WORDS, max_new_tokens=2)
    assert [(answer.is_cut, answer.is_right) for answer in got] == [(True, False), (True, True)]


def test_the_model_is_left_in_its_mode(model, word_tokenizer, questions_path):
    model.train()
    answer_questions(
        "tiny", model, word_tokenizer, read_questions(questions_path, 1), vocab_size=N_WORDS, max_new_tokens=2
    )
    assert model.training
    hook = model.register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        answer_questions(
            "tiny", model, word_tokenizer, read_questions(questions_path, 1), vocab_size=N_WORDS, max_new_tokens=2
        )
    hook.remove()
    assert model.training
    model.eval()


def _interrupt(module, args):
    raise KeyboardInterrupt


def test_a_conversation_goes_through_the_chat_template_and_ends_with_its_turn(new_student, word_tokenizer, tmp_path):
    """What is taught is what the template renders, so only the right prompt gives the answers; the turn ends with
    <|im_end|>, which is not the end of text, and what the model would say after it does not count."""
    asked = TAUGHT[:3]
    start = "<|im_start|> user {} <|im_end|> <|im_start|> assistant"
    sequences = [
        (as_words(word_tokenizer, start.format(q)), as_words(word_tokenizer, f"{said} <|im_end|> user 50 50 50"))
        for q, said, _ in asked
    ]
    model = taught_model(new_student, sequences)
    path = tmp_path / "chat.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"#### {right}"}]}
        for q, _, right in asked
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = answer_questions("tiny", model, word_tokenizer, read_questions(path), vocab_size=N_WORDS, max_new_tokens=9)
    assert [answer.is_right for answer in got] == [True] * 3
    assert [answer.is_cut for answer in got] == [False] * 3
    assert all("50" not in answer.text for answer in got)


@pytest.fixture(scope="module")
def held_out(new_store, word_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("held-out") / "store.parquet"
    return new_store(path, tokenizer_sha256=logitstore.tokenizer_sha256(word_tokenizer.get_vocab()))


@pytest.fixture(scope="module")
def folders(model, untaught, word_tokenizer, tmp_path_factory):
    paths = [tmp_path_factory.mktemp("models") / name for name in ("taught", "untaught")]
    for path, each in zip(paths, (model, untaught), strict=True):
        each.save_pretrained(path)
        word_tokenizer.save_pretrained(path)
    return list(map(str, paths))


def test_the_command_shows_all_students_and_the_teacher(folders, held_out, questions_path, tmp_path, capsys):
    taught, untaught = folders
    out = tmp_path / "eval"
    options = ["--data", str(held_out), "--out", str(out), "--device", "cpu", "--max-new-tokens", "12"]
    assert main(["eval", untaught, taught, "--teacher", taught, "--answers", str(questions_path), *options]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["questions"]["n"] == 8
    assert len(results["questions"]["sha256"]) == 64
    expected = {"n": 8, "n_right": 6, "share": 0.75, "n_without_number": 1, "n_cut": 0}
    for score in (results["students"][taught]["exact_match"], results["teacher"]["exact_match"]):
        assert {name: score[name] for name in expected} == expected
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    for name, n_right in ((taught, 6), (untaught, results["students"][untaught]["exact_match"]["n_right"])):
        assert sum(line["is_right"] for line in lines if line["model"] == name) == n_right
    assert len(lines) == 16
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith(f"{taught} (teacher)"))
    assert re.search(r"\b8 +6 +75\.0% +40\.9% to 92\.9% +1 +0$", row)
    page = (out / "report.html").read_text()
    assert "questions with the right answer" in page
    assert "40.9% to 92.9%" in page
    assert page.count("<svg") == 4


def test_the_first_rows_alone_can_be_asked(folders, held_out, questions_path, tmp_path):
    options = ["--data", str(held_out), "--out", str(tmp_path), "--device", "cpu", "--max-new-tokens", "12"]
    assert main(["eval", folders[0], "--answers", str(questions_path), "--answer-rows", "5", *options]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    score = results["students"][folders[0]]["exact_match"]
    assert (score["n"], score["n_right"]) == (5, 4)
    assert results["teacher"] is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a document"}], "rows are `text`, expected `prompt` and `completion`, or `messages`"),
        (
            [{"prompt": "Question: 1", "completion": "1"}],
            'questions.jsonl:1: its completion has no number behind "####"',
        ),
        (
            [{"messages": [{"role": "assistant", "content": "#### 1"}, {"role": "user", "content": "#### 2"}]}],
            "`messages` ends with the turn of 'user'",
        ),
        ([{"prompt": " ".join("1" * 60), "completion": "#### 1"}], "more than the 64 positions of"),
    ],
)
def test_questions_that_cannot_be_asked_are_one_line(folders, held_out, tmp_path, capsys, rows, message):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", folders[0], "--data", str(held_out), "--out", str(tmp_path / "eval"), "--device", "cpu"]
    assert main([*command, "--answers", str(path), "--max-new-tokens", "8"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--answer-rows", "3"], "--answer-rows is for --answers FILE"),
        (["--max-new-tokens", "3"], "--max-new-tokens is for --answers FILE"),
        (["--answers", "x.jsonl", "--answer-rows", "0"], "--answer-rows 0 must be above 0"),
        (["--answers", "x.jsonl", "--max-new-tokens", "-1"], "--max-new-tokens -1 must be above 0"),
        (["--answers", "not-there.jsonl"], "not-there.jsonl: no such file of questions; check --answers"),
    ],
)
def test_options_that_do_not_fit_are_one_line(folders, held_out, tmp_path, capsys, words, message):
    assert main(["eval", folders[0], "--data", str(held_out), "--out", str(tmp_path / "eval"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_that_cannot_end_and_one_without_a_template_are_refused(
    model, word_tokenizer, questions_path, tmp_path
):
    endless = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer.backend_tokenizer, eos_token="</s>")
    chat = tmp_path / "chat.jsonl"
    row = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "#### 1"}]}
    chat.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="has no chat template, which `messages` rows need"):
        answer_questions("tiny", model, endless, read_questions(chat), vocab_size=N_WORDS, max_new_tokens=2)
    endless.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token"):
        answer_questions("tiny", model, endless, read_questions(questions_path), vocab_size=N_WORDS, max_new_tokens=2)
