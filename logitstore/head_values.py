"""How the log-probs of the kept tokens become bytes: fp8, int8, fp16, log and sqrtp.

Every one-byte format reads logp = scale * table[code] + offset with a table of 256 numbers, so a kernel needs to know
tables and not formats. fp8 is e4m3 of log p itself (3 mantissa bits: a relative error of 1/16 of log p at most);
int8 counts steps down from the row's greatest entry, with a scale and an offset a row (error: half a step of the
row's range / 255); fp16 is two bytes (relative error 2^-11). log and sqrtp have one step for all rows, which is what
makes their codes cheap to entropy code: log counts steps of log p down from the row's first entry, whose own value
follows from the tail's mass and is not stored; sqrtp counts steps of sqrt(p), in which equal errors cost equal KL
(KL = 2 * sum of the squared errors of sqrt(p), to second order). What quantisation does to a row's total mass does
not matter: the head is shifted to 1 - tail mass wherever a row is used.

Letters: R rows, E entries.
"""

import functools
import math
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
    """One way of storing head log-probs. `table` [256] float32 for the one-byte formats, None for fp16.

    has_row_scale: scale and offset are stored for each row. derives_offset: a row's offset is not stored, but is what
    makes the head's mass 1 - tail mass. reach_nats: entries further below a row's first cannot be said.
    least_logp: entries of less probability cannot be said. Both go to the tail. descends: codes fall along a row, from
    `base` down; otherwise they rise from it.
    """

    name: str
    code_bytes: int
    has_row_scale: bool
    table: NDArray[np.float32] | None
    quantise: Callable[[NDArray[np.float32], NDArray[np.int64]], QuantisedHead]
    error_bound: Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float64]]
    derives_offset: bool = False
    reach_nats: float = math.inf
    least_logp: float = LEAST_LOGP
    descends: bool = False
    base: int = 0

    @functools.cached_property
    def shares(self) -> NDArray[np.float64]:
        """e^table [256], of a one-byte format."""
        return np.exp(self.table.astype(np.float64))

    @property
    def code_type(self) -> type[np.uint8] | type[np.uint16]:
        """The numpy type of a code."""
        return np.uint8 if self.code_bytes == 1 else np.uint16


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


def _log_format(step: float) -> HeadFormat:
    """Steps of `step` nats down from the row's first entry, 255 at most."""

    def quantise(logps: NDArray[np.float32], offsets: NDArray[np.int64]) -> QuantisedHead:
        counts = np.diff(offsets)
        first_E = np.repeat(logps[offsets[:-1][counts > 0]], counts[counts > 0])
        codes = np.clip(np.rint((first_E - logps) / np.float32(step)), 0, 255).astype(np.uint8)
        return QuantisedHead(table[codes], codes, None, None)

    def error_bound(logps: NDArray[np.float32], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
        # half a step of its own, and half a step of the others through the offset
        return np.full(len(logps), step + 2e-3)

    table = (-step * np.arange(256)).astype(np.float32)
    return HeadFormat("log", 1, False, table, quantise, error_bound, derives_offset=True, reach_nats=255.4 * step)


def _sqrtp_format(step: float) -> HeadFormat:
    """sqrt(p) in whole steps, 1 to 255; the least p is a quarter of a step squared."""

    def quantise(logps: NDArray[np.float32], offsets: NDArray[np.int64]) -> QuantisedHead:
        codes = np.clip(np.rint(np.exp(logps.astype(np.float64) / 2) / step), 1, 255).astype(np.uint8)
        return QuantisedHead(table[codes], codes, None, None)

    def error_bound(logps: NDArray[np.float32], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
        root = np.exp(logps.astype(np.float64) / 2)
        above, below = (np.maximum(root + side, step) for side in (step / 2, -step / 2))
        return 2 * np.log(np.maximum(above / root, root / np.minimum(below, root))) + 1e-5

    with np.errstate(divide="ignore"):
        table = np.minimum(2 * np.log(step * np.arange(256)), 0).astype(np.float32)
    return HeadFormat(
        "sqrtp",
        1,
        False,
        table,
        quantise,
        error_bound,
        least_logp=2 * math.log(step / 2) + 1e-6,
        descends=True,
        base=min(round(1 / step), 255),
    )


HEAD_FORMATS = {
    "fp8": HeadFormat("fp8", 1, False, E4M3_TABLE, _quantise_fp8, _fp8_bound, base=128),
    "int8": HeadFormat("int8", 1, True, INT8_TABLE, _quantise_int8, _int8_bound, descends=True, base=255),
    "fp16": HeadFormat("fp16", 2, False, None, _quantise_fp16, _fp16_bound, base=32768),
}
STEPPED_FORMATS = {"log": (_log_format, 0.25, 1 / 16, 4.0), "sqrtp": (_sqrtp_format, 1 / 64, 1 / 255, 1 / 4)}
HEADS = (*HEAD_FORMATS, *STEPPED_FORMATS)


def head_format(name: str, step: float | None = None) -> HeadFormat:
    """The format of that name; step: of "log" in nats (1/4 if None), of "sqrtp" in sqrt(p) (1/64 if None).

    Raises ValueError for another name, a step where there is none to choose, or one outside the format's range.
    """
    if name in HEAD_FORMATS:
        if step is not None:
            raise ValueError(f"head {name!r} has no step to choose; {' and '.join(STEPPED_FORMATS)} have one")
        return HEAD_FORMATS[name]
    if name not in STEPPED_FORMATS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {name!r}")
    _, default, least, most = STEPPED_FORMATS[name]
    step = default if step is None else step
    if not isinstance(step, int | float) or isinstance(step, bool) or not least <= step <= most:
        raise ValueError(f"head_step of {name!r} must be from {least:.4g} to {most:g}, got {step!r}")
    return _stepped_format(name, float(step))


@functools.lru_cache(maxsize=64)
def _stepped_format(name: str, step: float) -> HeadFormat:
    return STEPPED_FORMATS[name][0](step)
