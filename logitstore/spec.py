"""StoreSpec: what the distributions of a store are, and what they belong to.

It is stored as JSON in every shard, so that a shard says of itself which codec reads it and which tokenizer, teacher
and data set it came from. Shards with different specs are never read together.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from logitstore.codecs.registry import Codec, codec_from_config
from logitstore.errors import FormatError, SpecMismatchError
from logitstore.fingerprint import canonical_json

FORMAT = "logitstore direct/1"


@dataclass(frozen=True)
class StoreSpec:
    """codec: a codec of make_codec. vocab_size: tokens of the tokenizer, at most the width of the teacher's head.

    tokenizer_sha256: see tokenizer_sha256(). tokenizer_files_sha256: the folder in the tables beside the store.
    teacher, teacher_sha256, teacher_dtype: name as it was given, fingerprint of its files, dtype it ran in.
    head_width: columns of its head, padding included. dataset, dataset_sha256: file name and hash of its bytes.
    max_length: tokens. keep_prompt: True where rows before the learned tokens are stored too.
    collection: whatever else decided what was collected, as JSON scalars. Raises ValueError for parts that disagree.
    """

    codec: Codec
    vocab_size: int
    tokenizer_sha256: str | None = None
    tokenizer_files_sha256: str | None = None
    teacher: str | None = None
    teacher_sha256: str | None = None
    teacher_dtype: str | None = None
    head_width: int | None = None
    dataset: str | None = None
    dataset_sha256: str | None = None
    max_length: int | None = None
    keep_prompt: bool = False
    collection: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.codec.vocab_size != self.vocab_size:
            raise ValueError(f"codec has a vocabulary of {self.codec.vocab_size}, the store of {self.vocab_size}")
        if self.head_width is not None and self.head_width < self.vocab_size:
            raise ValueError(f"head_width {self.head_width} is below vocab_size {self.vocab_size}")

    def to_json(self) -> str:
        """Canonical JSON of all fields, with the format's name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["codec"] = self.codec.config
        values["collection"] = dict(self.collection)
        return canonical_json({"format": FORMAT, **values})

    @staticmethod
    def from_json(text: bytes | str) -> "StoreSpec":
        """The spec of which to_json made this text. Raises FormatError for another format or unknown fields."""
        try:
            values = json.loads(text)
            stored_format = values.pop("format")
            values["codec"] = codec_from_config(values["codec"])
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise FormatError(f"the spec in the footer is not one of ours: {error!r}") from None
        if stored_format != FORMAT:
            raise FormatError(f"store has format {stored_format!r}, expected {FORMAT!r}; update logitstore")
        unknown = sorted(set(values) - {f.name for f in fields(StoreSpec)})
        if unknown:
            raise FormatError(f"the spec in the footer has unknown fields {', '.join(unknown)}; update logitstore")
        try:
            return StoreSpec(**values)
        except (TypeError, ValueError) as error:
            raise FormatError(f"the spec in the footer does not hold together: {error}") from None


def require_same_spec(found: StoreSpec, expected: StoreSpec, *, where: str, advice: str) -> None:
    """Raises SpecMismatchError naming `where`, the first field that differs, both values and the advice.

    What a teacher or a data set is called does not count, nor how its tokenizer's files are written: the hashes do.
    """
    for name in _COMPARED:
        there, here = _comparable(found, name), _comparable(expected, name)
        if there != here:
            only = _differing(there, here) if name == "collection" else None
            raise SpecMismatchError(
                f"{where} has {_described(found, name, only)}, this run {_described(expected, name, only)}; {advice}"
            )


_COMPARED = (
    "teacher_sha256",
    "dataset_sha256",
    "codec",
    "tokenizer_sha256",
    "vocab_size",
    "head_width",
    "teacher_dtype",
    "max_length",
    "keep_prompt",
    "collection",
)
_CALLED = {"teacher_sha256": "teacher", "dataset_sha256": "dataset"}


def _comparable(spec: StoreSpec, name: str) -> Any:
    value = getattr(spec, name)
    return value.config if name == "codec" else dict(value) if name == "collection" else value


def _differing(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return sorted(key for key in there | here if (key in there, there.get(key)) != (key in here, here.get(key)))


def _described(spec: StoreSpec, name: str, only: list[str] | None) -> str:
    """A field and its value; of a mapping the items that are named, or all."""
    value = _comparable(spec, name)
    if isinstance(value, dict):
        keys = value if only is None else only
        value = ", ".join(f"{key}={value[key]}" if key in value else f"no {key}" for key in keys)
    if name in _CALLED:
        return f"{_CALLED[name]} {getattr(spec, _CALLED[name])} (SHA-256 {str(value)[:12]})"
    return f"{name} {value}"
