"""Two ways to store something about every token: llama.cpp's 16-bit log-probs, and the head's principal directions.

Letters: R rows, V vocabulary, D width of the head, r directions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import zstandard
from numpy.typing import NDArray

from logitstore.blob import ZSTD_LEVEL
from logitstore.logits_source import FactoredLogits, iter_logit_chunks
from logitstore.row_input import as_numpy
from logitstore_trainer.bench.candidates import TEMPERATURES, Reconstruction
from logitstore_trainer.bench.list_file import Totals
from logitstore_trainer.bench.logits_file import LogitsFile, LogitsSample
from logitstore_trainer.bench.readings import log_softmax_rows
from logitstore_trainer.bench.timing import median_call

_REACH = 16.0  # nats below the greatest logit, where llama.cpp's layout clips
_FITTED_ROWS = 20_000


class LlamaCppLayout:
    """The file of llama.cpp's `perplexity --kl-divergence-base`: a row is a float32 scale and least log-prob, and
    uint16 steps above it, V padded to an even number; no compression."""

    codec = "llama.cpp 16-bit"
    table_bytes = 0
    temperatures = TEMPERATURES
    budget = None
    decoded = None
    reads_hidden = False

    def __init__(self, vocab_size: int) -> None:
        self.config = {"vocab_size": vocab_size, "dtype": "uint16"}
        self._vocab_size = vocab_size

    def open(self, folder: Path) -> None:
        self._file = (folder / "logits.kld").open("wb")
        self._sums = np.zeros(4)

    def add(self, sample_id: int, sample: LogitsSample) -> Reconstruction:
        rows = np.arange(len(sample.input_ids) - 1)
        parts = iter_logit_chunks(sample.logits, rows, vocab_size=self._vocab_size)
        logits_RV = np.concatenate([part.astype(np.float32) for part in parts])
        blob, encode_s = median_call(lambda: self._encoded(logits_RV))
        decoded_RV, decode_s = median_call(lambda: self._decoded(blob, len(rows)))
        self._file.write(blob)
        self._file.write(sample.input_ids.astype("<i4").tobytes())
        self._sums += (len(rows), len(blob), encode_s, decode_s)
        return lambda temperature: log_softmax_rows(decoded_RV, temperature)

    def _encoded(self, logits_RV: NDArray[np.float32]) -> bytes:
        greatest_R1 = logits_RV.max(axis=1, keepdims=True)
        floor_R1 = np.maximum(logits_RV.min(axis=1, keepdims=True), greatest_R1 - _REACH)
        scale_R1 = (greatest_R1 - floor_R1) / 65535
        steps_RV = np.rint((np.maximum(logits_RV, floor_R1) - floor_R1) / np.maximum(scale_R1, 1e-30))
        lse_R1 = greatest_R1 + np.log(np.exp(logits_RV - greatest_R1).sum(axis=1, keepdims=True, dtype=np.float64))
        packed = np.zeros((len(logits_RV), 4 + self._padded), "<u2")
        packed[:, :2] = scale_R1.astype("<f4").view("<u2")
        packed[:, 2:4] = (floor_R1 - lse_R1).astype("<f4").view("<u2")
        packed[:, 4 : 4 + self._vocab_size] = steps_RV
        return packed.tobytes()

    def _decoded(self, blob: bytes, n_rows: int) -> NDArray[np.float32]:
        packed = np.frombuffer(blob, "<u2").reshape(n_rows, 4 + self._padded)
        scale_R1, floor_R1 = (np.ascontiguousarray(packed[:, i : i + 2]).view("<f4") for i in (0, 2))
        return packed[:, 4 : 4 + self._vocab_size] * scale_R1 + floor_R1

    @property
    def _padded(self) -> int:
        return self._vocab_size + self._vocab_size % 2

    def close(self) -> Totals:
        self._file.close()
        n_rows, blob_bytes, encode_s, decode_s = self._sums
        return Totals(int(n_rows), int(blob_bytes), Path(self._file.name).stat().st_size, encode_s, decode_s)


@dataclass(frozen=True, eq=False)
class Directions:
    """The directions of a head in which a teacher's logits vary most: mean [D] of the hidden states, to_coefs [D, r] of
    (hidden - mean), in units of one standard deviation, and from_coefs [D, r] back."""

    mean: NDArray[np.float32]
    to_coefs: NDArray[np.float32]
    from_coefs: NDArray[np.float32]


def head_directions(file: LogitsFile) -> Directions | None:
    """All directions, the ones of most variance first, from the first rows of a file; None where it holds no head."""
    parts: list[NDArray[np.float32]] = []
    lm_head = None
    for number in range(len(file)):
        logits = file[number].logits
        if not isinstance(logits, FactoredLogits):
            return None
        lm_head = as_numpy(logits.lm_head).astype(np.float64)
        parts.append(as_numpy(logits.hidden).astype(np.float32))
        if sum(map(len, parts)) >= _FITTED_ROWS:
            break
    assert lm_head is not None
    hidden = np.concatenate(parts).astype(np.float64)
    covariance = np.atleast_2d(np.cov(hidden.T))
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, values[-1] * 1e-10)
    root, inverse_root = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    centred = lm_head - lm_head.mean(axis=0)
    _, directions = np.linalg.eigh(root @ (centred.T @ centred) @ root)
    directions = directions[:, ::-1]
    mean = hidden.mean(axis=0).astype(np.float32)
    return Directions(mean, (inverse_root @ directions).astype(np.float32), (root @ directions).astype(np.float32))


class HeadDirections:
    """The coefficients of a row's hidden state in the r first directions of the head (a singular value decomposition,
    weighted by how the teacher's hidden states vary), int8 with a float16 scale a row, in a zstd frame a sample."""

    side_bytes: ClassVar[int] = 3  # a token, at most: the scale, and the frame shared by a sample's rows
    codec = "SVD of the head"
    temperatures = TEMPERATURES
    decoded = None
    reads_hidden = True

    def __init__(self, vocab_size: int, directions: Directions, rank: int, budget: float | None = None) -> None:
        self.config = {"vocab_size": vocab_size, "rank": rank, "dtype": "int8"}
        self.budget = budget
        self._directions, self._rank = directions, rank
        self.table_bytes = 2 * vocab_size * (rank + 1) + 4 * directions.to_coefs.shape[0] * (rank + 1)

    def open(self, folder: Path) -> None:
        self._file = (folder / "coefs.int8.zst").open("wb")
        self._sums = np.zeros(4)

    def add(self, sample_id: int, sample: LogitsSample) -> Reconstruction:
        n_rows = len(sample.input_ids) - 1
        coefs_Rr = self._coefs(sample.logits, n_rows)
        blob, encode_s = median_call(lambda: self._encoded(coefs_Rr))
        decoded_Rr, decode_s = median_call(lambda: self._decoded(blob, n_rows))
        self._file.write(blob)
        self._file.write(sample.input_ids.astype("<i4").tobytes())
        self._sums += (n_rows, len(blob), encode_s, decode_s)
        hidden = decoded_Rr @ self._directions.from_coefs[:, : self._rank].T + self._directions.mean
        logits_RV = hidden @ as_numpy(sample.logits.lm_head).astype(np.float32).T
        return lambda temperature: log_softmax_rows(logits_RV, temperature)

    def _coefs(self, logits: Any, n_rows: int) -> NDArray[np.float32]:
        hidden = as_numpy(logits.hidden)[:n_rows].astype(np.float32)
        return (hidden - self._directions.mean) @ self._directions.to_coefs[:, : self._rank]

    def _encoded(self, coefs_Rr: NDArray[np.float32]) -> bytes:
        scale_R = (np.abs(coefs_Rr).max(axis=1) / 127).astype("<f2")
        codes_Rr = np.rint(coefs_Rr / np.maximum(scale_R, np.float16(1e-7)).astype(np.float32)[:, None]).clip(-127, 127)
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
        return compressor.compress(scale_R.tobytes() + codes_Rr.astype(np.int8).T.tobytes())

    def _decoded(self, blob: bytes, n_rows: int) -> NDArray[np.float32]:
        content = zstandard.ZstdDecompressor().decompress(blob)
        scale_R = np.frombuffer(content, "<f2", n_rows).astype(np.float32)
        return np.frombuffer(content, np.int8, offset=2 * n_rows).reshape(self._rank, n_rows).T * scale_R[:, None]

    def close(self) -> Totals:
        self._file.close()
        n_rows, blob_bytes, encode_s, decode_s = self._sums
        on_disk = Path(self._file.name).stat().st_size + self.table_bytes
        return Totals(int(n_rows), int(blob_bytes), on_disk, encode_s, decode_s)
