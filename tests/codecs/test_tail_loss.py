"""The loss of a fit: its value and gradient against plain float64, whichever tokens a step looks at."""

import numpy as np
import pytest
import torch

from logitstore.tail_loss import BLOCK_ROWS, drawn_columns, tail_kl

V, D = 211, 7


def made_up(n_rows: int, seed: int = 0, scale: float = 2.0) -> dict[str, torch.Tensor]:
    """A head, hidden states, a prediction of them, and entries of which some are pads."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    head, bias, teacher = normal(V, D) * scale, normal(V), normal(n_rows, D)
    logits = teacher @ head.T + bias
    entries = logits.topk(6, dim=1).indices
    entries[torch.rand(n_rows, 6, generator=generator) < 0.3] = -1
    return {
        "head": head,
        "bias": bias,
        "teacher": teacher,
        "predicted": teacher + 0.5 * normal(n_rows, D),
        "lse_1": logits.logsumexp(1),
        "lse_2": (logits / 2).logsumexp(1),
        "entries": entries,
    }


def plain(given: dict[str, torch.Tensor], ids: torch.Tensor, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The same in float64, by autograd, term by term: sum p log(p / q) of weighted tokens that are no entries."""
    double = {name: tensor.double() for name, tensor in given.items() if name != "entries"}
    predicted = double["predicted"].requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(predicted)):
        tail = torch.tensor([i not in set(given["entries"][row].tolist()) for i in ids.tolist()])
        kept, log_w = ids[tail], weight[tail].double().log()
        z = double["head"][kept] @ double["teacher"][row] + double["bias"][kept]
        s = double["head"][kept] @ predicted[row] + double["bias"][kept]
        for temperature, lse in ((1, double["lse_1"][row]), (2, double["lse_2"][row])):
            log_p, log_q = (log_w + x / temperature for x in (z, s))
            p = (log_p - lse).exp()
            total = total + (p * (log_p.log_softmax(0) - log_q.log_softmax(0))).sum()
    (total / len(predicted)).backward()
    return float(total.detach() / len(predicted)), predicted.grad


@pytest.mark.parametrize("n_rows", [1, BLOCK_ROWS + 3])
@pytest.mark.parametrize("n_columns", [V, 64])
def test_value_and_gradient_are_those_of_plain_float64(n_rows: int, n_columns: int) -> None:
    given = made_up(n_rows)
    likeliest = torch.randperm(V, generator=torch.Generator().manual_seed(1))
    columns = drawn_columns(given["head"], given["bias"], likeliest, n_columns, torch.Generator().manual_seed(2))
    ids = torch.nonzero(columns.place < n_columns).squeeze(1)
    assert len(ids) == n_columns
    if n_columns < V:
        assert set(likeliest[: n_columns // 2].tolist()) <= set(ids.tolist())
        assert columns.weight.sum() == pytest.approx(V)
    loss, gradient = tail_kl(columns, *(given[name] for name in ("teacher", "lse_1", "lse_2", "entries", "predicted")))
    true_loss, true_gradient = plain(given, ids, columns.weight[columns.place[ids]])
    assert float(loss) == pytest.approx(true_loss, rel=1e-5)
    np.testing.assert_allclose(gradient, true_gradient, atol=3e-6 * float(true_gradient.abs().max()), rtol=1e-4)


def test_peaked_rows_and_rows_without_a_tail_are_finite() -> None:
    given = made_up(4, scale=60.0)
    given["entries"] = torch.arange(V).expand(4, V).clone()  # row 0: every token is an entry
    given["entries"][1:, 5:] = -1
    columns = drawn_columns(given["head"], given["bias"], torch.arange(V), V, torch.Generator())
    loss, gradient = tail_kl(columns, *(given[name] for name in ("teacher", "lse_1", "lse_2", "entries", "predicted")))
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert torch.equal(gradient[0], torch.zeros(D))


def test_a_perfect_prediction_costs_nothing() -> None:
    given = made_up(9)
    columns = drawn_columns(given["head"], given["bias"], torch.arange(V), V, torch.Generator())
    loss, gradient = tail_kl(
        columns, given["teacher"], given["lse_1"], given["lse_2"], given["entries"], given["teacher"]
    )
    assert abs(float(loss)) < 1e-6
    assert float(gradient.abs().max()) < 1e-6
