"""Real text and a trained teacher, where ../shared lies next to the checkout; skipped elsewhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from logitstore_trainer.cli import main
from transformers import AutoModelForCausalLM, AutoTokenizer

import logitstore

SHARED = Path(__file__).parents[3] / "shared" / "fixtures"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not (SHARED / "teacher-18m").is_dir(), reason="needs ../shared/fixtures next to the checkout"),
]


def test_gsm8k_rows_from_a_trained_teacher(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = (SHARED / "gsm8k-eval.jsonl").read_text().splitlines()[:12]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(rows) + "\n")
    out = tmp_path / "teacher_logits.parquet"
    teacher = str(SHARED / "teacher-18m")
    assert main(["collect", "--teacher", teacher, "--dataset", str(tmp_path / "gsm8k.jsonl"), "--out", str(out)]) == 0
    store = logitstore.open(out)
    assert len(store) == 12
    report = store.verify()
    assert report.ok
    # a teacher that learned GSM8K gives its labels far more than their neighbours
    assert report.label_probability[0] > 0.3
    assert max(report.label_probability[-1], report.label_probability[1]) < 0.1

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    kls, losses = [], []
    for sample in store:
        with torch.no_grad():
            logp_LV = model(torch.from_numpy(sample.input_ids)[None].long()).logits[0].double().log_softmax(1).numpy()
        present = np.flatnonzero(sample.targets.present)
        stored = sample.targets.dense_logprobs()[present]
        kls.append((np.exp(logp_LV[present]) * (logp_LV[present] - stored)).sum(axis=1))
        losses.append(-logp_LV[present, sample.input_ids[present + 1]])
    assert 0 < np.concatenate(kls).mean() < 0.3
    assert 1.5 < np.concatenate(losses).mean() < 2.4

    assert main(["head", str(out), "--rows", "3", "--top", "2"]) == 0
    printed = capsys.readouterr().out
    first_label = int(store[0].input_ids[np.flatnonzero(store[0].targets.present)[0] + 1])
    assert repr(AutoTokenizer.from_pretrained(teacher).decode([first_label])) in printed
