"""The GPU suite without a GPU: a dry run through all of it, checks that can fail, and what becomes of every mishap."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton, which is for Linux")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.py"


@pytest.fixture
def log(tmp_path):
    from gpu_parts.log import RowLog

    with RowLog.create(tmp_path / "rows.jsonl", {"device": "cpu"}, torch.device("cpu"), seconds=60) as log:
        yield log


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_a_dry_run_goes_through_every_section(tmp_path):
    out = tmp_path / "rows.jsonl"
    done = run("--dry-run", "--out", str(out), "--minutes", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = {}
    for row in rows:
        assert row["status"] not in ("wrong", "failed", "out of memory", "cut"), row
        assert {"device", "torch", "triton", "commit"} <= row.keys()
        found.setdefault(row["section"], set()).add(row["status"])
    liger = {"missing"} if all(row["liger"] is None for row in rows) else {"measured"}
    assert found == {
        "ceilings": {"measured"}, "check": {"checked", "skipped"}, "logits in": {"measured"} | liger,
        "beside PyTorch": {"measured"}, "through a head": {"measured"} | liger, "dense tail": {"measured"},
        "top-k with tail": {"measured"}, "goal": {"not measured"},
    }  # fmt: skip
    assert {row["tail"] for row in rows if row["section"] == "check" and "tail" in row} == {
        "bucket", "uniform", "renormalised", "dropped", "sampled", "dense",
    }  # fmt: skip
    timed = [row for row in rows if row["status"] == "measured"]
    assert all(0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in timed)
    ours = [row for row in timed if row["section"] == "logits in" and row["loss"].startswith("ours")]
    assert {row["temperature"] for row in ours} == {1.0, 2.0, 1.5}
    assert all(row["bytes"] == 2 * 3 * 272 * 2 + 5 * 3 * 64 for row in ours)
    assert all(0 < row["gradient_error"] < 1e-2 for row in ours)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "name a file with --out"),
        (["--dry-run", "--out", "x.jsonl", "--minutes", "0"], "--minutes must be above 0"),
        pytest.param(
            [], "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
        ),
    ],
)
def test_what_is_refused(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_mishap_is_a_row_and_the_section_goes_on(log):
    from gpu_parts import rivals
    from gpu_parts.log import Job, run_section

    def out_of_memory():
        raise torch.OutOfMemoryError("tried to allocate 5 GiB\nand more text")

    def missing():
        rivals.liger_cross_entropy(torch.zeros(1, 4), None, 1.0)

    jobs = {"memory": out_of_memory, "error": lambda: 1 // 0, "rival": missing, "good": lambda: log.add("s", {}, "ok")}
    if log.facts.get("liger") is None and not _has_liger():
        expected = ["out of memory", "failed", "missing", "ok"]
    else:
        del jobs["rival"]
        expected = ["out of memory", "failed", "ok"]
    run_section(log, "s", 60, [Job({"job": name}, call) for name, call in jobs.items()])
    assert [row["status"] for row in log.rows] == expected
    assert log.rows[0]["reason"] == "tried to allocate 5 GiB"
    assert log.rows[1]["reason"].startswith("ZeroDivisionError: ")
    run_section(log, "s", 0, [Job({"job": "late"}, lambda: log.add("s", {}, "ok"))])
    assert log.rows[-1]["status"] == "cut"
    log.device_lost = True
    run_section(log, "s", 60, [Job({"job": "lost"}, lambda: log.add("s", {}, "ok"))])
    assert "does not answer" in log.rows[-1]["reason"]


def _has_liger():
    import importlib.util

    return importlib.util.find_spec("liger_kernel") is not None


def test_time_is_up_for_the_run_before_it_is_for_a_section(log):
    from gpu_parts.log import Job, run_section

    log.end_s = time.monotonic()
    run_section(log, "s", 60, [Job({}, lambda: log.add("s", {}, "ok"))])
    assert [row["status"] for row in log.rows] == ["cut"]


def test_a_wrong_gradient_and_a_wrong_value_are_found(triton_interpreter, monkeypatch):
    from gpu_parts import checks
    from gpu_parts.log import NotMeasured

    variant = next(v for v in checks.dry_variants() if v.tail == "bucket" and v.gradient == "in place")
    right = checks.distillation_loss
    assert checks.check_variant(variant, torch.device("cpu"))["gradient_error"] > 0

    def steeper(logits_NW, *args, **kwargs):
        return right(logits_NW * 1.0, *args, **kwargs) + 0.03 * (logits_NW[:-1, 0] - logits_NW[:-1, 0].detach()).sum()

    def larger(*args, **kwargs):
        return right(*args, **kwargs) + 1e-3

    for wrong, what in ((steeper, "gradient"), (larger, "value")):
        monkeypatch.setattr(checks, "distillation_loss", wrong)
        with pytest.raises(NotMeasured, match=f"{what} is off by") as found:
            checks.check_variant(variant, torch.device("cpu"))
        assert found.value.status == "wrong"


def test_a_call_whose_gradient_is_wrong_gets_no_number(log):
    from gpu_parts.sections import Bench, Sizes

    bench = Bench(log, Sizes(dry=True))
    calls = {"bad": lambda: 1, "good": lambda: 2}
    checks = {"bad": lambda _: {"gradient_error": float("nan")}, "good": lambda _: {"gradient_error": 1e-3}}
    bench.group("s", {}, calls, checks, None, n_bytes=10**6)
    assert [(row["loss"], row["status"]) for row in log.rows] == [("bad", "wrong"), ("good", "measured")]
    assert "p50_ms" not in log.rows[0]


def test_a_worker_that_dies_is_a_row(log, monkeypatch):
    from gpu_parts import check_workers

    monkeypatch.setattr(check_workers, "_command", lambda *_: [sys.executable, "-c", "raise SystemExit(7)"])
    check_workers.run_workers(log, 2, 60, dry=True)
    assert [row["reason"] for row in log.rows] == ["left with code 7"] * 2


def test_goals_are_met_or_not_by_the_rows(log):
    from gpu_parts.goals import add_goals

    cell = {"n_rows": 8192, "vocab_size": 128_256, "temperature": 1.0}
    log.facts["device"] = "NVIDIA H100 80GB HBM3"
    for loss, ms, share, peak in (("ours, in place", 1.5, 0.93, 8192 * 65), ("Liger cross-entropy", 2.0, 0.7, 0),
                                  ("ours, cross-entropy alone, in place", 1.4, 0.95, 0)):  # fmt: skip
        log.add("logits in", cell | {"loss": loss}, "measured", p50_ms=ms, share_of_copy=share, extra_peak_bytes=peak,
                gradient_error=1.2e-3)  # fmt: skip
    log.add("beside PyTorch", cell | {"loss": "ours, in place"}, "measured", p50_ms=1.5)
    log.add("beside PyTorch", cell | {"loss": "eager"}, "measured", p50_ms=9.0)
    add_goals(log)
    verdicts = {row["goal"]: (row["status"], row["value"]) for row in log.rows if row["section"] == "goal"}
    assert verdicts["share of the copy bandwidth, two passes, T = 1"] == ("met", 0.93)
    assert verdicts["ms on H100, T = 1"] == ("met", 1.5)
    assert verdicts["ms on H200, T = 1"] == ("not measured", None)
    assert verdicts["time over that of our cross-entropy alone, T = 1"] == ("not met", pytest.approx(1.5 / 1.4))
    assert verdicts["eager PyTorch's time over ours, T = 1"] == ("met", 6.0)
    assert verdicts["compiled PyTorch's time over ours, T = 1"] == ("not measured", None)
    assert verdicts["Liger cross-entropy's time over ours, V = 128256"][0] == "not met"
    assert verdicts["extra bytes a row, in place"] == ("not met", 65.0)
    assert verdicts["gradient error in bfloat16, the worst of all sizes"] == ("met", 1.2e-3)
    assert len(verdicts) == 17


def test_every_variant_is_listed_once_and_those_that_are_measured_come_first():
    from gpu_parts.checks import DTYPES, TAILS, TEMPERATURES, variants

    listed = variants()
    assert len(set(listed)) == len(listed)
    combinations = {(v.tail, v.temperature, v.dtype) for v in listed}
    assert len(combinations) == (len(TAILS) - 1) * len(TEMPERATURES) * len(DTYPES) + len(DTYPES)
    assert [v.temperature for v in listed[:6]] == [1.0, 1.0, 2.0, 2.0, 1.5, 1.5]
    assert {v.tail for v in listed[:7]} == {"bucket"}
