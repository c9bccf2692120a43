"""`bench storage` on a tiny file: every number of results.json recomputed another way, in plain float64."""

import argparse
import json
import sys
import types
from itertools import pairwise

import numpy as np
import pytest
import torch
import zstandard
from logitstore_trainer.bench import storage
from logitstore_trainer.bench.candidates import StoreCandidate
from logitstore_trainer.bench.logits_file import LogitsFile, LogitsSample
from logitstore_trainer.bench.measure import Kind, measure, within_row_limit
from logitstore_trainer.bench.readings import missing_mass_uniform
from logitstore_trainer.bench.rivals import DistillKit, rivals
from logitstore_trainer.bench.storage_names import configuration_text
from logitstore_trainer.bench.storage_report import result_table
from logitstore_trainer.report import cell_text
from safetensors.numpy import save_file

import logitstore
from logitstore.errors import CorruptionError, FormatError, SpecMismatchError

V = 300
LENGTHS = (9, 14, 6, 11, 8, 13)
KEYS = {
    "codec", "config", "bytes_per_token", "container_bytes_per_token", "table_bytes", "kl_t1", "kl_t2", "kl_t1_se",
    "kl_t2_se", "tv_t1", "tv_t2", "gradient_error_t1", "gradient_error_t1_se", "encode_tokens_per_s",
    "decode_tokens_per_s", "tail_rows_per_s", "budget", "bytes_of", "tail_mass_error", "logprobs_at_error", "kinds",
}  # fmt: skip


def _tensors(lengths=LENGTHS, vocab_size=V, seed=0):
    rng = np.random.default_rng(seed)
    n_tokens = sum(lengths)
    return {
        "input_ids": rng.integers(0, vocab_size, n_tokens),
        "sample_lengths": np.array(lengths),
        "logits": (3 * rng.standard_normal((n_tokens, vocab_size))).astype(np.float32),
    }


def _run(tmp_path, *words):
    parser = argparse.ArgumentParser()
    storage.add_arguments(parser)
    assert storage.run(parser.parse_args([*words, "--out", str(tmp_path / "out")])) == 0
    return tmp_path / "out"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(samples as (input_ids, logits) of the measured half, rows of results.json, output folder)."""
    folder = tmp_path_factory.mktemp("storage")
    tensors = _tensors()
    save_file(tensors, str(folder / "logits.safetensors"))
    out = _run(folder, "--logits", str(folder / "logits.safetensors"))
    bounds = np.concatenate([[0], np.cumsum(LENGTHS)])
    samples = [(tensors["input_ids"][a:b], tensors["logits"][a:b]) for a, b in pairwise(bounds[3:])]
    return samples, json.loads((out / "results.json").read_text()), out


def _log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def _truth_against(samples, log_q_of, temperature):
    """(mean KL, its standard error, mean TV) over the rows of the samples."""
    kl_sums, tv_sums, rows = [], [], []
    for index, (_, logits) in enumerate(samples):
        logp, logq = _log_softmax(logits[:-1] / temperature), np.asarray(log_q_of(index, temperature), np.float64)
        p = np.exp(logp)
        kl_sums.append((p * (logp - logq)).sum())
        tv_sums.append(0.5 * np.abs(p - np.exp(logq)).sum())
        rows.append(len(p))
    kl_sums, rows = np.array(kl_sums), np.array(rows)
    mean = kl_sums.sum() / rows.sum()
    se = np.sqrt(len(rows) / (len(rows) - 1) * ((kl_sums - mean * rows) ** 2).sum()) / rows.sum()
    return mean, se, sum(tv_sums) / rows.sum()


def _check_gradient_error(row, samples, log_q_of):
    errors = []
    for index, (_, logits) in enumerate(samples):
        difference = np.exp(_log_softmax(logits[:-1])) - np.exp(np.asarray(log_q_of(index, 1.0), np.float64))
        errors.append(np.square(difference).sum(axis=1))
    assert row["gradient_error_t1"] == pytest.approx(np.concatenate(errors).mean(), rel=1e-5, abs=1e-12)
    assert row["gradient_error_t1_se"] > 0


def _check_fidelity(row, samples, log_q_of):
    _check_gradient_error(row, samples, log_q_of)
    for temperature in (1, 2):
        kl, se, tv = _truth_against(samples, log_q_of, float(temperature))
        assert row[f"kl_t{temperature}"] == pytest.approx(kl, rel=1e-6, abs=1e-9)
        assert row[f"kl_t{temperature}_se"] == pytest.approx(se, rel=1e-5, abs=1e-9)
        assert row[f"tv_t{temperature}"] == pytest.approx(tv, rel=1e-6, abs=1e-7)


def test_rows_have_exactly_the_documented_keys_and_the_documented_codecs(measured):
    _, results, _ = measured
    assert all(set(row) == KEYS for row in results)
    found = [(row["config"]["head"], row["config"]["k"]) for row in results if row["codec"] == "topk"]
    flat = [("int8", 8), ("int8", 16), ("int8", 32), ("int8", 64), ("int8", 128)]
    flat += [("fp8", 64), ("fp16", 64)]
    assert found == [*flat, ("log", 16), ("log", 64), ("sqrtp", 64)]
    assert [configuration_text(row["config"]) for row in results[7:13]] == [
        "log 0.5 k=16 fitted", "log 0.5 k=64 fitted", "sqrtp 0.0078125 k=64 fitted",
        "fp16 k=12", "fp16 weight 0.035", "50 draws",
    ]  # fmt: skip
    assert [row["codec"] for row in results[10:13]] == ["varopt", "varopt", "rskd"]
    assert [row["codec"] for row in results[13:]].count("raw fp16 + zstd") == 1
    assert [row["codec"] for row in results[13:]].count("parquet lists") == 3
    assert [row["codec"] for row in results[13:16]] == ["raw fp16 + zstd", "llama.cpp 16-bit", "top-p and 24 samples"]
    for row in results:
        assert row["encode_tokens_per_s"] > 0
        assert row["decode_tokens_per_s"] > 0
        assert (row["table_bytes"] > 0) == ("tables" in row["config"])
        assert row["tail_rows_per_s"] is None


@pytest.mark.parametrize("number", [10, 11, 12])
def test_samples_have_no_kl_and_the_squared_error_of_what_they_encode(measured, number):
    samples, results, _ = measured
    row = results[number]
    assert [row[name] for name in ("kl_t1", "kl_t1_se", "kl_t2", "kl_t2_se", "tv_t2")] == [None] * 5
    codec = logitstore.make_codec(row["codec"], **row["config"])
    decoded = [codec.targets_from_logits(logits, ids) for ids, logits in samples]
    _check_gradient_error(row, samples, lambda index, temperature: decoded[index].dense_logprobs(temperature))
    assert row["tv_t1"] > 0


def test_fitted_codecs_are_fitted_on_the_first_half_and_their_tables_are_counted(measured):
    samples, results, _ = measured
    row = results[7]
    tensors = _tensors()
    bounds = np.concatenate([[0], np.cumsum(LENGTHS)])
    fitting = [(tensors["logits"][a:b], tensors["input_ids"][a:b]) for a, b in pairwise(bounds[:4])]
    options = {name: value for name, value in row["config"].items() if name != "tables"}
    codec = logitstore.calibrate(logitstore.make_codec("topk", **options), *map(list, zip(*fitting, strict=True)))
    assert codec.tables_sha256 == row["config"]["tables"]
    assert row["table_bytes"] == len(codec.tables.file_bytes)
    n_rows = sum(len(ids) - 1 for ids, _ in samples)
    decoded = [codec.targets_from_logits(logits, ids) for ids, logits in samples]
    blob_bytes = sum(len(codec.encode(d, ids)) for d, (ids, _) in zip(decoded, samples, strict=True))
    assert row["bytes_per_token"] == blob_bytes / n_rows
    assert row["container_bytes_per_token"] > (row["table_bytes"] + blob_bytes) / n_rows
    _check_fidelity(row, samples, lambda index, temperature: decoded[index].dense_logprobs(temperature))


@pytest.mark.parametrize("number", [0, 1, 3, 5, 6])
def test_our_codecs_have_the_bytes_and_the_divergences_of_what_they_encode(measured, number, tmp_path):
    samples, results, _ = measured
    row = results[number]
    codec = logitstore.make_codec(row["codec"], **row["config"])
    n_rows = sum(len(ids) - 1 for ids, _ in samples)
    blobs, decoded = [], []
    with logitstore.create(tmp_path / "s.parquet", logitstore.StoreSpec(codec=codec, vocab_size=V)) as writer:
        for sample_id, (ids, logits) in enumerate(samples):
            targets = codec.targets_from_logits(logits, ids)
            blobs.append(codec.encode(targets, ids))
            decoded.append(codec.decode(blobs[-1], ids))
            writer.append(sample_id + 3, ids, targets)
    assert row["bytes_per_token"] == sum(map(len, blobs)) / n_rows
    assert row["container_bytes_per_token"] == (tmp_path / "s.parquet").stat().st_size / n_rows
    _check_fidelity(row, samples, lambda index, temperature: decoded[index].dense_logprobs(temperature))


def test_raw_logits_are_the_fp16_logits_in_zstd(measured):
    samples, results, _ = measured
    row = next(row for row in results if row["codec"] == "raw fp16 + zstd")
    rounded = [logits[:-1].astype(np.float16) for _, logits in samples]
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
    blob_bytes = sum(len(compressor.compress(part.tobytes())) for part in rounded)
    n_rows = sum(len(part) for part in rounded)
    assert row["bytes_per_token"] == blob_bytes / n_rows
    assert row["container_bytes_per_token"] == (blob_bytes + 4 * sum(len(ids) for ids, _ in samples)) / n_rows
    for temperature in (1.0, 2.0):
        kl, _, tv = _truth_against(samples, lambda i, T: _log_softmax(rounded[i].astype(np.float64) / T), temperature)
        assert row[f"kl_t{temperature:.0f}"] == pytest.approx(kl, abs=2e-7)  # the reconstruction is float32
        assert row[f"tv_t{temperature:.0f}"] == pytest.approx(tv, rel=1e-3)


def test_parquet_lists_spread_what_is_missing_and_then_temper(measured):
    samples, results, _ = measured
    row = next(row for row in results if row["codec"] == "parquet lists" and row["config"]["k"] == 64)

    def log_q(index, temperature):
        logp = _log_softmax(samples[index][1][:-1])
        kept = np.argsort(-logp, axis=1)[:, :64]
        q = np.zeros_like(logp)
        np.put_along_axis(q, kept, np.exp(np.take_along_axis(logp, kept, 1)), 1)
        missing = 1 - q.sum(1, keepdims=True)
        q = np.where(q > 0, q, missing / (V - 64))
        return _log_softmax(np.log(q) / temperature)

    for temperature in (1, 2):
        kl, se, tv = _truth_against(samples, log_q, float(temperature))
        assert row[f"kl_t{temperature}"] == pytest.approx(kl, rel=1e-4)
        assert row[f"kl_t{temperature}_se"] == pytest.approx(se, rel=1e-3)
        assert row[f"tv_t{temperature}"] == pytest.approx(tv, rel=1e-4)
    narrow = next(r for r in results if r["config"].get("ids") == "int32" and r["config"]["k"] == 64)
    assert narrow["kl_t1"] == row["kl_t1"]
    assert row["container_bytes_per_token"] > row["bytes_per_token"] > narrow["bytes_per_token"] > 64 * 4


def test_environment_says_how_it_was_measured(measured):
    _, _, out = measured
    facts = json.loads((out / "environment.json").read_text())
    assert facts["samples_measured"] == 3
    assert facts["samples_fitted_on"] == 3
    assert facts["rows_measured"] == sum(LENGTHS[3:]) - 3
    assert (facts["vocab_size"], facts["logits_dtype"]) == (V, "F32")
    assert facts["torch"] == torch.__version__
    assert {"cpu", "cores", "python", "commit", "command", "numpy", "zstandard"} <= set(facts)
    assert sorted(path.name for path in out.iterdir()) == ["environment.json", "report.html", "results.json"]


def test_report_and_terminal_hold_every_row(measured, capsys):
    _, results, out = measured
    headers, rows = result_table(results)
    assert len(rows) == len(results)
    assert rows[0][:3] == ["topk", "int8 k=8", None]
    assert configuration_text(results[-1]["config"]) == "k=128 int32 zstd"
    page = (out / "report.html").read_text()
    assert page.count("<svg ") == 4
    assert all(header in page for header in headers if ">" not in header)
    for row in results:
        assert f'<td class="num">{cell_text(row["bytes_per_token"])}</td>' in page


def test_with_a_calibration_file_all_samples_are_measured(tmp_path, capsys):
    save_file(_tensors((5, 7)), str(tmp_path / "eval.safetensors"))
    save_file(_tensors((4, 4, 4), seed=1), str(tmp_path / "train.safetensors"))
    paths = [str(tmp_path / name) for name in ("eval.safetensors", "train.safetensors")]
    out = _run(tmp_path, "--logits", paths[0], "--calibration", paths[1], "--quick")
    facts = json.loads((out / "environment.json").read_text())
    assert (facts["samples_measured"], facts["rows_measured"], facts["samples_fitted_on"]) == (2, 10, 3)
    assert facts["fitted_on"] == paths[1]
    heads = [row["config"]["k"] for row in json.loads((out / "results.json").read_text()) if row["codec"] == "topk"]
    assert heads == [16, 64, 64, 64, 16, 64]
    assert "report: " in capsys.readouterr().out


def test_hidden_states_measure_as_their_product_does(tmp_path):
    rng = np.random.default_rng(5)
    tensors = _tensors((6, 6))
    hidden, lm_head = rng.standard_normal((12, 8)).astype(np.float32), rng.standard_normal((V, 8)).astype(np.float32)
    tensors["logits"] = hidden @ lm_head.T
    save_file(tensors, str(tmp_path / "logits.safetensors"))
    del tensors["logits"]
    save_file({**tensors, "hidden": hidden, "lm_head": lm_head}, str(tmp_path / "factors.safetensors"))
    found = []
    for name in ("logits", "factors"):
        file = LogitsFile(tmp_path / f"{name}.safetensors")
        candidates = list(storage.codec_candidates(V, storage.QUICK_PRESETS[:1], storage.split_samples(file, file)))
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        found.append(measure([Kind("text", file, [0, 1])], candidates, folder)[0])
    assert found[0]["bytes_per_token"] == pytest.approx(found[1]["bytes_per_token"], rel=0.02)
    for name in ("kl_t1", "kl_t2", "tv_t1", "tv_t2", "kl_t1_se"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)


def test_presets_wider_than_the_vocabulary_are_left_out(tmp_path):
    save_file(_tensors((5, 5), vocab_size=20), str(tmp_path / "logits.safetensors"))
    results = json.loads(
        (_run(tmp_path, "--logits", str(tmp_path / "logits.safetensors")) / "results.json").read_text()
    )
    assert [row["config"].get("k") for row in results] == [8, 16, 16, 12, 29, None, None, None, None]


def test_quick_stops_at_the_sample_that_reaches_the_limit(tmp_path):
    save_file(_tensors((5,) * 8), str(tmp_path / "logits.safetensors"))
    file = LogitsFile(tmp_path / "logits.safetensors")
    assert within_row_limit(file, range(4, 8), 9) == [4, 5, 6]
    assert within_row_limit(file, range(4, 8), 1) == [4, 5]
    assert within_row_limit(file, range(4, 8), 99) == [4, 5, 6, 7]
    assert within_row_limit(file, range(4, 8), None) == [4, 5, 6, 7]


def test_bad_requests_are_refused(tmp_path):
    save_file(_tensors((5,)), str(tmp_path / "one.safetensors"))
    save_file(_tensors((5, 5), vocab_size=20), str(tmp_path / "small.safetensors"))
    with pytest.raises(ValueError, match="holds one sample, which cannot be split"):
        _run(tmp_path, "--logits", str(tmp_path / "one.safetensors"))
    with pytest.raises(SpecMismatchError, match="vocabulary of 20, .* of 300; both must come from one teacher"):
        paths = [str(tmp_path / f"{name}.safetensors") for name in ("one", "small")]
        _run(tmp_path, "--logits", paths[0], "--calibration", paths[1])
    with pytest.raises(ValueError, match="--calibration needs --logits"):
        _run(tmp_path, "--calibration", str(tmp_path / "one.safetensors"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        _run(tmp_path, "--logits", str(tmp_path / "none.safetensors"))
    (tmp_path / "text").write_text("x")
    with pytest.raises(FormatError, match="not a safetensors file, or cut short"):
        _run(tmp_path, "--logits", str(tmp_path / "text"))


class _ForgetfulCodec:
    """A codec whose decoded head differs from what was encoded in one value."""

    def __init__(self, codec):
        self._codec = codec

    def __getattr__(self, name):
        return getattr(self._codec, name)

    def decode(self, blob, input_ids):
        targets = self._codec.decode(blob, input_ids)
        targets.logps[0] -= 1e-3
        return targets


def test_no_number_from_a_codec_that_decodes_other_values(tmp_path):
    candidate = StoreCandidate(_ForgetfulCodec(logitstore.make_codec("topk", vocab_size=V, k=8)))
    candidate.open(tmp_path)
    tensors = _tensors((6,))
    with pytest.raises(CorruptionError, match="logps of sample 3 decodes to other values"):
        candidate.add(3, LogitsSample(tensors["input_ids"], tensors["logits"]))


def test_an_overfull_head_still_leaves_every_token_a_probability():
    # fp16 or bf16 heads can add up to more than 1: DistillKit's floor of 1e-8 a token applies
    log_q = missing_mass_uniform(np.array([[2, 0]]), np.log(np.array([[0.7, 0.31]], np.float32)), 4, 1.0)
    expected = np.array([0.31, 1e-8, 0.7, 1e-8])
    np.testing.assert_allclose(np.exp(log_q[0]), expected / expected.sum(), rtol=1e-5)


def test_absence_of_distillkit_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "distillkit", None)
    found, notes = rivals(V, quick=True)
    assert [candidate.codec for candidate in found] == [
        "raw fp16 + zstd", "llama.cpp 16-bit", "top-p and 24 samples", "parquet lists", "parquet lists",
    ]  # fmt: skip
    assert notes == [
        "DistillKit was not measured: it is not importable here. Put a clone of github.com/arcee-ai/DistillKit on "
        "PYTHONPATH (it needs torch and pydantic) and run again."
    ]


def test_distillkit_is_called_as_its_library_wants(monkeypatch, tmp_path):
    class Config:
        def __init__(self, **options):
            self.options = options

    class Compressor:
        def __init__(self, config):
            assert config.options == {"d": V, "k": 16, "exact_k": 16}

        def compress_from_sparse(self, ids, values):
            assert ids.shape == values.shape == (1, 8, 16)
            assert ids.dtype == torch.int64
            assert torch.get_num_threads() == 1
            return {
                "compressed_logprobs": values.contiguous().view(torch.uint8),
                "bytepacked_indices": ids.int().view(torch.uint8),
            }

        def decompress_to_sparse(self, row):
            return row["bytepacked_indices"].view(torch.int32).long(), row["compressed_logprobs"].view(torch.float32)

    module = types.ModuleType("distillkit.compression")
    module.DistributionQuantizationConfig, module.LogprobCompressor = Config, Compressor
    monkeypatch.setitem(sys.modules, "distillkit", types.ModuleType("distillkit"))
    monkeypatch.setitem(sys.modules, "distillkit.compression", module)
    candidate = DistillKit("exact", V, {"k": 16, "exact_k": 16})
    assert candidate.codec == "DistillKit exact"
    candidate.open(tmp_path)
    tensors = _tensors((9,))
    threads = torch.get_num_threads()
    log_q = candidate.add(0, LogitsSample(tensors["input_ids"], torch.from_numpy(tensors["logits"])))(1.0)
    assert torch.get_num_threads() == threads
    logp = _log_softmax(tensors["logits"][:-1])
    kept = np.argsort(-logp, axis=1)[:, :16]
    np.testing.assert_allclose(
        np.take_along_axis(log_q, kept, 1), np.take_along_axis(logp, kept, 1), rtol=1e-4, atol=1e-5
    )
    totals = candidate.close()
    assert (totals.n_rows, totals.blob_bytes) == (8, 8 * 16 * 8)
    assert totals.container_bytes == (tmp_path / "distillkit.parquet").stat().st_size
