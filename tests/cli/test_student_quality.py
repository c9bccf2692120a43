"""The script that trains students from every kind of target: shares, order, and a whole run of a tiny teacher."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_teacher import teacher_samples
from safetensors.torch import save_file

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch):
    """(student_quality, student_arms) as modules, a short training of small students."""
    monkeypatch.syspath_prepend(str(QUALITY))
    import student_arms
    import student_quality

    for name, value in {"LAYERS": 1, "WIDTH": 8, "HEADS": 2, "MLP": 16, "STEPS": 12, "WARMUP": 2}.items():
        monkeypatch.setattr(student_quality, name, value)
    yield student_quality, student_arms
    for name in ("student_quality", "student_arms"):
        sys.modules.pop(name, None)


def rows_of(seed: int, **kls: float) -> list[dict]:
    names = {"labels": "labels", "full": "full logits", "ours": "24 bytes"}
    return [
        {"arm": names[name], "seed": seed, "temperature": 1.0, "kl_t1": kl, "kl_t2": 0.0, "steps": 160}
        for name, kl in kls.items()
    ]


def test_a_share_is_the_way_from_labels_to_full_logits_by_seed(scripts) -> None:
    quality, arms = scripts
    rows = [*rows_of(1, labels=4.0, full=3.0, ours=3.1), *rows_of(2, labels=4.4, full=3.4, ours=3.4)]
    rows += rows_of(3, labels=4.0, ours=1.0)  # no full logits yet: no share
    ours = next(arm for arm in arms.ARMS if arm.name == "24 bytes" and arm.temperature == 1)
    assert quality.shares(rows, ours) == pytest.approx([0.9, 1.0])
    # two runs: 12.706 * sd / sqrt(2), sd = 0.1 / sqrt(2)
    assert quality.share_text([0.9, 1.0]) == f"95.0% +- {100 * 12.706 * 0.05:.1f}"
    assert (quality.share_text([0.987]), quality.share_text([])) == ("98.7%", "-")


def test_the_readme_s_table_and_advice_are_those_of_the_committed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(QUALITY))
    import student_quality

    readme = " ".join((QUALITY.parents[1] / "README.md").read_text().split())
    rows = student_quality.read_rows(student_quality.ROWS)
    for line in student_quality.table(rows):
        assert f"| {' | '.join(line)} |" in readme
    kls = []
    for arm, temperature in (("full logits", 1.0), ("full logits", 2.0), ("labels", 1.0)):
        own = [row for row in rows if (row["arm"], row["temperature"]) == (arm, temperature)]
        kls += [np.mean([row[name] for row in own]) for name in ("kl_t1", "kl_t2")]
    advice = (
        "From full logits, T = 1 leaves a KL of {:.3f} at T = 1 and {:.3f} at T = 2; T = 2 leaves {:.3f} and {:.3f}; "
        "labels alone leave {:.3f} and {:.3f}."
    )
    assert advice.format(*kls) in readme
    assert kls[0] < kls[2]
    assert kls[3] < kls[1]
    for name in ("student_quality", "student_arms"):
        sys.modules.pop(name, None)


def test_rows_of_other_lengths_do_not_count_and_a_cut_one_is_run_again(scripts, tmp_path: Path) -> None:
    quality, _ = scripts
    path = tmp_path / "rows.jsonl"
    whole = json.dumps({"steps": quality.STEPS, "seed": 1}) + "\n"
    path.write_text(json.dumps({"steps": quality.STEPS + 1}) + "\n" + whole + whole[:7])
    assert quality.read_rows(path) == [{"steps": quality.STEPS, "seed": 1}]
    assert path.read_text().endswith("}\n" + whole)
    assert quality.read_rows(tmp_path / "none.jsonl") == []


def test_every_sequence_comes_once_a_pass_and_seeds_differ(scripts) -> None:
    _, arms = scripts
    order = arms.batches(10, 2, 10, seed=1)
    assert sorted(number for step in order[:5] for number in step) == list(range(10))
    assert sorted(number for step in order[5:] for number in step) == list(range(10))
    assert all(sum(number < 5 for number in step) == 1 for step in order)  # as much of either kind of text
    assert order == arms.batches(10, 2, 10, seed=1) != arms.batches(10, 2, 10, seed=2)


@pytest.fixture
def rows_folder(tmp_path: Path) -> Path:
    """What codec_rows.py would write, of the made-up teacher."""
    folder = tmp_path / "rows"
    folder.mkdir()
    names = ["fit", "train", *(f"choose-{kind}" for kind in ("gsm8k", "instructions", "documentation"))]
    names += ["measured-gsm8k", "measured-instructions"]
    for seed, name in enumerate(names):
        samples = teacher_samples(seed, 40 if seed < 2 else 4, 30)
        tensors = {
            "input_ids": torch.from_numpy(np.concatenate([ids for _, ids, _ in samples]).astype(np.int32)),
            "sample_lengths": torch.full((len(samples),), 30, dtype=torch.int32),
            "hidden": torch.from_numpy(np.concatenate([logits.hidden for logits, _, _ in samples])).half(),
            "lm_head": torch.from_numpy(samples[0][0].lm_head.copy()).half(),
        }
        save_file(tensors, str(folder / f"{name}.safetensors"))
    return folder


def test_a_run_trains_measures_and_is_not_run_again(
    scripts, rows_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    quality, _ = scripts
    monkeypatch.setenv("LOGITSTORE_CACHE", str(tmp_path / "cache"))
    results = tmp_path / "rows.jsonl"

    def run(*arms: str) -> list[dict]:
        given = argparse.Namespace(rows=rows_folder, out=tmp_path / "out", seeds=[1], arms=list(arms), results=results)
        assert quality.run(given) == 0
        return [json.loads(line) for line in results.read_text().splitlines()]

    first = run("labels", "full logits", "top 16, bucket")
    assert [(row["arm"], row["temperature"]) for row in first] == [
        ("labels", 1.0), ("full logits", 1.0), ("top 16, bucket", 1.0), ("full logits", 2.0),
    ]  # fmt: skip
    kls = {row["arm"]: row["kl_t1"] for row in first if row["temperature"] == 1}
    assert kls["full logits"] < kls["top 16, bucket"]
    assert kls["full logits"] < kls["labels"]
    assert first[1]["bytes_per_token"] == 2 * 307
    again = run("labels", "full logits", "24 bytes")
    assert again[:4] == first
    assert [(row["arm"], row["temperature"]) for row in again[4:]] == [("24 bytes", 1.0), ("24 bytes", 2.0)]
    assert again[4]["bytes_per_token"] < 24
    assert "24 bytes" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no arm is called x; there are 16 bytes"):
        run("x")


def test_the_measure_is_the_plain_formula(scripts, rows_folder: Path) -> None:
    quality, _ = scripts
    from logitstore_trainer.bench.logits_file import LogitsFile

    file = LogitsFile(rows_folder / "measured-gsm8k.safetensors")
    model = quality.new_student(file[0].logits.lm_head, 0).eval()
    found = quality.measured(model, file)
    kl, loss, same, n = 0.0, 0.0, 0, 0
    for number in range(len(file)):
        sample = file[number]
        ids = torch.from_numpy(sample.input_ids).long()
        z = (sample.logits.hidden.double() @ sample.logits.lm_head.double().T)[:-1]
        with torch.no_grad():
            s = model(input_ids=ids[None]).logits[0, :-1].double()
        kl += float((z.softmax(-1) * (z.log_softmax(-1) - s.log_softmax(-1))).sum())
        loss += float(torch.nn.functional.cross_entropy(s, ids[1:], reduction="sum"))
        same += int((z.argmax(-1) == s.argmax(-1)).sum())
        n += len(z)
    assert found["kl_t1"] == pytest.approx(kl / n, rel=1e-4)
    assert found["loss"] == pytest.approx(loss / n, rel=1e-5)
    assert found["same_first"] == same / n
