"""A seeded sample of a teacher's rows, spread over the data set, to fit and to choose a codec on.

The data set is cut into as many equal stretches as texts are needed, a row is drawn in each, and of a document of
several windows one is taken; a second window of the same document only where there are too few others. A teacher that
gives hidden states and a head is run once and 2 D bytes a row are held. Of one that does not, or whose hidden states
do not fit into float16, nothing is held but the texts, and its logits are made whenever they are asked for.

Letters: L tokens of a text, n rows of it that are kept, D width, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitstore import FactoredLogits
from logitstore_trainer.collect.forward import ChunkedForward, choose_forward
from logitstore_trainer.collect.rows import Row
from logitstore_trainer.collect.samples import samples_of_rows
from logitstore_trainer.collect.size import PlannedSize
from logitstore_trainer.collect.source import Source
from logitstore_trainer.collect.tokenise import Counts, TokenisedSample
from logitstore_trainer.plan.sample import SampleRows
from logitstore_trainer.progress import Progress

LEAST_ROWS, MOST_ROWS, SHARE = 4_000, 50_000, 20
SPARE = 1.25  # texts drawn beyond the mean's, since some are short or give none


def default_rows(size: PlannedSize) -> int:
    """A twentieth of what will be stored, LEAST_ROWS to MOST_ROWS."""
    return min(max(size.n_stored_rows // SHARE, LEAST_ROWS), MOST_ROWS)


@dataclass(frozen=True, eq=False)
class TeacherSample:
    """Made by draw_sample: what PlanSample asks for. hidden: float16 [n, D] of each text, None where logits are made
    when they are asked for."""

    name: str
    texts: list[TokenisedSample]
    keep_prompt: bool
    forward: ChunkedForward
    hidden: list[torch.Tensor] | None

    @property
    def vocab_size(self) -> int:
        return self.forward.teacher.vocab_size

    @cached_property
    def row_counts(self) -> NDArray[np.int64]:
        return np.array([n_kept(text, self.keep_prompt) for text in self.texts], np.int64)

    @cached_property
    def head(self) -> dict[str, Any]:
        """lm_head [V, D] and bias [V] in float32, scale and softcap: what FactoredLogits takes beside hidden."""
        head, (scale, softcap) = self.forward.teacher.model.get_output_embeddings(), self.forward.transform
        bias = None if head.bias is None else head.bias[: self.vocab_size].float().cpu()
        lm_head = head.weight[: self.vocab_size].float().cpu()
        return {"lm_head": lm_head, "bias": bias, "scale": scale, "softcap": softcap}

    def __getitem__(self, number: int, /) -> SampleRows:
        text = self.texts[number]
        keep_mask = _keep_mask(text, self.keep_prompt)
        if self.hidden is not None:
            hidden = _on_all_rows(self.hidden[number], text, keep_mask)
            return SampleRows(FactoredLogits(hidden, **self.head), text.input_ids, keep_mask)
        ((logits,),) = self.forward.reduced(
            [text.input_ids], [keep_mask], lambda logits_nV: (logits_nV[:, : self.vocab_size],)
        )
        return SampleRows(_on_all_rows(logits, text, keep_mask), text.input_ids, keep_mask)


def draw_sample(source: Source, size: PlannedSize, n_rows: int) -> TeacherSample:
    """About n_rows rows (of all texts together), fewer where the data set has fewer. Raises ValueError for none."""
    texts = drawn_texts(source, size, n_rows)
    if not texts:
        raise ValueError(f"{source.dataset.path}: no row gave a sample to fit on")
    for text in texts:
        source.info.require_ids_in_head(text.input_ids, f"row {text.source_row}")
    forward = choose_forward(source.teacher, texts[0].input_ids)
    hidden = _hidden(source, texts, forward) if _has_linear_head(forward) else None
    return TeacherSample(source.dataset.path.name, texts, source.settings.keep_prompt, forward, hidden)


def drawn_texts(source: Source, size: PlannedSize, n_rows: int) -> list[TokenisedSample]:
    """Texts of about n_rows kept rows together, in the order in which they were drawn."""
    rng = np.random.default_rng(source.settings.seed)
    n_texts = math.ceil(SPARE * n_rows * size.n_samples / max(size.n_stored_rows, 1)) + 8
    numbers = rng.permutation(_one_of_each_stretch(size.n_dataset_rows, min(n_texts, size.n_dataset_rows), rng))
    counts = Counts()
    samples = samples_of_rows(_rows_at(source, numbers), source.tokeniser, source.settings, source.complete, counts)
    drawn: list[TokenisedSample] = []
    others: list[TokenisedSample] = []
    n_drawn = n_others = 0
    with Progress(total=n_rows, desc="draw a sample", unit="rows") as shown:
        for _, windows in itertools.groupby(samples, key=lambda sample: sample.source_row):
            first, *rest = (list_ := list(windows))[(start := int(rng.integers(len(list_)))) :] + list_[:start]
            drawn.append(first)
            n_drawn += (n := n_kept(first, source.settings.keep_prompt))
            shown.update(n)
            if n_drawn >= n_rows:
                return drawn
            for window in rest:
                if n_others < n_rows:
                    others.append(window)
                    n_others += n_kept(window, source.settings.keep_prompt)
    for i in rng.permutation(len(others)):
        if n_drawn >= n_rows:
            break
        drawn.append(others[i])
        n_drawn += n_kept(others[i], source.settings.keep_prompt)
    return drawn


def n_kept(text: TokenisedSample, keep_prompt: bool) -> int:
    """Rows of a text that a store keeps."""
    return len(text.input_ids) - 1 if keep_prompt else int(text.loss_mask.sum())


def _one_of_each_stretch(n: int, n_stretches: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A number drawn in each of n_stretches equal parts of 0 .. n - 1, each number once at most."""
    edges = np.linspace(0, n, n_stretches + 1)
    return np.unique(np.minimum((edges[:-1] + rng.random(n_stretches) * np.diff(edges)).astype(np.int64), n - 1))


def _rows_at(source: Source, numbers: NDArray[np.int64]) -> Iterator[Row]:
    for number in numbers:
        yield next(source.dataset.rows(int(number)))


def _keep_mask(text: TokenisedSample, keep_prompt: bool) -> NDArray[np.bool_] | None:
    return None if keep_prompt else text.loss_mask[1:]


def _on_all_rows(kept: torch.Tensor, text: TokenisedSample, keep_mask: NDArray[np.bool_] | None) -> torch.Tensor:
    """The kept rows [n, .] at their places among all [L, .], zeros elsewhere."""
    whole = kept.new_zeros(len(text.input_ids), kept.shape[1])
    rows = np.arange(len(text.input_ids) - 1) if keep_mask is None else np.flatnonzero(keep_mask)
    whole[torch.from_numpy(rows)] = kept
    return whole


def _has_linear_head(forward: ChunkedForward) -> bool:
    return forward.how == "head" and isinstance(forward.teacher.model.get_output_embeddings(), torch.nn.Linear)


def _hidden(source: Source, texts: list[TokenisedSample], forward: ChunkedForward) -> list[torch.Tensor] | None:
    """Hidden states of the kept rows, float16 [n, D] of each text; None where one does not fit into float16."""
    keep_prompt, batch_size = source.settings.keep_prompt, source.settings.batch_size
    found: dict[int, torch.Tensor] = {}
    order = np.argsort([-len(text.input_ids) for text in texts], kind="stable")
    total = sum(n_kept(text, keep_prompt) for text in texts)
    with Progress(total=total, desc="run the teacher on the sample", unit="rows") as shown:
        for start in range(0, len(order), batch_size):
            batch = [int(i) for i in order[start : start + batch_size]]
            keep_masks = [_keep_mask(texts[i], keep_prompt) for i in batch]
            for i, hidden in zip(
                batch, forward.kept_hidden([texts[i].input_ids for i in batch], keep_masks), strict=True
            ):
                found[i] = hidden.half()
                if not bool(torch.isfinite(found[i]).all()):
                    return None
                shown.update(len(hidden))
    return [found[i] for i in range(len(texts))]
