"""The codecs by name: make_codec, calibrate and load_codec. A new codec is one file here and one line in CODECS."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from logitstore.codecs.topk import TopKCodec
from logitstore.errors import CorruptionError, FormatError
from logitstore.fingerprint import sha256_json

Codec = TopKCodec
CODECS: dict[str, type[Codec]] = {"topk": TopKCodec}
CONFIG_FILE = "codec.json"


def make_codec(name: str, *, vocab_size: int, **options: Any) -> Codec:
    """The codec of that name and options, unfitted where it has something to fit.

    "topk": k (64), head "int8" | "fp8" | "fp16" | "log" | "sqrtp" ("int8"), head_step, min_prob, top_p (None), tail
    "residual".
    Raises ValueError for a name or an option that this version does not have.
    """
    if name not in CODECS:
        raise ValueError(f"no codec is named {name!r} in this version; there are: {', '.join(CODECS)}")
    codec_type = CODECS[name]
    known = [field.name for field in fields(codec_type)]
    for option in options:
        if option not in known:
            raise ValueError(f"codec {name!r} has no option {option!r} in this version; it has: {', '.join(known)}")
    return codec_type(vocab_size=vocab_size, **options)


def calibrate(codec: Codec, logits: Any, input_ids: Any, keep_mask: Any = None) -> Codec:
    """The codec fitted to a sample; itself where nothing of it is fitted, as with "topk".

    logits: [L, V] array, tensor or FactoredLogits, a list of them, or a re-iterable of them, with input_ids and
    keep_mask alike. Raises TypeError for a codec that is none of ours.
    """
    if not isinstance(codec, tuple(CODECS.values())):
        raise TypeError(f"calibrate takes a codec of make_codec or load_codec, got {type(codec).__name__}")
    return codec.calibrated(logits, input_ids, keep_mask)


def codec_from_config(config: dict[str, Any]) -> Codec:
    """The codec whose .config is `config`. Raises FormatError for one that this version does not know."""
    try:
        return make_codec(**config)
    except (TypeError, ValueError) as error:
        raise FormatError(f"codec configuration {config!r} is not one of this version: {error}") from None


def save_codec(codec: Codec, folder: str | os.PathLike[str]) -> None:
    """Writes codec.json, with its own SHA-256, into `folder`, which is made where it is missing."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"config": codec.config, "sha256": sha256_json(codec.config)}, indent=2) + "\n"
    partial = path / (CONFIG_FILE + ".partial")
    partial.write_text(text)
    partial.replace(path / CONFIG_FILE)


def load_codec(folder: str | os.PathLike[str]) -> Codec:
    """The codec that codec.save(folder) wrote.

    Raises FileNotFoundError, FormatError for what is no codec.json and CorruptionError where its hash does not hold.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        saved = json.loads(path.read_text())
        config, digest = saved["config"], saved["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is not a saved codec: {error!r}") from None
    if sha256_json(config) != digest:
        raise CorruptionError(f"{path}: configuration has SHA-256 {sha256_json(config)}, the file says {digest}")
    return codec_from_config(config)
