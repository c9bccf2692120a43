"""`logitstore train`: its settings, its options on the command line, and the call that runs it.

PyTorch and transformers are imported when the run starts, not here, so that `--help` and a wrong option are instant.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from logitstore_trainer.dtypes import long_name

DTYPES = ("auto", "bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda", "mps")
LOSS_NAMES = {"forward_kl": "KL", "reverse_kl": "reverse KL", "jsd": "JSD", "tvd": "total variation"}
LOSSES = tuple(LOSS_NAMES)
TAILS = ("bucket", "uniform", "renormalised", "dropped", "dense", "sampled")
EXAMPLES = """examples:
  logitstore train --student 20M --data teacher_logits.parquet --out student
  logitstore train --student HuggingFaceTB/SmolLM2-135M --data teacher_logits.parquet --eval-fraction 0.05 --out student
  logitstore train --student 20M --data teacher_logits.parquet --out labels-only --alpha 0
  logitstore train --student 20M --data teacher_logits.parquet --out student --resume
  logitstore train recipe.yaml --set lr=3e-4 --set data=[a.parquet,b.parquet] --out student
  logitstore train student/recipe.yaml --out student-again

A recipe is a YAML file with lines such as "batch_size: 16", by the names of the options; every option may stand in it.
An option on the command line wins over --set, --set over the recipe. A run leaves all its settings in OUT/recipe.yaml.
"""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run; the command line's options have the same names and defaults.

    student: see `build_student`. data: one store or several of one teacher. eval_data, or eval_fraction in (0, 1) of
    the samples, in whole rows of the data set drawn with the seed: held out. steps (optimizer steps) overrides epochs.
    lr None: 1e-3 from scratch, 5e-5 for a loaded student. warmup: steps if at least 1, else a share of all steps; then
    cosine to zero. A step takes batch_size * grad_accum samples per process; a run that is resumed keeps the samples of
    its steps, whatever the number of processes. pack: several samples in a row where they fit. dtype: bf16 and fp32
    stand for the long names. loss: the divergence of `distillation_loss`. save_every, eval_every: steps between, 0 for
    only at the end.
    """

    student: str
    data: Sequence[str]
    out: str
    eval_data: str | None = None
    eval_fraction: float = 0.0
    temperature: float = 2.0
    alpha: float = 0.7
    tail: str | None = None
    loss: str = "forward_kl"
    jsd_beta: float = 0.5
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 8
    grad_accum: int = 1
    pack: bool = False
    lr: float | None = None
    warmup: float = 0.05
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    save_every: int = 500
    eval_every: int = 0
    log_every: int = 10
    workers: int = 0
    report_to: str = "none"
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", long_name(self.dtype))


class SettingError(ValueError):
    """A setting that makes no run; `setting` is its name in TrainConfig."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(message)
        self.setting = setting


def train(config: TrainConfig, *, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Trains a student and returns the metrics that it writes to `out`/train_metrics.json beside the model.

    n_tokens, train_s, tokens_per_s and history are of the whole run, over checkpoints that it went on from; wall_s is
    of this call. recipe.yaml, run_report.html and README.md (the model card) lie beside them.
    `callbacks` are transformers TrainerCallbacks. A finished run is not repeated when resumed: its metrics are read.
    Raises ValueError for settings that make no run, for data in which nothing is to be learned and for a loss that is
    no longer a number, SpecMismatchError where student, stores or a run to resume do not fit together, and
    KeyboardInterrupt, with half-written files removed, when interrupted.
    """
    check_config(config)
    from logitstore_trainer.training_run import run_training

    return run_training(config, callbacks)


def check_config(config: TrainConfig) -> None:
    """Raises SettingError, a ValueError, naming the first setting that makes no run."""

    def refuse(name: str, problem: str) -> None:
        raise SettingError(name, f"--{name.replace('_', '-')} {getattr(config, name)!s} {problem}")

    for field in fields(TrainConfig):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            refuse(field.name, "must be a finite number")
    for name in ("epochs", "temperature", "batch_size", "grad_accum", "log_every", "steps", "lr"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            refuse(name, "must be above 0")
    for name in ("warmup", "save_every", "eval_every", "workers"):
        if getattr(config, name) < 0:
            refuse(name, "must not be negative")
    if not 0 <= config.seed < 1 << 32:
        refuse("seed", "must lie in [0, 2^32)")
    if not 0 <= config.alpha <= 1:
        refuse("alpha", "must lie in [0, 1]: 0 is labels only, 1 the teacher only")
    if not 0 <= config.eval_fraction < 1:
        refuse("eval_fraction", "must lie in [0, 1)")
    if config.eval_data and config.eval_fraction:
        raise SettingError("eval_fraction", "--eval-data and --eval-fraction exclude each other: give one")
    for name in ("student", "out", "eval_data"):
        value = getattr(config, name)
        if value is not None and not str(value).strip():
            raise SettingError(name, f"{name} is empty, expected a name or a path")
    if not isinstance(config.data, str) and not all(str(path).strip() for path in config.data):
        raise SettingError("data", "data has an empty path, expected paths of stores")
    if not config.data or isinstance(config.data, str):
        raise SettingError("data", f"data must be a list of at least one store, got {config.data!r}")
    if not 0 < config.jsd_beta < 1:
        refuse("jsd_beta", "must lie in (0, 1), its ends excluded")
    for name, known in (("loss", LOSSES), ("dtype", DTYPES), ("device", DEVICES), ("tail", (None, *TAILS))):
        value = getattr(config, name)
        if value not in known:
            named = ", ".join(each for each in known if each is not None)
            raise SettingError(name, f"--{name} {value!r} is not one of {named}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `logitstore train`; their names are the fields of TrainConfig."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = f"{parser.prog} [RECIPE] [--set NAME=VALUE ...] [options]"
    parser.epilog = EXAMPLES

    def option(name: str, help: str, **settings: Any) -> None:
        # What is not given is not in the parsed arguments: a recipe or TrainConfig says it.
        parser.add_argument(name, help=help, default=argparse.SUPPRESS, **settings)

    parser.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE", help="a YAML file of settings; name it first")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting beside the recipe's",
    )
    option(
        "--student", "a model folder or hub name; or, from scratch with the teacher's tokenizer, a size (5M) or a "
        "shape (llama:layers=3,width=192,heads=3)", metavar="M",
    )  # fmt: skip
    option("--data", "the store, or several of one teacher", nargs="+", metavar="PATH")
    option("--out", "folder for the model, checkpoints, metrics and recipe.yaml", metavar="DIR")
    option("--eval-data", "a store to measure on, never trained on", metavar="PATH")
    option("--eval-fraction", "share of samples to hold out, in rows drawn with the seed", type=float, metavar="F")
    option("--temperature", "T of teacher and student in the KL (default 2; a store of samples needs 1)", type=float)
    option("--alpha", "weight of T^2 KL; 1 - alpha weighs cross-entropy, 0 is labels only (default 0.7)", type=float)
    option("--tail", f"{', '.join(TAILS)} (default: what suits the store)")
    option(
        "--loss", f"how far the student is from the teacher: {', '.join(LOSSES)} (default forward_kl, which alone has "
        "a GPU kernel; the others not for a store of samples)", choices=LOSSES,
    )  # fmt: skip
    option("--jsd-beta", "weight of the teacher in the mixture of --loss jsd (default 0.5)", type=float)
    option("--epochs", "passes over the data (default 1)", type=float)
    option("--steps", "optimizer steps, instead of --epochs", type=int)
    option("--batch-size", "samples per forward pass and process (default 8)", type=int)
    option("--grad-accum", "forward passes per optimizer step (default 1)", type=int)
    parser.add_argument(
        "--pack", action="store_true", help="put short samples together into rows: fewer pads, same loss"
    )
    option("--lr", "peak learning rate (default 1e-3 from scratch, 5e-5 for a loaded student)", type=float)
    option("--warmup", "warm-up steps if at least 1, else share of all steps (default 0.05); then cosine", type=float)
    option(
        "--dtype", "bfloat16 (autocast) or float32; auto is bfloat16 on a CUDA device that has it", type=long_name,
        choices=DTYPES,
    )  # fmt: skip
    option("--device", "where to train (default: the best there is)", choices=DEVICES)
    option("--seed", "of the weights, the order of the data and dropout (default 0)", type=int)
    option("--save-every", "steps between checkpoints, 0 for none (default 500)", type=int)
    option("--eval-every", "steps between evaluations, 0 for only at the end (default)", type=int)
    option("--log-every", "steps between logged losses (default 10)", type=int)
    option("--workers", "processes that read and decode the store (default 0: the training process)", type=int)
    option("--report-to", "tensorboard, wandb, trackio, ...; several with commas between them (default none)")
    option(
        "--resume",
        "continue the run in --out from its last checkpoint, on any number of processes that can share a step",
        action="store_true",
    )


def run(args: argparse.Namespace) -> int:
    """Runs `logitstore train` and prints what came out; returns the exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    config = config_of_arguments(args)
    if args.recipe is not None and not config.resume:
        _say_other_step(args.recipe, config)
    metrics = train(config)
    print(summary(metrics, config.out))
    return 0


def _say_other_step(recipe: Path, config: TrainConfig) -> None:
    """One line where the run that left this recipe took steps of another size, as on another number of processes."""
    from logitstore_trainer.recipe import noted_samples_per_step
    from logitstore_trainer.training_run import asked_step

    before, step = noted_samples_per_step(recipe), asked_step(config)
    if before in (None, step.n_samples) or int(os.environ.get("RANK", "0")) != 0:
        return
    grad_accum, left_over = divmod(before, step.batch_size * step.n_processes)
    advice = "" if left_over else f"; --grad-accum {grad_accum} makes it {before} again"
    print(
        f"{recipe} is of a run in steps of {before} samples; this one takes {step.n_samples} (batch size "
        f"{step.batch_size} * accumulation {step.grad_accum} * processes {step.n_processes}){advice}",
        file=sys.stderr,
    )


def config_of_arguments(args: argparse.Namespace) -> TrainConfig:
    """The settings that parsed arguments stand for, with those of the recipe that they name.

    Raises ValueError for what a recipe, --set or option says wrong, and where student, data or out is not said.
    """
    from logitstore_trainer.recipe import resolved_config

    given = {field.name: getattr(args, field.name) for field in fields(TrainConfig) if hasattr(args, field.name)}
    swallowed = [path for path in given.get("data", []) if path.endswith((".yaml", ".yml"))]
    if swallowed:
        raise ValueError(f"--data {swallowed[0]} is no store; name a recipe first: logitstore train {swallowed[0]} ...")
    return resolved_config(args.recipe, args.overrides, given)


def summary(metrics: dict[str, Any], out: str) -> str:
    """A few lines for the terminal about a finished run."""
    temperature, name = metrics["config"]["temperature"], LOSS_NAMES[metrics["config"]["loss"]]
    lines = [
        f"{metrics['steps']:,} steps of {metrics['n_parameters']:,} parameters in {metrics['train_s']:.0f} s, "
        f"{metrics['tokens_per_s']:,.0f} tokens/s",
        f"training, last logged: loss {metrics['loss']:.4f}, {name} at T = {temperature:g} (without its factor T^2) "
        f"{metrics['kl']:.4f}, cross-entropy {metrics['ce']:.4f} nats/token",
    ]
    if "held_out" in metrics:
        held_out = metrics["held_out"]
        lines.append(
            f"held out: cross-entropy {held_out['loss_nats']:.4f}, KL(stored teacher || student) at T = 1 "
            f"{held_out['kl_store_nats']:.4f} nats/token, top-1 agreement {held_out['top1_agreement']:.1%} "
            f"over {held_out['n_tokens']:,} tokens"
        )
    return "\n".join([*lines, f"model, model card, train_metrics.json and run_report.html: {out}"])
