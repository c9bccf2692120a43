"""Every variant of the kernels compiles for sm_90 without a stack and with 128-bit loads; no GPU is needed."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton, which is for Linux")
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the assembler's tools are x86_64 binaries")
SCRIPT = Path(__file__).with_name("compile_gate.py")


def rows_of(*arguments: str) -> list[dict]:
    """The rows of the script, run in processes of its own, one for each part."""
    commands = [[sys.executable, str(SCRIPT), arguments[0], *part] for part in ([part] for part in arguments[1:])]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for command in commands]
    outputs = [process.communicate() for process in running]
    for process, (_, errors) in zip(running, outputs, strict=True):
        assert process.returncode == 0, errors.decode()
    return [json.loads(line) for out, _ in outputs for line in out.splitlines()]


def check(rows: list[dict]) -> None:
    for row in rows:
        assert row["stack_bytes"] == 0, row
        assert row["local_loads"] == 0, row
        assert row["registers"] > 0, row
        if row["even_rows"] and row["kernel"] not in ("mark_rows_kernel", "finish_rows_kernel"):
            assert row["wide_loads"] > 0, row
            assert row["wide_stores"] > 0 or not row["variant"].get("GRADIENT"), row


def test_a_part_of_the_grid():
    rows = rows_of("quick", "1/2", "2/2")
    check(rows)
    assert {row["variant"].get("TAIL", "dense") for row in rows} == {
        "bucket", "uniform", "renormalised", "dropped", "sampled", "dense",
    }  # fmt: skip
    assert {row["dtype"] for row in rows} == {"bf16", "fp16", "fp32"}
    assert any(not row["even_rows"] for row in rows)
    assert sum(row["kernel"] == "topk_with_tail_kernel" for row in rows) == 3


@pytest.mark.full_grid
def test_the_whole_grid():
    rows = rows_of("all", "1/2", "2/2")
    check(rows)
    assert {v for row in rows for v in row["vocab_sizes"]} >= {32_000, 49_152, 128_256, 151_936, 262_144}


def test_a_stack_and_missing_wide_loads_are_found():
    """The gate reads what the compiler made: too few registers and odd rows show."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import compile_gate; "
        "from logitstore_kernels import triton_launch; from logitstore_kernels.loss_terms import LossTerms; "
        "triton_launch._MAX_REGISTERS = 40; "
        "build = compile_gate.build(LossTerms(1.0, 0.7, 'bucket', True, True), 'bf16', 50_257, gradient='in place', "
        "head='codes', even_rows=False); print(json.dumps(compile_gate.compiled(build)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPT.parent)], capture_output=True, text=True, check=True)
    row = json.loads(done.stdout)
    assert row["stack_bytes"] > 0
    assert row["local_loads"] > 0
    assert row["wide_loads"] == 0
