"""Runs a tail model over rows as a codec or a reader has them, and finds the coefficients that a teacher's logits have.

Letters: R rows, r coefficients, V vocabulary, D width of the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logitstore.logits_source import FactoredLogits, iter_logit_chunks
from logitstore.row_input import as_numpy
from logitstore.tail_model import MEASURED_ENTRIES, TailInputs, TailModel, model_tensors, predicted_coefs
from logitstore.tail_rows import REACH
from logitstore.temperature import shifted_head

if TYPE_CHECKING:
    from torch import Tensor

    from logitstore.targets import TeacherTargets

BATCH_ROWS = 4096


@dataclass(frozen=True, eq=False)
class TailPredictor:
    """A tail model on the CPU, its tensors made on first use."""

    model: TailModel

    @cached_property
    def tensors(self) -> dict[str, "Tensor"]:
        return model_tensors(self.model)

    @cached_property
    def basis(self) -> NDArray[np.float32]:
        """[V, r] float32."""
        return self.model.arrays["basis"].astype(np.float32)

    def tail_logits(self, coefs_Nr: NDArray[np.float32]) -> NDArray[np.float32]:
        """basis @ coefs + bias [N, V] float32: logits of the tail's tokens, up to a constant a row."""
        return coefs_Nr @ self.basis.T + self.model.arrays["bias"]

    @cached_property
    def _projection(self) -> NDArray[np.float32]:
        """[V, r]: logits @ projection are the coefficients that come nearest to them up to a constant, tokens weighed
        by their mean probability in the tails."""
        weights = self.model.arrays["column_weights"].astype(np.float64)
        weights = weights / weights.sum() + 1e-3 / len(weights)
        mean = weights @ self.basis / weights.sum()
        centred = self.basis - mean.astype(np.float32)
        gram = (centred * weights[:, None].astype(np.float32)).T.astype(np.float64) @ centred
        gram += np.eye(len(gram)) * np.trace(gram) / len(gram) * 1e-9
        return ((centred * weights[:, None]) @ np.linalg.inv(gram)).astype(np.float32)

    def teacher_coefs(self, logits: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The coefficients [n, r] of these rows of logits [L, V] or FactoredLogits."""
        bias = self.model.arrays["bias"]
        if isinstance(logits, FactoredLogits) and logits.softcap is None:
            hidden = as_numpy(logits.hidden[rows]).astype(np.float32)
            head_bias = np.zeros_like(bias)
            if logits.bias is not None:
                head_bias = as_numpy(logits.bias)[: len(bias)].astype(np.float32)
                head_bias = np.maximum(head_bias, head_bias.max() - REACH)
            return hidden @ self._of_head(logits.lm_head) * np.float32(logits.scale) + (
                (head_bias * np.float32(logits.scale) - bias) @ self._projection
            )
        parts = [np.zeros((0, self.model.rank), np.float32)]
        for chunk in iter_logit_chunks(logits, rows, vocab_size=self.model.vocab_size):
            peak = chunk.max(axis=1, keepdims=True)
            parts.append((np.maximum(chunk - peak, -REACH) - bias) @ self._projection)
        return np.concatenate(parts)

    def _of_head(self, lm_head: Any) -> NDArray[np.float32]:
        """[D, r]: hidden states @ this are their coefficients; kept for the last head that was seen."""
        cached = self.__dict__.get("_last_head")
        if cached is None or cached[0] is not lm_head:
            matrix = as_numpy(lm_head)[: self.model.vocab_size].astype(np.float32).T @ self._projection
            cached = self.__dict__["_last_head"] = (lm_head, matrix)
        return cached[1]

    def predicted(self, targets: Sequence["TeacherTargets"]) -> list[NDArray[np.float32]]:
        """The predicted coefficients [R, r] of each sequence; 0 in absent rows."""
        import torch

        results: list[NDArray[np.float32]] = []
        start = 0
        while start < len(targets):
            end, longest = start, 0
            while end < len(targets) and (
                end == start or (end + 1 - start) * max(longest, targets[end].n_rows) <= BATCH_ROWS
            ):
                longest = max(longest, targets[end].n_rows)
                end += 1
            batch = targets[start:end]
            with torch.inference_mode():
                coefs = predicted_coefs(self.tensors, tail_inputs(batch)).numpy()
            results += [coefs[i, : sequence.n_rows] for i, sequence in enumerate(batch)]
            start = end
        return results


def tail_inputs(targets: Sequence["TeacherTargets"]) -> TailInputs:
    """What the model sees of these sequences, padded to the longest."""
    import torch

    n_rows = max(max(sequence.n_rows for sequence in targets), 1)
    n_entries = max(1, min(MEASURED_ENTRIES, max(int(sequence.counts.max(initial=0)) for sequence in targets)))
    tokens = np.zeros((2, len(targets), n_rows), np.int64)
    ids = np.full((len(targets), n_rows, n_entries), -1, np.int64)
    logps = np.zeros((len(targets), n_rows, n_entries), np.float32)
    moments = np.full((2, len(targets), n_rows), np.nan, np.float32)
    for b, sequence in enumerate(targets):
        r = sequence.n_rows
        tokens[0, b, :r], tokens[1, b, :r] = sequence.input_ids[:-1], sequence.input_ids[1:]
        moments[0, b, :r], moments[1, b, :r] = sequence.tail_logmass, sequence.tail_logmoment_half
        counts = sequence.counts
        row = np.repeat(np.arange(r), counts)
        rank = np.arange(len(row)) - np.repeat(sequence.offsets[:-1], counts)
        seen = rank < n_entries
        ids[b, row[seen], rank[seen]] = sequence.ids[seen]
        logps[b, row[seen], rank[seen]] = shifted_head(sequence.logps, sequence.offsets, sequence.tail_logmass)[seen]
    tensors = (torch.from_numpy(array) for array in (*tokens, ids, logps, *moments))
    return TailInputs(*tensors)
