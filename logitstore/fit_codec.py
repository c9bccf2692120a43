"""Fits a top-k codec: tables for its numbers, and where its tail is predicted, the tail model and the corrections.

The rows of the sample are read once, their 64 most probable tokens and hidden states are held, and everything is fitted
on them; only a codec that keeps more tokens reads the logits again.

Letters: L sequence length, R rows, V vocabulary, r coefficients.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore.codecs.ranked_layout import moment_classes
from logitstore.corrections import fit_corrections
from logitstore.fit_cache import FitCache
from logitstore.fit_tables import fit_tables, joined
from logitstore.logits_source import FactoredLogits
from logitstore.tail_fit import TailFitSettings, fit_tail_model
from logitstore.tail_model import TailModel
from logitstore.tail_moments import COARSE, encode_moments
from logitstore.tail_predictor import TailPredictor
from logitstore.tail_rank import default_rank, with_rank
from logitstore.tail_rows import ENTRIES, Sample, TailRows, tail_rows
from logitstore.targets import TeacherTargets
from logitstore.temperature import segment_logsumexp, shifted_head

if TYPE_CHECKING:
    from logitstore.codecs.topk import TopKCodec

CORRECTION_ROWS = 40_000
# stage, done, total or None; the stages: "rows" read ("rows again" where more than 64 entries are kept), those of the
# tail model's fit ("metric", "steps", "basis"), "texts" whose corrections are counted
OnProgress = Callable[[str, int, int | None], Any]
_NO_TAILS = "no tail model can be fitted to these rows, whose tails do not differ; use tail 'residual', or other rows"
PASSES = 40  # over a small sample; a large one is seen as often as TailFitSettings.rows_seen says


def fitted_on_samples(
    codec: "TopKCodec",
    samples: Iterable[Sample],
    on_progress: OnProgress | None = None,
    cache: FitCache | None = None,
) -> "TopKCodec":
    """The codec fitted to a re-iterable of samples (logits [L, V], input_ids [L], keep_mask [L-1] or None); on_progress
    and cache as in logitstore.calibrate."""
    if codec.tail == "residual":
        targets = list(_targets_of_samples(codec.unfitted(), samples, counted(on_progress, "rows")))
        return codec.refitted(fit_tables(joined(targets), codec.head_format, codec.vocab_size))
    rows = tail_rows(samples, codec.vocab_size, on_rows=counted(on_progress, "rows"))
    tail = codec.tables.tail if codec.tables is not None else None
    if tail is None:
        tail = fit_tail(rows, rank=default_rank(codec.tail_step), on_progress=on_progress, cache=cache)
    if codec.k <= ENTRIES:
        return fitted_on_rows(codec, rows, tail, on_progress)
    targets = list(_targets_of_samples(codec.unfitted(), samples, counted(on_progress, "rows again")))
    return _fitted(codec, rows, targets, tail, on_progress)


def counted(on_progress: OnProgress | None, stage: str, total: int | None = None) -> Callable[[int], Any]:
    """What takes the number of newly done units of a stage and tells on_progress how many are done in all."""
    done = 0

    def more(n: int) -> None:
        nonlocal done
        done += n
        if on_progress is not None:
            on_progress(stage, done, total)

    return more


def _targets_of_samples(
    codec: "TopKCodec", samples: Iterable[Sample], on_rows: Callable[[int], Any]
) -> Iterator[TeacherTargets]:
    for sample in samples:
        targets = codec.targets_from_logits(*sample)
        yield targets
        on_rows(int(targets.present.sum()))


def fitted_on_rows(
    codec: "TopKCodec", rows: TailRows, tail: TailModel | None = None, on_progress: OnProgress | None = None
) -> "TopKCodec":
    """The codec, of at most 64 entries, fitted to rows; tail: a model that was fitted before, taken as it is, None to
    fit one of default_rank coefficients."""
    return _fitted(codec, rows, list(targets_of_rows(codec.unfitted(), rows)), tail, on_progress)


def fitted_steps(
    codec: "TopKCodec", rows: TailRows, tail: TailModel, steps: Sequence[float | None]
) -> Iterator["TopKCodec"]:
    """The codec, of at most 64 entries and a predicted tail, once for each tail_step, None for no corrections: as
    fitted_on_rows makes them, but what does not hang on the step is fitted once."""
    targets = list(targets_of_rows(codec.unfitted(), rows))
    tables = replace(fit_tables(joined(targets), codec.head_format, codec.vocab_size), tail=tail)
    left_over = None
    for step in steps:
        if step is None:
            yield replace(codec.unfitted(), tail="predicted").refitted(tables)
            continue
        left_over = left_over or _left_over(rows, targets, tables.predictor, None)
        corrected = replace(codec.unfitted(), tail="predicted", tail_step=step)
        yield corrected.refitted(replace(tables, corrections=fit_corrections(step, *left_over)))


def fit_tail(
    rows: TailRows,
    settings: TailFitSettings | None = None,
    *,
    rank: int | None = None,
    on_progress: OnProgress | None = None,
    cache: FitCache | None = None,
) -> TailModel:
    """fit_tail_model with no more passes over a small sample than do it good, or what the cache has of it; on a CUDA
    device where there is one. rank: coefficients, None for as many as the head is wide (1,024 at most). Raises
    ValueError for rows whose tails do not differ."""
    import torch

    settings = settings or TailFitSettings()
    settings = replace(settings, rows_seen=min(settings.rows_seen, PASSES * rows.n_rows))

    def fit() -> TailModel:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model = fit_tail_model(rows, settings, device=device, on_progress=on_progress)
        except torch.linalg.LinAlgError as error:
            raise ValueError(_NO_TAILS) from error
        if not model.arrays["basis"].any():
            raise ValueError(_NO_TAILS)
        return model

    model = fit() if cache is None else cache.fitted(rows, settings, fit)
    return model if rank is None else with_rank(model, rows, min(rank, model.rank))


def targets_of_rows(codec: "TopKCodec", rows: TailRows) -> Iterator[TeacherTargets]:
    """What a codec of at most 64 entries keeps of each sequence."""
    for index, tokens, keep in _sequences(rows):
        logps = rows.logps[index].numpy()
        head = np.exp(logps.astype(np.float64))
        mass = np.log1p(-np.minimum(head.sum(axis=1), 1 - 1e-7))
        half_of_all = np.exp(rows.lse_2[index].numpy().astype(np.float64) - rows.lse_1[index].numpy() / 2)
        half = np.log(np.maximum(half_of_all - np.sqrt(head).sum(axis=1), 1e-7))
        if logps.shape[1] == codec.vocab_size:  # every token is here
            mass, half = np.full((2, len(logps)), -np.inf)
        coefs = None
        if codec.tail == "predicted" and codec.tail_step is not None and codec.tables is not None:
            coefs = codec.tables.predictor.teacher_coefs(*_hidden(rows, index))
        moments = mass.astype(np.float32), half.astype(np.float32)
        ids = np.where(np.isneginf(logps), -1, rows.ids[index].numpy())
        yield codec.targets_from_topk(ids, logps, *moments, tokens, keep, teacher_coefs=coefs)


def _fitted(
    codec: "TopKCodec",
    rows: TailRows,
    targets: Sequence[TeacherTargets],
    tail: TailModel | None,
    on_progress: OnProgress | None,
) -> "TopKCodec":
    tables = fit_tables(joined(targets), codec.head_format, codec.vocab_size)
    if codec.tail != "predicted":
        return codec.refitted(tables)
    if tail is None:
        tail = fit_tail(rows, rank=default_rank(codec.tail_step), on_progress=on_progress)
    tables = replace(tables, tail=tail)
    if codec.tail_step is not None:
        left_over = _left_over(rows, targets, tables.predictor, on_progress)
        tables = replace(tables, corrections=fit_corrections(codec.tail_step, *left_over))
    return codec.refitted(tables)


def _left_over(
    rows: TailRows, targets: Sequence[TeacherTargets], predictor: TailPredictor, on_progress: OnProgress | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(errors [n, r] of the prediction, weights [n], classes [n]) of CORRECTION_ROWS rows, spread over all."""
    errors, weights, classes = [], [], []
    on_text = counted(on_progress, "texts", rows.n_sequences)
    every = max(1, rows.n_rows // CORRECTION_ROWS)
    for number, (index, _, _) in enumerate(_sequences(rows)):
        on_text(1)
        if number % every:
            continue
        sequence = targets[number]
        (predicted,) = predictor.predicted([sequence])
        errors.append(predictor.teacher_coefs(*_hidden(rows, index)) - predicted[sequence.present])
        weights.append(tail_weights(sequence))
        classes.append(classes_of(sequence))
    return np.concatenate(errors), np.concatenate(weights), np.concatenate(classes)


def classes_of(targets: TeacherTargets) -> np.ndarray:
    """The class of each present row of targets, for corrections."""
    present = targets.present
    return moment_classes(encode_moments(targets.tail_logmass[present], targets.tail_logmoment_half[present], COARSE))


def tail_weights(targets: TeacherTargets) -> np.ndarray:
    """How much an error in the tail of each present row counts: the mean of its masses at T = 1 and T = 2."""
    head_half = segment_logsumexp(
        shifted_head(targets.logps, targets.offsets, targets.tail_logmass) / 2, targets.offsets
    )[targets.present]
    half = targets.tail_logmoment_half[targets.present].astype(np.float64)
    share_2 = np.exp(half - np.logaddexp(head_half, half))
    return ((np.exp(targets.tail_logmass[targets.present].astype(np.float64)) + share_2) / 2).astype(np.float32)


def _sequences(rows: TailRows) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(rows, tokens [L], keep_mask [L-1]) of each sequence."""
    starts = np.searchsorted(rows.sequence.numpy(), np.arange(rows.n_sequences + 1))
    for number, tokens in enumerate(rows.tokens):
        index = slice(int(starts[number]), int(starts[number + 1]))
        keep = np.zeros(len(tokens) - 1, bool)
        keep[rows.position[index].numpy()] = True
        yield index, tokens, keep


def _hidden(rows: TailRows, index: slice) -> tuple[FactoredLogits, np.ndarray]:
    hidden = rows.hidden[index]
    return FactoredLogits(hidden, rows.lm_head, rows.bias), np.arange(len(hidden))
