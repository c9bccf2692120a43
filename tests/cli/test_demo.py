"""`logitstore demo --quick` end to end, its files and numbers against each other; the split and its parts."""

import contextlib
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from logitstore_trainer import cli
from logitstore_trainer.comparison import page
from logitstore_trainer.demo.demo import MARKER, prepare_folder
from logitstore_trainer.demo.models import (
    TeacherTraining,
    build_teacher,
    token_stream,
    train_teacher,
    train_tokenizer,
)
from logitstore_trainer.demo.recipe import FULL, QUICK
from logitstore_trainer.demo.text import (
    is_held_out,
    paragraphs,
    python_documentation,
    split_pages,
    transfer_texts,
    write_texts,
)
from logitstore_trainer.student import LlamaShape, parse_shape
from transformers import AutoModelForCausalLM, AutoTokenizer

import logitstore


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(folder, results.json, printed text) of one quick demo, run through the command line."""
    out = tmp_path_factory.mktemp("demo") / "a folder"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main(["demo", "--quick", "--seed", "3", "--out", str(out)])
    assert code == 0
    return out, json.loads((out / "results.json").read_text()), printed.getvalue()


def test_the_demo_leaves_every_file(quick):
    out, results, _ = quick
    assert sorted(path.name for path in out.iterdir()) == [
        "demo.json",
        "heldout.jsonl",
        "heldout_logits.parquet",
        "heldout_logits.parquet.tables",
        "report.html",
        "results.json",
        "student-distilled",
        "student-labels",
        "teacher",
        "teacher_logits.parquet",
        "teacher_logits.parquet.tables",
        "train.jsonl",
    ]
    assert (results["seed"], results["recipe"]["name"]) == (3, "quick")
    train, held_out = (
        {p for line in (out / name).read_text().splitlines() for p in paragraphs(json.loads(line)["text"])}
        for name in ("train.jsonl", "heldout.jsonl")
    )
    split = split_pages(python_documentation())
    assert held_out == {p for text in split.held_out for p in paragraphs(text)}
    asked = transfer_texts(split.train, QUICK.transfer_share)
    assert train == {p for text in asked for p in paragraphs(text)}
    assert not train & held_out


def test_store_and_models_open_and_belong_together(quick):
    out, results, _ = quick
    store = logitstore.open(out / "teacher_logits.parquet")
    assert store.verify().ok
    assert store.blob_bytes / store.n_present_rows == pytest.approx(results["store"]["bytes_per_token"])
    assert store.spec.vocab_size == QUICK.vocab_size
    assert results["store"]["fp16_bytes_per_token"] == 2 * QUICK.vocab_size

    tokenizer = AutoTokenizer.from_pretrained(str(out / "teacher"))
    assert logitstore.tokenizer_sha256(tokenizer.get_vocab()) == store.spec.tokenizer_sha256
    first_text = json.loads((out / "train.jsonl").read_text().splitlines()[0])["text"]
    ids = store[0].input_ids.tolist()
    assert first_text.startswith(tokenizer.decode(ids))

    teacher = AutoModelForCausalLM.from_pretrained(str(out / "teacher"))
    with torch.no_grad():
        logp_LV = teacher(torch.tensor([ids])).logits[0].log_softmax(dim=1).numpy()
    q_RV = store[0].targets.dense_logprobs(1.0)
    kl_R = (np.exp(logp_LV[:-1]) * (logp_LV[:-1] - q_RV)).sum(axis=1)
    assert 0 < kl_R.mean() < 0.05
    for name, seconds in (("labels", 0), ("distilled", 0)):
        student = AutoModelForCausalLM.from_pretrained(str(out / f"student-{name}"))
        n_parameters = sum(p.numel() for p in student.parameters())
        assert n_parameters == results["students"][name]["n_parameters"]
        assert n_parameters == parse_shape(QUICK.student).n_parameters(QUICK.vocab_size)
        assert results["students"][name]["train_seconds"] > seconds


def test_the_students_differ_in_alpha_alone(quick):
    _, results, _ = quick
    labels, distilled = (results["students"][name] for name in ("labels", "distilled"))
    assert (labels["alpha"], distilled["alpha"]) == (0.0, 0.7)
    assert labels["n_tokens_trained"] == distilled["n_tokens_trained"] > 0
    # the same weights and the same first batch: the first logged cross-entropy is from before the first update
    assert labels["ce_by_step"][0] == distilled["ce_by_step"][0]
    assert labels["ce_by_step"][-1] != distilled["ce_by_step"][-1]
    assert labels["loss_nats"] != distilled["loss_nats"]


def test_held_out_loss_and_kl_are_those_of_a_plain_loop(quick):
    out, results, _ = quick
    store = logitstore.open(out / "heldout_logits.parquet")
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(str(out / name)).eval() for name in ("teacher", "student-distilled")
    )
    ce = kl = agreeing = n = 0.0
    with torch.no_grad():
        for sample in store:
            ids = torch.tensor(sample.input_ids.tolist())
            teacher_LV, student_LV = (m(ids[None]).logits[0].double().log_softmax(1) for m in (teacher, student))
            keep = torch.from_numpy(sample.loss_mask[1:])
            ce -= float(student_LV[:-1].gather(1, ids[1:, None])[:, 0][keep].sum())
            kl += float((teacher_LV.exp() * (teacher_LV - student_LV)).sum(1)[:-1][keep].sum())
            agreeing += float((teacher_LV.argmax(1) == student_LV.argmax(1))[:-1][keep].sum())
            n += float(keep.sum())
    measured = results["students"]["distilled"]
    assert measured["n_tokens"] == n
    assert measured["loss_nats"] == pytest.approx(ce / n, rel=1e-5)
    assert measured["kl_teacher_nats"] == pytest.approx(kl / n, rel=1e-4)
    assert measured["top1_agreement"] == pytest.approx(agreeing / n, abs=2e-3)  # near-ties may fall either way


def test_fidelity_of_store_and_of_fp16(quick):
    _, results, _ = quick
    store = results["store"]
    for temperature in ("t1", "t2"):
        assert 0 < store[f"kl_{temperature}"] < 0.05
        assert 0 < store[f"kl_{temperature}_se"] < store[f"kl_{temperature}"]
        assert abs(store[f"fp16_kl_{temperature}"]) < 1e-6
    assert results["teacher"]["kl_teacher_nats"] == pytest.approx(0, abs=1e-9)
    assert results["teacher"]["top1_agreement"] == 1.0


def test_printed_table_is_what_results_json_says(quick):
    out, results, printed = quick
    assert page.table_text(results) in printed
    assert page.verdict(results) in printed
    assert str(out / "report.html") in printed
    cells = {row[0]: row[1:] for row in (re.split(r"  +", line) for line in page.table_text(results).splitlines())}
    labels, distilled, store = results["students"]["labels"], results["students"]["distilled"], results["store"]
    assert cells["bytes/token"][:2] == ["1,024", f"{store['bytes_per_token']:.1f}"]
    assert float(cells["loss (nats/token)"][3]) == pytest.approx(labels["loss_nats"], abs=5e-5)
    assert float(cells["loss (nats/token)"][4]) == pytest.approx(distilled["loss_nats"], abs=5e-5)
    kl = cells["KL(teacher || .) at T = 1 (nats)"]
    assert float(kl[1]) == pytest.approx(store["kl_t1"], rel=0.01)
    assert [float(kl[3]), float(kl[4])] == [pytest.approx(s["kl_teacher_nats"], abs=5e-5) for s in (labels, distilled)]
    assert cells["top-1 agreement with teacher"][4] == f"{distilled['top1_agreement']:.1%}"


def test_stages_have_times_and_rates(quick):
    _, results, printed = quick
    names = [row["stage"] for row in results["stages"]]
    assert names == [
        "text",
        "tokenizer",
        "teacher",
        "collect",
        "collect held-out",
        "verify",
        "student, labels",
        "student, distilled",
        "compare store",
        "evaluate",
    ]
    for row in results["stages"]:
        assert row["stage"] in printed
        if row["tokens"]:
            assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
    assert sum(row["seconds"] for row in results["stages"]) <= results["seconds"]


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.targets += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]


def test_the_report_needs_nothing_else(quick):
    out, results, _ = quick
    text = (out / "report.html").read_text(encoding="utf-8")
    links = _Links()
    links.feed(text)
    assert all(target.startswith("#") for target in links.targets)
    assert not {"script", "link", "img", "iframe"} & set(links.tags)
    assert "url(http" not in text
    assert "@import" not in text
    assert links.tags.count("svg") == 6
    assert f"{results['students']['distilled']['loss_nats']:.4f}" in text


def test_an_earlier_demo_is_replaced_and_other_files_are_not(tmp_path):
    out = tmp_path / "out"
    prepare_folder(out, {"seed": 0})
    (out / "teacher").mkdir()
    (out / "teacher" / "model.safetensors").write_text("old")
    (out / "teacher_logits.parquet").write_text("old")
    (out / "notes.txt").write_text("mine")
    prepare_folder(out, {"seed": 1})
    assert sorted(path.name for path in out.iterdir()) == [MARKER, "notes.txt"]
    assert json.loads((out / MARKER).read_text()) == {"seed": 1}


def test_a_folder_of_somebody_else_is_refused(tmp_path, capsys):
    (tmp_path / "teacher").mkdir()
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"logitstore: --out {tmp_path} is not empty and not from an earlier demo; choose another folder\n"
    assert (tmp_path / "teacher").is_dir()
    file = tmp_path / "file"
    file.write_text("")
    assert cli.main(["demo", "--out", str(file)]) == 2
    assert capsys.readouterr().err == f"logitstore: --out {file} is a file, expected a folder; choose another\n"


def test_paragraphs_are_split_at_blank_lines_and_keep_indentation():
    assert paragraphs("\nA b\n  c  \n \n\n    code()\n\n\n\n") == ["A b\n  c", "    code()"]


def test_the_split_drops_repeats_and_depends_on_the_paragraph_alone():
    texts = [f"Paragraph {i} says something." for i in range(400)]
    pages = {"a": "\n\n".join(texts[:250]), "b": "\n\n".join("   " + text for text in texts[200:])}
    split = split_pages(pages)
    assert (split.n_paragraphs, split.n_repeats) == (400, 50)
    held_out = [p.strip() for text in split.held_out for p in paragraphs(text)]
    by_hash = [t for t in texts if int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) < 0.1 * 2**64]
    assert held_out == by_hash
    assert 20 <= len(by_hash) <= 60
    assert [is_held_out(text) for text in texts] == [text in by_hash for text in texts]
    assert len([p for text in split.train for p in paragraphs(text)]) == 400 - len(by_hash)


def test_the_students_text_is_a_share_of_the_pages_that_depends_on_each_page_alone():
    texts = [f"Page {i}." for i in range(400)]
    asked = transfer_texts(texts, 0.5)
    assert asked == tuple(t for t in texts if int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) < 0.5 * 2**64)
    assert 160 <= len(asked) <= 240
    assert transfer_texts(reversed(texts), 0.5) == asked[::-1]
    assert (transfer_texts(texts, 0.0), transfer_texts(texts, 1.0)) == ((), tuple(texts))


def test_the_documentation_is_large_enough_for_the_recipe():
    split = split_pages(python_documentation())
    assert split.train_bytes > 250_000
    assert 0.05 < split.held_out_bytes / split.train_bytes < 0.2
    assert split.n_repeats > 300


def test_a_python_without_its_documentation_gets_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(OSError, match=r"lacks pydoc_data\.topics.*use a complete Python"):
        python_documentation()


def test_texts_are_written_as_collect_reads_them(tmp_path: Path):
    from logitstore_trainer.collect.prompts import read_dataset

    path = write_texts(tmp_path / "x.jsonl", ["a\nb", 'quote " and \u00e4'])
    dataset = read_dataset(path)
    assert dataset.shape == "text"
    assert [row.columns["text"] for row in dataset.rows()] == ["a\nb", 'quote " and \u00e4']


def test_tokenizer_is_lossless_and_teacher_learns():
    texts = ["the cat sat on the mat and the dog sat on the log\n" * 40]
    tokenizer = train_tokenizer(texts, 300)
    assert len(tokenizer) <= 300
    assert tokenizer.decode(tokenizer("caf\u00e9 \t zz")["input_ids"]) == "caf\u00e9 \t zz"
    stream = token_stream(texts, tokenizer)
    assert int(stream[-1]) == tokenizer.eos_token_id == 0
    model = build_teacher(LlamaShape(layers=1, width=32, heads=1, mlp=64), tokenizer, max_length=16, seed=1)
    settings = TeacherTraining(steps=60, batch_size=4, length=16, lr=1e-2)
    trained = train_teacher(model, stream, settings, seed=1)
    assert trained.n_tokens == 60 * 4 * 16
    assert trained.loss_by_step[0][1] == pytest.approx(np.log(len(tokenizer)), rel=0.1)
    assert trained.loss_by_step[-1][1] < 1.0
    assert not model.training
    again = build_teacher(LlamaShape(layers=1, width=32, heads=1, mlp=64), tokenizer, max_length=16, seed=1)
    assert train_teacher(again, stream, settings, seed=1).loss_by_step == trained.loss_by_step


def test_too_little_text_is_refused():
    tokenizer = train_tokenizer(["a b c"], 300)
    model = build_teacher(LlamaShape(layers=1, width=32, heads=1, mlp=64), tokenizer, max_length=16, seed=1)
    settings = TeacherTraining(steps=1, batch_size=4, length=16, lr=1e-2)
    with pytest.raises(ValueError, match="too few for a batch of 4 sequences of 16: at least 80 are needed"):
        train_teacher(model, torch.zeros(70, dtype=torch.int64), settings, seed=0)


def test_the_teacher_gets_at_least_twice_a_students_compute():
    student = parse_shape(FULL.student).n_parameters(FULL.vocab_size)
    teacher = FULL.teacher.n_parameters(FULL.vocab_size)
    training = FULL.training
    teacher_compute = teacher * training.steps * training.batch_size * training.length
    assert teacher_compute >= 2 * student * FULL.student_steps * FULL.student_batch_size * FULL.length
