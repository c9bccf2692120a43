"""The loss on two CPU cores at V = 49,152 against the dense loop: at least 3 times its speed, a quarter of its memory.

Run: pytest benchmarks/test_loss_on_cpu.py --benchmark-only, on a machine with nothing else to do. Value and gradient
from given float32 logits, no matrix product timed; rounds interleaved, so that the ratio is of one run. The losses are
held against float64 first. extra_info: the ratios of the shortest times, which are the least disturbed, and of peak
memory beyond the inputs.
"""

import pytest
import torch
from logitstore_trainer.bench.kernels import check_faults
from logitstore_trainer.bench.loss_candidates import (
    DENSE,
    LOSSES,
    OURS,
    Case,
    LossInputs,
    relative_errors,
    value_and_gradient,
)
from logitstore_trainer.bench.memory import peak_extra_bytes
from logitstore_trainer.bench.timing import interleaved_times

N_ROWS, VOCAB_SIZE, N_CORES = 512, 49_152, 2


@pytest.fixture(autouse=True)
def two_cores():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(N_CORES)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.5])
def test_three_times_the_dense_loop_in_a_quarter_of_its_memory(benchmark, temperature):
    case = Case(N_ROWS, VOCAB_SIZE, temperature, "float32")
    inputs = LossInputs.seeded(case, torch.device("cpu"))
    faults = check_faults({name: relative_errors(name, inputs) for name in LOSSES}, case)
    assert not faults, "; ".join(faults)

    def call(name):
        return lambda round_index=0: value_and_gradient(name, inputs, buffer=round_index)

    times = interleaved_times({name: call(name) for name in (OURS, DENSE)}, repeats=11)
    peaks = {name: peak_extra_bytes(call(name), torch.device("cpu")) for name in (OURS, DENSE)}
    speed, memory = min(times[DENSE].seconds) / min(times[OURS].seconds), peaks[OURS] / peaks[DENSE]
    benchmark.group = f"loss on {N_CORES} cores: {N_ROWS} x {VOCAB_SIZE}, T = {temperature:g}, float32"
    benchmark.extra_info["times_the_dense_loop"] = speed
    benchmark.extra_info["memory_of_the_dense_loop"] = memory
    benchmark.pedantic(call(OURS), rounds=5)
    assert speed >= 3
    assert memory <= 0.25
