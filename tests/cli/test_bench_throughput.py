"""`bench throughput`: rows, bytes and the verdict, recomputed from a store of known samples; and the clock itself."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from logitstore_trainer.bench import throughput
from logitstore_trainer.bench.environment import environment, environment_rows, write_json
from logitstore_trainer.bench.timing import Times, interleaved_times, median_call

import logitstore

V = 64
LENGTHS = (9, 12, 7, 12, 12, 12)


@pytest.fixture(scope="module")
def store_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s.parquet"
    rng = np.random.default_rng(0)
    codec = logitstore.make_codec("topk", vocab_size=V, k=4)
    with logitstore.create(path, logitstore.StoreSpec(codec=codec, vocab_size=V)) as writer:
        for sample_id, length in enumerate(LENGTHS):
            ids = rng.integers(0, V, length)
            loss_mask = np.arange(length) >= 3  # rows 0 and 1 are absent
            logits = rng.standard_normal((length, V)).astype(np.float32)
            targets = codec.targets_from_logits(logits, ids, keep_mask=loss_mask[1:])
            writer.append(sample_id, ids, targets, loss_mask=loss_mask)
    return path


def _run(store_path, out, *words):
    parser = argparse.ArgumentParser()
    throughput.add_arguments(parser)
    common = ["--out", str(out), "--student", "llama:layers=1,width=16,heads=1", "--device", "cpu", "--quick"]
    return throughput.run(parser.parse_args([str(store_path), *common, *words]))


def test_rows_and_bytes_of_each_stage(store_path, tmp_path, capsys):
    assert _run(store_path, tmp_path / "out", "--batch-size", "3") == 0
    results = {row["stage"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert list(results) == ["read", "decode", "collate", "loss", "step"]
    # two batches of three samples; round 0 warms up, rounds 1 to 3 work on the second, the first and the second
    store = logitstore.open(store_path)
    counted = [3, 4, 5, 0, 1, 2, 3, 4, 5]
    n_present = sum(LENGTHS[i] - 3 for i in counted)
    blob_bytes = sum(len(store.read_stored(i)[0].blob) for i in counted)
    stored_bytes = blob_bytes + sum(4 * LENGTHS[i] + math.ceil(LENGTHS[i] / 8) for i in counted)
    slots = 3 * 12 * 3  # batches are padded to 12 tokens each
    batch_bytes = slots * (3 * 8 + 4 * 5 + 4 * 4)  # three int64 columns, four entries of 5 bytes, four row numbers
    per_row = {name: row["bytes_per_s"] / row["tokens_per_s"] * n_present for name, row in results.items()}
    assert per_row["read"] == pytest.approx(stored_bytes)
    assert per_row["decode"] == pytest.approx(blob_bytes)
    assert per_row["collate"] == pytest.approx(batch_bytes)
    assert per_row["loss"] == pytest.approx(2 * slots * V * 4)
    assert per_row["step"] == pytest.approx(stored_bytes)
    for row in results.values():
        assert row["calls"] == 3
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        # numpy's quantiles of three values say what the values were
        middle = row["p50_ms"]
        least = (row["p20_ms"] - 0.4 * middle) / 0.6
        most = middle + (row["p80_ms"] - middle) / 0.6
        assert row["tokens_per_s"] == pytest.approx(n_present / (least + middle + most) * 1e3)
    facts = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert (facts["samples_a_batch"], facts["distinct_batches"], facts["device"]) == (3, 2, "cpu")
    assert facts["student_parameters"] > V * 16
    printed = capsys.readouterr().out
    assert facts["bottleneck"] in printed
    assert "<svg " in (tmp_path / "out" / "report.html").read_text()


def _stage_times(**milliseconds):
    return {stage: Times((value / 1e3,)) for stage, value in milliseconds.items()}


def test_the_verdict_names_the_slower_side():
    step = throughput.bottleneck(_stage_times(read=1.0, decode=3.0, collate=1.0, loss=25.0, step=100.0))
    assert step == (
        "The bottleneck is the step: 100 ms, of which the loss is 25%; reading, decoding and collating its batch on "
        "one core takes 5 ms, 5.0% of the step."
    )
    data = throughput.bottleneck(_stage_times(read=1.0, decode=30.0, collate=9.0, loss=1.0, step=10.0))
    assert data == (
        "The bottleneck is the data: reading, decoding and collating its batch on one core takes 40 ms (decode most, "
        "30 ms), the step 10 ms; prefetch with workers or threads."
    )


def test_bad_requests_are_refused(store_path, tmp_path):
    with pytest.raises(ValueError, match="--batch-size must be at least 1, got 0"):
        _run(store_path, tmp_path, "--batch-size", "0")
    with pytest.raises(FileNotFoundError, match="no store at"):
        _run(tmp_path / "nothing.parquet", tmp_path)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="--out .*file is a file; name a folder for results.json and report.html"):
        _run(store_path, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(ValueError, match="--device is 'nonsense', expected auto, cpu, cuda, cuda:N or mps"):
        _run(store_path, tmp_path, "--device", "nonsense")


@pytest.mark.parametrize("kind", ["sampled", "dense"])
def test_stores_of_samples_and_of_predicted_tails_are_measured_with_the_loss_that_suits_them(
    tmp_path, capsys, kind: str
):
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, V, 12) for _ in range(4)]
    logits = [rng.standard_normal((12, V)).astype(np.float32) for _ in texts]
    if kind == "sampled":
        codec = logitstore.make_codec("varopt", vocab_size=V, k=5)
    else:
        codec = logitstore.make_codec("topk", vocab_size=V, k=4, head="log", tail="predicted", tail_step=0.5)
        codec = logitstore.calibrate(codec, logits, texts)
    path = tmp_path / "s.parquet"
    with logitstore.create(path, logitstore.StoreSpec(codec=codec, vocab_size=V)) as writer:
        for sample_id, (rows, ids) in enumerate(zip(logits, texts, strict=True)):
            writer.append(sample_id, ids, codec.targets_from_logits(rows, ids))
    assert _run(path, tmp_path / "out", "--batch-size", "2") == 0
    results = {row["stage"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert list(results) == ["read", "decode", "collate", "loss", "step"]
    store = logitstore.open(path)
    counted = [2, 3, 0, 1, 2, 3]  # rounds 1 to 3 of two batches of two
    blob_bytes = sum(len(store.read_stored(i)[0].blob) for i in counted)
    n_present = 11 * len(counted)
    decode = results["decode"]
    assert decode["bytes_per_s"] / decode["tokens_per_s"] * n_present == pytest.approx(blob_bytes)
    facts = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert (facts["tail"], facts["temperature"]) == (kind, 1.0 if kind == "sampled" else 2.0)
    assert facts["bottleneck"] in capsys.readouterr().out


def test_candidates_are_called_in_turn_and_warm_up_does_not_count():
    calls = []
    times = interleaved_times(
        {"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i))},
        repeats=2,
        warmup=1,
        synchronize=lambda: calls.append("wait"),
        after_each=lambda: calls.append("done"),
    )
    one = [step for i in range(3) for name in "ab" for step in ("wait", (name, i), "wait", "done")]
    assert calls == one
    assert {name: len(found.seconds) for name, found in times.items()} == {"a": 2, "b": 2}


def test_quantiles_are_in_milliseconds():
    times = Times((0.001, 0.002, 0.003, 0.004, 0.005, 0.006))
    assert times.as_json() == {
        "p20_ms": pytest.approx(2.0), "p50_ms": pytest.approx(3.5), "p80_ms": pytest.approx(5.0), "calls": 6,
    }  # fmt: skip
    assert times.p50_s == pytest.approx(0.0035)


def test_median_call_calls_three_times_and_keeps_the_result():
    calls = []
    result, seconds = median_call(lambda: calls.append(1) or len(calls))
    assert (result, len(calls)) == (3, 3)
    assert 0 <= seconds < 1


def test_json_is_written_in_one_step_and_has_no_nan(tmp_path):
    path = write_json(tmp_path / "new" / "results.json", [{"a": 1.5, "b": None}])
    assert json.loads(path.read_text()) == [{"a": 1.5, "b": None}]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, [{"a": float("nan")}])
    assert json.loads(path.read_text()) == [{"a": 1.5, "b": None}]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_environment_names_hardware_versions_and_the_callers_facts():
    facts = environment(rows_measured=7, nothing=None)
    assert facts["rows_measured"] == 7
    assert facts["torch"] == torch.__version__
    assert facts["cores"] >= 1
    assert facts["cpu"]
    rows = dict(environment_rows(facts))
    assert rows["rows_measured"] == "7"
    assert "nothing" not in rows
