"""Fits a tail model to rows of a teacher, on the KL at T = 1 and T = 2 together.

The embedding is the teacher's head in its Fisher-weighted principal directions; prior and posterior start from ridge
regression and the covariance that it leaves, the network from zero, and everything is trained with Adam on
KL(teacher || prediction) with the head exact (tail_loss.py), a step on the likeliest 4,096 tokens and as many of the
others, which is a sixth of a 49k vocabulary. How many entries a row has, by count or
by probability, how coarse its values are and how much of a sequence is stored are drawn at random, so that one model
serves every configuration. The output is expressed in all directions of the head, ordered by how much the prediction
leaves of them, which is the basis that corrections are coded in.

Seeded: the same rows and seed give the same model, up to how matrix products are rounded on a machine. Everything is
drawn on the processor and the rows stay there; a device gets the head and one batch after the other.

Letters: B batch, L rows of the longest sequence, K entries, V vocabulary, D width of the head, p width of the
embedding, r coefficients.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore.tail_loss import drawn_columns, tail_kl
from logitstore.tail_model import CONTEXT_WIDTH, TailInputs, TailModel, latent_mean, n_inputs
from logitstore.tail_rows import TailRows

if TYPE_CHECKING:
    from torch import Tensor

MOST_COEFS = 1024
FISHER_ROWS = 6144
RIDGE_ROWS = 100_000
BASIS_ROWS = 50_000
TRAINED = (
    "prior",
    "current_map",
    "next_map",
    "factor",
    "noise",
    "context_map",
    "hidden_map",
    "hidden_bias",
    "output_map",
    "output_bias",
    "head_map",
    "head_bias",
)
SLOW = {"prior": 0.1, "current_map": 0.1, "next_map": 0.1, "factor": 0.1, "head_map": 0.15, "head_bias": 0.15}


@dataclass(frozen=True)
class TailFitSettings:
    """width p and hidden units of the network. rows_seen: over how many rows training goes, passes times rows.
    batch_rows: rows of a step. columns: tokens of a step, the likeliest half always. entries: range of the number of
    entries. seed: of everything drawn."""

    width: int = 192
    hidden: int = 224
    rows_seen: int = 2_400_000
    batch_rows: int = 512
    columns: int = 8192
    entries: tuple[int, int] = (4, 32)
    lr: float = 2e-3
    seed: int = 0


# stage, done, total; the stages in order: "metric" (rows), "steps", "basis" (rows)
OnFit = Callable[[str, int, int], Any]


def fit_tail_model(
    rows: TailRows, settings: TailFitSettings | None = None, *, device: Any = "cpu", on_progress: OnFit | None = None
) -> TailModel:
    """The tail model of these rows. device: where it is computed, the processor or a GPU."""
    import torch

    settings = settings or TailFitSettings()
    told = on_progress or (lambda stage, done, total: None)
    generator = torch.Generator().manual_seed(settings.seed)
    head = _Head(rows.lm_head.to(device), rows.bias.to(device), rows.hidden.float().mean(0).to(device))
    fisher = tail_fisher(rows, _some(rows.n_rows, FISHER_ROWS, generator), head, told)
    width = min(settings.width, head.matrix.shape[1])
    directions = _directions(rows, fisher.metric, width)
    embedding, bias = _as_half(head.matrix @ directions).float(), head.matrix @ head.mean_hidden + head.bias
    directions = directions * (embedding != 0).any(0)
    parameters = _initial_parameters(rows, head, embedding, directions, fisher.metric, settings, generator)
    _train(rows, head, embedding, bias, fisher.column_weights, parameters, settings, generator, told)
    return _in_residual_basis(rows, head, embedding, bias, fisher, parameters, generator, told)


@dataclass(frozen=True, eq=False)
class _Head:
    """The teacher's head on the device: matrix [V, D], bias [V]; mean_hidden [D] of the rows."""

    matrix: "Tensor"
    bias: "Tensor"
    mean_hidden: "Tensor"


@dataclass(frozen=True, eq=False)
class TailFisher:
    """metric [D, D]: mean over rows of the tails' Fisher information in the hidden state, T = 1 and T = 2 added.
    column_weights [V]: mean probability of each token in the tails, T = 1 and a quarter of T = 2 added."""

    metric: "Tensor"
    column_weights: "Tensor"


def tail_fisher(rows: TailRows, chosen: "Tensor", head: _Head, told: OnFit, n_entries: int = 16) -> TailFisher:
    """The metric in which errors of the hidden state cost KL, to second order: KL = e^T metric e / 2."""
    lm_head, n_entries = head.matrix, min(n_entries, rows.ids.shape[1])
    width = lm_head.shape[1]
    first, column_weights = lm_head.new_zeros(width, width), lm_head.new_zeros(len(lm_head))
    n_done = 0
    for index in chosen.split(256):
        logits = rows.hidden[index].to(lm_head.device).float() @ lm_head.T + head.bias
        ids = rows.ids[index, :n_entries].to(lm_head.device).long()
        for temperature in (1.0, 2.0):
            tail = (logits / temperature).softmax(-1).scatter_(1, ids, 0.0)
            mass = tail.sum(-1, keepdim=True).clamp(min=1e-12)
            column_weights += tail.sum(0) / temperature**2
            means = (tail @ lm_head) / mass.sqrt()
            first += means.T @ means / temperature**2
        n_done += len(index)
        told("metric", n_done, len(chosen))
    second = lm_head.T @ (lm_head * column_weights[:, None])
    return TailFisher((second - first) / len(chosen), column_weights / len(chosen))


def _directions(rows: TailRows, metric: "Tensor", width: int) -> "Tensor":
    """The p directions [D, p] of the hidden states that cost most KL."""
    import torch

    root, inverse_root = _roots(metric)
    covariance = _covariance(rows.hidden[:RIDGE_ROWS].to(metric.device).float())
    _, vectors = torch.linalg.eigh((root @ covariance @ root).double())
    return inverse_root @ vectors.flip(1)[:, :width].float()


def _covariance(x: "Tensor") -> "Tensor":
    """Of rows x [n, D]: [D, D]; 0 where there is one row."""
    centred = x - x.mean(0)
    return centred.T @ centred / max(len(x) - 1, 1)


def _roots(metric: "Tensor") -> tuple["Tensor", "Tensor"]:
    """(metric^(1/2), metric^(-1/2)), eigenvalues held above 1e-9 of the greatest."""
    import torch

    values, vectors = torch.linalg.eigh(metric.double())
    values = values.maximum(values[-1] * 1e-9)
    return ((vectors * values.sqrt()) @ vectors.T).float(), ((vectors / values.sqrt()) @ vectors.T).float()


def _initial_parameters(
    rows: TailRows,
    head: _Head,
    embedding: "Tensor",
    directions: "Tensor",
    metric: "Tensor",
    settings: TailFitSettings,
    generator: Any,
) -> dict[str, "Tensor"]:
    """Ridge regression for the prior, the covariance it leaves for the posterior, zero for the network's output."""
    import torch

    width, device = embedding.shape[1], embedding.device
    some = _some(rows.n_rows, RIDGE_ROWS, generator)
    latent = (rows.hidden[some].to(device).float() - head.mean_hidden) @ (metric @ directions)
    tokens = torch.cat([embedding[rows.current[some].to(device)], embedding[rows.following[some].to(device)]], 1)
    tokens = torch.cat([tokens, tokens.new_ones(len(some), 1)], 1).double()
    gram = tokens.T @ tokens
    gram.diagonal().add_(gram.diagonal().mean() * 1e-3)
    maps = torch.linalg.solve(gram, tokens.T @ latent.double())
    left = latent - (tokens @ maps).float()
    covariance = _covariance(left)
    covariance.diagonal().add_(1e-4)
    n_in = n_inputs(width)

    def uniform(n_rows: int, n_columns: int) -> torch.Tensor:
        return (torch.rand(n_rows, n_columns, generator=generator) * 2 - 1) / math.sqrt(n_rows)

    parameters = {
        "prior": maps[-1].float(),
        "current_map": maps[:width].float(),
        "next_map": maps[width:-1].float(),
        "factor": torch.linalg.cholesky(covariance),
        "noise": torch.tensor([-2.0, 2.0]),
        "context_map": uniform(width, CONTEXT_WIDTH),
        "hidden_map": uniform(n_in, settings.hidden),
        "hidden_bias": torch.zeros(settings.hidden),
        "output_map": torch.zeros(settings.hidden, width),
        "output_bias": torch.zeros(width),
        "head_map": directions,
        "head_bias": head.mean_hidden,
    }
    return {name: parameter.to(device, copy=True).requires_grad_() for name, parameter in parameters.items()}


def _train(
    rows: TailRows,
    head: _Head,
    embedding: "Tensor",
    bias: "Tensor",
    column_weights: "Tensor",
    parameters: dict[str, "Tensor"],
    settings: TailFitSettings,
    generator: Any,
    told: OnFit,
) -> None:
    import torch

    starts = torch.searchsorted(rows.sequence, torch.arange(rows.n_sequences + 1))
    steps = max(100, settings.rows_seen // settings.batch_rows)
    groups = [
        {"params": [parameter], "lr": settings.lr * SLOW.get(name, 1.0)} for name, parameter in parameters.items()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    likeliest = column_weights.argsort(descending=True)
    batches = _sequence_batches(starts, settings.batch_rows, generator)
    for step in range(1, steps + 1):
        batch = drawn_batch(rows, starts, next(batches), settings.entries, generator, head.matrix.device)
        columns = drawn_columns(head.matrix, head.bias, likeliest, settings.columns, generator)
        tensors = {"embedding": embedding, "embedding_bias": bias, **parameters}
        tensors["scaled_embedding"] = embedding @ parameters["factor"]
        latent = latent_mean(tensors, batch.inputs)[batch.at]
        predicted = latent @ parameters["head_map"].T + parameters["head_bias"]
        _, gradient = tail_kl(columns, batch.hidden, batch.lse_1, batch.lse_2, batch.ids, predicted.detach())
        optimizer.zero_grad()
        predicted.backward(gradient)
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        schedule.step()
        told("steps", step, steps)


def _sequence_batches(starts: "Tensor", batch_rows: int, generator: Any) -> Any:
    """Endless lists of sequences of about batch_rows rows together, pass after pass in shuffled order."""
    import torch

    lengths = starts.diff()
    batch: list[int] = []
    while True:
        for sequence in torch.randperm(len(lengths), generator=generator).tolist():
            batch.append(sequence)
            longest = max(int(lengths[s]) for s in batch)
            if (len(batch) + 1) * longest > batch_rows:
                yield batch
                batch = []


@dataclass(frozen=True, eq=False)
class DrawnBatch:
    """inputs: as a decoder would see them. at: the places (b, l) of the N rows in inputs. Of these rows: hidden [N, D]
    float32, lse_1 and lse_2 [N], ids [N, K] int64, -1 for tokens that are not entries."""

    inputs: TailInputs
    at: tuple["Tensor", "Tensor"]
    hidden: "Tensor"
    lse_1: "Tensor"
    lse_2: "Tensor"
    ids: "Tensor"

    @property
    def weight(self) -> "Tensor":
        """How much an error in a row's tail counts [N]: the mean of the tail's masses at T = 1 and T = 2."""
        mass, half = self.inputs.tail_logmass[self.at], self.inputs.tail_logmoment_half[self.at]
        total_half = self.lse_2 - self.lse_1 / 2
        return (mass.exp() + (half - total_half).exp()) / 2


def drawn_batch(
    rows: TailRows,
    starts: "Tensor",
    sequences: list[int],
    entries: tuple[int, int],
    generator: Any,
    device: Any = "cpu",
) -> DrawnBatch:
    """These sequences with a drawn number of entries, coarseness of values and, for some, only their ends stored."""
    import torch

    def uniform() -> float:
        return float(torch.rand((), generator=generator))

    low, high = entries[0], min(entries[1], rows.ids.shape[1])
    n_entries = round(math.exp(math.log(min(low, high)) + (math.log(high) - math.log(min(low, high))) * uniform()))
    least_logp = -math.inf if uniform() < 0.5 else -3 - 4 * uniform()
    step = (0.0, 0.25, 0.5, 1.0)[int(4 * uniform())]
    row = []
    for sequence in sequences:
        begin, end = int(starts[sequence]), int(starts[sequence + 1])
        hidden = int(uniform() * (end - begin) * 0.7) if uniform() < 0.3 else 0
        row.append(torch.arange(begin + hidden, end))
    index = torch.cat(row)
    b = torch.repeat_interleave(torch.arange(len(row)), torch.tensor([len(part) for part in row]))
    first = torch.tensor([int(rows.position[part[0]]) for part in row])
    at = (b, rows.position[index] - first[b])
    ids, logps, mass, half = kept_entries(rows, index, n_entries, least_logp, step)
    placed = (
        _placed(rows.current[index], at, 0),
        _placed(rows.following[index], at, 0),
        _placed(ids, at, -1),
        _placed(logps, at, 0.0),
        _placed(mass, at, math.nan),
        _placed(half, at, math.nan),
    )
    of_rows = rows.hidden[index], rows.lse_1[index], rows.lse_2[index], ids
    hidden_ND, lse_1, lse_2, ids = (tensor.to(device) for tensor in of_rows)
    return DrawnBatch(
        inputs=TailInputs(*(tensor.to(device) for tensor in placed)),
        at=(at[0].to(device), at[1].to(device)),
        hidden=hidden_ND.float(),
        lse_1=lse_1,
        lse_2=lse_2,
        ids=ids,
    )


def _placed(values: "Tensor", at: tuple["Tensor", "Tensor"], pad: float) -> "Tensor":
    """The rows' values on the grid [B, L] of their sequences."""
    grid = values.new_full((int(at[0].max()) + 1, int(at[1].max()) + 1, *values.shape[1:]), pad)
    grid[at] = values
    return grid


def kept_entries(
    rows: TailRows, index: "Tensor", n_entries: int, least_logp: float, step: float
) -> tuple["Tensor", "Tensor", "Tensor", "Tensor"]:
    """(ids [N, K] with -1 in pads, log-probs in steps as a decoder has them, tail log-mass, half moment) of rows."""
    import torch

    exact = rows.logps[index, :n_entries]
    keep = exact >= least_logp
    keep[:, 0] = True
    head_mass = torch.where(keep, exact.exp(), 0.0).sum(1)
    mass = torch.log1p(-head_mass.clamp(max=1 - 1e-6))
    total_half = (rows.lse_2[index] - rows.lse_1[index] / 2).exp()
    half = (total_half - torch.where(keep, (exact / 2).exp(), 0.0).sum(1)).clamp(min=1e-6).log()
    logps = exact if step == 0 else exact[:, :1] - ((exact[:, :1] - exact) / step).round() * step
    shift = torch.log1p(-mass.exp()) - torch.where(keep, logps, -math.inf).logsumexp(1)
    logps = torch.where(keep, logps + shift[:, None], 0.0)
    return torch.where(keep, rows.ids[index, :n_entries].long(), -1), logps, mass, half


def _in_residual_basis(
    rows: TailRows,
    head: _Head,
    embedding: "Tensor",
    bias: "Tensor",
    fisher: TailFisher,
    parameters: dict[str, "Tensor"],
    generator: Any,
    told: OnFit,
) -> TailModel:
    """The trained model with its output in the directions of the head, the ones that it predicts worst first."""
    import torch

    tensors = {"embedding": embedding, "embedding_bias": bias, **{name: p.detach() for name, p in parameters.items()}}
    tensors["scaled_embedding"] = embedding @ tensors["factor"]
    starts = torch.searchsorted(rows.sequence, torch.arange(rows.n_sequences + 1))
    root, inverse_root = _roots(fisher.metric)
    left: list[torch.Tensor] = []
    n_left, n_rows = 0, min(rows.n_rows, BASIS_ROWS)
    with torch.no_grad():
        for sequence in torch.randperm(rows.n_sequences, generator=generator).tolist():
            batch = drawn_batch(rows, starts, [sequence], (16, 16), generator, head.matrix.device)
            latent = latent_mean(tensors, batch.inputs)[batch.at]
            error = batch.hidden - latent @ tensors["head_map"].T - tensors["head_bias"]
            left.append((error @ root) * batch.weight.sqrt()[:, None])
            n_left += len(error)
            told("basis", min(n_left, n_rows), n_rows)
            if n_left > n_rows:
                break
    told("basis", n_rows, n_rows)
    residual = torch.cat(left)
    _, vectors = torch.linalg.eigh((residual.T @ residual).double() / len(residual))
    rank = min(head.matrix.shape[1], MOST_COEFS)
    directions = vectors.flip(1)[:, :rank].float()
    basis = _as_half(head.matrix @ (inverse_root @ directions))
    to_coefs = (root @ directions) * (basis != 0).any(0)
    arrays = {
        "basis": basis,
        "bias": head.bias,
        "embedding": embedding.half(),
        "column_weights": fisher.column_weights,
        "coefs_map": tensors["head_map"].T @ to_coefs,
        "coefs_bias": tensors["head_bias"] @ to_coefs,
    }
    names = [name for name in TRAINED if name not in ("head_map", "head_bias")]
    arrays |= {name: tensors[name] for name in names}
    arrays["embedding_bias"] = bias
    return TailModel({name: np.ascontiguousarray(array.cpu().numpy()) for name, array in arrays.items()})


def _as_half(columns: "Tensor") -> "Tensor":
    """Columns in float16; 0 where a column is beyond its range, a direction in which no tail would feel an error."""
    return (columns * (columns.abs().amax(0) < 6e4)).half()


def _some(n: int, most: int, generator: Any) -> "Tensor":
    """Indices of `most` of n rows, drawn without replacement; all where there are no more."""
    import torch

    return torch.randperm(n, generator=generator)[:most]
