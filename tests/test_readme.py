"""The README says what is so: its tree, its example, its commands and its numbers."""

import json
import re
import subprocess
import symtable
from pathlib import Path

import numpy as np
import pytest
from logitstore_trainer.bench.storage_names import configuration_text
from logitstore_trainer.cli import COMMANDS

import logitstore

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def tree_files() -> set[str]:
    """Paths of the files that the tree under "Where things are" names."""
    block = README.split("## Where things are", 1)[1].split("```")[1]
    folder, files = "", set()
    for line in block.strip().splitlines():
        name = line.split()[0]
        if name.endswith("/") and not line.startswith(" "):
            folder = name
        elif line.startswith(" "):
            files.add(folder + name)
        else:
            files.add(name)
    return files


def test_the_tree_has_a_line_for_every_source_file_and_no_other() -> None:
    folders = ("logitstore", "kernels", "trainer", "examples", "tests", "benchmarks")
    there = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py")}
    there = {name for name in there if not name.endswith("__init__.py")}
    there |= {str(path.relative_to(ROOT)) for path in (ROOT / "docs").iterdir()}
    named = tree_files()
    assert there - named == set()
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_the_plug_in_example_is_the_file_that_a_test_runs() -> None:
    example = (ROOT / "examples" / "hf_trainer.py").read_text()
    block = example.split("# plug-in: begin\n", 1)[1].split("    # plug-in: end", 1)[0]
    lines = [line.removeprefix("    ").rstrip() for line in block.splitlines()]
    assert len(lines) <= 10
    assert "\n".join(lines) in README
    shown = README.split("## In a trainer that you already have", 1)[1].split("```")[1].removeprefix("python")
    names = symtable.symtable(shown, "README.md", "exec").get_symbols()
    assert {n.get_name() for n in names if not (n.is_assigned() or n.is_imported())} == {"path", "model", "args"}


def test_links_lead_to_files() -> None:
    for name in ("README.md", "docs/two-steps.md", "docs/scale.md", "docs/launch.md", "FORMAT.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"


def test_commands_are_those_of_the_command_line() -> None:
    block = README.split("## The commands", 1)[1].split("```")[1]
    named = {word for line in block.strip().splitlines() for word in re.findall(r"[a-z]+", line.split("  ")[0])}
    assert set(COMMANDS) <= named


def test_numbers_of_the_seeds_are_those_of_the_committed_rows() -> None:
    path = ROOT / "benchmarks" / "results" / "demo_seeds.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["seed"] for row in rows}) == len(rows) >= 5
    for row in rows:
        labels, distilled = row["students"]["labels"], row["students"]["distilled"]
        for number in (row["teacher"]["loss_nats"], labels["loss_nats"], distilled["loss_nats"]):
            assert f"{number:.4f}" in README
        assert f"{labels['kl_teacher_nats']:.4f}" in README
        assert f"{distilled['kl_teacher_nats']:.4f}" in README


def test_numbers_of_the_real_line_are_those_of_the_committed_row() -> None:
    path = ROOT / "benchmarks" / "results" / "real_line.jsonl"
    row = json.loads(path.read_text().splitlines()[-1])
    assert f"{row['store']['bytes_per_token']:.1f}" in README
    for student in row["students"].values():
        assert f"{student['loss_nats']:.4f}" in README
        assert f"{student['kl_teacher_nats']:.4f}" in README


def storage_line(row: dict) -> str:
    """A measured codec as the README's table shows it."""
    name = f"{row['codec']} {configuration_text(row['config'])}".strip()
    if row["budget"] is not None:
        name = f"{row['budget']:g} bytes: {name}"
    kls = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("kl_t1", "kl_t2")]
    return f"| {name} | {row['bytes_per_token']:,.1f} | {' | '.join(kls)} |"


def test_sizes_and_fidelities_are_those_of_the_committed_rows() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "storage.json").read_text())["results"]
    planned = [row for row in results if row["budget"] is not None and row["codec"] == "topk"]
    assert [row["budget"] for row in planned] == [16, 24, 40, 64, 104]
    rivals = [row for row in results if row["codec"] not in ("topk", "varopt", "rskd")]
    for row in (*planned, *rivals):
        assert storage_line(row) in README
    sampled = [row for row in results if row["codec"] in ("varopt", "rskd")]
    assert len(sampled) == 3
    for row in sampled:
        assert f"{row['gradient_error_t1']:.4f} at {row['bytes_per_token']:.1f} bytes" in README
    heads = {
        _head(row): row for row in results if row["config"].get("tail") == "residual" and "tables" in row["config"]
    }
    for row in planned:
        unseen, uniform = (of_row["kinds"]["measured-source"] for of_row in (row, heads[_head(row)]))
        numbers = [unseen["kl_t1"], unseen["kl_t2"], uniform["kl_t1"], uniform["kl_t2"]]
        line = (
            f"| {row['budget']:g} bytes | {unseen['bytes_per_token']:.1f} | {' | '.join(f'{x:.3f}' for x in numbers)} |"
        )
        assert line in README
        assert unseen["kl_t1"] < uniform["kl_t1"]
        assert unseen["kl_t2"] < uniform["kl_t2"]


_HEADS = (("log 0.5", " fitted"), ("sqrtp 0.0078125", " fitted"), ("int8", ""), ("fp8", ""), ("fp16", ""))


def test_errors_of_asked_log_probs_and_costs_of_heads_are_those_of_the_committed_rows() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "storage.json").read_text())["results"]
    rows = {row["budget"] or configuration_text(row["config"]): row for row in results if row["codec"] == "topk"}
    asked = [rows[name]["logprobs_at_error"] for name in (24.0, 104.0, "int8 k=64")]
    text = " ".join(README.split())
    expected = (
        "off by {:.2f} nats on average in the 24 bytes a token above, by {:.2f} in the 104, by {:.2f} in topk int8"
    )
    assert expected.format(*asked) in text
    log, sqrtp, int8, fp8, fp16 = (rows[f"{head} k=64{fitted}"] for head, fitted in _HEADS)
    assert f"{int8['kl_t1']:.3f}" == f"{fp16['kl_t1']:.3f}"
    values = [row["bytes_of"]["values"] for row in (log, sqrtp, fp16)]
    expected = (
        "have a KL of {:.3f} at T = 1, `fp8` {:.3f}, and fitted the `log` steps of 0.5 nats that planned codecs take "
        "{:.3f} with {:.1f} bytes of values a token, `sqrtp` steps of 1/128 {:.3f} with {:.1f}, where fp16 has {:.1f}."
    )
    costs = fp16["kl_t1"], fp8["kl_t1"], log["kl_t1"], values[0], sqrtp["kl_t1"], values[1], values[2]
    assert expected.format(*costs) in text


def test_answers_about_heads_and_coefficients_are_those_of_the_committed_row() -> None:
    row = json.loads((ROOT / "benchmarks" / "results" / "codec_checks.jsonl").read_text().splitlines()[-1])
    heads = {(head["head"], head["head_step"]): head for head in row["heads"]}
    text = " ".join(README.split())
    for name in (("log", 0.5), ("log", 0.25), ("sqrtp", 1 / 32), ("fp8", None)):
        size, kl = heads[name]["bytes_per_token"], heads[name]["kl_t1"]
        assert re.search(rf"{size:.1f}(?: bytes a token, KL|,) {kl:.4f}", text)
    saved = row["rank"]["saved"]
    expected = "save {:.1%} of the KL of 256 at 24 bytes a token, {:.1%} at 40 and {:.1%} at 56"
    assert expected.format(*(saved[budget]["kl_t1"] for budget in ("24", "40", "56"))) in text


def test_the_example_of_asked_log_probs_runs(tmp_path: Path) -> None:
    logits, student_top_ids = np.random.default_rng(0).normal(size=(5, 9)), np.arange(8).reshape(4, 2)
    codec = logitstore.make_codec("topk", vocab_size=9, k=3)
    input_ids = np.arange(5)
    with logitstore.create(tmp_path / "x.parquet", logitstore.StoreSpec(codec=codec, vocab_size=9)) as writer:
        writer.append(0, input_ids, codec.targets_from_logits(logits, input_ids))
    block = next(block for block in README.split("```python\n")[1:] if "logprobs_at" in block).split("```")[0]
    opened, asked = block.strip().splitlines()
    names = {"logitstore": logitstore, "student_top_ids": student_top_ids}
    exec(opened.replace("x.parquet", str(tmp_path / "x.parquet")), names)
    logprobs = eval(asked, names)
    truth = names["targets"].dense_logprobs(2.0)
    np.testing.assert_array_equal(logprobs, np.take_along_axis(truth, student_top_ids, axis=1))


def _head(row: dict) -> tuple:
    return tuple(row["config"].get(name) for name in ("head", "head_step", "k", "min_prob"))


def test_speeds_of_fitted_codecs_are_those_of_the_committed_rows() -> None:
    path = ROOT / "benchmarks" / "results" / "codec_speed.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 8
    lines = [line for line in README.splitlines() if line.startswith("| ") and "constriction" in line]
    lines += [line for line in README.splitlines() if line.startswith(("| decode", "| encode top-k arrays"))]
    shown = {number for line in lines for number in re.findall(r"[\d,]{6,}", line)}
    assert shown == {f"{row[name]:,}" for row in rows for name in ("rows_per_s_fastest", "rows_per_s_median")}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the git checkout")
def test_ci_runs_the_readme_s_test_command() -> None:
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    listed = subprocess.run(["git", "ls-files", "-s", ".ci/run"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stdout.startswith("100755")
