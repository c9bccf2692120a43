"""Rows to fit a tail model on: the teacher's hidden states and what codecs keep of its distributions.

A teacher that gives hidden states and its head is taken as it is. One that gives full logits is first factored: the
principal directions of some of its logit rows play the head, and the rows' coordinates in them the hidden states.

Memory: 2 D + 8 * 64 bytes a row, some 1.7 kB at D = 576; logits are read in chunks.

Letters: R rows, D width, V vocabulary, K entries, S sequences.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logitstore.logits_source import FactoredLogits, iter_logit_chunks
from logitstore.row_input import as_numpy, checked_input_ids, checked_keep_mask

if TYPE_CHECKING:
    from torch import Tensor

ENTRIES = 64
FACTORED_ROWS, FACTORED_WIDTH = 2048, 640
LEAST_SHARE = 1e-6  # of the greatest eigenvalue; below, float32 products are noise, and a head of noise has no answer
REACH = 100.0

Sample = tuple[Any, Any, Any]


@dataclass(frozen=True, eq=False)
class TailRows:
    """lm_head [V, D] and bias [V] float32; hidden [R, D] float16; ids [R, K] int32, logps [R, K], lse_1 and lse_2 [R]
    float32: the most probable tokens and the log-sum-exps of the logits at T = 1 and 2. current, following [R] int64;
    sequence and position [R] int64: where each row stands. tokens: int32 [L] of each sequence."""

    lm_head: "Tensor"
    bias: "Tensor"
    hidden: "Tensor"
    ids: "Tensor"
    logps: "Tensor"
    lse_1: "Tensor"
    lse_2: "Tensor"
    current: "Tensor"
    following: "Tensor"
    sequence: "Tensor"
    position: "Tensor"
    tokens: tuple[NDArray[np.int32], ...]

    @property
    def n_rows(self) -> int:
        return len(self.hidden)

    @property
    def n_sequences(self) -> int:
        return int(self.sequence[-1]) + 1


def tail_rows(samples: Iterable[Sample], vocab_size: int, *, on_rows: Callable[[int], Any] | None = None) -> TailRows:
    """The rows of samples of (logits [L, V], input_ids [L], keep_mask [L-1] or None), a re-iterable of them.

    on_rows is called with the number of rows after each sample. Raises ValueError where no row is present, the samples
    have different heads, a row is no distribution, or hidden states do not fit into float16.
    """
    import torch

    head = _head_of(samples, vocab_size)
    columns: dict[str, list[Tensor]] = {
        name: [] for name in TailRows.__annotations__ if name not in ("lm_head", "bias", "tokens")
    }
    kept_tokens: list[NDArray[np.int32]] = []
    for logits, input_ids, keep_mask in samples:
        tokens = checked_input_ids(input_ids, vocab_size)
        keep = np.flatnonzero(checked_keep_mask(keep_mask, len(tokens)))
        if not len(keep):
            continue
        for z in _distributions(logits, keep, vocab_size):
            values, ids = z.topk(min(ENTRIES, vocab_size), dim=1)
            lse_1 = z.logsumexp(1)
            columns["ids"].append(ids.int())
            columns["logps"].append(values - lse_1[:, None])
            columns["lse_1"].append(lse_1)
            columns["lse_2"].append((z / 2).logsumexp(1))
        columns["hidden"].append(head.hidden_of(logits, keep))
        columns["current"].append(torch.from_numpy(tokens[keep].astype(np.int64)))
        columns["following"].append(torch.from_numpy(tokens[keep + 1].astype(np.int64)))
        columns["position"].append(torch.from_numpy(keep))
        columns["sequence"].append(torch.full((len(keep),), len(kept_tokens)))
        kept_tokens.append(tokens)
        if on_rows is not None:
            on_rows(len(keep))
    if not kept_tokens:
        raise ValueError("nothing to fit on: no sample has a present row")
    joined_columns = {name: torch.cat(parts) for name, parts in columns.items()}
    return TailRows(head.lm_head, head.bias, **joined_columns, tokens=tuple(kept_tokens))


@dataclass(frozen=True, eq=False)
class _Head:
    """possible [V] bool, for a head that was made of full logits: True for tokens that some row gives a probability."""

    lm_head: "Tensor"
    bias: "Tensor"
    possible: "Tensor | None" = None

    def hidden_of(self, logits: Any, rows: np.ndarray) -> "Tensor":
        """The hidden states of these rows, float16 [n, D]."""
        import torch

        if self.possible is None:
            return _as_float16(as_numpy(logits.hidden[rows]))
        parts = []
        for z in _distributions(logits, rows, len(self.bias)):
            parts.append((_centred(z, self.bias, self.possible) @ self.lm_head).half())
        return torch.cat(parts)


def _as_float16(hidden: NDArray[np.floating]) -> "Tensor":
    import torch

    with np.errstate(over="ignore"):
        half = hidden.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(
            f"hidden states reach {np.abs(hidden).max():g}, a fit takes them up to {np.finfo(np.float16).max:g}; "
            "divide them by a power of two and multiply lm_head by it"
        )
    return torch.from_numpy(half)


def _distributions(logits: Any, rows: NDArray[np.int64], vocab_size: int) -> Iterator["Tensor"]:
    """logits[rows] as float32 [n, V], chunk by chunk. Raises ValueError for a row that is no distribution."""
    import torch

    done = 0
    for chunk in iter_logit_chunks(logits, rows, vocab_size=vocab_size):
        unusable = np.flatnonzero(~np.isfinite(chunk.max(axis=1)))
        if len(unusable):
            raise ValueError(
                f"logits of row {rows[done + unusable[0]]} have NaN, +inf or no finite value; a distribution needs one"
            )
        done += len(chunk)
        yield torch.from_numpy(chunk)


def _head_of(samples: Iterable[Sample], vocab_size: int) -> _Head:
    import torch

    first = next(iter(samples), None)
    if first is None:
        raise ValueError("nothing to fit on: there are no samples")
    logits = first[0]
    if isinstance(logits, FactoredLogits) and logits.softcap is None:
        lm_head = torch.from_numpy(as_numpy(logits.lm_head).astype(np.float32)[:vocab_size]) * logits.scale
        bias = torch.zeros(vocab_size)
        if logits.bias is not None:
            bias = torch.from_numpy(as_numpy(logits.bias).astype(np.float32)[:vocab_size]) * logits.scale
            bias = _finite(bias[None])[0]
        for other, _, _ in samples:
            if not isinstance(other, FactoredLogits) or tuple(other.lm_head.shape) != tuple(logits.lm_head.shape):
                raise ValueError("samples of several heads cannot be fitted together")
        return _Head(lm_head, bias)
    return _principal_directions(samples, vocab_size)


def _principal_directions(samples: Iterable[Sample], vocab_size: int) -> _Head:
    """A head of orthonormal columns from the first rows of logits, by the eigenvectors of their Gram matrix."""
    import torch

    rows: list[torch.Tensor] = []
    n_rows = 0
    for logits, input_ids, keep_mask in samples:
        keep = np.flatnonzero(checked_keep_mask(keep_mask, len(as_numpy(input_ids))))
        for chunk in _distributions(logits, keep[: FACTORED_ROWS - n_rows], vocab_size):
            rows.append(chunk)
            n_rows += len(chunk)
        if n_rows >= FACTORED_ROWS:
            break
    if not n_rows:
        raise ValueError("nothing to fit on: no sample has a present row")
    z = torch.cat(rows)
    possible = ~torch.isneginf(z).all(0)
    finite = _finite(z)
    bias = finite.mean(0)
    bias = torch.where(possible, bias, bias[possible].max() - REACH)
    centred = _centred(z, bias, possible)
    values, vectors = torch.linalg.eigh((centred @ centred.T).double())
    usable = values > values[-1] * LEAST_SHARE
    keep_width = min(FACTORED_WIDTH, max(int(usable.sum()), 1), vocab_size)
    directions = vectors[:, -keep_width:].float()
    scale = values[-keep_width:].clamp(min=1e-12).sqrt().float()
    return _Head((centred.T @ directions) / scale, bias, possible)


def _centred(logits: "Tensor", bias: "Tensor", possible: "Tensor") -> "Tensor":
    """Logits [N, V] less bias and each row's mean over the possible tokens; 0 for the others."""
    centred = (_finite(logits) - bias) * possible
    return (centred - centred.sum(1, keepdim=True) / possible.sum()) * possible


def _finite(logits: "Tensor") -> "Tensor":
    """Logits [N, V] held at most REACH below their row's greatest: a probability of 0 has no direction to point in."""
    return logits.maximum(logits.amax(dim=1, keepdim=True) - REACH)
