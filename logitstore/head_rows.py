"""Head codes of whole rows: what they stand for, and whether log-probs are on a format's grid already.

Letters: R rows, E entries.
"""

import numpy as np
from numpy.typing import NDArray

from logitstore.head_values import HeadFormat, QuantisedHead, decode_one_byte
from logitstore.targets import TeacherTargets


def decoded_head(
    head_format: HeadFormat,
    codes: NDArray[np.uint8] | NDArray[np.uint16],
    offsets: NDArray[np.int64],
    tail_logmass: NDArray[np.float32],
    scale: NDArray[np.float32] | None = None,
    offset: NDArray[np.float32] | None = None,
) -> QuantisedHead:
    """What codes [E] stand for: logps [E], and scale and offset [R] where the format has them.

    tail_logmass [R] as decoded, NaN in absent rows. scale and offset are given for formats that store them; an offset
    that is derived puts the head's mass at 1 - tail mass.
    """
    if head_format.table is None:
        return QuantisedHead(codes.view(np.float16).astype(np.float32), codes, None, None)
    if head_format.derives_offset:
        from logitstore.row_loops import log_head

        offset, logps = log_head(codes, offsets, head_format.table, head_format.shares, tail_logmass)
        return QuantisedHead(logps, codes, np.ones(len(offset), np.float32), offset)
    counts = np.diff(offsets)
    scale_E, offset_E = (None if number is None else np.repeat(number, counts) for number in (scale, offset))
    return QuantisedHead(decode_one_byte(codes, head_format.table, scale_E, offset_E), codes, scale, offset)


def quantised_head(
    head_format: HeadFormat, logps: NDArray[np.float32], offsets: NDArray[np.int64], tail_logmass: NDArray[np.float32]
) -> QuantisedHead:
    """The nearest codes of log-probs [E], and what they stand for beside these tail masses (as decoded)."""
    head = head_format.quantise(logps, offsets)
    return decoded_head(head_format, head.codes, offsets, tail_logmass, head.scale, head.offset)


def head_on_grid(head_format: HeadFormat, targets: TeacherTargets, tail_logmass: NDArray[np.float32]) -> QuantisedHead:
    """The targets' own codes where they are this format's codes, else their log-probs quantised."""
    codes, scale, offset = targets.codes, targets.code_scale, targets.code_offset
    has_numbers = head_format.has_row_scale or head_format.derives_offset
    if codes is not None and head_format.table is not None and (scale is not None) == has_numbers:
        head = decoded_head(head_format, codes, targets.offsets, tail_logmass, scale, offset)
        if np.array_equal(head.logps, targets.logps):
            return head
    return quantised_head(head_format, targets.logps, targets.offsets, tail_logmass)
