"""How the log-probs of the kept tokens become bytes: fp8, int8 and fp16.

Every one-byte format reads logp = scale * table[code] + offset with a table of 256 numbers, so a kernel needs to know
tables and not formats. fp8 is e4m3 of log p itself (3 mantissa bits: a relative error of 1/16 of log p at most);
int8 counts steps down from the row's greatest entry, with a scale and an offset a row (error: half a step of the
row's range / 255); fp16 is two bytes (relative error 2^-11). What quantisation does to a row's total mass does not
matter: the head is shifted to 1 - tail mass wherever a row is used.

Letters: R rows, E entries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# e^-87 is the least probability that float32 holds as a normal number; an entry below would decode to probability 0
LEAST_LOGP = -87.0


class QuantisedHead(NamedTuple):
    """logps [E] float32 as they decode; codes [E] uint8 or uint16; scale and offset [R] float32, or None."""

    logps: NDArray[np.float32]
    codes: NDArray[np.uint8] | NDArray[np.uint16]
    scale: NDArray[np.float32] | None
    offset: NDArray[np.float32] | None


@dataclass(frozen=True)
class HeadFormat:
    """One way of storing head log-probs. `table` [256] float32 for the one-byte formats, None for fp16."""

    name: str
    code_bytes: int
    has_row_scale: bool
    table: NDArray[np.float32] | None
    quantise: Callable[[NDArray[np.float32], NDArray[np.int64]], QuantisedHead]
    error_bound: Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float64]]

    @property
    def code_type(self) -> type[np.uint8] | type[np.uint16]:
        """The numpy type of a code."""
        return np.uint8 if self.code_bytes == 1 else np.uint16

    def decode(
        self,
        codes_E: NDArray,
        counts_R: NDArray[np.int64],
        scale_R: NDArray[np.float32] | None = None,
        offset_R: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """The log-probs [E] that codes of ragged rows with counts_R entries stand for."""
        if self.table is None:
            return codes_E.view(np.float16).astype(np.float32)
        scale_E, offset_E = (None if a is None else np.repeat(a, counts_R) for a in (scale_R, offset_R))
        return decode_one_byte(codes_E, self.table, scale_E, offset_E)


def _e4m3_table() -> NDArray[np.float32]:
    """Value of each float8 e4m3fn bit pattern [256]; 0x7f and 0xff are NaN. Format: Micikevicius et al. 2022."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[exponent * 8 + mantissa == 127] = np.nan
    return np.where(codes >= 128, -magnitude, magnitude).astype(np.float32)


E4M3_TABLE = _e4m3_table()
_E4M3_NEGATIVE = -E4M3_TABLE[128:255].astype(np.float64)
_E4M3_MIDPOINTS = (_E4M3_NEGATIVE[1:] + _E4M3_NEGATIVE[:-1]) / 2
INT8_TABLE = np.arange(-255, 1, dtype=np.float32)


def _quantise_fp8(logps: NDArray[np.float32], offsets: NDArray[np.int64]) -> QuantisedHead:
    """Nearest e4m3 value, ties to the even mantissa; the sign bit is always set, so 0 is coded as -0."""
    magnitude = -logps.astype(np.float64)
    index = np.searchsorted(_E4M3_MIDPOINTS, magnitude, side="left")
    tie_up = (index < len(_E4M3_MIDPOINTS)) & (index % 2 == 1)
    tie_up &= _E4M3_MIDPOINTS[np.minimum(index, len(_E4M3_MIDPOINTS) - 1)] == magnitude
    codes = (128 + index + tie_up).astype(np.uint8)
    return QuantisedHead(E4M3_TABLE[codes], codes, None, None)


def _quantise_int8(logps: NDArray[np.float32], offsets: NDArray[np.int64]) -> QuantisedHead:
    """logp = scale * (code - 255) + offset, scale and offset float16; the offset is the greatest entry rounded down,
    so that no entry decodes above 0."""
    counts = np.diff(offsets)
    present = counts > 0
    greatest, least = logps[offsets[:-1][present]], logps[offsets[1:][present] - 1]
    offset = _round_float16(greatest, towards=-np.inf)
    scale = _round_float16(np.maximum(offset.astype(np.float32) - least, 0) / np.float32(255), towards=np.inf)
    scale_R, offset_R = (np.zeros(len(counts), np.float32) for _ in range(2))
    scale_R[present], offset_R[present] = scale, offset
    scale_E, offset_E = np.repeat(scale_R, counts), np.repeat(offset_R, counts)
    steps = np.divide(logps - offset_E, scale_E, out=np.zeros_like(logps), where=scale_E > 0)
    codes = (np.clip(np.rint(steps), -255, 0) + 255).astype(np.uint8)
    return QuantisedHead(decode_one_byte(codes, INT8_TABLE, scale_E, offset_E), codes, scale_R, offset_R)


def _round_float16(values: NDArray[np.float32], *, towards: float) -> NDArray[np.float16]:
    """The float16 number next to each value on the side of `towards` (plus or minus infinity), itself if it is one."""
    nearest = values.astype(np.float16)
    back = nearest.astype(np.float32)
    wrong_side = back < values if towards > 0 else back > values
    return np.where(wrong_side, np.nextafter(nearest, np.float16(towards)), nearest)


def _quantise_fp16(logps: NDArray[np.float32], offsets: NDArray[np.int64]) -> QuantisedHead:
    """IEEE half precision of log p; the codes are its bits."""
    half = logps.astype(np.float16)
    return QuantisedHead(half.astype(np.float32), half.view(np.uint16), None, None)


def decode_one_byte(
    codes_E: NDArray[np.uint8],
    table: NDArray[np.float32],
    scale_E: NDArray[np.float32] | None,
    offset_E: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """scale * table[code] + offset [E] float32: what a stored code stands for."""
    values = table[codes_E]
    if scale_E is None or offset_E is None:
        return values
    return scale_E * values + offset_E


def _fp8_bound(logps: NDArray[np.float32], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.maximum(np.abs(logps.astype(np.float64)) / 16, 2.0**-10)


def _int8_bound(logps: NDArray[np.float32], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Half a step (range / 255, rounded up to float16), the offset's rounding, and float32 noise."""
    counts = np.diff(offsets)
    present = counts > 0
    greatest, least = np.zeros(len(counts)), np.zeros(len(counts))
    greatest[present], least[present] = logps[offsets[:-1][present]], logps[offsets[1:][present] - 1]
    offset_rounding = np.maximum(np.abs(greatest) * 2.0**-10, 2.0**-24)
    step = (greatest - least) / 255 * (1 + 2.0**-10) + 2.0**-24
    return np.repeat(step / 2 + offset_rounding + 1e-5, counts)


def _fp16_bound(logps: NDArray[np.float32], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.maximum(np.abs(logps.astype(np.float64)) * 2.0**-11, 2.0**-25)


HEAD_FORMATS = {
    "fp8": HeadFormat("fp8", 1, False, E4M3_TABLE, _quantise_fp8, _fp8_bound),
    "int8": HeadFormat("int8", 1, True, INT8_TABLE, _quantise_int8, _int8_bound),
    "fp16": HeadFormat("fp16", 2, False, None, _quantise_fp16, _fp16_bound),
}
