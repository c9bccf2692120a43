"""What every codec checks alike: its options, the targets that it is to encode, and the header of a blob.

Letters: R rows, L sequence length.
"""

import operator
import re
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.blob import BlobHeader, check_header, input_ids_crc32, unpack_blob
from logitstore.codec_tables import CodecTables
from logitstore.codecs.interface import Codec
from logitstore.errors import CorruptionError, SpecMismatchError
from logitstore.fingerprint import canonical_json
from logitstore.planes import PlaneReader
from logitstore.targets import TeacherTargets

MAX_VOCAB_SIZE = 1 << 24
_SHA256 = re.compile("[0-9a-f]{64}")
_BYTES_OF_BLOB = 64  # more than a layout stores once, whatever its rows


def require_int(name: str, value: Any, least: int, most: int) -> int:
    """An option as an int, whatever integer type it has (numpy's are no JSON); a bool is none.

    Raises ValueError for one that is not an integer from `least` to `most`.
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most:,}, got {value!r}")
    return number


def require_fraction(name: str, value: Any) -> None:
    """Raises ValueError for an option that is neither None nor a number above 0 and below 1."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 < value < 1):
        raise ValueError(f"{name} must be a number above 0 and below 1, or None, got {value!r}")


def require_sha256(name: str, value: Any) -> None:
    """Raises ValueError for an option that is neither None nor a SHA-256 as 64 lower-case hex digits. It names a file
    beside the store, so it must not be a path."""
    if value is not None and not (isinstance(value, str) and _SHA256.fullmatch(value)):
        raise ValueError(f"{name} must be a SHA-256 of 64 lower-case hex digits, or None, got {value!r}")


def require_tables(codec: Codec) -> CodecTables:
    """The tables of a fitted codec. Raises SpecMismatchError where they are not at hand."""
    if codec.tables_sha256 is None:
        raise SpecMismatchError("codec predicts its tail and was not fitted: logitstore.calibrate fits it to a sample")
    if codec.tables is None:
        raise SpecMismatchError(
            f"codec needs its tables {codec.tables_sha256}: open the store beside its .tables folder, or use "
            "logitstore.load_codec on the folder that codec.save wrote"
        )
    return codec.tables


def expected_header(codec: Codec, tokens: NDArray[np.int32], *, n_present: int = 0, n_entries: int = 0) -> BlobHeader:
    """The header of a blob that `codec` writes for this text."""
    return BlobHeader(
        codec_id=codec.codec_id,
        n_rows=max(len(tokens) - 1, 0),
        n_present=n_present,
        n_entries=n_entries,
        vocab_size=codec.vocab_size,
        input_ids_crc32=input_ids_crc32(tokens),
        config_crc32=zlib.crc32(canonical_json(codec.config).encode()),
    )


def opened_blob(codec: Codec, blob: bytes | memoryview, tokens: NDArray[np.int32]) -> tuple[BlobHeader, PlaneReader]:
    """The header and the planes of a blob, its size, codec, vocabulary and text checked.

    Raises FormatError, CorruptionError or SpecMismatchError.
    """
    expected = expected_header(codec, tokens)
    header, payload = unpack_blob(blob, max_payload_bytes=_BYTES_OF_BLOB + expected.n_rows * codec.max_row_bytes)
    check_header(header, expected)
    return header, PlaneReader(payload)


def taken_counts(planes: PlaneReader, header: BlobHeader, dtype: str, *, max_entries: int) -> NDArray[np.int64]:
    """The next plane, which holds the entries of each row [R], checked."""
    counts = planes.take(dtype, header.n_rows).astype(np.int64)
    check_counts(counts, header, max_entries=max_entries)
    return counts


def check_counts(counts: NDArray[np.int64], header: BlobHeader, *, max_entries: int) -> None:
    """Raises CorruptionError where the entries of the rows [R] are not those of the header, or above max_entries.

    What follows may be allocated from them.
    """
    if counts.sum() != header.n_entries or np.count_nonzero(counts) != header.n_present:
        raise CorruptionError(f"row counts add up to {counts.sum()} entries, the header says {header.n_entries}")
    if counts.max(initial=0) > max_entries:
        raise CorruptionError(f"a row has {counts.max()} entries, the codec keeps {max_entries} at most")


def check_targets(codec: Codec, targets: TeacherTargets, tokens: NDArray[np.int32], *, max_entries: int) -> None:
    """Raises unless `codec` can encode these targets for this text.

    ValueError for another text, SpecMismatchError for another vocabulary, for samples where the codec keeps none or
    the other way round, or for more than max_entries in a row, CorruptionError for a broken invariant.
    """
    if targets.vocab_size != codec.vocab_size:
        raise SpecMismatchError(f"targets have a vocabulary of {targets.vocab_size}, the codec {codec.vocab_size}")
    if not np.array_equal(tokens, targets.input_ids):
        raise ValueError("input_ids are not the ones that the targets were made with")
    if targets.is_sampled != (codec.tail == "sampled"):
        kinds = {True: "weighted samples", False: "top entries"}
        raise SpecMismatchError(
            f"targets hold {kinds[targets.is_sampled]}, the codec {codec.config['name']!r} stores "
            f"{kinds[not targets.is_sampled]}; make them with its own targets_from_logits"
        )
    targets.validate_shapes()
    check_rows(codec, targets)
    most = int(targets.counts.max(initial=0))
    if most > max_entries:
        raise SpecMismatchError(f"a row of the targets has {most} entries, the codec keeps {max_entries}")


def check_rows(codec: Codec, targets: TeacherTargets) -> None:
    """targets.validate(), by compiled loops for a fitted codec, which needs some anyway; sizes have been validated.

    Raises CorruptionError.
    """
    if codec.tables_sha256 is not None and not targets.is_sampled:
        from logitstore.row_loops import rows_are_sound

        moments = targets.tail_logmass, targets.tail_logmoment_half
        if rows_are_sound(targets.offsets, targets.ids, targets.logps, *moments, targets.vocab_size):
            return
    targets.validate()  # says which row holds what
