"""What calibrating a codec leaves: candidate lists, static symbol tables and the tail model, as one safetensors file.

The file is named by the SHA-256 of its bytes, which the codec's configuration names too: a blob can only be read with
the tables that wrote it. All that entropy decoding depends on is integers; the floats (tail model, weights and levels
of corrections) only say what decoded integers stand for.

Letters: C contexts, A alphabet, V vocabulary.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from logitstore.corrections import CorrectionTables
from logitstore.entropy_code import StaticTables
from logitstore.errors import CorruptionError, FormatError
from logitstore.id_lists import LIST_LENGTH, CandidateLists, IdLists
from logitstore.tail_model import TailModel
from logitstore.tail_predictor import TailPredictor

TABLES_VERSION = "1"
_CORRECTIONS = ("weights", "contexts", "levels")
_LISTS = ("after", "beside", "together")
N_ODDS_CONTEXTS, N_RANK_GROUPS, N_TIE_SIZES = 9, 10, 5
N_ID_CONTEXTS = 3 * N_RANK_GROUPS + N_TIE_SIZES
_CONTEXTS_OF = {
    "odds": 1,
    "excess": N_ODDS_CONTEXTS,
    "counts": N_ODDS_CONTEXTS,
    "values": N_RANK_GROUPS,
    "ids": N_ID_CONTEXTS,
}


@dataclass(frozen=True, eq=False)
class CodecTables:
    """lists: candidates for ids. odds, excess, counts, values, ids: symbol frequencies of each kind of number.

    tail: the model of a predicted tail, None for others; corrections: how what it leaves over is coded, None where
    nothing of it is."""

    lists: IdLists
    odds: StaticTables
    excess: StaticTables
    counts: StaticTables
    values: StaticTables
    ids: StaticTables
    tail: TailModel | None = None
    corrections: CorrectionTables | None = None

    @cached_property
    def predictor(self) -> TailPredictor:
        """Runs the tail model. Raises CorruptionError for tables without one."""
        if self.tail is None:
            raise CorruptionError("codec tables hold no tail model, which a predicted tail needs")
        return TailPredictor(self.tail)

    @cached_property
    def file_bytes(self) -> bytes:
        """The tables as a safetensors file; equal tables give equal bytes."""
        from safetensors.numpy import save

        arrays: dict[str, NDArray] = {"by_frequency": self.lists.by_frequency}
        for name in _LISTS:
            candidates: CandidateLists = getattr(self.lists, name)
            arrays |= {f"{name}.offsets": candidates.offsets, f"{name}.members": candidates.members}
        arrays |= {f"symbols.{name}": getattr(self, name).frequencies for name in _CONTEXTS_OF}
        if self.tail is not None:
            arrays |= {f"tail.{name}": array for name, array in self.tail.arrays.items()}
        if self.corrections is not None:
            arrays |= {f"corrections.{name}": getattr(self.corrections, name) for name in _CORRECTIONS}
            arrays["corrections.step"] = np.array([self.corrections.step])
            arrays["symbols.corrections"] = self.corrections.symbols.frequencies
        return save(arrays, metadata={"logitstore.tables": TABLES_VERSION})

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of file_bytes, in hex."""
        return hashlib.sha256(self.file_bytes).hexdigest()


def tables_from_bytes(content: bytes, *, vocab_size: int) -> CodecTables:
    """The tables of a file whose hash was checked. Raises FormatError for another file or version, CorruptionError for
    arrays that are no tables of this vocabulary."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    version = _version(content)
    if version != TABLES_VERSION:
        raise FormatError(f"codec tables have version {version!r}, this logitstore reads {TABLES_VERSION!r}; update it")
    try:
        arrays = load(content)
        lists = {name: _candidates(arrays, name, vocab_size) for name in _LISTS}
        by_frequency = arrays["by_frequency"]
        symbols = {name: StaticTables(arrays[f"symbols.{name}"]) for name in _CONTEXTS_OF}
        tail, corrections = _tail(arrays, vocab_size), _corrections(arrays)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise FormatError(f"not a file of codec tables: {error}") from None
    if by_frequency.dtype != np.int32 or not np.array_equal(np.sort(by_frequency), np.arange(vocab_size)):
        raise CorruptionError(f"by_frequency is not a permutation of the {vocab_size} token ids")
    for name, tables in symbols.items():
        if tables.n_contexts != _CONTEXTS_OF[name]:
            raise CorruptionError(f"symbols.{name} has {tables.n_contexts} contexts, expected {_CONTEXTS_OF[name]}")
    lists = IdLists(by_frequency=by_frequency, **lists)
    return CodecTables(lists=lists, **symbols, tail=tail, corrections=corrections)


def _tail(arrays: dict[str, NDArray], vocab_size: int) -> TailModel | None:
    own = {name.removeprefix("tail."): array for name, array in arrays.items() if name.startswith("tail.")}
    if not own:
        return None
    model = TailModel(own)
    if model.vocab_size != vocab_size:
        raise CorruptionError(f"tail model is for a vocabulary of {model.vocab_size}, the codec has {vocab_size}")
    return model


def _corrections(arrays: dict[str, NDArray]) -> CorrectionTables | None:
    if "corrections.step" not in arrays:
        return None
    step = arrays["corrections.step"]
    if step.shape != (1,) or step.dtype != np.float64 or not (np.isfinite(step[0]) and step[0] > 0):
        raise CorruptionError(f"step of corrections is {step!r}, expected one float64 above 0")
    parts = {name: arrays[f"corrections.{name}"] for name in _CORRECTIONS}
    return CorrectionTables(float(step[0]), **parts, symbols=StaticTables(arrays["symbols.corrections"]))


def _version(content: bytes) -> str | None:
    try:
        (header_bytes,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + header_bytes])
        return header["__metadata__"]["logitstore.tables"]
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"not a file of codec tables: {error!r}") from None


def _candidates(arrays: dict[str, NDArray], name: str, vocab_size: int) -> CandidateLists:
    offsets, members = arrays[f"{name}.offsets"], arrays[f"{name}.members"]
    if (
        offsets.dtype != np.int32
        or members.dtype != np.int32
        or offsets.shape != (vocab_size + 1,)
        or members.ndim != 1
    ):
        raise CorruptionError(
            f"candidate lists {name!r} are {offsets.dtype} {offsets.shape} and {members.dtype} {members.shape}, "
            f"expected int32 [{vocab_size + 1}] and int32 [P]"
        )
    if offsets[0] != 0 or offsets[-1] != len(members) or np.any(np.diff(offsets) < 0):
        raise CorruptionError(f"offsets of the candidate lists {name!r} do not rise from 0 to their members")
    longest = int(np.diff(offsets).max())
    if longest > LIST_LENGTH:
        raise CorruptionError(f"candidate lists {name!r} hold one of {longest} ids, expected {LIST_LENGTH} at most")
    if len(members) and (members.min() < 0 or members.max() >= vocab_size):
        raise CorruptionError(f"candidate lists {name!r} hold an id outside the vocabulary of {vocab_size}")
    return CandidateLists(offsets, members)
