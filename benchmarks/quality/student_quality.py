"""Is what a store keeps enough for a student? The same student on the same text from every kind of target.

    python benchmarks/quality/codec_rows.py --out codec-rows
    python benchmarks/quality/student_quality.py --rows codec-rows --out student-quality

The student has 3 layers of width 192; its embedding starts from the teacher's, projected. It takes 320 steps of 1,020
rows, half GSM8K and half instructions, each row twice, from the targets alone (only the arm "labels" sees labels).
Text, order and initial weights are the same for all arms of a seed. No codec was fitted on this text. Measured is the
KL from the teacher over the whole vocabulary at T = 1 and T = 2 on held-out text of both kinds, the loss against its
labels and how often student and teacher rank the same token first. An arm's share is how much of the way from labels
to full logits it went, at the temperature that it was trained at.

It takes hours. Every finished run is one line of the file of rows; what is there is not run again, so a killed script
goes on where it was. It ends with the table of all rows.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from logitstore_trainer.bench.environment import environment
from logitstore_trainer.bench.logits_file import LogitsFile
from logitstore_trainer.cli import one_line_errors
from logitstore_trainer.progress import Progress
from logitstore_trainer.report import format_table
from student_arms import ARMS, Arm, batches, loss_of_arm, write_stores
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "benchmarks" / "results" / "student_quality.jsonl"
HELD_OUT = ("gsm8k", "instructions")
LAYERS, WIDTH, HEADS, MLP = 3, 192, 6, 512
EMBEDDING_RMS = 0.05
BATCH_SIZE, STEPS, WARMUP, LR = 4, 320, 16, 2e-3
HEADERS = ("targets", "T", "bytes a token", "runs", "KL", "share of full", "other KL", "loss", "same first")
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, two-sided, of 2 to 10 runs
MOST_SEEDS = len(_T_95) + 1


def main() -> int:
    """Runs what has no row yet; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("codec-rows"), help="folder that codec_rows.py wrote")
    parser.add_argument("--out", type=Path, default=Path("student-quality"), help="folder for the stores")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="which; none: print the table alone")
    parser.add_argument("--arms", nargs="+", help="only these, by name (default: all)")
    parser.add_argument("--results", type=Path, default=ROWS, help="file of result rows, one JSON object a line")
    args = parser.parse_args()
    return one_line_errors(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Seed by seed, all arms of a seed; then the table."""
    unknown = sorted(set(args.arms or []) - {arm.name for arm in ARMS})
    if unknown:
        raise ValueError(f"no arm is called {unknown[0]}; there are {', '.join(sorted({arm.name for arm in ARMS}))}")
    if len(args.seeds) > MOST_SEEDS:
        raise ValueError(f"{len(args.seeds)} seeds, expected at most {MOST_SEEDS}")
    wanted = [arm for arm in ARMS if not args.arms or arm.name in args.arms]
    if any(arm.name == "DistillKit" for arm in wanted) and importlib.util.find_spec("distillkit") is None:
        print("DistillKit is not importable here: its arm is left out; put a clone of it on PYTHONPATH and run again")
        wanted = [arm for arm in wanted if arm.name != "DistillKit"]
    found = read_rows(args.results)
    missing = [(s, arm) for s in args.seeds for arm in wanted if not any(_is_of(row, s, arm) for row in found)]
    if missing:
        write_stores(args.rows, args.out, [arm for _, arm in missing])
        train_rows = LogitsFile(args.rows / "train.safetensors")
        held_out = {kind: LogitsFile(args.rows / f"measured-{kind}.safetensors") for kind in HELD_OUT}
    for seed, arm in missing:
        row = one_run(arm, seed, train_rows, held_out, args.out)
        with args.results.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        name = f"seed {seed}, {arm.name}, T = {arm.temperature:g}"
        print(f"{name}: KL {row['kl_t1']:.4f}, at T = 2 {row['kl_t2']:.4f}", flush=True)
    print(format_table(HEADERS, table(read_rows(args.results))))
    return 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of runs of as many steps, none where there is no file. A line that a kill cut short is taken off it."""
    if not path.exists():
        return []
    whole, newline, _ = path.read_text().rpartition("\n")
    os.truncate(path, len((whole + newline).encode()))
    rows = [json.loads(line) for line in whole.splitlines()]
    return [row for row in rows if row["steps"] == STEPS]


def _is_of(row: dict[str, Any], seed: int, arm: Arm) -> bool:
    return (row["seed"], row["arm"], row["temperature"]) == (seed, arm.name, arm.temperature)


def one_run(
    arm: Arm, seed: int, train_rows: LogitsFile, held_out: dict[str, LogitsFile], stores: Path
) -> dict[str, Any]:
    """Trains and measures one student."""
    start_s = time.perf_counter()
    model = new_student(train_rows[0].logits.lm_head, seed)
    loss_of, bytes_per_token = loss_of_arm(arm, train_rows, stores)
    losses = train(model, loss_of, train_rows, seed, f"seed {seed}, {arm.name}, T = {arm.temperature:g}")
    train_s = time.perf_counter() - start_s
    kinds = {kind: measured(model, file) for kind, file in held_out.items()}
    means = {name: float(np.mean([kind[name] for kind in kinds.values()])) for name in next(iter(kinds.values()))}
    return {
        "arm": arm.name,
        "seed": seed,
        "temperature": arm.temperature,
        "steps": STEPS,
        "bytes_per_token": bytes_per_token,
        **means,
        "kinds": kinds,
        "train_loss": [float(np.mean(losses[i : i + 16])) for i in range(0, STEPS, 16)],
        "train_s": train_s,
        "seconds": time.perf_counter() - start_s,
        "environment": environment(command="python benchmarks/quality/student_quality.py"),
    }


def new_student(lm_head_VD: torch.Tensor, seed: int) -> LlamaForCausalLM:
    """A Llama whose tied embedding is the teacher's in its principal directions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(lm_head_VD),
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    head_VD = lm_head_VD.double()
    head_VD = head_VD - head_VD.mean(0)
    _, vectors = torch.linalg.eigh(head_VD.T @ head_VD)
    embedding_VW = (head_VD @ vectors[:, -WIDTH:]).float()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding_VW * EMBEDDING_RMS / embedding_VW.square().mean().sqrt())
    return model


def train(model: LlamaForCausalLM, loss_of: Any, rows: LogitsFile, seed: int, name: str) -> list[float]:
    """AdamW over the batches of the seed, a cosine to zero; returns the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _lr_share)
    losses = []
    model.train()
    with Progress(total=STEPS, desc=name, unit="steps") as display:
        for numbers in batches(len(rows), BATCH_SIZE, STEPS, seed):
            input_ids = torch.stack([torch.from_numpy(rows[number].input_ids).long() for number in numbers])
            loss = loss_of(model(input_ids=input_ids, use_cache=False).logits, numbers)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            display.update()
    model.eval()
    return losses


def _lr_share(step: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


@torch.inference_mode()
def measured(model: LlamaForCausalLM, file: LogitsFile) -> dict[str, float]:
    """Means over the rows of a file: KL(teacher || student) at T = 1 and 2 and loss in nats, share of equal tops."""
    sums: dict[str, float] = dict.fromkeys(("kl_t1", "kl_t2", "loss", "same_first"), 0.0)
    n_rows = 0
    for number in range(len(file)):
        sample = file[number]
        ids_L = torch.from_numpy(sample.input_ids).long()
        z_RV = sample.logits.hidden[:-1].float() @ sample.logits.lm_head.float().T
        s_RV = model(input_ids=ids_L[None], use_cache=False).logits[0, :-1].float()
        for temperature in (1, 2):
            log_p, log_q = (z_RV / temperature).log_softmax(-1), (s_RV / temperature).log_softmax(-1)
            sums[f"kl_t{temperature}"] += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
            if temperature == 1:
                sums["loss"] -= float(log_q.gather(1, ids_L[1:, None]).double().sum())
        sums["same_first"] += float((z_RV.argmax(-1) == s_RV.argmax(-1)).sum())
        n_rows += len(z_RV)
    return {name: total / n_rows for name, total in sums.items()}


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """One line for each arm, means over its seeds; shares with a 95 % interval over seeds."""
    lines = []
    for arm in ARMS:
        own = [row for row in rows if (row["arm"], row["temperature"]) == (arm.name, arm.temperature)]
        if not own:
            continue
        scored, other = ("kl_t1", "kl_t2") if arm.temperature == 1 else ("kl_t2", "kl_t1")
        lines.append(
            [
                arm.name,
                f"{arm.temperature:g}",
                f"{own[0]['bytes_per_token']:,.1f}",
                str(len(own)),
                f"{np.mean([row[scored] for row in own]):.4f}",
                share_text(shares(rows, arm)),
                f"{np.mean([row[other] for row in own]):.4f}",
                f"{np.mean([row['loss'] for row in own]):.4f}",
                f"{np.mean([row['same_first'] for row in own]):.1%}",
            ]
        )
    return lines


def shares(rows: list[dict[str, Any]], arm: Arm) -> list[float]:
    """(KL of labels - KL of the arm) / (KL of labels - KL of full logits), for each seed that has all three."""
    scored = f"kl_t{arm.temperature:g}"
    found = []
    for row in rows:
        if (row["arm"], row["temperature"]) != (arm.name, arm.temperature):
            continue
        of_seed = {(r["arm"], r["temperature"]): r[scored] for r in rows if r["seed"] == row["seed"]}
        labels, full = of_seed.get(("labels", 1.0)), of_seed.get(("full logits", arm.temperature))
        if labels is not None and full is not None:
            found.append((labels - row[scored]) / (labels - full))
    return found


def share_text(values: list[float]) -> str:
    """Mean and half a 95 % interval, in percent."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1%}"
    half = _T_95[len(values) - 2] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{np.mean(values):.1%} +- {100 * half:.1f}"


if __name__ == "__main__":
    sys.exit(main())
