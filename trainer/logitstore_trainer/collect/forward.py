"""The teacher's logits in row chunks: [L,V] is never held whole.

The backbone gives hidden states [B,L,D]; only the rows that are kept go through the head, a chunk of them at a time,
and each chunk is reduced before the next one is made. The largest tensor besides the weights is one chunk: at most
64 MiB of fp32 logits, and always fewer rows than the longest sequence has. On a CPU 128 rows keep the product with
the head as fast as for the whole batch (42 rows: 1.7 times as slow), and what fits into 32 MiB is memory that malloc
reuses instead of asking the system for fresh pages (1.1 times).

Some models do more to their logits than multiply by the head. A scale and a soft cap that the configuration names
(Gemma 2, Cohere, Granite) are applied here. Whether that is all is measured, not assumed: on the first 64 tokens of
the first sequence this path is compared with model(...).logits. Where they differ the model's own forward is used
with `logits_to_keep`, one sequence and one chunk of rows at a time, which repeats the backbone for every chunk.

Row t of a sequence is the distribution of token t+1. The last row has no label and is dropped, here and nowhere
else.

B batch, L length of the longest sequence, N kept rows of a batch, D width, V columns of the head.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from logitstore_trainer.collect.teacher import Teacher

CHUNK_BYTES = 64 << 20
REUSED_BYTES = 32 << 20
EFFICIENT_ROWS = 128
REPEATED_CHUNK_BYTES = 256 << 20  # fewer and larger chunks where each one costs a backbone
CHECK_TOKENS = 64
_FP32_TOLERANCE = 1e-3
_HALF_STEPS = 4

# logits [n, V] of any float dtype on the teacher's device -> a (named) tuple of tensors of n rows each
Reduce = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


class LogitTransform(NamedTuple):
    """logits = softcap * tanh(scale * hidden @ head / softcap); no cap where softcap is None."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """Returns logits_NV, mutated."""
        if self.scale != 1.0:
            logits_NV.mul_(self.scale)
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV


@dataclass(frozen=True)
class ChunkedForward:
    """How this teacher's logits are made; built by choose_forward.

    `how` is "head" (backbone once, head in chunks), "logits_to_keep" (the model's own forward for each chunk) or
    "whole" (a model that has no logits_to_keep: all rows of one sequence at once). `error` is the largest
    difference of the "head" path from model(...).logits (NaN if the model has no backbone and head to try).
    """

    teacher: Teacher
    how: str
    transform: LogitTransform
    error: float
    tolerance: float

    def reduced(
        self, sequences: Sequence[np.ndarray], keep_masks: Sequence[np.ndarray | None], reduce: Reduce
    ) -> list[tuple[torch.Tensor, ...]]:
        """Returns reduce(logits of the kept rows), on the CPU, of each sequence.

        sequences: B arrays [L_b] of token ids, L_b >= 2. keep_masks: B arrays [L_b - 1] bool, or None to keep
        every row; loss_mask[1:] keeps the rows whose label is learned. `reduce` is called with logits [n, V] of
        consecutive kept rows, which may belong to several sequences. Result b has keep_masks[b].sum() rows, in the
        order of the sequence, in the type of tuple that `reduce` returns.
        """
        kept_rows = _kept_rows(sequences, keep_masks)
        with torch.inference_mode():
            # map, unlike a loop variable, does not keep a chunk alive while the next one is made
            parts = list(map(reduce, self._chunks(sequences, kept_rows)))
            whole = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
        n_rows = [len(rows) for rows in kept_rows]
        make = getattr(type(parts[0]), "_make", tuple)
        return [make(columns) for columns in zip(*(column.split(n_rows) for column in whole), strict=True)]

    def backbone_passes(self, length: int) -> int:
        """Returns how often the backbone runs over a sequence of `length` tokens of which all are learned."""
        if self.how != "logits_to_keep":
            return 1
        return math.ceil((length - 1) / self._rows_per_pass(length))

    def note(self, length: int) -> str | None:
        """Returns one line where the fast path cannot be used, with what it costs at `length` tokens; else None."""
        if self.how == "head":
            return None
        name = self.teacher.info.name
        differ = f"backbone and head differ from its own logits by {self.error:.3g} (allowed {self.tolerance:.3g})"
        why = "has no backbone and head of its own" if math.isnan(self.error) else differ
        if self.how == "whole":
            return f"{name}: {why} and no logits_to_keep, so all logits of one sequence are made at once"
        return (
            f"{name}: {why}, so its own forward is used with logits_to_keep; "
            f"at {length:,} tokens a sequence that runs the backbone {self.backbone_passes(length)} times"
        )

    def _chunks(self, sequences: Sequence[np.ndarray], kept_rows: list[np.ndarray]) -> Iterator[torch.Tensor]:
        if self.how == "head":
            yield from self._head_chunks(sequences, kept_rows)
            return
        for ids, rows in zip(sequences, kept_rows, strict=True):
            inputs = _model_inputs(self.teacher.model, [ids], self.teacher.device)
            rows = torch.from_numpy(rows).to(self.teacher.device)
            if self.how == "whole":
                yield self.teacher.model(**inputs).logits[0, rows]
                continue
            for chunk in rows.split(self._rows_per_pass(len(ids))):
                yield self.teacher.model(**inputs, logits_to_keep=chunk).logits[0]

    def kept_hidden(
        self, sequences: Sequence[np.ndarray], keep_masks: Sequence[np.ndarray | None]
    ) -> list[torch.Tensor]:
        """Returns what the head makes the logits of the kept rows from, [n, D] in the teacher's dtype on the CPU, of
        each sequence. For the path "head" only; arguments as in reduced."""
        assert self.how == "head"
        kept_rows = _kept_rows(sequences, keep_masks)
        with torch.inference_mode():
            return list(self._hidden(sequences, kept_rows).cpu().split([len(rows) for rows in kept_rows]))

    def _head_chunks(self, sequences: Sequence[np.ndarray], kept_rows: list[np.ndarray]) -> Iterator[torch.Tensor]:
        length = max(len(ids) for ids in sequences)
        head = self.teacher.model.get_output_embeddings()
        for hidden_nD in self._hidden(sequences, kept_rows).split(self._rows_per_chunk(length)):
            yield self.transform.apply_(head(hidden_nD))

    def _hidden(self, sequences: Sequence[np.ndarray], kept_rows: list[np.ndarray]) -> torch.Tensor:
        """Returns the hidden states [N, D] of the kept rows of all sequences."""
        model, device = self.teacher.model, self.teacher.device
        hidden_BLD = model.base_model(**_model_inputs(model.base_model, sequences, device)).last_hidden_state
        length = hidden_BLD.shape[1]
        index_N = np.concatenate([b * length + rows for b, rows in enumerate(kept_rows)])
        return hidden_BLD.flatten(0, 1)[torch.from_numpy(index_N).to(device)]

    def _rows_per_chunk(self, length: int) -> int:
        row_bytes = 4 * self.teacher.info.head_width
        affordable = min(CHUNK_BYTES // row_bytes, max(REUSED_BYTES // row_bytes, EFFICIENT_ROWS))
        return max(1, min(affordable, max(length // 2, EFFICIENT_ROWS), length - 2))

    def _rows_per_pass(self, length: int) -> int:
        return max(1, min(REPEATED_CHUNK_BYTES // (4 * self.teacher.info.head_width), length // 2))


def choose_forward(teacher: Teacher, first_ids: np.ndarray) -> ChunkedForward:
    """Returns the fastest way to this teacher's logits that agrees with model(...).logits on first_ids [L].

    Raises ValueError where the logits are not finite, or where a later token changes an earlier row.
    """
    ids = first_ids[:CHECK_TOKENS]
    with torch.inference_mode():
        logits_LV = teacher.model(**_model_inputs(teacher.model, [ids], teacher.device)).logits[0]
        _require_finite(teacher, logits_LV)
        tolerance = _tolerance(logits_LV)
        _require_causal(teacher, ids, logits_LV, tolerance)
        error = math.nan
        for transform in _candidate_transforms(teacher.model):
            found = ChunkedForward(teacher, "head", transform, error, tolerance)
            this_error = _largest_error(found, ids, logits_LV)
            if this_error <= tolerance:
                return ChunkedForward(teacher, "head", transform, this_error, tolerance)
            error = min(error, this_error) if error == error else this_error
        found = ChunkedForward(teacher, "logits_to_keep", LogitTransform(), error, tolerance)
        has_argument = "logits_to_keep" in inspect.signature(teacher.model.forward).parameters
        if has_argument and _largest_error(found, ids, logits_LV) <= tolerance:
            return found
    return ChunkedForward(teacher, "whole", LogitTransform(), error, tolerance)


def _kept_rows(sequences: Sequence[np.ndarray], keep_masks: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    return [
        np.arange(len(ids) - 1) if keep_mask is None else np.flatnonzero(keep_mask)
        for ids, keep_mask in zip(sequences, keep_masks, strict=True)
    ]


def _candidate_transforms(model: Any) -> list[LogitTransform]:
    """Returns what the configuration says of the logits, then nothing; [] without a backbone and a head."""
    if model.base_model is model or model.get_output_embeddings() is None:
        return []
    config = model.config.get_text_config(decoder=True)
    divisor = getattr(config, "logits_scaling", None)  # Granite
    scale = 1.0 / divisor if divisor else getattr(config, "logit_scale", None) or 1.0  # Cohere
    configured = LogitTransform(float(scale), getattr(config, "final_logit_softcapping", None))  # Gemma 2
    return list(dict.fromkeys([configured, LogitTransform()]))


def _largest_error(forward: ChunkedForward, ids: np.ndarray, logits_LV: torch.Tensor) -> float:
    """Returns the largest |logit - its own logit| over the rows of `ids`, infinite where the shapes differ."""
    n_rows = len(ids) - 1
    chunks = list(forward._chunks([ids], [np.arange(n_rows)]))
    got_LV = torch.cat(chunks)
    if got_LV.shape != logits_LV[:n_rows].shape:
        return math.inf
    return float((got_LV.float() - logits_LV[:n_rows].float()).abs().max())


def _tolerance(logits_LV: torch.Tensor) -> float:
    """Returns 1e-3 for fp32, four steps of the dtype at the largest logit for bf16 and fp16."""
    if logits_LV.dtype in (torch.float32, torch.float64):
        return _FP32_TOLERANCE
    exponent = math.floor(math.log2(max(float(logits_LV.abs().max()), 1.0)))
    return _HALF_STEPS * torch.finfo(logits_LV.dtype).eps * 2.0**exponent


def _require_finite(teacher: Teacher, logits_LV: torch.Tensor) -> None:
    if bool(torch.isnan(logits_LV).any()) or bool(torch.isposinf(logits_LV).any()):
        raise ValueError(
            f"{teacher.info.name}: its logits are NaN or infinite in {teacher.dtype_name}; try --dtype float32"
        )


def _require_causal(teacher: Teacher, ids: np.ndarray, logits_LV: torch.Tensor, tolerance: float) -> None:
    half = len(ids) // 2
    shorter_LV = teacher.model(**_model_inputs(teacher.model, [ids[:half]], teacher.device)).logits[0]
    change = float((shorter_LV.float() - logits_LV[:half].float()).abs().max())
    # two lengths may take two kernels, which half precision feels in every layer
    allowed = max(16 * tolerance, 0.02 * float(logits_LV.float().abs().max()))
    if not change <= allowed:
        raise ValueError(
            f"{teacher.info.name}: not a causal language model: later tokens change earlier logits by {change:.3g}; "
            f"use a decoder as the teacher"
        )


def _model_inputs(module: Any, sequences: Sequence[np.ndarray], device: torch.device) -> dict[str, Any]:
    """Returns right-padded input_ids [B,L], with positions and the attention mask that padding needs."""
    length = max(len(ids) for ids in sequences)
    input_ids_BL = np.zeros((len(sequences), length), dtype=np.int64)
    attention_mask_BL = np.zeros_like(input_ids_BL)
    for b, ids in enumerate(sequences):
        input_ids_BL[b, : len(ids)] = ids
        attention_mask_BL[b, : len(ids)] = 1
    inputs = {"input_ids": torch.from_numpy(input_ids_BL).to(device)}
    accepted = inspect.signature(module.forward).parameters
    if "attention_mask" in accepted and not attention_mask_BL.all():
        inputs["attention_mask"] = torch.from_numpy(attention_mask_BL).to(device)
    if "position_ids" in accepted:
        inputs["position_ids"] = torch.arange(length, device=device).expand(len(sequences), length)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs
