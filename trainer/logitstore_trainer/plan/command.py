"""`logitstore plan`: its command-line arguments. Nothing heavy is imported here, so that --help answers at once."""

import argparse
from pathlib import Path

EPILOG = """\
Fits what has to be fitted on four fifths of the samples, measures every configuration on the last fifth, prints what
each costs and loses, and recommends one for the goal. With --out it leaves the fitted codec for `collect --tables`.

examples:
  logitstore plan --logits sample.safetensors --max-bytes-per-token 24 --out plan-24
  logitstore plan --logits sample.safetensors --max-kl 0.2 --temperature 2 --tokens 1e9 --out plan
  logitstore collect --teacher M --dataset F --out teacher_logits.parquet --tables plan-24

FILE.safetensors holds input_ids [N] and sample_lengths [S] (integers) and either logits [N, V] or hidden [N, D] with
lm_head [V, D], float16, bfloat16 or float32. 50,000 to 200,000 rows of the text that will be stored are a good sample.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `logitstore plan`."""
    parser.epilog = EPILOG
    parser.add_argument("--logits", required=True, type=Path, metavar="FILE", help="a sample of the teacher's logits")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--max-bytes-per-token", type=float, metavar="B", help="the least KL in at most B bytes a token")
    goal.add_argument("--max-kl", type=float, metavar="NATS", help="the fewest bytes at a KL of at most this")
    parser.add_argument(
        "--temperature", type=float, metavar="T",
        help="at which KL counts (default: T = 1 and T = 2 together; with --max-kl T = 1)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=float, default=1e9, metavar="N", help="that will be stored (default: 1e9)")
    parser.add_argument("--rows", type=int, default=1020, metavar="N", help="to measure on (default: 1,020)")
    parser.add_argument("--seed", type=int, default=0, help="of the fit (default: 0)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the fitted codec, plan.json and report.html"
    )


def run(args: argparse.Namespace) -> int:
    """Plans and prints; returns the exit code: 1 where no configuration reaches the goal."""
    from logitstore_trainer.plan.plan import Goal, plan

    goal = Goal(args.max_bytes_per_token, args.max_kl, args.temperature, args.tokens)
    return plan(args.logits, goal, n_rows=args.rows, seed=args.seed, out=args.out)
