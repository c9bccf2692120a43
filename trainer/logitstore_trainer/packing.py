"""Several samples in one row of a batch, without one seeing another: fewer pads, the same loss and gradient.

A packed batch holds the very samples that `collate` would pad, in rows as long as the longest of them, so that
attention never costs more than it did and a step learns what it would have learned. Documents are told apart by
position_ids that start again at 0 and by the absence of attention_mask, as transformers does without padding: a mask of
ones or a cache would let them see each other, so the model must be called with input_ids, position_ids and
use_cache=False alone.
`require_packing` runs a model on two documents and refuses one that mixes them up all the same.

Letters: B rows of the batch, L their length, S samples, M length of the longest sample, N = B * L.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from logitstore_trainer.collator import IGNORE_INDEX, collate

if TYPE_CHECKING:
    from logitstore import Sample

SAMPLE_PLACES = "sample_places"
_PADS = {
    "labels": IGNORE_INDEX,
    "teacher_ids": -1,
    "teacher_codes": 0,
    "teacher_logprobs": -torch.inf,
    "teacher_code_scale": 0.0,
    "teacher_code_offset": 0.0,
    "teacher_tail_logmass": torch.nan,
    "teacher_tail_logmoment_half": torch.nan,
    "teacher_corrections": 0.0,
}


def collate_packed(samples: Sequence["Sample"], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """One batch of a store's samples, several in a row where they fit: the tensors of `collate`, in fewer rows [B, L].

    Instead of attention_mask it has position_ids [B, L] int64, from 0 in each sample and 0 in pads, and sample_places
    [S, M] int64: where token t of sample s lies among the N flattened places, -1 behind its end. The first label of a
    sample is -100 and its last teacher row is absent, as in `collate`, so nothing is learned across two samples.

    Raises what `collate` raises.
    """
    padded = collate(samples, pad_token_id)
    valid_SM = padded.pop("attention_mask").bool()
    lengths_S = valid_SM.sum(dim=1)
    places_SM, n_rows = _places(lengths_S.numpy())
    places = places_SM[valid_SM]
    position_SM = torch.arange(valid_SM.shape[1]).expand_as(valid_SM)
    packed = {
        name: _packed(tensor[valid_SM], places, (n_rows, valid_SM.shape[1]), _PADS.get(name, pad_token_id))
        for name, tensor in padded.items()
    }
    packed["position_ids"] = _packed(position_SM[valid_SM], places, (n_rows, valid_SM.shape[1]), 0)
    packed[SAMPLE_PLACES] = places_SM.masked_fill(~valid_SM, -1)
    return packed


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What a causal language model is called with for a batch of `collate` or `collate_packed`."""
    if SAMPLE_PLACES in batch:
        return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def by_sample(packed_BL: torch.Tensor, places_SM: torch.Tensor, pad: float) -> torch.Tensor:
    """[B, L, ...] of a packed batch as [S, M, ...], one row a sample, `pad` behind its end."""
    rows = packed_BL.flatten(0, 1)[places_SM.clamp(min=0)]
    return rows.masked_fill((places_SM < 0).view(*places_SM.shape, *[1] * (rows.dim() - 2)), pad)


def in_rows(by_sample_SM: torch.Tensor, places_SM: torch.Tensor, n_places: int) -> torch.Tensor:
    """[S, M, ...], one row a sample, at their places [N, ...] of the packed batch; 0 in pads."""
    tail = by_sample_SM.shape[2:]
    # what lies behind the end of a sample goes to a place of its own, which is cut off: no count is read by the host
    rows = by_sample_SM.new_zeros(n_places + 1, *tail)
    rows[places_SM.flatten().remainder(n_places + 1)] = by_sample_SM.flatten(0, 1)
    return rows[:n_places]


@torch.no_grad()
def require_packing(model: torch.nn.Module) -> None:
    """Raises ValueError in one line for a model whose documents in one row see each other, or that cannot be told
    where each begins. It is run three times on 12 tokens and left in its mode."""
    name = type(model).__name__
    device = next(model.parameters()).device
    n_ids = model.get_input_embeddings().num_embeddings
    first, other, second = (
        torch.arange(start, start + n, device=device).remainder(n_ids) for start, n in ((1, 5), (20, 5), (10, 7))
    )
    positions = torch.cat([torch.arange(5, device=device), torch.arange(7, device=device)])[None]

    def logits(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        outputs = model(input_ids=input_ids[None], position_ids=position_ids, use_cache=False)
        return outputs.logits[0, -7:].float()

    was_training = model.training
    model.eval()
    try:
        behind_first, behind_other = (logits(torch.cat([each, second]), positions) for each in (first, other))
        alone = logits(second, positions[:, 5:])
    except TypeError as error:
        raise ValueError(
            f"{name} cannot be packed: it takes no position_ids ({error}); train without packing"
        ) from None
    finally:
        model.train(was_training)
    scale = float(alone.abs().max())
    leak, difference = float((behind_first - behind_other).abs().max()), float((behind_first - alone).abs().max())
    half_precision = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    if not (leak <= 1e-6 * scale and difference <= (0.1 if half_precision else 1e-4) * scale):
        raise ValueError(
            f"{name} cannot be packed: its logits of a document change by {max(leak, difference):.3g} (of {scale:.3g}) "
            "with another document before it in the row, so samples would see each other; train without packing"
        )


def _places(lengths_S: np.ndarray) -> tuple[torch.Tensor, int]:
    """(places [S, M], number of rows): longest first, each sample into the first row with room for it."""
    width = int(lengths_S.max())
    starts_S, used = np.zeros(len(lengths_S), dtype=np.int64), np.zeros(len(lengths_S), dtype=np.int64)
    for s in np.argsort(-lengths_S, kind="stable"):
        row = int(np.argmax(used + lengths_S[s] <= width))
        starts_S[s] = row * width + used[row]
        used[row] += lengths_S[s]
    return torch.from_numpy(starts_S[:, None] + np.arange(width)), int((used > 0).sum())


def _packed(rows: torch.Tensor, places: torch.Tensor, shape_BL: tuple[int, int], pad: float) -> torch.Tensor:
    """[B, L, ...] with rows [n, ...] at their places [n], `pad` elsewhere."""
    packed = torch.full((shape_BL[0] * shape_BL[1], *rows.shape[1:]), pad, dtype=rows.dtype)
    packed[places] = rows
    return packed.view(*shape_BL, *rows.shape[1:])
