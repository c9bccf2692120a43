"""What a codec is: the attributes and methods that the store, the collector and the decoder call.

A codec is a frozen dataclass whose fields are its options, vocab_size first. To add one: write it in a file of its own
in this folder, give it a line in registry.CODECS, a codec_id and its byte tables in FORMAT.md, and pass
conformance.check_codec. Its targets_from_logits must hand out what decode(encode(...)) gives back, bit for bit.
"""

import os
from typing import Any, ClassVar, Protocol

from logitstore.targets import TeacherTargets


class Codec(Protocol):
    """codec_id: the number in its blobs' headers. tail: what it says of the tokens that it does not keep, "residual"
    or "sampled", from which trainers choose their loss. config: its options as JSON values, with its `name`;
    make_codec(**config) makes it again. max_row_bytes: bytes of its largest row before compression."""

    codec_id: ClassVar[int]

    @property
    def vocab_size(self) -> int: ...

    @property
    def tail(self) -> str: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def max_row_bytes(self) -> int: ...

    def calibrated(self, logits: Any, input_ids: Any, keep_mask: Any = None) -> "Codec":
        """The codec fitted to a sample; itself where nothing of it is fitted."""
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
