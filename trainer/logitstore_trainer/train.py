"""`logitstore train`: its settings, its options on the command line, and the call that runs it.

PyTorch and transformers are imported when the run starts, not here, so that `--help` and a wrong option are instant.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from logitstore_trainer.dtypes import long_name

DTYPES = ("auto", "bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda", "mps")
LOSSES = ("forward_kl", "reverse_kl", "jsd", "tvd")
TAILS = ("bucket", "uniform", "renormalised", "dropped", "dense", "sampled")
EXAMPLES = """examples:
  logitstore train --student 20M --data teacher_logits.parquet --out student
  logitstore train --student HuggingFaceTB/SmolLM2-135M --data teacher_logits.parquet --eval-fraction 0.05 --out student
  logitstore train --student 20M --data teacher_logits.parquet --out labels-only --alpha 0
  logitstore train --student 20M --data teacher_logits.parquet --out student --resume
"""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run; the command line's options have the same names and defaults.

    student: see `build_student`. data: one store or several of one teacher. eval_data, or eval_fraction in (0, 1) of
    the samples, in whole rows of the data set drawn with the seed: held out. steps (optimizer steps) overrides epochs.
    lr None: 1e-3 from scratch, 5e-5 for a loaded student. warmup: steps if at least 1, else a share of all steps; then
    cosine to zero. A step takes batch_size * grad_accum samples per process; a run that is resumed keeps the samples of
    its steps, whatever the number of processes. dtype: bf16 and fp32 stand for the long names. loss: the divergence of
    `distillation_loss`. save_every, eval_every: steps between, 0 for only at the end.
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


def train(config: TrainConfig, *, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Trains a student and returns the metrics that it writes to `out`/train_metrics.json beside the model.

    `callbacks` are transformers TrainerCallbacks. A finished run is not repeated when resumed: its metrics are read.
    Raises ValueError for settings that make no run, SpecMismatchError where student, stores or a run to resume do not
    fit together, and KeyboardInterrupt, with half-written files removed, when interrupted.
    """
    check_config(config)
    from logitstore_trainer.training_run import run_training

    return run_training(config, callbacks)


def check_config(config: TrainConfig) -> None:
    """Raises ValueError naming the first setting that makes no run."""
    positive = {"--epochs": config.epochs, "--temperature": config.temperature, "--batch-size": config.batch_size}
    positive |= {"--grad-accum": config.grad_accum, "--log-every": config.log_every}
    positive |= {"--steps": config.steps} if config.steps is not None else {}
    positive |= {"--lr": config.lr} if config.lr is not None else {}
    for option, value in positive.items():
        if not value > 0:
            raise ValueError(f"{option} {value} must be above 0")
    if min(config.warmup, config.save_every, config.eval_every, config.workers) < 0:
        raise ValueError("--warmup, --save-every, --eval-every and --workers must not be negative")
    if not 0 <= config.alpha <= 1:
        raise ValueError(f"--alpha {config.alpha} must lie in [0, 1]: 0 is labels only, 1 the teacher only")
    if not 0 <= config.eval_fraction < 1:
        raise ValueError(f"--eval-fraction {config.eval_fraction} must lie in [0, 1)")
    if config.eval_data and config.eval_fraction:
        raise ValueError("--eval-data and --eval-fraction exclude each other: give one")
    if not config.data or isinstance(config.data, str):
        raise ValueError(f"data must be a list of at least one store, got {config.data!r}")
    if not 0 < config.jsd_beta < 1:
        raise ValueError(f"--jsd-beta {config.jsd_beta} must lie in (0, 1), its ends excluded")
    choices = [("--loss", config.loss, LOSSES), ("--dtype", config.dtype, DTYPES), ("--device", config.device, DEVICES)]
    choices += [("--tail", config.tail, TAILS)] if config.tail is not None else []
    for option, value, known in choices:
        if value not in known:
            raise ValueError(f"{option} {value!r} is not one of {', '.join(known)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `logitstore train`; their names are the fields of TrainConfig."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    default = {field.name: field.default for field in fields(TrainConfig)}

    def option(name: str, help: str, **settings: Any) -> None:
        key = name.removeprefix("--").replace("-", "_")
        settings.setdefault("default", default[key])
        parser.add_argument(name, help=help, **settings)

    parser.add_argument(
        "--student",
        required=True,
        metavar="M",
        help="a model folder or hub name; or, from scratch with the teacher's tokenizer, a size (5M) or a shape "
        "(llama:layers=3,width=192,heads=3)",
    )
    parser.add_argument("--data", required=True, nargs="+", metavar="PATH", help="the store, or several of one teacher")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the model, checkpoints and metrics")
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
    option("--report-to", "tensorboard, wandb, trackio, ... (default none)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out from its last checkpoint, on any number of processes that can share a step",
    )


def run(args: argparse.Namespace) -> int:
    """Runs `logitstore train` and prints what came out; returns the exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    config = TrainConfig(**{field.name: getattr(args, field.name) for field in fields(TrainConfig)})
    metrics = train(config)
    print(summary(metrics, config.out))
    return 0


def summary(metrics: dict[str, Any], out: str) -> str:
    """A few lines for the terminal about a finished run."""
    temperature = metrics["config"]["temperature"]
    lines = [
        f"{metrics['steps']:,} steps of {metrics['n_parameters']:,} parameters in {metrics['wall_s']:.0f} s, "
        f"{metrics['tokens_per_s']:,.0f} tokens/s",
        f"training, last logged: loss {metrics['loss']:.4f}, KL at T = {temperature:g} (without its factor T^2) "
        f"{metrics['kl']:.4f}, cross-entropy {metrics['ce']:.4f} nats/token",
    ]
    if "held_out" in metrics:
        held_out = metrics["held_out"]
        lines.append(
            f"held out: cross-entropy {held_out['loss_nats']:.4f}, KL(stored teacher || student) at T = 1 "
            f"{held_out['kl_store_nats']:.4f} nats/token, top-1 agreement {held_out['top1_agreement']:.1%} "
            f"over {held_out['n_tokens']:,} tokens"
        )
    return "\n".join([*lines, f"model and train_metrics.json: {out}"])
