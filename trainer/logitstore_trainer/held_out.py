"""Which samples of a store are held out of training: whole rows of the data set, drawn with a seed.

A window that is held out while its neighbours in the same text are trained on measures memory as much as learning. The
price is that the share is not exact: rows are drawn until it is reached, so the last one may pass it.
"""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from logitstore import LogitStore


class Split(NamedTuple):
    """Positions in the concatenated stores, ascending: each sample is in one of the two."""

    train: list[int]
    held_out: list[int]


def split_by_source_row(stores: Sequence["LogitStore"], fraction: float, seed: int) -> Split:
    """Holds out at least `fraction` of the stores' samples, and at least one, with each row whole on one side.

    Stores of one data set (dataset_sha256) share its rows. A sample whose row is not known (source_row -1) is a row of
    its own. Equal seeds give equal splits. Raises ValueError where that leaves nothing to train on.
    """
    samples_of_row: dict[Hashable, list[int]] = {}
    n_samples = 0
    for number, store in enumerate(stores):
        dataset = store.spec.dataset_sha256 or number
        source_rows = np.concatenate([shard.index.source_row for shard in store.shards]).tolist()
        for i, row in enumerate(source_rows, start=n_samples):
            samples_of_row.setdefault((dataset, row) if row >= 0 else ("not known", i), []).append(i)
        n_samples += len(source_rows)
    rows = list(samples_of_row.values())
    wanted = max(round(n_samples * fraction), 1)
    held_out: list[int] = []
    for row in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(held_out) >= wanted:
            break
        held_out += rows[row]
    train = sorted(set(range(n_samples)).difference(held_out))
    if not train:
        raise ValueError(
            f"--eval-fraction {fraction} leaves no sample to train on: whole rows of the data set are held out, and "
            f"these {n_samples} samples come from {len(rows)}; hold out less, or give --eval-data"
        )
    return Split(train, sorted(held_out))
