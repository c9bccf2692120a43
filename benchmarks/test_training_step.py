"""A whole training step on two CPU cores at V = 49,152: what distillation adds, and what the usual dense loop takes.

Run: pytest benchmarks/test_training_step.py --benchmark-only, on a machine with nothing else to do. A step is forward,
loss, backward and AdamW of a Llama of 3 layers and width 192 on 4 sequences of 256 tokens; the rounds of what is
compared are interleaved. Compared by the shortest times and by peak memory beyond what lives between steps:

- labels: our own loss at alpha = 0; hf labels: what transformers computes from labels=;
- bucket: the loss of stored top-16 targets with residual mass, collated before the clock starts;
- dense: predicted tails of 128 coefficients, the tail model's own work included (its weights are random: time alone);
- the dense loop: 0.7 KL(T = 2) T^2 + 0.3 cross-entropy in plain PyTorch with the teacher's float32 logits in memory.

The last test times the input pipeline: reading, decoding and collating a batch, in the process that trains.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logitstore_trainer import DistillationLoss, collate
from logitstore_trainer.bench.memory import peak_extra_bytes
from logitstore_trainer.bench.timing import interleaved_times
from transformers import LlamaConfig, LlamaForCausalLM

import logitstore
from logitstore.fit_codec import fitted_on_rows
from logitstore.logits_source import FactoredLogits
from logitstore.tail_model import CONTEXT_WIDTH, TailModel, n_inputs
from logitstore.tail_rows import tail_rows

VOCAB_SIZE, LENGTH, N_SEQUENCES, BATCH_SIZE = 49_152, 256, 32, 4
TEACHER_WIDTH, RANK, TAIL_WIDTH, TAIL_HIDDEN = 128, 128, 192, 224
N_CORES, ROUNDS = 2, 7
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def two_cores():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(N_CORES)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def samples() -> list[tuple[FactoredLogits, np.ndarray, None]]:
    """Made-up text of a made-up teacher."""
    rng = np.random.default_rng(0)
    head = rng.standard_normal((VOCAB_SIZE, TEACHER_WIDTH)).astype(np.float32)
    made = []
    for _ in range(N_SEQUENCES):
        hidden = rng.standard_normal((LENGTH, TEACHER_WIDTH)).astype(np.float32) * 0.35
        made.append((FactoredLogits(hidden, head), rng.integers(0, VOCAB_SIZE, LENGTH), None))
    return made


def random_tail_model() -> TailModel:
    """The shapes of a fitted model with RANK coefficients; what it predicts means nothing."""
    rng = np.random.default_rng(1)
    v, r, p, h = VOCAB_SIZE, RANK, TAIL_WIDTH, TAIL_HIDDEN
    shapes: dict[str, tuple[int, ...]] = {
        "basis": (v, r), "bias": (v,), "embedding": (v, p), "embedding_bias": (v,), "column_weights": (v,),
        "prior": (p,), "current_map": (p, p), "next_map": (p, p), "factor": (p, p), "noise": (2,),
        "context_map": (p, CONTEXT_WIDTH), "hidden_map": (n_inputs(p), h), "hidden_bias": (h,), "output_map": (h, p),
        "output_bias": (p,), "coefs_map": (p, r), "coefs_bias": (r,),
    }  # fmt: skip
    arrays = {name: 0.02 * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["column_weights"] = np.full(v, 1 / v, np.float32)
    for name in ("basis", "embedding"):
        arrays[name] = arrays[name].astype(np.float16)
    return TailModel(arrays)


@pytest.fixture(scope="module")
def stores(samples: list, tmp_path_factory) -> dict[str, logitstore.LogitStore]:
    """The text with residual mass and with predicted tails, both with the 16 most probable tokens."""
    folder = tmp_path_factory.mktemp("stores")
    bucket = logitstore.make_codec("topk", vocab_size=VOCAB_SIZE, k=16)
    dense = replace(logitstore.make_codec("topk", vocab_size=VOCAB_SIZE, k=16, head="log"), tail="predicted")
    dense = fitted_on_rows(dense, tail_rows(samples[:8], VOCAB_SIZE), random_tail_model())
    return {name: _written(folder / f"{name}.parquet", codec, samples) for name, codec in
            (("bucket", bucket), ("dense", dense))}  # fmt: skip


def _written(path: Path, codec: Any, samples: list) -> logitstore.LogitStore:
    with logitstore.create(path, logitstore.StoreSpec(codec=codec, vocab_size=VOCAB_SIZE)) as writer:
        for number, sample in enumerate(samples):
            writer.append(number, sample[1], codec.targets_from_logits(*sample))
    return logitstore.open(path)


class Step:
    """A student, its optimizer and one way to a loss: called, it takes one step."""

    def __init__(self, loss_of: Any) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=192, intermediate_size=512, num_hidden_layers=3,
            num_attention_heads=6, max_position_embeddings=512, tie_word_embeddings=True,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).train()
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self._loss_of = loss_of
        self()  # the optimizer's own memory is made in the first step

    def __call__(self, round_index: int = 0) -> float:
        loss = self._loss_of(self.model)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())


@pytest.fixture(scope="module")
def steps(stores: dict, samples: list) -> dict[str, Step]:
    """Every way to a loss, of one batch."""
    batches = {name: collate([store[number] for number in range(BATCH_SIZE)]) for name, store in stores.items()}
    losses = {
        "labels": (DistillationLoss(stores["bucket"], temperature=1.0, alpha=0.0), batches["bucket"]),
        "bucket": (DistillationLoss(stores["bucket"], temperature=2.0, alpha=0.7), batches["bucket"]),
        "dense": (DistillationLoss(stores["dense"], temperature=2.0, alpha=0.7), batches["dense"]),
    }
    input_ids, labels = batches["bucket"]["input_ids"], batches["bucket"]["labels"]
    teacher = torch.cat([torch.from_numpy(s.hidden[:-1] @ s.lm_head.T) for s, _, _ in samples[:BATCH_SIZE]])

    def stored(name: str) -> Any:
        loss_of, batch = losses[name]
        return lambda model: loss_of(model(input_ids=input_ids, use_cache=False).logits, batch)

    def hf_labels(model: Any) -> torch.Tensor:
        return model(input_ids=input_ids, labels=labels, use_cache=False).loss

    def dense_loop(model: Any) -> torch.Tensor:
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        soft = torch.nn.functional.softmax(teacher / 2.0, dim=-1)
        kl = torch.nn.functional.kl_div(
            torch.nn.functional.log_softmax(logits / 2.0, dim=-1), soft, reduction="batchmean"
        )
        return 0.7 * kl * 4.0 + 0.3 * torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    made = {name: Step(stored(name)) for name in losses}
    made |= {"hf labels": Step(hf_labels), "dense loop": Step(dense_loop)}
    made["bucket"].target_bytes = sum(batches["bucket"][name].nbytes for name in batches["bucket"] if "teacher" in name)
    made["dense loop"].target_bytes = teacher.nbytes
    return made


def measured(benchmark: Any, steps: dict[str, Step], names: tuple[str, ...]) -> tuple[dict, dict]:
    """(shortest seconds, peak bytes) by name, also as extra_info."""
    times = interleaved_times({name: steps[name] for name in names}, repeats=ROUNDS)
    seconds = {name: min(found.seconds) for name, found in times.items()}
    peaks = {name: peak_extra_bytes(steps[name], CPU) for name in names}
    benchmark.group = f"a step on {N_CORES} cores: {BATCH_SIZE} x {LENGTH} tokens, {VOCAB_SIZE} tokens"
    benchmark.extra_info["seconds"], benchmark.extra_info["peak_bytes"] = seconds, peaks
    benchmark.pedantic(steps[names[0]], rounds=3)
    return seconds, peaks


def test_a_stored_teacher_costs_little_more_than_labels(benchmark, steps):
    seconds, peaks = measured(benchmark, steps, ("bucket", "labels", "dense", "hf labels"))
    assert seconds["bucket"] <= 1.15 * seconds["labels"]
    assert peaks["bucket"] <= 1.05 * peaks["labels"]
    assert seconds["dense"] <= 1.5 * seconds["labels"]


def test_the_dense_loop_takes_longer_and_holds_more(benchmark, steps):
    first = {name: steps[name]() for name in ("bucket", "dense loop")}
    assert np.isfinite(list(first.values())).all()
    seconds, peaks = measured(benchmark, steps, ("bucket", "dense loop"))
    target_bytes = {name: steps[name].target_bytes for name in ("bucket", "dense loop")}
    benchmark.extra_info["target_bytes"] = target_bytes
    assert seconds["dense loop"] >= 1.3 * seconds["bucket"]
    assert target_bytes["dense loop"] >= 200 * target_bytes["bucket"]
    assert peaks["bucket"] <= 0.6 * peaks["dense loop"]


@pytest.mark.parametrize("name", ["bucket", "dense"])
def test_the_step_hardly_waits_for_its_data(benchmark, steps, stores, name):
    store, order = stores[name], np.random.default_rng(2).permutation(N_SEQUENCES)

    def batch(round_index: int = 0) -> dict[str, torch.Tensor]:
        start = round_index * BATCH_SIZE % N_SEQUENCES
        return collate([store[int(number)] for number in order[start : start + BATCH_SIZE]])

    times = interleaved_times({"batch": batch, "step": steps[name]}, repeats=ROUNDS)
    share = times["batch"].p50_s / (times["batch"].p50_s + times["step"].p50_s)
    benchmark.group = "input pipeline"
    benchmark.extra_info["share_of_a_step"] = share
    benchmark.pedantic(batch, rounds=5)
    assert share < 0.02
