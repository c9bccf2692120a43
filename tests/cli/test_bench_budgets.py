"""`bench storage` on several kinds of text: codecs planned for budgets, kinds apart, and what the report says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from logitstore_trainer.bench.storage_details import choice, kinds_of_text
from logitstore_trainer.cli import main
from made_up_teacher import V, teacher_samples
from safetensors.torch import save_file


def _write(path: Path, seed: int, n_samples: int) -> str:
    samples = teacher_samples(seed, n_samples, 30)
    tensors = {
        "input_ids": torch.from_numpy(np.concatenate([ids for _, ids, _ in samples]).astype(np.int32)),
        "sample_lengths": torch.full((n_samples,), 30, dtype=torch.int32),
        "hidden": torch.from_numpy(np.concatenate([logits.hidden for logits, _, _ in samples])),
        "lm_head": torch.from_numpy(samples[0][0].lm_head.copy()),
    }
    save_file(tensors, str(path))
    return str(path)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, list[dict]]:
    """(output folder, results.json) of two kinds, a third that is unseen, and two budgets."""
    folder = tmp_path_factory.mktemp("budgets")
    kinds = [_write(folder / f"{name}.safetensors", seed, 4) for name, seed in (("maths", 101), ("chat", 102))]
    unseen = _write(folder / "code.safetensors", 103, 3)
    fit = _write(folder / "fit.safetensors", 0, 90)
    words = ["--logits", *kinds, "--unseen", unseen, "--calibration", fit, "--quick", "--budgets", "12", "24"]
    assert main(["bench", "storage", *words, "--out", str(folder / "out")]) == 0
    return folder / "out", json.loads((folder / "out" / "results.json").read_text())


def test_each_budget_has_a_codec_that_keeps_to_it_on_the_deciding_rows(measured) -> None:
    _, results = measured
    planned = {row["budget"]: row for row in results if row["budget"] and row["codec"] == "topk"}
    assert sorted(planned) == [12, 24]
    for budget, row in planned.items():
        assert row["bytes_per_token"] < 1.1 * budget  # other rows than those that decided
    assert planned[24]["kl_t1"] < planned[12]["kl_t1"]
    assert planned[24]["config"]["tail"] == "predicted"
    assert planned[24]["tail_rows_per_s"] > 0


def test_the_same_head_with_a_uniform_tail_is_measured_beside_it(measured) -> None:
    _, results = measured
    predicted = next(row for row in results if row["budget"] == 24 and row["codec"] == "topk")
    head = {name: predicted["config"][name] for name in ("head", "head_step", "k", "min_prob")}
    (uniform,) = (
        row for row in results if row["config"].get("tail") == "residual" and head.items() <= row["config"].items()
    )
    assert "tables" in uniform["config"]
    assert uniform["bytes_per_token"] <= predicted["bytes_per_token"]
    assert uniform["kl_t2"] > predicted["kl_t2"]


def test_kinds_are_apart_and_the_unseen_one_counts_nowhere_else(measured) -> None:
    out, results = measured
    facts = json.loads((out / "environment.json").read_text())
    assert facts["rows_measured"] == 2 * 4 * 29
    assert facts["rows_fitted"] == 72 * 29
    assert 0 < facts["seconds_of_fit"] < facts["seconds"]
    for row in results:
        asked = [("maths", False), ("chat", False), *([("code", True)] if row["table_bytes"] else [])]
        assert [(name, kind["unseen"]) for name, kind in row["kinds"].items()] == asked
        seen = [row["kinds"][name] for name in ("maths", "chat")]
        assert row["bytes_per_token"] == pytest.approx(np.mean([kind["bytes_per_token"] for kind in seen]))
        if row["kl_t1"] is not None:
            assert row["kl_t1"] == pytest.approx(np.mean([kind["kl_t1"] for kind in seen]))
            assert all(kind["kl_t1"] > 0 for kind in row["kinds"].values())


def test_tables_are_counted_once_in_the_container(measured) -> None:
    _, results = measured
    row = next(row for row in results if row["budget"] == 24 and row["codec"] == "topk")
    beyond = (row["container_bytes_per_token"] - row["bytes_per_token"]) * 2 * 4 * 29 - row["table_bytes"]
    assert 4 * 8 * 30 < beyond < 4 * 8 * 30 + 2 * 6000  # ids of the text, and two files of Parquet


def test_the_head_s_directions_are_measured_at_the_same_bytes(measured) -> None:
    _, results = measured
    rows = [row for row in results if row["codec"] == "SVD of the head"]
    assert [(row["budget"], row["config"]["rank"]) for row in rows] == [(12, 9)]  # 21 are more than the head's 12
    assert rows[0]["bytes_per_token"] <= 12


def test_the_page_says_what_to_choose(measured) -> None:
    out, results = measured
    page = (out / "report.html").read_text()
    for title in ("What to choose", "Kinds of text", "The tail", "code (in no fit)"):
        assert title in page
    text = choice(results).body[0].text
    assert "For 12 bytes a token (" in text
    assert "For 24 bytes a token (" in text
    assert choice([row for row in results if row["budget"] is None]) is None
    assert kinds_of_text([{**row, "kinds": {"maths": row["kinds"]["maths"]}} for row in results]) is None


def test_made_up_and_few_rows_are_not_planned_for(tmp_path, capsys) -> None:
    path = _write(tmp_path / "few.safetensors", 1, 4)
    assert main(["bench", "storage", "--logits", path, "--quick", "--out", str(tmp_path / "out")]) == 0
    assert "No codec was planned for a budget: there are 58 rows to fit on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--unseen", "x.safetensors"], "--unseen needs --logits"),
        (["--choose-on", "x.safetensors"], "--choose-on needs --logits"),
        (["--logits", "a.safetensors", "b.safetensors"], "several files of logits need --calibration"),
        (["--logits", "a.safetensors", "x/a.safetensors", "--calibration", "f"], "need different names"),
        (["--logits", "a.safetensors", "--budgets", "0"], "--budgets are bytes a token, above 0; got 0"),
    ],
)
def test_bad_requests_are_one_line(words, message, tmp_path, capsys) -> None:
    assert main(["bench", "storage", *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_kinds_of_another_teacher_are_refused(tmp_path, capsys) -> None:
    path = _write(tmp_path / "a.safetensors", 1, 2)
    save_file(
        {
            "input_ids": torch.zeros(6, dtype=torch.int32),
            "sample_lengths": torch.tensor([6]),
            "logits": torch.zeros(6, V + 1),
        },
        str(tmp_path / "b.safetensors"),
    )
    words = ["--logits", path, str(tmp_path / "b.safetensors"), "--calibration", path, "--out", str(tmp_path / "out")]
    assert main(["bench", "storage", *words]) == 2
    assert f"a vocabulary of {V + 1}" in capsys.readouterr().err
