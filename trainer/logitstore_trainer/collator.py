"""Samples of a store to one padded batch of plain tensors, which any framework can move and pin.

Padding costs memory: where the store's head format has one byte an entry, a batch takes 5 bytes for each of its
B * L * K slots, K being its longest row, and 8 otherwise. In exchange every tensor leads with [B, L], so that samplers,
`accelerate` and data-parallel scatter work on it unchanged. There is no Python per token: the ragged rows of all
samples are placed by one boolean index.

Letters: B batch, L length of the longest sample, K entries of the longest row, E entries of all rows together.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from logitstore.errors import SpecMismatchError

if TYPE_CHECKING:
    from logitstore import Sample

IGNORE_INDEX = -100


def collate(samples: Sequence["Sample"], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """One right-padded batch of a store's samples.

    input_ids, attention_mask and labels are [B, L] int64. Labels are not shifted: labels[b, t] is input_ids[b, t], or
    -100 where it is not to be learned: position 0, pads, tokens outside the loss mask, and tokens whose teacher row is
    absent. The kept entries are teacher_ids [B, L, K] int32 (-1 in pads) and teacher_codes [B, L, K] uint8 (0 in pads),
    with teacher_code_scale and teacher_code_offset [B, L] float32 (0 where the row is absent) where the format has
    them; teacher_logprobs [B, L, K] float32 (natural log at T = 1, -inf in pads) instead if a sample has no codes.
    teacher_tail_logmass and teacher_tail_logmoment_half [B, L] float32 hold the tail (NaN where the row is absent).
    Teacher row t describes token t + 1, so a sample's last row is absent. A store with corrections of predicted tails
    adds teacher_corrections [B, L, width] float32, 0 where there are none.

    Raises ValueError for an empty list, TypeError for what is not a sample of a store, and SpecMismatchError for
    samples of several vocabularies.
    """
    _check_samples(samples)
    lengths_B = np.array([len(sample.input_ids) for sample in samples])
    n_batch, length = len(samples), int(lengths_B.max())

    input_ids = np.full((n_batch, length), pad_token_id, dtype=np.int64)
    learn = np.zeros((n_batch, length), dtype=bool)
    counts = np.zeros((n_batch, length), dtype=np.int64)
    moments = np.full((2, n_batch, length), np.nan, dtype=np.float32)
    for b, sample in enumerate(samples):
        targets, n_rows = sample.targets, len(sample.input_ids) - 1
        input_ids[b, : n_rows + 1] = sample.input_ids
        counts[b, :n_rows] = targets.counts
        learn[b, 1 : n_rows + 1] = sample.loss_mask[1:] & targets.present
        moments[0, b, :n_rows] = targets.tail_logmass
        moments[1, b, :n_rows] = targets.tail_logmoment_half
    targets_B = [sample.targets for sample in samples]
    holds_codes = all(targets.codes is not None for targets in targets_B)
    holds_numbers = holds_codes and all(targets.code_scale is not None for targets in targets_B)
    batch = {
        "input_ids": input_ids,
        "attention_mask": (np.arange(length) < lengths_B[:, None]).astype(np.int64),
        "labels": np.where(learn, input_ids, IGNORE_INDEX),
        "teacher_ids": _place_entries([targets.ids for targets in targets_B], counts, pad=np.int32(-1)),
        "teacher_tail_logmass": moments[0],
        "teacher_tail_logmoment_half": moments[1],
    }
    if holds_codes:
        batch["teacher_codes"] = _place_entries([targets.codes for targets in targets_B], counts, pad=np.uint8(0))
    else:
        batch["teacher_logprobs"] = _place_entries(
            [targets.logps for targets in targets_B], counts, np.float32(-np.inf)
        )
    if holds_numbers:
        batch["teacher_code_scale"] = _place_rows([targets.code_scale for targets in targets_B], length)
        batch["teacher_code_offset"] = _place_rows([targets.code_offset for targets in targets_B], length)
    if samples[0].targets.corrections is not None:
        batch["teacher_corrections"] = _place_corrections(samples, length)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def next_token_labels(labels_BL: torch.Tensor) -> torch.Tensor:
    """Labels moved to the rows that predict them, [B, L] -> [B * L]: entry (b, t) is labels[b, t + 1]; last -100."""
    return torch.nn.functional.pad(labels_BL[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()


def _place_entries(ragged_E: Sequence[NDArray], counts_BL: NDArray[np.int64], pad: np.generic) -> NDArray:
    """Each sample's ragged entries at their rows [B, L, K], of pad's type, `pad` elsewhere."""
    # A boolean index walks [B, L, K] in the order in which the samples' ragged entries follow each other.
    n_entries = max(int(counts_BL.max(initial=0)), 1)
    used_BLK = np.arange(n_entries) < counts_BL[:, :, None]
    placed_BLK = np.full(used_BLK.shape, pad, dtype=pad.dtype)
    placed_BLK[used_BLK] = np.concatenate(ragged_E)
    return placed_BLK


def _place_rows(rows_R: Sequence[NDArray[np.float32]], length: int) -> NDArray[np.float32]:
    placed_BL = np.zeros((len(rows_R), length), dtype=np.float32)
    for b, row_R in enumerate(rows_R):
        placed_BL[b, : len(row_R)] = row_R
    return placed_BL


def _place_corrections(samples: Sequence["Sample"], length: int) -> NDArray[np.float32]:
    width = max(sample.targets.corrections.shape[1] for sample in samples)
    corrections_BLr = np.zeros((len(samples), length, width), dtype=np.float32)
    for b, sample in enumerate(samples):
        corrections = sample.targets.corrections
        corrections_BLr[b, : len(corrections), : corrections.shape[1]] = corrections
    return corrections_BLr


def _check_samples(samples: Sequence["Sample"]) -> None:
    if not samples:
        raise ValueError("collate got an empty list, expected at least one sample of a store")
    for sample in samples:
        if not hasattr(sample, "targets"):
            raise TypeError(
                f"collate takes samples of a logitstore.LogitStore, got a {type(sample).__name__}: "
                "pass the opened store (or a Subset or ConcatDataset of stores) as the dataset"
            )
    vocab_sizes = sorted({sample.targets.vocab_size for sample in samples})
    if len(vocab_sizes) > 1:
        raise SpecMismatchError(
            f"one batch holds samples of several vocabularies, of {' and '.join(map(str, vocab_sizes))} tokens: "
            "their token ids mean different text; train from one of the stores"
        )
