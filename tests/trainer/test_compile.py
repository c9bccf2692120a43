"""torch.compile around a student, and around student and loss together: a step ends in the weights of the eager step.

The backend is "aot_eager", which traces and differentiates as inductor does and generates no machine code; with
inductor, which takes minutes for these few steps, the same tests are of the full grid.
"""

import pytest
import torch
from logitstore_trainer import DistillationLoss, DistillationTrainer, collate, collate_packed
from logitstore_trainer.packing import model_inputs
from transformers import TrainingArguments

_NO_SPACE = pytest.mark.skipif(" " in torch.__path__[0], reason="inductor cannot link to a PyTorch below a space")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=[pytest.mark.full_grid, _NO_SPACE])]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counted(backend, counts):
    """The backend, counting the graphs that it is given."""
    from torch._dynamo.backends.registry import lookup_backend

    def compiled(graph, example_inputs):
        counts.append(len(graph.graph.nodes))
        return lookup_backend(backend)(graph, example_inputs)

    return compiled


def assert_same_step(compiled, eager, before):
    moved = 0.0
    for (name, got), expected, start in zip(
        compiled.named_parameters(), eager.parameters(), before.parameters(), strict=True
    ):
        step = float((expected - start).detach().abs().max())
        moved = max(moved, step)
        assert float((got - expected).detach().abs().max()) <= 1e-5 * max(step, 1e-3), name
    assert moved > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["student", "student and loss"])
@pytest.mark.parametrize("collator", [collate, collate_packed])
def test_a_plain_step_with_a_compiled_student(backend, what, collator, new_student, store):
    batch, loss_of = collator([store[i] for i in range(6)]), DistillationLoss(store, temperature=2.0, alpha=0.7)
    models = [new_student(5).train() for _ in range(2)]
    graphs = []
    for model, is_compiled in zip(models, (True, False), strict=True):
        forward = torch.compile(model, backend=counted(backend, graphs), dynamic=False) if is_compiled else model

        def step(forward=forward):
            return loss_of(forward(**model_inputs(batch)).logits, batch)

        if is_compiled and what == "student and loss":
            step = torch.compile(step, backend=counted(backend, graphs), dynamic=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        step().backward()
        optimizer.step()
    assert len(graphs) > 0
    assert_same_step(*models, new_student(5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trainer_step_with_torch_compile(backend, new_student, store, tmp_path):
    models = [new_student(5) for _ in range(2)]
    for model, is_compiled in zip(models, (True, False), strict=True):
        args = TrainingArguments(
            output_dir=str(tmp_path / str(is_compiled)), use_cpu=True, report_to="none", max_steps=1,
            per_device_train_batch_size=6, learning_rate=0.5, lr_scheduler_type="constant", optim="sgd",
            max_grad_norm=0.0, disable_tqdm=True, save_strategy="no",
            **({"torch_compile": True, "torch_compile_backend": backend} if is_compiled else {}),
        )  # fmt: skip
        trainer = DistillationTrainer(model=model, args=args, train_dataset=store, temperature=2.0, alpha=0.7)
        torch._dynamo.utils.counters.clear()
        trainer.train()
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == is_compiled
    assert_same_step(*models, new_student(5))
