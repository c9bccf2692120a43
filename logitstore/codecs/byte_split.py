"""What the bytes of a top-k blob are spent on: ids, values of the head, the tail, and what is beside them.

Entropy-coded numbers cost what their tables say of them, and their raw bits; the coder itself adds less than 8 bytes a
blob. Byte planes, which zstd compresses together, are compressed one by one, and what that takes is scaled to the blob.
"""

import zstandard

from logitstore.blob import HEADER_BYTES, ZSTD_LEVEL
from logitstore.codecs.checks import require_tables
from logitstore.codecs.flat_layout import flat_planes
from logitstore.codecs.ranked_layout import coded_groups
from logitstore.codecs.topk import TopKCodec
from logitstore.entropy_code import cost_bits
from logitstore.targets import TeacherTargets

PARTS = ("ids", "values", "tail", "side")


def byte_split(codec: TopKCodec, targets: TeacherTargets, blob: bytes) -> dict[str, float]:
    """Bytes of the blob of these targets by PARTS; they add up to len(blob). side: header, frame, counts of entries."""
    rows = codec.stored_rows(targets)
    bytes_of = dict.fromkeys(PARTS, 0.0)
    if codec.is_fitted:
        for part, tables, numbers, contexts in coded_groups(
            codec.head_format, require_tables(codec), targets.input_ids, rows
        ):
            bytes_of[part] += cost_bits(tables, numbers, contexts) / 8
        if codec.head_format.has_row_scale:
            bytes_of["values"] += 4 * int(targets.present.sum())
        bytes_of["side"] += len(blob) - sum(bytes_of.values())
        return bytes_of
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    empty = len(compressor.compress(b""))
    for part, plane in flat_planes(codec.head_format, rows, codec.vocab_size):
        bytes_of[part] += len(compressor.compress(plane)) - empty
    bytes_of["side"] += HEADER_BYTES + empty
    scale = len(blob) / sum(bytes_of.values())
    return {part: n_bytes * scale for part, n_bytes in bytes_of.items()}
