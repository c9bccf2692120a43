"""The codecs by name: make_codec, calibrate and load_codec.

A new codec is one file here and one line in CODECS. interface.py says what it must have; conformance.py checks it:

    from logitstore.codecs import conformance
    for codec in conformance.variants(logitstore.make_codec("mine", vocab_size=1000)):
        conformance.check_codec(codec)
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from logitstore.codec_tables import tables_from_bytes
from logitstore.codecs.checks import require_tables
from logitstore.codecs.interface import Codec
from logitstore.codecs.rskd import RSKDCodec
from logitstore.codecs.topk import TopKCodec
from logitstore.codecs.varopt import VarOptCodec
from logitstore.errors import CorruptionError, FormatError
from logitstore.fingerprint import sha256_json
from logitstore.fit_cache import FitCache
from logitstore.shard_writer import sync_folder

CODECS: dict[str, type[Codec]] = {
    "rskd": RSKDCodec,
    "topk": TopKCodec,
    "varopt": VarOptCodec,
}
CONFIG_FILE = "codec.json"


def make_codec(name: str, *, vocab_size: int, tables: str | None = None, **options: Any) -> Codec:
    """The codec of that name and options, unfitted where it has something to fit.

    "topk": k (64), head "int8" | "fp8" | "fp16" | "log" | "sqrtp" ("int8"), head_step, min_prob, top_p (None), tail
    "residual" | "predicted" ("residual"), tail_step (None). tables: SHA-256 of the tables of a fitted codec, which can
    neither encode nor decode before it has them (codec.with_tables; load_codec and logitstore.open see to it).
    "varopt": k (12), head "int8" | "fp8" | "fp16" ("fp16"), seed (0), max_weight (None).
    "rskd": draws (50), seed (0).
    Raises ValueError for a name or an option that this version does not have.
    """
    if name not in CODECS:
        raise ValueError(f"no codec is named {name!r} in this version; there are: {', '.join(CODECS)}")
    codec_type = CODECS[name]
    known = [field.name for field in fields(codec_type) if not field.name.startswith("tables")]
    for option in options:
        if option not in known:
            raise ValueError(f"codec {name!r} has no option {option!r} in this version; it has: {', '.join(known)}")
    if tables is not None:
        if "tables_sha256" not in [field.name for field in fields(codec_type)]:
            raise ValueError(f"codec {name!r} has nothing that is fitted, and no tables")
        options["tables_sha256"] = tables
    return codec_type(vocab_size=vocab_size, **options)


def calibrate(
    codec: Codec,
    logits: Any,
    input_ids: Any,
    keep_mask: Any = None,
    *,
    on_progress: Callable[[str, int, int | None], Any] | None = None,
    cache: FitCache | None = None,
) -> Codec:
    """The codec fitted to a sample: a new codec, whose stores need its tables beside them. A codec that samples is
    returned as it is: nothing of it is fitted.

    logits: [L, V] array, tensor or FactoredLogits, a list of them, or a re-iterable of them, with input_ids and
    keep_mask alike. Only the kept entries are held.

    on_progress: called with (stage, done, total or None) as the fit goes on, the stages being "rows" read, "steps" of
    the tail model's fit and "texts" whose corrections are counted; nothing is printed. cache: a FitCache of tail
    models, None to fit anew. Raises TypeError for a codec that is none of ours, ValueError where the lengths differ or
    no row is present.
    """
    if not isinstance(codec, tuple(CODECS.values())):
        raise TypeError(f"calibrate takes a codec of make_codec or load_codec, got {type(codec).__name__}")
    return codec.calibrated(_Samples(logits, input_ids, keep_mask), on_progress, cache)


@dataclass(frozen=True)
class _Samples:
    """(logits, input_ids, keep_mask) of each sample, as often as it is asked for them."""

    logits: Any
    input_ids: Any
    keep_mask: Any

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        if hasattr(self.logits, "shape"):
            yield self.logits, self.input_ids, self.keep_mask
            return
        masks = itertools.repeat(None) if self.keep_mask is None else self.keep_mask
        no_more = object()
        iterators = iter(self.logits), iter(self.input_ids), iter(masks)
        while True:
            sample = tuple(next(iterator, no_more) for iterator in iterators)
            if sample[0] is no_more and sample[1] is no_more:
                return
            if any(part is no_more for part in sample):
                raise ValueError("logits, input_ids and keep_mask hold different numbers of samples")
            yield sample


def codec_from_config(config: dict[str, Any]) -> Codec:
    """The codec whose .config is `config`. Raises FormatError for one that this version does not know."""
    try:
        return make_codec(**config)
    except (TypeError, ValueError) as error:
        raise FormatError(f"codec configuration {config!r} is not one of this version: {error}") from None


def save_codec(codec: Codec, folder: str | os.PathLike[str]) -> None:
    """Writes codec.json, with its own SHA-256, and the codec's tables into `folder`, made where it is missing."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if codec.tables_sha256 is not None:
        write_tables(codec, path)
    text = json.dumps({"config": codec.config, "sha256": sha256_json(codec.config)}, indent=2) + "\n"
    _write_in_one_step(path / CONFIG_FILE, text.encode())


def load_codec(folder: str | os.PathLike[str]) -> Codec:
    """The codec that codec.save(folder) wrote, its tables read and checked.

    Raises FileNotFoundError, FormatError for what is no codec.json and CorruptionError where a hash does not hold.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        saved = json.loads(path.read_text())
        config, digest = saved["config"], saved["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is not a saved codec: {error!r}") from None
    if sha256_json(config) != digest:
        raise CorruptionError(f"{path}: configuration has SHA-256 {sha256_json(config)}, the file says {digest}")
    return with_tables_of(codec_from_config(config), Path(folder))


def remove_saved_codec(folder: Path) -> None:
    """Removes codec.json and the tables that it names; nothing where there is none."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return
    try:
        tables_sha256 = codec_from_config(json.loads(path.read_text())["config"]).tables_sha256
    except (FormatError, ValueError, KeyError, TypeError):
        tables_sha256 = None  # damaged, so that it names no tables
    path.unlink()
    if tables_sha256 is not None:
        (folder / tables_file_name(tables_sha256)).unlink(missing_ok=True)


def write_tables(codec: Codec, folder: Path) -> None:
    """Writes the codec's tables as `<sha256>.safetensors`, in one step; nothing where the codec has none.

    Raises SpecMismatchError for a fitted codec without its tables at hand.
    """
    if codec.tables_sha256 is None:
        return
    target = folder / tables_file_name(codec.tables_sha256)
    if not target.is_file():
        content = require_tables(codec).file_bytes
        folder.mkdir(parents=True, exist_ok=True)
        _write_in_one_step(target, content)


def _write_in_one_step(target: Path, content: bytes) -> None:
    """Whole and on the disk before it has its name; interrupted, it leaves nothing."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # rows that are on the disk cannot be read without their tables
        partial.replace(target)
        sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def with_tables_of(codec: Codec, folder: Path) -> Codec:
    """The codec with its tables from the folder; itself where it needs none or has them.

    Raises FileNotFoundError where the file is missing, CorruptionError where its hash is another.
    """
    if codec.tables_sha256 is None or codec.tables is not None:
        return codec
    path = folder / tables_file_name(codec.tables_sha256)
    if not path.is_file():
        raise FileNotFoundError(f"codec tables {path} are missing; copy the folder along with what was written with it")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != codec.tables_sha256:
        raise CorruptionError(f"codec tables {path} have SHA-256 {found}, not that of their name; copy them again")
    return codec.with_tables(tables_from_bytes(content, vocab_size=codec.vocab_size))


def codec_with_tables_at_hand(codec: Codec, folder: Path) -> Codec:
    """The codec with its tables where the folder has them; else as it is, unable to encode or decode.

    Raises CorruptionError where the file's hash is another.
    """
    if codec.tables_sha256 is None or not (folder / tables_file_name(codec.tables_sha256)).is_file():
        return codec
    return with_tables_of(codec, folder)


def tables_file_name(sha256: str) -> str:
    """Name of the file of tables with this hash."""
    return f"{sha256}.safetensors"
