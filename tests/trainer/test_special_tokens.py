"""Special tokens that differ from the store's are said, each in a line, at the start of train, eval and in plug-ins."""

import shutil

import pytest
from logitstore_trainer import DistillationTrainer, distill
from logitstore_trainer.cli import main
from logitstore_trainer.special_tokens import special_token_notes
from tokenizers import processors
from transformers import Trainer, TrainingArguments

import logitstore
from logitstore.errors import CorruptionError
from logitstore.tables import put_tokenizer_folder, tables_path


@pytest.fixture
def changed(tokenizer, tmp_path):
    """changed(**what): the store's tokenizer with something else about it, as it comes back from its files."""

    def change(*, added=(), begins_with=None, chat_template=None, **roles):
        tokenizer.save_pretrained(tmp_path / "changed")
        copy = type(tokenizer).from_pretrained(tmp_path / "changed")
        for role, token in roles.items():
            setattr(copy, role, token)
        if added:
            copy.add_special_tokens({"additional_special_tokens": list(added)})
        if begins_with:
            single = f"{begins_with} $A"
            ids = [(begins_with, copy.convert_tokens_to_ids(begins_with))]
            copy.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
        copy.chat_template = chat_template
        assert copy.get_vocab() == tokenizer.get_vocab()
        return copy

    return change


def test_the_same_tokenizer_has_no_notes(store, changed):
    assert special_token_notes(store.path, store.spec, changed()) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"eos_token": "w5"}, "eos token: '</s>' in the store, 'w5' in S: the student learns to end as the store's"),
        ({"pad_token": "w5"}, "pad token: '<pad>' in the store, 'w5' in S: pads are masked"),
        ({"bos_token": "w5"}, "bos token: none in the store, 'w5' in S: prompts should begin as"),
        ({"unk_token": "w5"}, "unk token: none in the store, 'w5' in S: text that the vocabulary lacks"),
        ({"begins_with": "w6"}, "before a text: nothing in the store, 'w6' in S: prompts should begin as"),
        (
            {"added": ["w7", "w8"]},
            "special tokens: nothing in the store alone, 'w7', 'w8' in S alone: the ids are the same",
        ),
        ({"chat_template": "{{ messages }}"}, "chat template: the store has none, S has one: nothing in the store"),
    ],
)
def test_each_difference_is_one_line_and_nothing_else_is_said(store, changed, change, line):
    notes = special_token_notes(store.path, store.spec, changed(**change), name="S")
    assert len(notes) == 1
    assert notes[0].startswith(line)
    assert "\n" not in notes[0]


def store_written_with(tokenizer, new_store, folder):
    tokenizer.save_pretrained(folder / "tokenizer")
    path = folder / "store.parquet"
    return new_store(
        path,
        tokenizer_sha256=logitstore.tokenizer_sha256(tokenizer.get_vocab()),
        tokenizer_files_sha256=put_tokenizer_folder(folder / "tokenizer", path),
    )


def test_a_student_without_the_stores_chat_template_or_with_another_is_told_which_to_use(
    changed, new_store, tokenizer, tmp_path
):
    store = logitstore.open(store_written_with(changed(chat_template="A{{ messages }}"), new_store, tmp_path))
    (none,) = special_token_notes(store.path, store.spec, changed())
    assert none.startswith("chat template: the student has none: conversations of the store are written in the store's")
    (other,) = special_token_notes(store.path, store.spec, changed(chat_template="B{{ messages }}"))
    assert other.startswith("chat template: the student has another: conversations")
    assert special_token_notes(store.path, store.spec, changed(chat_template="A{{ messages }}")) == []


def test_a_store_that_records_no_tokenizer_and_one_whose_files_are_missing(changed, new_store, tmp_path):
    changed_eos = changed(eos_token="w5")
    silent = logitstore.open(new_store(tmp_path / "silent.parquet"))
    assert special_token_notes(silent.path, silent.spec, changed_eos) == []
    path = store_written_with(changed(), new_store, tmp_path)
    store = logitstore.open(path)
    assert len(special_token_notes(store.path, store.spec, changed_eos)) == 1
    shutil.rmtree(tables_path(path))
    (note,) = special_token_notes(store.path, store.spec, changed_eos)
    assert note.startswith("special tokens and chat template of the student are not compared with the store's")
    assert str(tables_path(path)) in note


def test_damaged_tokenizer_files_are_an_error(changed, new_store, tmp_path):
    store = logitstore.open(store_written_with(changed(), new_store, tmp_path))
    file = store.tokenizer_folder / "tokenizer_config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(CorruptionError, match="tokenizer files in .* have SHA-256"):
        special_token_notes(store.path, store.spec, changed())


def test_files_that_make_no_tokenizer_are_said(new_store, changed, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    path = tmp_path / "store.parquet"
    store = logitstore.open(new_store(path, tokenizer_files_sha256=put_tokenizer_folder(tmp_path / "tokenizer", path)))
    (note,) = special_token_notes(store.path, store.spec, changed())
    assert "are not compared with the store's: the store's tokenizer: its tokenizer cannot be loaded" in note
    assert "\n" not in note


@pytest.fixture
def student_folder(new_student, changed, tmp_path):
    folder = tmp_path / "student"
    new_student(2).save_pretrained(folder)
    changed(eos_token="w5", chat_template="{{ messages }}").save_pretrained(folder)
    return folder


NOTES = ["note: eos token: '</s>' in the store, 'w5' in ", "note: chat template: the store has none, "]


def notes_in(text):
    return [line for line in text.splitlines() if line.startswith("note: ")]


def test_train_says_them_once_and_trains(student_folder, store_path, tmp_path, capsys):
    options = ["--data", str(store_path), "--out", str(tmp_path / "out"), "--steps", "1", "--device", "cpu"]
    assert main(["train", "--student", str(student_folder), *options]) == 0
    said = notes_in(capsys.readouterr().err)
    assert len(said) == 2
    assert all(line.startswith(expected) for line, expected in zip(said, NOTES, strict=True))
    assert (tmp_path / "out" / "train_metrics.json").is_file()


def test_eval_says_them_of_the_student_that_differs(
    student_folder, new_student, tokenizer, store_path, tmp_path, capsys
):
    alike = tmp_path / "alike"
    new_student(3).save_pretrained(alike)
    tokenizer.save_pretrained(alike)
    options = ["--data", str(store_path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["eval", str(alike), str(student_folder), *options]) == 0
    said = notes_in(capsys.readouterr().err)
    assert len(said) == 2
    assert all(f"{line}{student_folder}" in text for line, text in zip(NOTES, said, strict=True))


@pytest.mark.parametrize("plug_in", ["mixin", "hook"])
def test_plug_ins_say_them(plug_in, new_student, changed, store, tmp_path, capsys):
    arguments = {
        "model": new_student(2),
        "args": TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none"),
        "train_dataset": store,
        "processing_class": changed(eos_token="w5"),
    }
    if plug_in == "mixin":
        DistillationTrainer(**arguments)
    else:
        distill(Trainer(**arguments))
    (said,) = notes_in(capsys.readouterr().err)
    assert said.startswith(NOTES[0])
