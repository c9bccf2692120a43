"""The teacher over texts, into a writer: windows of samples, sorted by length into batches, stored in order.

A window and what is pending before it are at most one row group together, in samples and in time, so that an
interruption costs no more than that.
"""

import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np

import logitstore
from logitstore.shard_writer import GROUP_SAMPLES
from logitstore.units import RowRange
from logitstore.work_folder import work_path
from logitstore_trainer.collect.forward import ChunkedForward, choose_forward
from logitstore_trainer.collect.reduction import reduced_targets, reduction_for
from logitstore_trainer.collect.samples import remaining_samples
from logitstore_trainer.collect.settings import CollectSettings
from logitstore_trainer.collect.size import PlannedSize
from logitstore_trainer.collect.source import Source
from logitstore_trainer.collect.tokenise import Counts, TokenisedSample
from logitstore_trainer.progress import Progress
from logitstore_trainer.units import bytes_text, duration_text

WINDOW_BATCHES = 4
WINDOW_SECONDS = 20.0
FLUSH_SECONDS = 40.0


class TeacherRun:
    """What one process does for a collection: the teacher, and what it has done in this run, over all its writers.

    n_tokens_to_go is what it expects to do, for the estimate; n_samples_of_units is what finished units hold.
    """

    def __init__(
        self, source: Source, settings: CollectSettings, spec: logitstore.StoreSpec, size: PlannedSize
    ) -> None:
        self.source, self.settings, self.spec, self.size = source, settings, spec, size
        self.dataset, self.info, self.say = source.dataset, source.info, source.say
        self.shard_samples = size.shard_samples(spec.codec.max_row_bytes)
        self.counts = Counts()
        self.n_samples_of_units = self.n_new_tokens = 0
        self.n_tokens_to_go = size.n_tokens
        self.seconds = 0.0
        self._forward: ChunkedForward | None = None

    def say_size(self) -> None:
        """One line: the data set, and how much of it will be collected in all."""
        about = "" if self.size.is_exact else "about "
        self.say(f"{self.dataset.path}: {about}{self.size.n_samples:,} samples of {self.size.n_tokens:,} tokens")

    @contextmanager
    def saying_what_is_safe(self, writer: logitstore.StoreWriter | None = None) -> Iterator[None]:
        """Adds to what interrupts the block where the work done so far is, that of the writer too, and how to go on."""
        safe = f"what was done is safe in {work_path(self.settings.out)}; the same command goes on from there"
        try:
            yield
        except OSError as error:
            raise OSError(f"{os_reason(error)}; {safe}") from error
        except KeyboardInterrupt:
            n_done = self.n_samples_of_units + (0 if writer is None else writer.n_acknowledged)
            raise KeyboardInterrupt(f"interrupted with {n_done:,} samples done; {safe}") from None

    def fill(self, writer: logitstore.StoreWriter, part: RowRange, shown: Progress | None = None) -> bool:
        """Collects what the writer has not of `part` of the data set; whether there was any of it."""
        done = writer.acknowledged
        samples = remaining_samples(
            self.dataset,
            self.source.tokeniser,
            self.settings,
            self.source.complete,
            part=part,
            done=done,
            counts=self.counts,
        )
        started_s = time.monotonic()
        first = next(samples, None)
        if first is None:
            return False
        self.info.require_ids_in_head(first.input_ids, f"row {first.source_row}")
        if self._forward is None:
            self._forward = choose_forward(self.source.teacher, first.input_ids)
            if note := self._forward.note(len(first.input_ids)):
                self.say(note)
        alone = Progress(total=self.size.n_tokens, desc="collecting", unit="tokens") if shown is None else None
        with alone or nullcontext(shown) as shown:
            if alone is not None:
                shown.update(done.n_tokens)
            self._fill_windows(writer, self._forward, itertools.chain([first], samples), shown, started_s)
        return True

    def _fill_windows(
        self,
        writer: logitstore.StoreWriter,
        forward: ChunkedForward,
        samples: Iterator[TokenisedSample],
        shown: Progress,
        started_s: float,
    ) -> None:
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
                self._say_estimate(window, window_s, writer.blob_bytes_appended)
            if now_s - flushed_s + window_s > FLUSH_SECONDS:
                writer.flush()
                flushed_s = now_s
            affordable = int(len(window) * WINDOW_SECONDS / window_s) // self.settings.batch_size
            window_samples = self.settings.batch_size * max(1, min(WINDOW_BATCHES, affordable))
        self.seconds += time.monotonic() - started_s

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

    def _say_estimate(self, window: Sequence[TokenisedSample], seconds: float, blob_bytes: int) -> None:
        """One line after the first window: tokens, time, bytes, and whether the disk has them."""
        rate = sum(len(sample.input_ids) for sample in window) / seconds
        to_go = self.n_tokens_to_go
        n_rows = sum(len(s.input_ids) - 1 if self.settings.keep_prompt else int(s.loss_mask.sum()) for s in window)
        total_bytes = blob_bytes / n_rows * self.size.n_stored_rows + 5 * self.size.n_tokens
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


def os_reason(error: OSError) -> str:
    """The system's own words, with the file they are about."""
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
