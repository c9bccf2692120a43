"""`logitstore plan` on a made-up teacher: what it measures, what it recommends, and what it leaves for collect."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from logitstore_trainer.cli import main
from logitstore_trainer.plan.plan import Goal, mark_frontier
from made_up_teacher import V, teacher_samples
from safetensors.torch import save_file

import logitstore


@pytest.fixture(scope="module")
def logits_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "sample.safetensors"
    samples = teacher_samples(0, 30, 30)
    tensors = {
        "input_ids": torch.from_numpy(np.concatenate([ids for _, ids, _ in samples]).astype(np.int32)),
        "sample_lengths": torch.full((30,), 30, dtype=torch.int32),
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
    assert best["bytes_per_token"] <= 24
    for row in result["results"]:
        if row["bytes_per_token"] <= 24:
            assert sum(row["kl"].values()) >= sum(best["kl"].values())
    assert len(result["results"]) == 23
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
    n_bytes, kl, n_rows = 0, 0.0, 0
    for logits, ids, _ in teacher_samples(0, 30, 30)[4::5][::2]:
        targets = codec.targets_from_logits(logits, ids)
        n_bytes += len(codec.encode(targets, ids))
        z = logits.hidden.astype(np.float64)[:-1] @ logits.lm_head.astype(np.float64).T
        log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        kl += float((np.exp(log_p) * (log_p - targets.dense_logprobs())).sum())
        n_rows += len(ids) - 1
    assert best["bytes_per_token"] == pytest.approx(n_bytes / n_rows)
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
    assert "No configuration reaches a KL of at most 1e-07 nats at T = 2. The nearest:" in capsys.readouterr().out


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


def test_what_is_on_the_frontier() -> None:
    goal = Goal(max_bytes_per_token=None, max_kl=0.5)
    rows = [{"bytes_per_token": b, "kl": {"1": kl, "2": 0.0}} for b, kl in ((10, 0.3), (12, 0.4), (20, 0.1), (20, 0.2))]
    mark_frontier(rows, goal)
    assert [row["frontier"] for row in rows] == [True, False, True, False]
    assert goal.chosen(rows) is rows[0]
    assert Goal(15.0, None).chosen(rows) is rows[0]
    assert Goal(5.0, None).chosen(rows) is None
