"""`logitstore collect`: a teacher and a data set in, a verified store of its distributions out.

The order is chosen so that what can fail fails early: the data set is read through, the teacher's configuration and
tokenizer are looked at, the output is compared with what is there, and only then are the weights loaded. Samples are
run in batches sorted by length within a window, stored in the order of the data set, and acknowledged group by group.
"""

import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import logitstore
from logitstore.shard_reader import ShardReader
from logitstore.shard_writer import GROUP_SAMPLES
from logitstore.spec import require_same_spec
from logitstore.tables import put_tokenizer_folder
from logitstore.work_folder import read_plan, work_path
from logitstore_trainer.collect.codec_choice import fitted_codec, settled_codec
from logitstore_trainer.collect.forward import ChunkedForward, choose_forward
from logitstore_trainer.collect.reduction import reduced_targets, reduction_for
from logitstore_trainer.collect.samples import remaining_samples
from logitstore_trainer.collect.settings import CollectSettings
from logitstore_trainer.collect.size import PlannedSize, planned_size
from logitstore_trainer.collect.source import Say, Source, open_source
from logitstore_trainer.collect.store_spec import store_spec, tokenizer_files
from logitstore_trainer.collect.tokenise import Counts, TokenisedSample
from logitstore_trainer.progress import Progress
from logitstore_trainer.units import bytes_text, duration_text

WINDOW_BATCHES = 4
WINDOW_SECONDS = 20.0
FLUSH_SECONDS = 40.0


@dataclass(frozen=True)
class CollectResult:
    """What a collection left. `seconds` and `tokens_per_s` are of this run (0 where it found everything done)."""

    path: Path
    n_samples: int
    n_tokens: int
    n_present_rows: int
    blob_bytes: int
    file_bytes: int
    seconds: float
    tokens_per_s: float
    was_finished: bool


def collect(settings: CollectSettings, say: Say = print) -> CollectResult:
    """Collects, or goes on collecting, into settings.out; `say` gets one line at a time.

    Raises ValueError, OSError or LogitStoreError in one line for what is wrong with the input or the output.
    """
    source = open_source(settings, say)
    codec = settled_codec(source, settings)
    if codec is not None and settings.out.exists():
        finished = _finished(settings.out, store_spec(source, settings, codec))
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
    return _Collection(source, settings, store_spec(source, settings, codec), size).run()


class _Collection:
    """One run: the teacher, the writer, and the counters between them."""

    def __init__(
        self, source: Source, settings: CollectSettings, spec: logitstore.StoreSpec, size: PlannedSize
    ) -> None:
        self.source, self.settings, self.spec, self.size = source, settings, spec, size
        self.dataset, self.info, self.say = source.dataset, source.info, source.say
        self.shard_samples = size.shard_samples(spec.codec.max_row_bytes)
        self.counts = Counts()
        self.n_new_tokens = 0
        self.run_seconds = 0.0

    def run(self) -> CollectResult:
        with tokenizer_files(self.info) as folder:
            put_tokenizer_folder(folder, self.settings.out)
        plan = read_plan(self.settings.out)
        shard_samples = plan.shard_samples if plan is not None else self.shard_samples
        with logitstore.create(self.settings.out, self.spec, shard_samples, resume=True) as writer:
            about = "" if self.size.is_exact else "about "
            done = writer.acknowledged
            self.say(f"{self.dataset.path}: {about}{self.size.n_samples:,} samples of {self.size.n_tokens:,} tokens")
            if done.n_samples:
                self.say(f"{self.settings.out}: going on behind {done.n_samples:,} samples of {done.n_tokens:,} tokens")
            safe = f"what was done is safe in {work_path(self.settings.out)}; the same command goes on from there"
            try:
                self._fill(writer)
            except OSError as error:
                raise OSError(f"{_os_reason(error)}; {safe}") from error
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"interrupted with {writer.n_acknowledged:,} samples done; {safe}") from None
        self.say(f"this run: {self.counts.summary()}")
        store = logitstore.open(self.settings.out)
        return _result(store, seconds=self.run_seconds, new_tokens=self.n_new_tokens, was_finished=False)

    def _fill(self, writer: logitstore.StoreWriter) -> None:
        done = writer.acknowledged
        samples = remaining_samples(
            self.dataset, self.source.tokeniser, self.settings, self.source.complete, done=done, counts=self.counts
        )
        started_s = time.monotonic()
        first = next(samples, None)
        if first is None:
            if done.n_samples == 0:
                raise ValueError(f"{self.dataset.path}: no row gave a sample ({self.counts.summary()})")
            return
        self.info.require_ids_in_head(first.input_ids, f"row {first.source_row}")
        forward = choose_forward(self.source.teacher, first.input_ids)
        if note := forward.note(len(first.input_ids)):
            self.say(note)
        with Progress(total=self.size.n_tokens, desc="collecting", unit="tokens") as shown:
            shown.update(done.n_tokens)
            self._fill_windows(writer, forward, itertools.chain([first], samples), shown, started_s)

    def _fill_windows(
        self,
        writer: logitstore.StoreWriter,
        forward: ChunkedForward,
        samples: Iterator[TokenisedSample],
        shown: Progress,
        started_s: float,
    ) -> None:
        """Runs windows of samples: sorted by length into batches, stored in order.

        A window and what is pending before it are at most one row group together, in samples and in time, so that an
        interruption costs no more than that.
        """
        window_samples = self.settings.batch_size
        flushed_s = window_started_s = started_s
        sample_id = writer.n_acknowledged
        while window := list(itertools.islice(samples, window_samples)):
            if writer.n_pending + len(window) > GROUP_SAMPLES:
                writer.flush()
            for sample, targets in zip(window, self._targets(forward, window, shown), strict=True):
                writer.append(sample_id, sample.input_ids, targets, sample.loss_mask, source_row=sample.source_row)
                sample_id += 1
            now_s = time.monotonic()
            window_s = max(now_s - window_started_s, 1e-3)  # completions that the teacher wrote for it included
            window_started_s = now_s
            if self.n_new_tokens == sum(len(sample.input_ids) for sample in window):
                self._say_estimate(window, window_s, writer)
            if now_s - flushed_s + window_s > FLUSH_SECONDS:
                writer.flush()
                flushed_s = now_s
            affordable = int(len(window) * WINDOW_SECONDS / window_s) // self.settings.batch_size
            window_samples = self.settings.batch_size * max(1, min(WINDOW_BATCHES, affordable))
        self.run_seconds = time.monotonic() - started_s

    def _targets(
        self, forward: ChunkedForward, window: Sequence[TokenisedSample], shown: Progress
    ) -> list[logitstore.TeacherTargets]:
        """The targets of the window's samples, in its order."""
        codec = self.spec.codec
        targets: dict[int, logitstore.TeacherTargets] = {}
        order = np.argsort([-len(sample.input_ids) for sample in window], kind="stable")
        for start in range(0, len(order), self.settings.batch_size):
            batch = [int(i) for i in order[start : start + self.settings.batch_size]]
            keep_masks = [None if self.settings.keep_prompt else window[i].loss_mask[1:] for i in batch]
            for i in batch:
                self.info.require_ids_in_head(window[i].input_ids, f"row {window[i].source_row}")
            sequences = [window[i].input_ids for i in batch]
            reduced = forward.reduced(sequences, keep_masks, reduction_for(codec, sequences, keep_masks))
            for i, keep_mask, columns in zip(batch, keep_masks, reduced, strict=True):
                targets[i] = reduced_targets(codec, columns, input_ids=window[i].input_ids, keep_mask=keep_mask)
            n_tokens = sum(len(window[i].input_ids) for i in batch)
            self.n_new_tokens += n_tokens
            shown.update(n_tokens)
        return [targets[i] for i in range(len(window))]

    def _say_estimate(self, window: Sequence[TokenisedSample], seconds: float, writer: logitstore.StoreWriter) -> None:
        """One line after the first window: tokens, time, bytes, and whether the disk has them."""
        rate = sum(len(sample.input_ids) for sample in window) / seconds
        to_go = max(self.size.n_tokens - writer.acknowledged.n_tokens, 0)
        n_rows = sum(len(s.input_ids) - 1 if self.settings.keep_prompt else int(s.loss_mask.sum()) for s in window)
        total_bytes = writer.blob_bytes_appended / n_rows * self.size.n_stored_rows + 5 * self.size.n_tokens
        self.say(
            f"estimate from the first {len(window)} samples: {to_go:,} tokens to go at {rate:,.0f} tokens/s, "
            f"{duration_text(to_go / rate)}; the store will take about {bytes_text(total_bytes)}"
        )
        free_bytes = shutil.disk_usage(work_path(self.settings.out)).free
        needed = total_bytes * (2 if self.shard_samples is None else 1) + (1 << 28)
        if needed > free_bytes:
            self.say(
                f"warning: with its work files that needs {bytes_text(needed)}, and "
                f"{work_path(self.settings.out).parent} has {bytes_text(free_bytes)} free; what is written stays safe "
                "if the disk runs full"
            )


def _require_writable_folder(folder: Path) -> None:
    """Fails now rather than after the teacher has run. Raises OSError in one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"--out cannot be written: {_os_reason(error)}; choose another folder") from None


def _os_reason(error: OSError) -> str:
    """The system's own words, with the file they are about."""
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def _finished(path: Path, spec: logitstore.StoreSpec) -> logitstore.LogitStore | None:
    """The finished store at `path`; None where shards are still to come. Raises SpecMismatchError for another one.

    A work folder that a run left behind after its last shard was in place is removed.
    """
    if path.is_dir() and read_plan(path) is not None and not _has_last_shard(path):
        return None
    store = logitstore.open(path)
    require_same_spec(store.spec, spec, where=str(path), advice="choose another --out, or delete that store")
    shutil.rmtree(work_path(path), ignore_errors=True)
    return store


def _has_last_shard(path: Path) -> bool:
    shards = sorted(path.glob("*.parquet"))
    return bool(shards) and ShardReader(shards[-1]).index.is_last


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
