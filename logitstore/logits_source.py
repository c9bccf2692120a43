"""A teacher's logits in any of the shapes that callers have, read in row chunks of bounded size.

[L, V] logits at V = 128k are half a megabyte a row in fp32; nothing here holds more than CHUNK_BYTES of them beyond
what the caller already holds. A head that is not float32 in the computer's own memory is brought there a part of the
vocabulary at a time, CHUNK_BYTES of it, again for as many rows as CHUNK_BYTES of logits are; who reads many short texts
gives a float32 head. Columns at or beyond the vocabulary (heads padded for speed) are dropped.

Letters: L sequence length, V vocabulary, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class FactoredLogits:
    """logits = softcap * tanh(z / softcap) with z = scale * (hidden @ lm_head.T + bias), not yet multiplied out.

    hidden [L, D], lm_head [V, D], bias [V] or None: numpy arrays or torch tensors of any float dtype and device.
    softcap None: logits = z.
    """

    hidden: Any
    lm_head: Any
    bias: Any = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if len(self.hidden.shape) != 2 or len(self.lm_head.shape) != 2:
            raise ValueError(
                f"hidden must be [L, D] and lm_head [V, D], got {tuple(self.hidden.shape)}, {tuple(self.lm_head.shape)}"
            )
        if self.hidden.shape[1] != self.lm_head.shape[1]:
            raise ValueError(f"hidden has width {self.hidden.shape[1]}, lm_head {self.lm_head.shape[1]}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive or None, got {self.softcap}")

    @property
    def shape(self) -> tuple[int, int]:
        """(L, V) of the product."""
        return self.hidden.shape[0], self.lm_head.shape[0]


def iter_logit_chunks(
    logits: Any, rows: NDArray[np.int64], *, vocab_size: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[NDArray[np.float32]]:
    """Yields logits[rows, :vocab_size] as float32 [n, V] chunks of at most `chunk_bytes` (one row at least).

    logits: [L, W] numpy array, torch tensor or FactoredLogits with W >= vocab_size.
    Raises ValueError for another shape, TypeError for something that is none of the three.
    """
    if not hasattr(logits, "shape"):
        raise TypeError(f"logits must be a numpy array, a torch tensor or FactoredLogits, got {type(logits).__name__}")
    if len(logits.shape) != 2:
        raise ValueError(f"logits must be [L, V], got shape {tuple(logits.shape)}")
    if logits.shape[1] < vocab_size:
        raise ValueError(f"logits have {logits.shape[1]} columns, the codec's vocabulary is {vocab_size}")
    n_chunk = max(1, chunk_bytes // (4 * vocab_size))
    if not isinstance(logits, FactoredLogits):
        for start in range(0, len(rows), n_chunk):
            yield _as_float32(logits[_index(rows[start : start + n_chunk]), :vocab_size])
        return
    n_product = n_chunk if _is_float32_here(logits.lm_head) else max(n_chunk, CHUNK_BYTES // (4 * vocab_size))
    for start in range(0, len(rows), n_product):
        z_NV = _multiplied_out(logits, rows[start : start + n_product], vocab_size)
        for first in range(0, len(z_NV), n_chunk):
            yield z_NV[first : first + n_chunk]


def full_logits(logits: Any, vocab_size: int) -> Any:
    """Logits [L, V] that need no multiplying out: factored ones as a float32 array, others as they are."""
    if not isinstance(logits, FactoredLogits):
        return logits
    return np.concatenate(list(iter_logit_chunks(logits, np.arange(logits.shape[0]), vocab_size=vocab_size)))


def _multiplied_out(logits: FactoredLogits, rows: NDArray[np.int64], vocab_size: int) -> NDArray[np.float32]:
    hidden_ND = _as_float32(logits.hidden[_index(rows)])
    if _is_float32_here(logits.lm_head):
        z_NV = hidden_ND @ _as_float32(logits.lm_head)[:vocab_size].T
    else:
        z_NV = np.empty((len(rows), vocab_size), np.float32)
        n_part = max(1, CHUNK_BYTES // (4 * hidden_ND.shape[1]))
        for start in range(0, vocab_size, n_part):
            part = slice(start, min(start + n_part, vocab_size))
            np.matmul(hidden_ND, _as_float32(logits.lm_head[part]).T, out=z_NV[:, part])
    if logits.bias is not None:
        z_NV += _as_float32(logits.bias)[: z_NV.shape[1]]
    if logits.scale != 1.0:
        z_NV *= np.float32(logits.scale)
    if logits.softcap is not None:
        z_NV = np.float32(logits.softcap) * np.tanh(z_NV / np.float32(logits.softcap))
    return z_NV


def _index(rows: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _is_float32_here(array: Any) -> bool:
    """Whether _as_float32 copies nothing of it."""
    if isinstance(array, np.ndarray):
        return array.dtype == np.float32 and array.flags.c_contiguous
    import torch

    is_here = isinstance(array, torch.Tensor) and array.device.type == "cpu" and array.is_contiguous()
    return is_here and array.dtype == torch.float32


def _as_float32(array: Any) -> NDArray[np.float32]:
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array, dtype=np.float32)
    import torch

    if not isinstance(array, torch.Tensor):
        raise TypeError(f"expected a numpy array or a torch tensor, got {type(array).__name__}")
    return array.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()
