"""`logitstore collect`: a teacher and a data set in, a verified store of its distributions out.

The order is chosen so that what can fail fails early: the data set is read through, the teacher's configuration and
tokenizer are looked at, the output is compared with what is there, and only then are the weights loaded. Samples are
run in batches sorted by length within a window, stored in the order of the data set, and acknowledged group by group.
Several processes (ranks.py) cut the data set into units, claim them one by one, and the last one joins them.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import logitstore
from logitstore.finished import finished_store
from logitstore.tables import put_tokenizer_folder
from logitstore.units import RowRange, read_unit_plan
from logitstore.work_folder import read_plan
from logitstore_trainer.collect.codec_choice import fitted_codec, settled_codec
from logitstore_trainer.collect.ranks import Rank
from logitstore_trainer.collect.settings import CollectSettings
from logitstore_trainer.collect.shared_collection import collect_units
from logitstore_trainer.collect.size import planned_size
from logitstore_trainer.collect.source import Say, open_source
from logitstore_trainer.collect.store_spec import store_spec, tokenizer_files
from logitstore_trainer.collect.teacher_run import TeacherRun, os_reason
from logitstore_trainer.devices import device_of_process


@dataclass(frozen=True)
class CollectResult:
    """What a collection left. `seconds` and `tokens_per_s` are of this run (0 where it found everything done).

    n_units_left: units that other ranks have still to do; the store is not there yet, and the counts are of this run.
    """

    path: Path
    n_samples: int
    n_tokens: int
    n_present_rows: int
    blob_bytes: int
    file_bytes: int
    seconds: float
    tokens_per_s: float
    was_finished: bool
    n_units_left: int = 0


def collect(settings: CollectSettings, say: Say = print) -> CollectResult:
    """Collects, or goes on collecting, into settings.out; `say` gets one line at a time.

    Raises ValueError, OSError or LogitStoreError in one line for what is wrong with the input or the output.
    """
    if settings.rank.count > 1:
        settings = replace(settings, device=device_of_process(settings.device, settings.rank.local))
        say = _with_rank(say, settings.rank)
    source = open_source(settings, say)
    codec = settled_codec(source, settings)
    if codec is None and settings.rank.count > 1:
        raise ValueError(
            f"{settings.rank.count} ranks would each fit a codec of their own; make one first, with logitstore plan "
            "--out DIR, and give it to all of them with --tables DIR"
        )
    if codec is not None:
        finished = finished_store(settings.out, store_spec(source, settings, codec))
        if finished is not None:
            have = f"{len(finished):,} samples of {finished.n_tokens:,} tokens"
            say(f"{settings.out}: finished already, {have}; nothing to do")
            return _result(finished, seconds=0.0, new_tokens=0, was_finished=True)
    _require_writable_folder(settings.out.absolute().parent)
    if note := source.info.widths_note():
        say(note)
    size = planned_size(source.dataset, source.tokeniser, settings)
    if codec is None:
        codec = fitted_codec(source, settings, size)
    run = TeacherRun(source, settings, store_spec(source, settings, codec), size)
    if settings.rank.count > 1 or read_unit_plan(settings.out) is not None:
        n_units_left = collect_units(run)
        if n_units_left:
            return _result_of_rank(run, n_units_left)
    else:
        _collect_alone(run)
    store = logitstore.open(settings.out)
    return _result(store, seconds=run.seconds, new_tokens=run.n_new_tokens, was_finished=False)


def _collect_alone(run: TeacherRun) -> None:
    """Collects all that is missing, in the order of the data set."""
    out = run.settings.out
    with tokenizer_files(run.info) as folder:
        put_tokenizer_folder(folder, out)
    plan = read_plan(out)
    shard_samples = plan.shard_samples if plan is not None else run.shard_samples
    with logitstore.create(out, run.spec, shard_samples, resume=True) as writer:
        if read_unit_plan(out) is not None:
            raise FileExistsError(
                f"{out}: several ranks have just begun to write it; give the command again to join in"
            )
        run.say_size()
        done = writer.acknowledged
        if done.n_samples:
            run.say(f"{out}: going on behind {done.n_samples:,} samples of {done.n_tokens:,} tokens")
        run.n_tokens_to_go = max(run.size.n_tokens - done.n_tokens, 0)
        with run.saying_what_is_safe(writer):
            had_samples = run.fill(writer, RowRange(max_tokens=run.settings.max_tokens))
        if not had_samples and done.n_samples == 0:
            raise ValueError(f"{run.dataset.path}: no row gave a sample ({run.counts.summary()})")
    run.say(f"this run: {run.counts.summary()}")


def _require_writable_folder(folder: Path) -> None:
    """Fails now rather than after the teacher has run. Raises OSError in one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"--out cannot be written: {os_reason(error)}; choose another folder") from None


def _result(store: logitstore.LogitStore, *, seconds: float, new_tokens: int, was_finished: bool) -> CollectResult:
    return CollectResult(
        path=store.path,
        n_samples=len(store),
        n_tokens=store.n_tokens,
        n_present_rows=store.n_present_rows,
        blob_bytes=store.blob_bytes,
        file_bytes=store.file_bytes,
        seconds=seconds,
        tokens_per_s=new_tokens / seconds if seconds else 0.0,
        was_finished=was_finished,
    )


def _result_of_rank(run: TeacherRun, n_units_left: int) -> CollectResult:
    return CollectResult(
        path=run.settings.out,
        n_samples=run.n_samples_of_units,
        n_tokens=run.n_new_tokens,
        n_present_rows=0,
        blob_bytes=0,
        file_bytes=0,
        seconds=run.seconds,
        tokens_per_s=run.n_new_tokens / run.seconds if run.seconds else 0.0,
        was_finished=False,
        n_units_left=n_units_left,
    )


def _with_rank(say: Say, rank: Rank) -> Say:
    return lambda line: say(f"rank {rank.index} of {rank.count}: {line}")
