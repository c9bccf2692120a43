"""`logitstore plan` on a made-up teacher: what it measures, what it recommends, and what it leaves for collect."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from logitstore_trainer.cli import main
from logitstore_trainer.collect.size import planned_size
from logitstore_trainer.collect.source import open_source
from logitstore_trainer.collect.source_settings import SourceSettings
from logitstore_trainer.collect.teacher_sample import drawn_texts
from logitstore_trainer.plan.goal import Goal
from logitstore_trainer.plan.page import warnings_of
from logitstore_trainer.plan.plan import PREDICTED, RESIDUAL, UNFITTED, Planned, mark_frontier
from made_up_teacher import D, V, teacher_samples
from safetensors.torch import save, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import logitstore
from logitstore.logits_source import FactoredLogits
from logitstore.tail_rows import tail_rows


@pytest.fixture(scope="module")
def logits_file(tmp_path_factory) -> Path:
    return _saved(tmp_path_factory.mktemp("sample") / "sample.safetensors", teacher_samples(0, 30, 30))


def _saved(path: Path, samples: list) -> Path:
    tensors = {
        "input_ids": torch.from_numpy(np.concatenate([ids for _, ids, _ in samples]).astype(np.int32)),
        "sample_lengths": torch.tensor([len(ids) for _, ids, _ in samples], dtype=torch.int32),
        "hidden": torch.from_numpy(np.concatenate([logits.hidden for logits, _, _ in samples])),
        "lm_head": torch.from_numpy(samples[0][0].lm_head.copy()),
    }
    save_file(tensors, str(path))
    return path


@pytest.fixture(scope="module")
def planned(logits_file: Path, tmp_path_factory) -> tuple[Path, dict]:
    """(folder, plan.json) of a plan for 24 bytes a token."""
    out = tmp_path_factory.mktemp("plan") / "a plan"
    code = main(
        ["plan", "--logits", str(logits_file), "--max-bytes-per-token", "24", "--rows", "80", "--out", str(out)]
    )
    assert code == 0
    return out, json.loads((out / "plan.json").read_text())


def test_the_chosen_one_keeps_to_the_goal_and_none_that_does_is_better(planned: tuple[Path, dict]) -> None:
    _, result = planned
    best = result["chosen"]
    assert best["bytes_per_token"] + 2 * best["bytes_per_token_se"] <= 24
    for row in result["results"]:
        if row["bytes_per_token"] + 2 * row["bytes_per_token_se"] <= 24:
            assert sum(row["kl"].values()) >= sum(best["kl"].values())
    assert len(result["results"]) == len(UNFITTED) + len(RESIDUAL) + len(PREDICTED) == 32
    assert result["facts"]["rows_measured"] == 87
    assert result["facts"]["rows_fitted"] == 24 * 29


def test_its_numbers_are_those_of_the_codec_that_it_saved(planned: tuple[Path, dict]) -> None:
    out, result = planned
    codec = logitstore.load_codec(out)
    best = result["chosen"]
    assert {**best["config"], "name": "topk", "vocab_size": V} == {
        name: value for name, value in codec.config.items() if name != "tables"
    }
    assert (codec.tables is None) == (best["table_bytes"] == 0)
    assert codec.tail_rank == best["tail_rank"]
    n_bytes, kl, n_rows = [], 0.0, 0
    held_out = teacher_samples(0, 30, 30)[4::5]
    for number, (logits, ids, _) in enumerate(held_out):
        targets = codec.targets_from_logits(logits, ids)
        n_bytes.append(len(codec.encode(targets, ids)))
        if number % 2:
            continue  # bytes are counted on all of them, KL is measured on half
        z = logits.hidden.astype(np.float64)[:-1] @ logits.lm_head.astype(np.float64).T
        log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        kl += float((np.exp(log_p) * (log_p - targets.dense_logprobs())).sum())
        n_rows += len(ids) - 1
    assert best["bytes_per_token"] == pytest.approx(np.mean(n_bytes) / 29, rel=2e-3)  # ties of float16 aside
    assert best["bytes_per_token_se"] == pytest.approx(np.std(n_bytes, ddof=1) / 29 / np.sqrt(6), rel=0.05)
    assert best["kl"]["1"] == pytest.approx(kl / n_rows, rel=1e-4)


def test_the_report_is_complete(planned: tuple[Path, dict]) -> None:
    page = (planned[0] / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "bytes a token" in page
    assert "tail step 0.13" in page


def test_a_goal_for_fidelity_takes_the_fewest_bytes(
    logits_file: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitstore_trainer.plan.plan.PREDICTED", ())
    arguments = ["plan", "--logits", str(logits_file), "--rows", "60", "--temperature", "2"]
    assert main([*arguments, "--max-kl", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "For a KL of at most 0.1 nats at T = 2: residual, k = 64, int8" in printed
    assert main([*arguments, "--max-kl", "0.0000001"]) == 1
    assert "No configuration reaches a KL of at most 1e-07 nats at T = 2; the nearest:" in capsys.readouterr().out


def test_a_goal_that_nothing_reaches_leaves_no_codec_of_an_earlier_plan(
    logits_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Nor does a plan leave the tables of another one behind; files that are not a plan's stay."""
    fitted, unfitted = {"head": "log", "k": 8}, {"k": 8}
    arguments = ["plan", "--logits", str(logits_file), "--rows", "30", "--out", str(tmp_path)]
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr("logitstore_trainer.plan.plan.fitted_tail", lambda texts, *_: (tail_rows(texts, V), None))
    monkeypatch.setattr("logitstore_trainer.plan.plan.PREDICTED", ())
    for residual, goal, code, files in (
        ((fitted,), "9", 0, 5),
        ((), "1e-9", 1, 3),
        ((fitted,), "9", 0, 5),
        ((), "9", 0, 4),
    ):
        monkeypatch.setattr("logitstore_trainer.plan.plan.RESIDUAL", residual)
        monkeypatch.setattr("logitstore_trainer.plan.plan.UNFITTED", () if residual else (unfitted,))
        assert main([*arguments, "--max-kl", goal]) == code
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            ["notes.txt", "plan.json", "report.html"]
            + ["codec.json"] * (code == 0)
            + [f"{logitstore.load_codec(tmp_path).tables_sha256}.safetensors" for _ in residual]
        )
        assert len(list(tmp_path.iterdir())) == files
        assert (json.loads((tmp_path / "plan.json").read_text())["chosen"] is None) == (code == 1)
    (tmp_path / "codec.json").write_text("{")
    assert main([*arguments, "--max-kl", "1e-9"]) == 1
    assert not (tmp_path / "codec.json").exists()
    capsys.readouterr()
    out = ["--out", str(logits_file)]
    assert main(["plan", "--logits", str(logits_file), "--max-kl", "1", *out]) == 2
    assert "is a file; name a folder for the fitted codec, plan.json and report.html" in capsys.readouterr().err


def test_a_vocabulary_too_small_to_plan_for_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tensors = {
        "input_ids": torch.arange(40) % 3,
        "sample_lengths": torch.tensor([20, 20]),
        "logits": torch.eye(40)[:, :3],
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(tmp_path / "three.safetensors"))
    assert main(["plan", "--logits", str(tmp_path / "three.safetensors"), "--max-kl", "0.1"]) == 2
    assert "has a vocabulary of 3 tokens, a plan is for 18 or more; keep them all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-kl", "-1"], "--max-kl must be above 0, got -1.0"),
        (["--max-kl", "0.1", "--rows", "0"], "--rows must be at least 1, got 0"),
        (["--max-kl", "0.1", "--temperature", "0"], "--temperature must be above 0"),
    ],
)
def test_bad_goals_get_one_line(logits_file: Path, arguments, message, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--logits", str(logits_file), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_coarse_corrections_and_none_get_fewer_coefficients(
    logits_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps in between two of a plan, too."""
    monkeypatch.setattr("logitstore.tail_rank.FEW", 7)
    monkeypatch.setattr("logitstore_trainer.plan.plan.FEW", 7)
    monkeypatch.setattr("logitstore_trainer.plan.plan.RESIDUAL", ())
    monkeypatch.setattr(
        "logitstore_trainer.plan.plan.PREDICTED",
        tuple({"head": "log", "k": 64, "tail": "predicted", "tail_step": step} for step in (None, 0.4, 0.2, 0.05)),
    )
    arguments = ["plan", "--logits", str(logits_file), "--rows", "60", "--out", str(tmp_path)]
    assert main([*arguments, "--max-kl", "0.01"]) == 0
    results = json.loads((tmp_path / "plan.json").read_text())["results"]
    found = {
        row["config"].get("tail_step"): row["tail_rank"] for row in results if row["config"]["tail"] == "predicted"
    }
    assert {None: 7, 0.4: 7, 0.2: 7, 0.05: D}.items() <= found.items()
    assert len(found) == 5
    assert all(rank == (7 if step is None or step > 0.11 else D) for step, rank in found.items())
    assert all(row["tail_rank"] is None for row in results if row["config"]["tail"] == "residual")


def test_what_is_on_the_frontier() -> None:
    goal = Goal(max_bytes_per_token=None, max_kl=0.5)
    rows = [
        {"bytes_per_token": b, "bytes_per_token_se": 1.0, "table_bytes": 0, "kl": {"1": kl, "2": 0.0}}
        for b, kl in ((10, 0.3), (12, 0.4), (20, 0.1), (20, 0.2))
    ]
    mark_frontier(rows, goal)
    assert [row["frontier"] for row in rows] == [True, False, True, False]
    assert goal.chosen(rows) is rows[0]
    assert Goal(13.9, None).chosen(rows) is rows[0]  # 12 and two standard errors are too many
    assert Goal(12.0, None).chosen(rows[:1]) is rows[0]
    assert Goal(11.9, None).chosen(rows[:1]) is None
    assert Goal(5.0, None).chosen(rows) is None


def steps_of(sizes: dict[float | None, tuple[float, float]], min_prob: float = 0.005) -> list[dict]:
    return [
        {
            "config": {"min_prob": min_prob, "tail_step": step}, "bytes_per_token": n_bytes, "bytes_per_token_se": 0.5,
            "table_bytes": 0, "kl": {"1": kl, "2": kl},
        }
        for step, (n_bytes, kl) in sizes.items()
    ]  # fmt: skip


def test_a_step_between_two_that_were_tried_is_tried_for_the_goal() -> None:
    """Bytes go with step^-1.5 and KL with step here, so that the step is known."""
    rows = steps_of({step: (2 * step**-1.5 - 1, step) for step in (0.2, 0.1)} | {None: (10.0, 0.5)})
    other_head = steps_of({0.14: (43.5, 2.0)}, min_prob=0.01)
    for_bytes = Goal(45.0, None).between([*rows, *other_head])
    step_at_45 = (2 / 45) ** (1 / 1.5)
    assert for_bytes == {"min_prob": 0.005, "tail_step": pytest.approx(0.2 * (step_at_45 / 0.2) ** 0.95, rel=4e-3)}
    for_kl = Goal(None, 0.15).between(rows)
    assert for_kl == {"min_prob": 0.005, "tail_step": pytest.approx(0.1 * 1.5**0.95, rel=2e-3)}
    assert Goal(2 * 0.2**-1.5 + 1e-3, None).between(rows) is None  # 0.2 is the step already
    assert Goal(1000.0, None).between(rows) is None  # nothing misses it
    assert Goal(5.0, None).between(rows) is None  # nothing keeps it
    assert Goal(10.0 + 1.1, None).between([row for row in rows if row["config"]["tail_step"] != 0.2]) is None


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> tuple[Path, Path]:
    """(folder of a tiny Llama with its tokenizer, one token a byte, and prompts with completions)."""
    folder = tmp_path_factory.mktemp("teacher")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<eos>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, eos_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    rows = [{"prompt": f"{i} + {i} = ", "completion": f"{2 * i}" + "!" * (i % 7)} for i in range(40)]
    dataset = folder / "prompts.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, dataset


@pytest.fixture
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitstore_trainer.plan.plan.UNFITTED", ({"k": 8}, {"k": 64}))
    monkeypatch.setattr("logitstore_trainer.plan.plan.RESIDUAL", ())
    predicted = {"head": "log", "k": 64, "min_prob": 0.002, "tail": "predicted", "tail_step": 0.13}
    monkeypatch.setattr("logitstore_trainer.plan.plan.PREDICTED", (predicted,))


def test_codecs_are_chosen_on_other_files_of_which_each_counts_the_same(
    logits_file: Path, tmp_path: Path, few_candidates
) -> None:
    """KL and bytes are those of the other files' texts; every text of the sample is fitted on."""
    kinds = [teacher_samples(5, 12, 20), teacher_samples(6, 3, 50)]
    files = [_saved(tmp_path / f"kind-{i}.safetensors", samples) for i, samples in enumerate(kinds)]
    arguments = ["--choose-on", *map(str, files), "--max-kl", "5", "--rows", "180", "--out", str(tmp_path / "plan")]
    assert main(["plan", "--logits", str(logits_file), *arguments]) == 0
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert plan["facts"]["rows_fitted"] == 30 * 29
    assert plan["facts"]["chosen_on"] == ["kind-0.safetensors", "kind-1.safetensors"]
    measured = [*kinds[0][::2][:5], *kinds[1][:2]]  # of about 90 rows each
    assert plan["facts"]["rows_measured"] == 5 * 19 + 2 * 49
    codec = logitstore.make_codec("topk", vocab_size=V, k=8)
    n_bytes = [len(codec.encode(codec.targets_from_logits(*text), text[1])) for text in (*kinds[0], *kinds[1])]
    assert plan["results"][0]["config"]["k"] == 8
    assert plan["results"][0]["bytes_per_token"] == pytest.approx(sum(n_bytes) / (12 * 19 + 3 * 49), rel=2e-3)
    errors = np.std(n_bytes[:12], ddof=1) * np.sqrt(12), np.std(n_bytes[12:], ddof=1) * np.sqrt(3)
    assert plan["results"][0]["bytes_per_token_se"] == pytest.approx(np.hypot(*errors) / (12 * 19 + 3 * 49), rel=0.05)
    kl = 0.0
    for logits, ids, _ in measured:
        z = logits.hidden.astype(np.float64)[:-1] @ logits.lm_head.astype(np.float64).T
        log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        read = codec.decode(codec.encode(codec.targets_from_logits(logits, ids), ids), ids)
        kl += float((np.exp(log_p) * (log_p - read.dense_logprobs())).sum())
    assert plan["results"][0]["kl"]["1"] == pytest.approx(kl / (5 * 19 + 2 * 49), rel=1e-4)


def test_a_file_of_another_teacher_to_choose_on_gets_one_line(
    logits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    samples = [(FactoredLogits(logits.hidden, logits.lm_head[:300]), ids % 300, None) for logits, ids, _ in
               teacher_samples(5, 3, 20)]  # fmt: skip
    other = _saved(tmp_path / "other.safetensors", samples)
    assert main(["plan", "--logits", str(logits_file), "--choose-on", str(other), "--max-kl", "1"]) == 2
    message = "sample.safetensors has a vocabulary of 307, other.safetensors of 300; a plan is made for one teacher"
    assert message in capsys.readouterr().err


def test_a_teacher_and_prompts_give_the_plan_that_their_logits_would(
    teacher: tuple[Path, Path], tmp_path: Path, few_candidates, capsys: pytest.CaptureFixture
) -> None:
    """The same rows from the teacher and from a file of its hidden states: the same bytes, and KLs that differ by what
    float16 costs. `--keep-prompt`, since a file has no mask."""
    folder, dataset = teacher
    goal = ["--max-bytes-per-token", "35", "--rows", "60"]
    from_teacher = ["--teacher", str(folder), "--dataset", str(dataset), "--device", "cpu", "--dtype", "float32"]
    assert main(["plan", *from_teacher, *goal, "--keep-prompt", "--out", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert "sample: 570 rows of 40 texts spread over prompts.jsonl" in printed
    assert f"use it: logitstore collect ... --tables {tmp_path / 'a'}" in printed
    a = json.loads((tmp_path / "a" / "plan.json").read_text())

    wanted = SourceSettings(teacher=str(folder), dataset=dataset, device="cpu", dtype="float32", keep_prompt=True)
    source = open_source(wanted, lambda line: None)
    texts = drawn_texts(source, planned_size(source.dataset, source.tokeniser, wanted), 4_000)
    hidden, head = [], source.teacher.model.lm_head.weight
    for text in texts:
        hidden.append(source.teacher.model.model(torch.from_numpy(text.input_ids)[None].long()).last_hidden_state[0])
    tensors = {
        "input_ids": torch.cat([torch.from_numpy(text.input_ids) for text in texts]),
        "sample_lengths": torch.tensor([len(text.input_ids) for text in texts]),
        "hidden": torch.cat(hidden),
        "lm_head": head.detach().clone(),
    }
    save_file(tensors, str(tmp_path / "sample.safetensors"))
    file = str(tmp_path / "sample.safetensors")
    assert main(["plan", "--logits", file, *goal, "--out", str(tmp_path / "b")]) == 0
    b = json.loads((tmp_path / "b" / "plan.json").read_text())
    assert len(a["results"]) == len(b["results"]) == 3
    assert a["chosen"]["config"] == b["chosen"]["config"]
    for row_a, row_b in zip(a["results"], b["results"], strict=True):
        assert row_a["config"] == row_b["config"]
        assert row_a["bytes_per_token"] == pytest.approx(row_b["bytes_per_token"], rel=0.02)
        assert row_a["kl"]["1"] == pytest.approx(row_b["kl"]["1"], rel=0.05)
    for facts in (a["facts"], b["facts"]):
        assert (facts["rows_fitted"], facts["rows_measured"]) == (
            a["facts"]["rows_fitted"],
            a["facts"]["rows_measured"],
        )


def test_only_rows_that_are_learned_are_measured(teacher: tuple[Path, Path], tmp_path: Path, few_candidates) -> None:
    """bytes_per_token and KL of the plan are those of its codec over the present rows of the texts it held out."""
    folder, dataset = teacher
    arguments = ["plan", "--teacher", str(folder), "--dataset", str(dataset), "--device", "cpu", "--dtype", "float32"]
    assert main([*arguments, "--max-bytes-per-token", "35", "--out", str(tmp_path / "p")]) == 0
    result = json.loads((tmp_path / "p" / "plan.json").read_text())
    codec = logitstore.load_codec(tmp_path / "p")
    wanted = SourceSettings(teacher=str(folder), dataset=dataset, device="cpu", dtype="float32")
    source = open_source(wanted, lambda line: None)
    texts = drawn_texts(source, planned_size(source.dataset, source.tokeniser, wanted), 4_000)
    model = source.teacher.model.double()
    n_bytes, kl, n_rows = 0, 0.0, 0
    for text in texts[4::5]:
        keep = text.loss_mask[1:]
        logits = model(torch.from_numpy(text.input_ids)[None].long()).logits[0].detach()
        targets = codec.targets_from_logits(logits, text.input_ids, keep)
        n_bytes += len(codec.encode(targets, text.input_ids))
        log_p = logits.log_softmax(-1).numpy()[:-1][keep]
        kl += float((np.exp(log_p) * (log_p - targets.dense_logprobs()[keep])).sum())
        n_rows += int(keep.sum())
    assert result["facts"]["rows_measured"] == n_rows
    assert result["chosen"]["bytes_per_token"] == pytest.approx(n_bytes / n_rows, rel=0.01)
    assert result["chosen"]["kl"]["1"] == pytest.approx(kl / n_rows, rel=0.02)


def test_a_second_plan_on_the_same_rows_skips_the_fit(
    teacher: tuple[Path, Path], few_candidates, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setenv("LOGITSTORE_CACHE", str(tmp_path))
    folder, dataset = teacher
    arguments = ["plan", "--teacher", str(folder), "--dataset", str(dataset), "--device", "cpu", "--max-kl", "1"]
    assert main([*arguments, "--no-cache"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert main(arguments) == 0
    assert "fitted tables found" not in capsys.readouterr().out
    (entry,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("logitstore.fit_codec.fit_tail_model", lambda *a, **k: pytest.fail("it fitted again"))
        assert main([*arguments, "--max-kl", "0.5"]) == 0
    assert f"fitted tables found in {entry}" in capsys.readouterr().out
    entry.write_bytes(entry.read_bytes()[:-1])
    assert main(arguments) == 0
    assert "do not have their checksum; fitting anew" in capsys.readouterr().out
    assert main(arguments) == 0
    assert f"fitted tables found in {entry}" in capsys.readouterr().out


def plan_of(kl: float, kl_se: float | None, *, rows_fitted: int = 50_000) -> Planned:
    config = {"k": 8, "head": "int8", "tail": "residual"}
    row = {"config": config, "bytes_per_token": 9.0, "table_bytes": 0, "kl": {"1": kl, "2": kl}}
    row["kl_se"] = {"1": kl_se, "2": kl_se}
    return Planned([row], row, None, rows_fitted, 1_020, 9, 1.0)


def test_small_samples_are_warned_of() -> None:
    goal = Goal(None, 0.5)
    assert warnings_of(plan_of(0.3, 0.02), goal) == []
    assert warnings_of(plan_of(0.3, 0.02, rows_fitted=900), goal) == [
        "fitted to only 900 rows; a fitted codec gets better with more"
    ]
    assert warnings_of(plan_of(0.3, 0.04), goal) == [
        "the KL at T = 1 is 0.3000 with a standard error of 0.04 (13%), measured on 1,020 rows of 9 texts; "
        "more of them make it surer"
    ]
    assert warnings_of(plan_of(0.3, None), goal) == [
        "the KL at T = 1 is measured on 1,020 rows of 9 texts, too few for a standard error"
    ]
    assert len(warnings_of(plan_of(0.3, 0.04), Goal(24.0, None))) == 2  # at T = 1 and at T = 2, which count together


def test_tables_count_where_a_kl_is_to_be_reached_in_the_fewest_bytes() -> None:
    rows = [
        {"bytes_per_token": 10.0, "table_bytes": 5_000_000, "kl": {"1": 0.2, "2": 0.1}},
        {"bytes_per_token": 60.0, "table_bytes": 0, "kl": {"1": 0.3, "2": 0.1}},
    ]
    assert Goal(None, 0.5, tokens=99_000).chosen(rows) is rows[1]
    assert Goal(None, 0.5, tokens=101_000).chosen(rows) is rows[0]
    assert Goal(None, 0.5).chosen(rows) is rows[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"prompt,completion\n",
            "not a safetensors file, or cut short; expected input_ids [N], sample_lengths",
        ),
        (save({"logits": torch.zeros(4, 9)}), "no tensor input_ids and no sample_lengths; expected input_ids [N]"),
        (
            save({"input_ids": torch.arange(4), "sample_lengths": torch.tensor([4])}),
            "no logits (tensors: input_ids, sample_lengths); expected input_ids [N]",
        ),
        (
            save({"input_ids": torch.arange(4), "sample_lengths": torch.tensor([4]), "logits": torch.zeros(4, 99)}),
            "sample.safetensors gives one text; a plan fits on some and measures on others",
        ),
    ],
    ids=["text", "no ids", "no logits", "one text"],
)
def test_a_wrong_file_is_said_in_one_line(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "sample.safetensors"
    path.write_bytes(content)
    assert main(["plan", "--logits", str(path), "--max-kl", "0.1", "--out", str(tmp_path / "plan")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "deserializ" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "plan needs a sample: --teacher M with --dataset F, or --logits FILE"),
        (["--teacher", "m"], "plan needs a sample: --teacher M with --dataset F, or --logits FILE"),
        (["--dataset", "f"], "plan needs a sample: --teacher M with --dataset F, or --logits FILE"),
        (["--logits", "x", "--teacher", "m"], "--logits is a sample already; leave out --teacher and --dataset"),
        (["--logits", "x", "--plan-rows", "9"], "--plan-rows is for --teacher with --dataset; of --logits every row"),
        (["--logits", "x", "--plan-rows", "0"], "--plan-rows must be at least 1, got 0"),
        (["--logits", "absent.safetensors"], "absent.safetensors: no such file"),
        (["--teacher", "./absent", "--dataset", "absent.jsonl"], "absent.jsonl: no such dataset file"),
    ],
)
def test_a_sample_is_a_file_or_a_teacher_with_prompts(arguments, message, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *arguments, "--max-kl", "0.1"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
