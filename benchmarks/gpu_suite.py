"""The GPU suite: checks the kernels on a GPU, then measures them, alone and beside their rivals; one JSON row a result.

    python benchmarks/gpu_suite.py                 # under 8 minutes on an H100 or H200; rows in benchmarks/results/
    python benchmarks/gpu_suite.py --dry-run       # no GPU: tiny sizes by Triton's interpreter; no number means a thing

Needs torch, triton and this checkout; liger-kernel is measured where it is installed. Nothing is tuned or repeated by
hand: every section has a budget of seconds and says what it had no time for. Exit codes: 0 done, 1 a check failed,
2 bad arguments or no GPU, 3 stopped at the limit.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/gpu_suite_DEVICE.jsonl")
    parser.add_argument("--minutes", type=float, default=7.0, help="no job begins after that (default: 7)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, by the interpreter; needs --out")
    parser.add_argument("--checks", metavar="PART/PARTS", type=part_of, help=argparse.SUPPRESS)  # a worker's part
    args = parser.parse_args()
    if args.dry_run and args.out is None:
        parser.error("a dry run's rows are no results: name a file with --out")
    if not args.minutes > 0:
        parser.error(f"--minutes must be above 0, got {args.minutes}")
    return args


def part_of(text: str) -> tuple[int, int]:
    part, n_parts = map(int, text.split("/"))
    return part, n_parts


def main() -> int:
    args = arguments()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
    sys.path.insert(0, str(ROOT / "kernels"))  # where this checkout is not installed
    import torch
    from gpu_parts.log import RowLog, facts_of
    from gpu_parts.sections import run_all, run_checks

    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA device: the suite needs one; --dry-run goes through it without", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.dry_run else "cuda")
    facts = facts_of(device, ROOT)
    name = facts["device"].replace(" ", "_")
    path = args.out or ROOT / "benchmarks" / "results" / f"gpu_suite_{name}.jsonl"
    with RowLog.create(path, facts, device, seconds=60 * args.minutes) as log:
        if args.checks:
            run_checks(log, *args.checks, dry=args.dry_run)
        else:
            run_all(log, dry=args.dry_run)
            print(f"rows: {path}")
    red = any(row["status"] == "wrong" or (row["section"], row["status"]) == ("check", "failed") for row in log.rows)
    return 1 if red or log.device_lost else 0


if __name__ == "__main__":
    sys.exit(main())
