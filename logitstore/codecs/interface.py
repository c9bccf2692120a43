"""What a codec is: the attributes and methods that the store, the collector and the decoder call.

A codec is a frozen dataclass whose fields are its options, vocab_size first. To add one: write it in a file of its own
in this folder, give it a line in registry.CODECS, a codec_id and its byte tables in FORMAT.md, and pass
conformance.check_codec. Its targets_from_logits must hand out what decode(encode(...)) gives back, bit for bit.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from logitstore.codec_tables import CodecTables
from logitstore.fit_cache import FitCache
from logitstore.targets import TeacherTargets


class Codec(Protocol):
    """codec_id: the number in its blobs' headers. tail: what it says of the tokens that it does not keep, "residual",
    "predicted" or "sampled", from which trainers choose their loss. config: its options as JSON values, with its
    `name`; make_codec(**config) makes it again. max_row_bytes: bytes of its largest row before compression.

    tables_sha256: hash of the tables that it was fitted with, which config names as `tables`; None where nothing is
    fitted. tables: these where they are at hand; without them it can neither encode nor decode.
    """

    @property
    def codec_id(self) -> int: ...

    @property
    def tables_sha256(self) -> str | None: ...

    @property
    def tables(self) -> CodecTables | None: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def tail(self) -> str: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def max_row_bytes(self) -> int: ...

    def calibrated(
        self,
        samples: Iterable[tuple[Any, Any, Any]],
        on_progress: Callable[[str, int, int | None], Any] | None = None,
        cache: FitCache | None = None,
    ) -> "Codec":
        """The codec fitted to samples of (logits, input_ids, keep_mask or None); itself where nothing is fitted.
        on_progress is called with (stage, done, total or None); cache: tail models that were fitted before."""
        ...

    def with_tables(self, tables: CodecTables) -> "Codec":
        """The codec with its tables at hand. Raises ValueError for others than it names."""
        ...

    def targets_from_logits(self, logits: Any, input_ids: Any, keep_mask: Any = None) -> TeacherTargets:
        """What it keeps of softmax(logits [L, W >= V]): L - 1 rows, absent where keep_mask [L - 1] is False."""
        ...

    def encode(self, targets: TeacherTargets, input_ids: Any) -> bytes:
        """One blob. Raises ValueError, CorruptionError or SpecMismatchError for targets that it cannot store."""
        ...

    def decode(self, blob: bytes | memoryview, input_ids: Any) -> TeacherTargets:
        """The targets that were encoded for this text; any damage is a LogitStoreError."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the codec to a folder, for logitstore.load_codec."""
        ...
