"""The two tail moments of a row as two small integers.

The log-mass is stored as the log-odds of the tail, ln(r / (1 - r)): a log-mass alone would lose the head of a flat
row, where r rounds to 1. The half moment is stored as its excess over log-mass / 2, which is at least 0 and at most
ln(V) / 2 by Cauchy-Schwarz.

Two grids: FINE, two bytes a moment, whose steps cost below 2e-7 nats of KL; and COARSE, for entropy coding, whose
steps of 1/16 cost at most 4e-5 nats at T = 1 (r (1 - r) / 2 * step^2 / 12) and as much at T = 2, and save 1.6 bytes
a row.

A tail whose odds are below e^-64 is stored as e^-64 and one above e^20 as e^20 (a head of at least one token in
2^24 stays below e^17); no tail at all (-inf) has the code 65535 in both places.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import CorruptionError
from logitstore.temperature import log1mexp

ODDS_OFFSET = 64.0
NO_TAIL = 65535


@dataclass(frozen=True)
class MomentGrid:
    """Steps a nat of the log-odds and of the half moment's excess."""

    odds_steps: float
    excess_steps: float

    @property
    def greatest_odds_code(self) -> int:
        """The code of the greatest odds, e^20."""
        return int((20 + ODDS_OFFSET) * self.odds_steps)

    @property
    def mass_error_bound(self) -> float:
        """Nats, on log-mass and on ln(1 - mass), unless the floor of e^-64 applies."""
        return 0.5 / self.odds_steps + 1e-6

    @property
    def half_error_bound(self) -> float:
        """Nats, on the half moment."""
        return 0.5 * self.mass_error_bound + 0.5 / self.excess_steps + 1e-6


FINE = MomentGrid(512.0, 4096.0)
COARSE = MomentGrid(16.0, 16.0)

Codes = NDArray[np.uint16]
Float32 = NDArray[np.float32]


def encode_moments(logmass: Float32, logmoment_half: Float32, grid: MomentGrid = FINE) -> tuple[Codes, Codes]:
    """(odds codes, excess codes), uint16 each, of moments in nats; re-encoding what was decoded changes nothing."""
    odds_codes = encode_logmass(logmass, grid)
    no_tail = odds_codes == NO_TAIL
    mass = np.where(no_tail, -1.0, logmass.astype(np.float64))
    reference_mass = np.where(_logodds(mass) < -ODDS_OFFSET, mass, _logmass(odds_codes, grid))
    excess = np.where(no_tail, 0.0, logmoment_half.astype(np.float64) - reference_mass / 2)
    excess_codes = np.clip(np.rint(excess * grid.excess_steps), 0, NO_TAIL - 1).astype(np.uint16)
    excess_codes[no_tail] = NO_TAIL
    return odds_codes, excess_codes


def decode_moments(odds_codes: Codes, excess_codes: Codes, grid: MomentGrid = FINE) -> tuple[Float32, Float32]:
    """(log-mass, half moment) float32 in nats. Raises CorruptionError where one code says no tail and one a tail."""
    if not np.array_equal(odds_codes == NO_TAIL, excess_codes == NO_TAIL):
        raise CorruptionError("one tail moment says that there is no tail, the other that there is one")
    mass = decode_logmass(odds_codes, grid)  # and -inf without a tail, as its half is then
    return mass.astype(np.float32), (mass / 2 + excess_codes / grid.excess_steps).astype(np.float32)


def encode_logmass(logmass: Float32, grid: MomentGrid = FINE) -> Codes:
    """The log-odds code of a tail's log-mass in nats, uint16; NO_TAIL where it is -inf."""
    mass = logmass.astype(np.float64)
    no_tail = np.isneginf(mass)
    odds = _logodds(np.where(no_tail, -1.0, mass))
    codes = np.clip(np.rint((odds + ODDS_OFFSET) * grid.odds_steps), 0, grid.greatest_odds_code).astype(np.uint16)
    codes[no_tail] = NO_TAIL
    return codes


def decode_logmass(odds_codes: Codes, grid: MomentGrid = FINE) -> NDArray[np.float64]:
    """The log-mass in nats; -inf for NO_TAIL. Raises CorruptionError for a code that stands for nothing."""
    above = odds_codes > grid.greatest_odds_code
    mass = _logmass(odds_codes, grid)
    if above.any():
        if np.any(odds_codes[above] != NO_TAIL):
            raise CorruptionError(f"a tail moment has a code above {grid.greatest_odds_code}")
        mass[above] = -np.inf
    return mass


def _logodds(logmass: NDArray[np.float64]) -> NDArray[np.float64]:
    """ln(r / (1 - r)) of ln r; a mass that float32 has rounded to 1 counts as 1 - 1e-9."""
    below_1 = np.minimum(logmass, -1e-9)
    return below_1 - log1mexp(below_1)


def _logmass(odds_codes: Codes, grid: MomentGrid) -> NDArray[np.float64]:
    """ln(sigmoid(odds)), which is below 0 for every code; anything for codes above the greatest."""
    return np.take(_logmass_of_codes(grid), odds_codes, mode="clip")


@functools.lru_cache(maxsize=2)
def _logmass_of_codes(grid: MomentGrid) -> NDArray[np.float64]:
    odds = np.arange(grid.greatest_odds_code + 1) / grid.odds_steps - ODDS_OFFSET
    return -np.logaddexp(0.0, -odds)
