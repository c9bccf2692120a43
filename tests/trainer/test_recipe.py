"""Recipes: what they resolve to, that the one a run leaves gives the same losses, and what is refused in one line."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
from logitstore_trainer.cli import main
from logitstore_trainer.recipe import read_recipe, recipe_text, resolved_config
from logitstore_trainer.train import TrainConfig, add_arguments
from safetensors.torch import load_file

STUDENT = "llama:layers=2,width=32,heads=2,mlp=64"
RECIPE = f"""\
# A comment.
student: {STUDENT}
data: store.parquet
out: out
lr: 1e-2
batch-size: 4
"""


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_an_option_wins_over_set_and_set_over_the_recipe(recipe):
    path = recipe(RECIPE + "steps: 5\nseed: 5\n")
    got = resolved_config(path, ["steps=6", "seed=6", "data=[a, b]", "alpha=.5"], {"steps": 7, "data": ["c"]})
    assert got == TrainConfig(STUDENT, ["c"], "out", steps=7, lr=0.01, batch_size=4, seed=6, alpha=0.5)
    assert resolved_config(path, ["data=[a, b]"], {}).data == ["a", "b"]
    assert resolved_config(path, [], {}).data == ["store.parquet"]


def test_values_are_read_as_the_type_of_their_setting(recipe):
    """YAML 1.1 makes a text of 3e-4, False of no, 8 of 010, 90 of 1:30, a date of 2026-01-01, None of a null."""
    text = "student: no\ndata: [010, '2026-01-01', 1:30]\nout: 2026-01-01\nlr: 3e-4\nseed: 010\ntail: null\n"
    got = resolved_config(recipe(text + "eval_data: 'null'\nresume: TRUE\nwarmup: 7\nsteps: ~\n"), ["report_to=1"], {})
    expected = TrainConfig("no", ["010", "2026-01-01", "1:30"], "2026-01-01", lr=3e-4, seed=10, eval_data="null")
    assert got == dataclasses.replace(expected, resume=True, warmup=7.0, report_to="1")
    assert isinstance(got.warmup, float)


def test_the_recipe_in_the_readme_is_one(recipe):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    text = readme.split("```yaml\n", 1)[1].split("```", 1)[0]
    expected = TrainConfig("20M", ["teacher_logits.parquet"], "student", eval_fraction=0.05, lr=1e-3, batch_size=16)
    assert resolved_config(recipe(text), ["lr=1e-3"], {}) == expected


def test_every_option_can_be_in_a_recipe_and_is_read_back_equal(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = {action.dest for action in parser._actions if action.dest not in ("help", "recipe", "overrides")}
    assert options == {field.name for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(
        "5M", ["a b", "c: #d", "é\n"], "null", eval_data="e", temperature=1.0, alpha=1e-7, tail="dense", loss="jsd",
        jsd_beta=0.25, epochs=2.5, steps=3, batch_size=2, grad_accum=5, lr=3e-4, warmup=12.0, dtype="fp32",
        device="cpu", seed=4, save_every=0, eval_every=6, log_every=1, workers=2, report_to="wandb", resume=True,
    )  # fmt: skip
    text = recipe_text(config, {"lr": "a note", "data": "another"})
    assert "\nlr: 0.0003  # a note\n" in text
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    assert set(read_recipe(tmp_path / "r.yaml")) == options
    assert resolved_config(tmp_path / "r.yaml", [], {}) == dataclasses.replace(config, resume=False)


def test_the_recipe_that_a_run_leaves_gives_the_same_losses(recipe, store_path, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    text = RECIPE.replace("store.parquet", str(store_path)) + "device: cpu\nsteps: 4\nlog_every: 1\neval_fraction: .2\n"
    assert main(["train", str(recipe(text)), "--set", "seed=3", "--alpha", "0.4", "--out", str(first)]) == 0
    assert main(["train", str(first / "recipe.yaml"), "--out", str(second)]) == 0
    one, two = (json.loads((folder / "train_metrics.json").read_text()) for folder in (first, second))
    assert (one["config"]["seed"], one["config"]["alpha"], one["config"]["batch_size"]) == (3, 0.4, 4)
    for name in ("loss", "kl", "ce", "eval_loss", "grad_norm"):
        assert [entry.get(name) for entry in one["history"]] == [entry.get(name) for entry in two["history"]]
    assert len([entry for entry in one["history"] if "kl" in entry]) == 4
    assert one["held_out"] == two["held_out"]
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    assert all(weights[1][name].equal(tensor) for name, tensor in weights[0].items())
    left = (second / "recipe.yaml").read_text()
    assert f"out: {second}\n" in left
    assert "tail: null  # here bucket\n" in left
    assert "dtype: auto  # here float32\n" in left
    assert "lr: 0.01\n" in left


def test_steps_of_another_size_than_the_recipe_had_are_said(recipe, store_path, tmp_path, capsys):
    text = RECIPE.replace("store.parquet", str(store_path)) + "device: cpu\nsteps: 1\n"
    assert main(["train", str(recipe(text)), "--out", str(tmp_path / "first")]) == 0
    left = tmp_path / "first" / "recipe.yaml"
    of_one, of_two = (
        "batch_size: 4  # here steps of 4 samples on 1 process\n",
        "here steps of 8 samples on 2 processes\n",
    )
    assert of_one in left.read_text()
    assert main(["train", str(left), "--out", str(tmp_path / "second")]) == 0
    assert "is of a run in steps" not in capsys.readouterr().err
    left.write_text(left.read_text().replace(of_one, f"batch_size: 4  # {of_two}"))
    assert main(["train", str(left), "--out", str(tmp_path / "third")]) == 0
    assert (
        f"{left} is of a run in steps of 8 samples; this one takes 4 (batch size 4 * accumulation 1 * processes 1); "
        "--grad-accum 2 makes it 8 again\n"
    ) in capsys.readouterr().err
    assert main(["train", str(left), "--out", str(tmp_path / "fourth"), "--grad-accum", "2"]) == 0
    assert main(["train", str(left), "--out", str(tmp_path / "third"), "--resume"]) == 0
    assert "is of a run in steps" not in capsys.readouterr().err


def test_a_run_goes_on_from_its_own_recipe(recipe, store_path, tmp_path, capsys):
    text = RECIPE.replace("store.parquet", str(store_path)) + "device: cpu\nsteps: 1\n"
    assert main(["train", str(recipe(text)), "--out", str(tmp_path / "out")]) == 0
    assert main(["train", str(tmp_path / "out" / "recipe.yaml")]) == 2
    assert "holds a training run: continue it with --resume" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "out" / "recipe.yaml"), "--resume"]) == 0
    assert "finished: nothing to do" in capsys.readouterr().err


WRONG = [
    (RECIPE + "temprature: 1\n", [], "recipe.yaml, line 7: unknown setting 'temprature', the nearest is 'temp"),
    (RECIPE + "batchsize: 3\n", [], "line 7: unknown setting 'batchsize', the nearest is 'batch_size'"),
    (RECIPE + "learning-rate: 3\n", [], "line 7: unknown setting 'learning-rate', the nearest is 'lr'"),
    (RECIPE + "? [a]\n: 3\n", [], "line 7: unknown setting '?'"),
    (RECIPE, ["--set", "max_step=1"], "--set max_step=1: unknown setting 'max_step', the nearest is 'steps'"),
    (RECIPE + "batch_size: 3\n", [], "line 7: batch_size is there twice, first at line 6"),
    (RECIPE + "steps: many\n", [], "line 7: steps is 'many', expected a whole number or null"),
    (RECIPE + "seed: 1.5\n", [], "line 7: seed is '1.5', expected a whole number"),
    (
        RECIPE + "seed: 99999999999999999999\n",
        [],
        "line 7: seed is '99999999999999999999', expected a whole number",
    ),
    (RECIPE + "alpha: true\n", [], "line 7: alpha is 'true', expected a number"),
    (RECIPE + "alpha: [1]\n", [], "line 7: alpha is a list, expected a number"),
    (RECIPE + "alpha:\n", [], "line 7: alpha has no value, expected a number"),
    (RECIPE + "resume: maybe\n", [], "line 7: resume is 'maybe', expected true or false"),
    (RECIPE + "loss: {a: b}\n", [], "line 7: loss is a mapping, expected a text"),
    (
        RECIPE + "loss: !!python/name:os.system\n",
        [],
        "line 7: loss has the YAML tag tag:yaml.org,2002:python/name:",
    ),
    (RECIPE.replace("data: store.parquet", "data: [a, [b]]"), [], "line 3: data is a list, expected a text"),
    (RECIPE + "alpha: 1.5\n", [], "recipe.yaml, line 7: --alpha 1.5 must lie in [0, 1]"),
    (RECIPE + "alpha: .5\nwarmup: nan\n", [], "recipe.yaml, line 8: --warmup nan must be a finite number"),
    (RECIPE + "loss: kl\n", [], "recipe.yaml, line 7: --loss 'kl' is not one of forward_kl, reverse_kl"),
    (RECIPE + "eval_data: x\n", ["--set", "eval_fraction=.1"], "--set eval_fraction=.1: --eval-data and --eval-f"),
    (RECIPE.replace("store.parquet", "[]"), [], "line 3: data must be a list of at least one store, got []"),
    (RECIPE, ["--set", "alpha=2"], "--set alpha=2: --alpha 2.0 must lie in [0, 1]"),
    (RECIPE + "alpha: 3\n", ["--alpha", "2"], "logitstore: --alpha 2.0 must lie in [0, 1]"),
    (RECIPE, ["--set", "lr"], "--set lr has no '=', expected NAME=VALUE"),
    (RECIPE, ["--set", "data=[1"], "--set data=[1, line 1: no YAML, expected ',' or ']'"),
    (RECIPE, ["--set", "steps=a: b"], "--set steps=a: b: steps is a mapping, expected a whole number or null"),
    ("student: 5M\n", [], "recipe.yaml and the command line lack --data, --out"),
    ("- 5M\n", [], "recipe.yaml holds no settings, expected lines such as student: 20M"),
    ("", [], "recipe.yaml holds no settings"),
    ("a: 1\nb: [\n", [], "recipe.yaml, line 3: no YAML, "),
    ("a: 1\n---\nb: 1\n", [], "recipe.yaml, line 2: no YAML, but found another document"),
    ("a: \x00\n", [], "recipe.yaml: no YAML, unacceptable character"),
    ("out: " + "[" * 5000, [], "recipe.yaml: nested too deeply"),
]


@pytest.mark.parametrize(("text", "arguments", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_one_line_that_names_the_place(recipe, tmp_path, capsys, text, arguments, message):
    assert main(["train", str(recipe(text)), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_no_recipe_is_one_line(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_bytes(b"out: \xff\n")
    (tmp_path / "large.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    for arguments, message in (
        ([str(tmp_path / "none.yaml")], "none.yaml: No such file or directory"),
        ([str(tmp_path)], f"is a folder, expected a YAML file; did you mean {tmp_path / 'recipe.yaml'}?"),
        ([str(tmp_path / "recipe.yaml")], "is no text in UTF-8"),
        ([str(tmp_path / "large.yaml")], "large.yaml has more than 1,048,576 bytes: is it a recipe?"),
        (["--student", "5M"], "logitstore: the command line lacks --data, --out"),
        (["--data", "a.parquet", "r.yaml"], "--data r.yaml is no store; name a recipe first: logitstore train r.yaml"),
    ):
        assert main(["train", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
