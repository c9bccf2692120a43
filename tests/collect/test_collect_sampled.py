"""`logitstore collect` with the codecs that sample: the same draws whatever the batches, and what is drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from logitstore_trainer.cli import main
from logitstore_trainer.collect.reduction import reduced_targets, reduction_for
from transformers import AutoModelForCausalLM

import logitstore
from logitstore.codecs.conformance import require_same


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i} + {i} = ", "completion": f"{2 * i}" + "!" * (i % 7)} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def collect(teacher: Path, dataset: Path, out: Path, *options: str) -> int:
    arguments = ["--teacher", str(teacher), "--dataset", str(dataset), "--out", str(out)]
    return main(["collect", *arguments, "--device", "cpu", "--dtype", "float32", *options])


@pytest.mark.parametrize(
    "options",
    [
        ["--codec", "varopt", "--set", "k=9", "--set", "seed=3"],
        ["--codec", "varopt", "--set", "head=int8"],
        ["--codec", "varopt", "--set", "max_weight=0.05"],
        ["--codec", "rskd", "--set", "draws=20"],
    ],
    ids=lambda options: "-".join(options[1::2]),
)
@pytest.mark.parametrize("keep_prompt", [False, True])
def test_the_store_holds_the_codec_s_own_samples_of_the_teacher(
    teacher_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: list, keep_prompt: bool
) -> None:
    out = tmp_path / "x.parquet"
    kept = ["--keep-prompt"] if keep_prompt else []
    assert collect(teacher_folder, prompts, out, "--batch-size", "3", *options, *kept) == 0
    store = logitstore.open(out)
    assert store.verify().ok
    assert len(store) == 20
    model = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    codec, n_same, n_rows = store.spec.codec, 0, 0
    for sample in store:
        with torch.no_grad():
            logits_LW = model(torch.from_numpy(sample.input_ids)[None].long()).logits[0]
        keep_mask = np.ones(len(sample.input_ids) - 1, bool) if keep_prompt else sample.loss_mask[1:]
        expected = codec.targets_from_logits(logits_LW, sample.input_ids, keep_mask)
        np.testing.assert_array_equal(sample.targets.present, keep_mask)
        # batched and single forwards differ in the last digit, so a point next to a boundary may draw a neighbour
        a, b = sample.targets.dense_logprobs(), expected.dense_logprobs()
        n_same += int((np.isneginf(a) == np.isneginf(b)).all(axis=1)[keep_mask].sum())
        n_rows += int(keep_mask.sum())
    assert n_same >= 0.98 * n_rows
    assert main(["head", str(out), "--sample", "3", "--rows", "4"]) == 0
    assert "in the tail" not in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    assert f"name={codec.config['name']}" in capsys.readouterr().out


def test_a_second_seed_is_another_collection(
    teacher_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "x.parquet"
    assert collect(teacher_folder, prompts, out, "--codec", "rskd") == 0
    assert collect(teacher_folder, prompts, out, "--codec", "rskd", "--set", "seed=1") == 2
    assert "seed=0, name=rskd" in (error := capsys.readouterr().err) or "seed=0" in error
    assert collect(teacher_folder, prompts, tmp_path / "y.parquet", "--codec", "rskd", "--set", "seed=1") == 0
    a, b = logitstore.open(out)[0].targets, logitstore.open(tmp_path / "y.parquet")[0].targets
    assert not (len(a.ids) == len(b.ids) and np.array_equal(a.ids, b.ids))


def test_options_of_another_codec_are_refused(
    teacher_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert collect(teacher_folder, prompts, tmp_path / "x.parquet", "--codec", "rskd", "--set", "k=4") == 2
    assert "codec 'rskd' has no option 'k' in this version; it has: vocab_size, draws, seed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["varopt", "rskd"])
def test_neither_chunks_nor_batches_decide_what_is_drawn(name: str) -> None:
    """The reduction of a batch, handed the same logits in chunks of any size, is targets_from_logits of each text."""
    rng = np.random.default_rng(0)
    codec = logitstore.make_codec(name, vocab_size=60)
    texts = [rng.integers(0, 60, length).astype(np.int32) for length in (9, 2, 14)]
    logits = [torch.from_numpy(rng.standard_normal((len(text), 64)).astype(np.float32)) for text in texts]
    keep_masks = [rng.random(8) < 0.5, None, rng.random(13) < 0.5]
    kept = [np.arange(len(t) - 1) if k is None else np.flatnonzero(k) for t, k in zip(texts, keep_masks, strict=True)]
    rows_NV = torch.cat([logits_LV[rows] for logits_LV, rows in zip(logits, kept, strict=True)])
    for chunk_rows in (1, 4, 1000):
        reduce = reduction_for(codec, texts, keep_masks)
        parts = [reduce(chunk_nV) for chunk_nV in rows_NV.split(chunk_rows)]
        columns = [torch.cat(column).split([len(rows) for rows in kept]) for column in zip(*parts, strict=True)]
        for i, text in enumerate(texts):
            own = [column[i] for column in columns]
            targets = reduced_targets(codec, own, input_ids=text, keep_mask=keep_masks[i])
            require_same(targets, codec.targets_from_logits(logits[i], text, keep_masks[i]), f"text {i}")


@pytest.mark.parametrize("name", ["varopt", "rskd"])
@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_logits_that_are_no_distribution_are_refused(name: str, fault: float) -> None:
    codec = logitstore.make_codec(name, vocab_size=60)
    logits_nV = torch.zeros(4, 60)
    logits_nV[2, 7] = fault
    reduce = reduction_for(codec, [np.arange(5, dtype=np.int32)], [None])
    with pytest.raises(ValueError, match="logits of row 2 have NaN, \\+inf or no finite value"):
        reduce(logits_nV)
