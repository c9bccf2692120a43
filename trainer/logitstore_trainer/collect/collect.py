"""`logitstore collect`: a teacher and a data set in, a verified store of its distributions out.

The order is chosen so that what can fail fails early: the data set is read through, the teacher's configuration and
tokenizer are looked at, the output is compared with what is there, and only then are the weights loaded. Samples are
run in batches sorted by length within a window, stored in the order of the data set, and acknowledged group by group.
"""

import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

import logitstore
from logitstore.codecs.registry import CONFIG_FILE, Codec, load_codec
from logitstore.errors import SpecMismatchError
from logitstore.fingerprint import sha256_json
from logitstore.shard_reader import ShardReader
from logitstore.shard_writer import GROUP_SAMPLES
from logitstore.spec import require_same_spec
from logitstore.tables import folder_sha256, put_tokenizer_folder
from logitstore.work_folder import read_plan, work_path
from logitstore_trainer.collect.forward import ChunkedForward, choose_forward
from logitstore_trainer.collect.generate import generate_completions
from logitstore_trainer.collect.prompts import Dataset, read_dataset
from logitstore_trainer.collect.reduction import reduced_targets, reduction_for
from logitstore_trainer.collect.samples import remaining_samples
from logitstore_trainer.collect.settings import DEFAULT_MAX_LENGTH, CollectSettings
from logitstore_trainer.collect.size import PlannedSize, planned_size
from logitstore_trainer.collect.teacher import (
    Teacher,
    TeacherInfo,
    choose_device,
    choose_dtype,
    inspect_teacher,
    load_teacher,
)
from logitstore_trainer.collect.teacher_source import generation_config_sha256
from logitstore_trainer.collect.tokenise import Counts, TokenisedSample, Tokeniser
from logitstore_trainer.progress import Progress

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


Say = Callable[[str], None]


def collect(settings: CollectSettings, say: Say = print) -> CollectResult:
    """Collects, or goes on collecting, into settings.out; `say` gets one line at a time.

    Raises ValueError, OSError or LogitStoreError in one line for what is wrong with the input or the output.
    """
    dataset = read_dataset(settings.dataset)
    info = inspect_teacher(settings.teacher, trust_remote_code=settings.trust_remote_code)
    if dataset.shape == "prompt" and settings.generate is None:
        raise ValueError(
            f"{settings.dataset}: rows have a `prompt` and no `completion`, so there is nothing to learn; "
            "add completions, or let the teacher write them with --generate N"
        )
    if dataset.shape != "prompt" and settings.generate is not None:
        raise ValueError(f"{settings.dataset}: --generate is for rows that are a `prompt` alone, not {dataset.shape}")
    tokeniser = Tokeniser(info.tokenizer, dataset.shape, _max_length(settings, info))
    codec = _codec(settings, info)
    spec = _spec(settings, dataset, info, codec, tokeniser)
    if settings.out.exists() and (finished := _finished(settings.out, spec)) is not None:
        have = f"{len(finished):,} samples of {finished.n_tokens:,} tokens"
        say(f"{settings.out}: finished already, {have}; nothing to do")
        return _result(finished, seconds=0.0, new_tokens=0, was_finished=True)
    _require_writable_folder(settings.out.absolute().parent)
    if note := info.widths_note():
        say(note)
    size = planned_size(dataset, tokeniser, settings, bytes_a_row=codec.max_row_bytes)
    return _Collection(settings, dataset, tokeniser, spec, size, info, say).run()


class _Collection:
    """One run: the teacher, the writer, and the counters between them."""

    def __init__(
        self,
        settings: CollectSettings,
        dataset: Dataset,
        tokeniser: Tokeniser,
        spec: logitstore.StoreSpec,
        size: PlannedSize,
        info: TeacherInfo,
        say: Say,
    ) -> None:
        self.settings, self.dataset, self.tokeniser, self.spec = settings, dataset, tokeniser, spec
        self.size, self.info, self.say = size, info, say
        self.counts = Counts()
        self.n_new_tokens = 0
        self.run_seconds = 0.0

    def run(self) -> CollectResult:
        with _tokenizer_files(self.info) as folder:
            put_tokenizer_folder(folder, self.settings.out)
        plan = read_plan(self.settings.out)
        shard_samples = plan.shard_samples if plan is not None else self.size.shard_samples
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

    @cached_property
    def teacher(self) -> Teacher:
        """Loaded when it is first needed: never, where a run only has to put its last shard together."""
        settings = self.settings
        teacher = load_teacher(
            self.info, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code
        )
        self.say(f"{self.info.name}: {teacher.dtype_name} on {teacher.device}")
        return teacher

    def _fill(self, writer: logitstore.StoreWriter) -> None:
        done = writer.acknowledged
        samples = remaining_samples(
            self.dataset, self.tokeniser, self.settings, self._complete, done=done, counts=self.counts
        )
        started_s = time.monotonic()
        first = next(samples, None)
        if first is None:
            if done.n_samples == 0:
                raise ValueError(f"{self.dataset.path}: no row gave a sample ({self.counts.summary()})")
            return
        self.info.require_ids_in_head(first.input_ids, f"row {first.source_row}")
        forward = choose_forward(self.teacher, first.input_ids)
        if note := forward.note(len(first.input_ids)):
            self.say(note)
        with Progress(total=self.size.n_tokens, desc="collecting", unit="tokens") as shown:
            shown.update(done.n_tokens)
            self._fill_windows(writer, forward, itertools.chain([first], samples), shown, started_s)

    def _complete(
        self, prompts: Sequence[Sequence[int]], source_rows: Sequence[int], max_new_tokens: int
    ) -> list[list[int]]:
        return generate_completions(
            self.teacher,
            prompts,
            source_rows,
            max_new_tokens=max_new_tokens,
            temperature=self.settings.generate_temperature,
            seed=self.settings.seed,
        )

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
            f"{_duration(to_go / rate)}; the store will take about {_bytes(total_bytes)}"
        )
        free_bytes = shutil.disk_usage(work_path(self.settings.out)).free
        needed = total_bytes * (2 if self.size.shard_samples is None else 1) + (1 << 28)
        if needed > free_bytes:
            self.say(
                f"warning: with its work files that needs {_bytes(needed)}, and {work_path(self.settings.out).parent} "
                f"has {_bytes(free_bytes)} free; what is written stays safe if the disk runs full"
            )


def _max_length(settings: CollectSettings, info: TeacherInfo) -> int:
    limit = info.max_positions
    if settings.max_length is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    if limit is not None and settings.max_length > limit:
        raise ValueError(f"--max-length {settings.max_length} is beyond the {limit} positions of {info.name}; lower it")
    return settings.max_length


def _codec(settings: CollectSettings, info: TeacherInfo) -> Codec:
    if settings.tables is not None:
        is_saved = (settings.tables / CONFIG_FILE).is_file()
        codec = load_codec(settings.tables) if is_saved else logitstore.open(settings.tables).spec.codec
        if codec.vocab_size != info.vocab_size:
            raise SpecMismatchError(
                f"--tables {settings.tables}: fitted for a vocabulary of {codec.vocab_size:,}, {info.name} has "
                f"{info.vocab_size:,}; fit a codec to this teacher"
            )
        return codec
    return logitstore.make_codec(settings.codec, vocab_size=info.vocab_size, **settings.codec_options)


def _spec(
    settings: CollectSettings, dataset: Dataset, info: TeacherInfo, codec: Codec, tokeniser: Tokeniser
) -> logitstore.StoreSpec:
    device = choose_device(settings.device)
    collection = {"shape": dataset.shape, "max_tokens": settings.max_tokens}
    if dataset.shape == "messages":
        collection["chat_template_sha256"] = sha256_json(info.tokenizer.chat_template)
    if settings.generate is not None:
        collection |= {
            "generate": settings.generate,
            "generate_temperature": settings.generate_temperature,
            "seed": settings.seed,
        }
        if (config_sha256 := generation_config_sha256(info.source)) is not None:
            collection["generation_config_sha256"] = config_sha256
    return logitstore.StoreSpec(
        codec=codec,
        vocab_size=info.vocab_size,
        tokenizer_sha256=logitstore.tokenizer_sha256(info.tokenizer.get_vocab()),
        tokenizer_files_sha256=_tokenizer_files_sha256(info),
        teacher=settings.teacher,
        teacher_sha256=info.sha256,
        teacher_dtype=choose_dtype(settings.dtype, device, getattr(info.config, "dtype", None)),
        head_width=info.head_width,
        dataset=settings.dataset.name,
        dataset_sha256=dataset.sha256,
        max_length=tokeniser.max_length,
        keep_prompt=settings.keep_prompt,
        collection=collection,
    )


def _tokenizer_files_sha256(info: TeacherInfo) -> str:
    with _tokenizer_files(info) as folder:
        return folder_sha256(folder)


@contextmanager
def _tokenizer_files(info: TeacherInfo) -> Iterator[Path]:
    """A temporary folder with the tokenizer's files. Raises OSError where it cannot be written."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            info.tokenizer.save_pretrained(folder)
        except Exception as error:  # the tokenizers library raises a bare Exception for a full disk
            raise OSError(f"the tokenizer's files cannot be written into {folder}: {error}") from None
        yield Path(folder)


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


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"


def _bytes(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"
