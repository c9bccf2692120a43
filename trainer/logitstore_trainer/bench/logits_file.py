"""Full teacher logits on disk, as `bench storage` reads them: one safetensors file, read one sample at a time.

input_ids [N] and sample_lengths [S] (any integer dtype, lengths add up to N), and either logits [N, V] or
hidden [N, D] with lm_head [V, D] (float16, bfloat16 or float32). Row i of the logits is the distribution after
token i; the last row of each sample has no label and is not used.

Letters: N tokens of all samples, S samples, L length of one, V vocabulary, D width.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import FormatError
from logitstore.logits_source import FactoredLogits

_FLOAT_DTYPES = ("F16", "BF16", "F32")
_INT_DTYPES = ("I64", "I32", "I16", "U8", "U16", "U32")
_EXPECTED = "expected input_ids [N], sample_lengths [S] and either logits [N, V] or hidden [N, D] with lm_head [V, D]"


class LogitsSample(NamedTuple):
    """input_ids [L] int32; logits [L, V], a torch tensor of the file's dtype or FactoredLogits."""

    input_ids: NDArray[np.int32]
    logits: Any


class LogitsFile:
    """A checked logits file: len() samples, [i] -> LogitsSample, one sample in memory at a time (and lm_head).

    Raises FileNotFoundError, and FormatError naming the tensor that is not as the module docstring says.
    """

    def __init__(self, path: str | Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file; it should be a .safetensors file of teacher logits")
        try:
            self._file = safe_open(str(self.path), framework="pt")
        except (SafetensorError, OSError):
            raise FormatError(
                f"{self.path}: not a safetensors file, or cut short; {_EXPECTED}, as safetensors' save_file writes it"
            ) from None
        self._check_names()
        lengths = self._integers("sample_lengths")
        self._input_ids = self._integers("input_ids")
        self.sample_lengths = lengths
        self._check_lengths()
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._lm_head = None
        if "logits" in self._names:
            self.vocab_size = self._matrix_shape("logits", n_rows=self.n_tokens)[1]
        else:
            width = self._matrix_shape("hidden", n_rows=self.n_tokens)[1]
            self.vocab_size = self._matrix_shape("lm_head", width=width)[0]
            self._lm_head = self._file.get_tensor("lm_head").float()
        self._check_ids()

    def __len__(self) -> int:
        return len(self.sample_lengths)

    def __getitem__(self, index: int) -> LogitsSample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: no sample {index}, the file has {len(self)}")
        start, stop = int(self._starts[index]), int(self._starts[index + 1])
        input_ids = self._input_ids[start:stop].astype(np.int32)
        if self._lm_head is None:
            return LogitsSample(input_ids, self._file.get_slice("logits")[start:stop])
        return LogitsSample(input_ids, FactoredLogits(self._file.get_slice("hidden")[start:stop], self._lm_head))

    @property
    def n_tokens(self) -> int:
        """N, the tokens of all samples."""
        return len(self._input_ids)

    @property
    def source_dtype(self) -> str:
        """The dtype of the logits or hidden states, as safetensors names it."""
        return self._file.get_slice("hidden" if self._lm_head is not None else "logits").get_dtype()

    def _check_names(self) -> None:
        self._names = set(self._file.keys())
        missing = {"input_ids", "sample_lengths"} - self._names
        if missing:
            raise FormatError(f"{self.path}: no tensor {' and no '.join(sorted(missing))}; {_EXPECTED}")
        has_logits, has_factors = "logits" in self._names, {"hidden", "lm_head"} <= self._names
        if has_logits == has_factors:
            found = ", ".join(sorted(self._names))
            problem = "both logits and hidden with lm_head" if has_logits else f"no logits (tensors: {found})"
            raise FormatError(f"{self.path}: {problem}; {_EXPECTED}")

    def _integers(self, name: str) -> NDArray[np.int64]:
        piece = self._file.get_slice(name)
        if piece.get_dtype() not in _INT_DTYPES or len(piece.get_shape()) != 1:
            raise FormatError(
                f"{self.path}: {name} is {piece.get_dtype()} {piece.get_shape()}, expected one axis of integers"
            )
        return self._file.get_tensor(name).numpy().astype(np.int64)

    def _matrix_shape(self, name: str, *, n_rows: int | None = None, width: int | None = None) -> tuple[int, int]:
        piece = self._file.get_slice(name)
        shape = list(piece.get_shape())
        if piece.get_dtype() not in _FLOAT_DTYPES or len(shape) != 2 or 0 in shape:
            raise FormatError(
                f"{self.path}: {name} is {piece.get_dtype()} {shape}, expected two axes of float16, bfloat16 or float32"
            )
        if n_rows is not None and shape[0] != n_rows:
            raise FormatError(f"{self.path}: {name} has {shape[0]} rows for {n_rows} input_ids; they must be equal")
        if width is not None and shape[1] != width:
            raise FormatError(f"{self.path}: {name} has width {shape[1]}, hidden has {width}; they must be equal")
        return shape[0], shape[1]

    def _check_lengths(self) -> None:
        lengths, n_tokens = self.sample_lengths, len(self._input_ids)
        if len(lengths) == 0:
            raise FormatError(f"{self.path}: sample_lengths is empty; there is nothing to measure")
        short = np.flatnonzero(lengths < 2)
        if len(short):
            raise FormatError(
                f"{self.path}: sample {short[0]} has length {lengths[short[0]]}; a sample needs two tokens, "
                "a context and a label"
            )
        if lengths.sum() != n_tokens:
            raise FormatError(f"{self.path}: sample_lengths add up to {lengths.sum()}, input_ids has {n_tokens}")

    def _check_ids(self) -> None:
        outside = np.flatnonzero((self._input_ids < 0) | (self._input_ids >= self.vocab_size))
        if len(outside):
            raise FormatError(
                f"{self.path}: input_ids[{outside[0]}] is {self._input_ids[outside[0]]}, "
                f"expected 0 to {self.vocab_size - 1}, the vocabulary of the logits"
            )
