"""Top-p and a few samples of the tail, as a public data set of teacher logits stores them.

The tokens of the nucleus (a mass of 0.98, 100 at most, the one that crosses it included), 24 more drawn from the rest,
ids in 18 bits (more where the vocabulary is larger), log-probs in 16, and the log-sum-exp in float32. The samples carry
no inclusion probability, so that they are what they are: further tokens whose probability is known. What all of them
lack to a mass of 1 is spread over the other tokens.

Letters: R rows, E entries, V vocabulary.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logitstore.logits_source import iter_logit_chunks
from logitstore.topk import topk_with_tail
from logitstore_trainer.bench.candidates import TEMPERATURES, Reconstruction
from logitstore_trainer.bench.list_file import Totals
from logitstore_trainer.bench.logits_file import LogitsSample
from logitstore_trainer.bench.readings import missing_mass_uniform
from logitstore_trainer.bench.timing import median_call

TOP_P, MOST, DRAWN = 0.98, 100, 24
_LEAST_ID_BITS, _VALUE_BITS = 18, 16
_REACH = 64.0  # nats below zero that 16 bits of log-prob cover


class NucleusAndSamples:
    """R rows of counts (uint8), log-sum-exps (float32) and E entries of 18 + 16 bits; drives as Candidate says."""

    codec = "top-p and 24 samples"
    table_bytes = 0
    temperatures = TEMPERATURES
    budget = None
    decoded = None
    reads_hidden = False

    def __init__(self, vocab_size: int) -> None:
        self._id_bits = max(_LEAST_ID_BITS, (vocab_size - 1).bit_length())
        self.config = {"vocab_size": vocab_size, "top_p": TOP_P, "most": MOST, "drawn": DRAWN}
        self._vocab_size = vocab_size

    def open(self, folder: Path) -> None:
        self._file = (folder / "entries.bin").open("wb")
        self._sums = np.zeros(4)

    def add(self, sample_id: int, sample: LogitsSample) -> Reconstruction:
        n_rows = len(sample.input_ids) - 1
        ids_RK, logps_RK, counts_R, lse_R = self._entries(sample_id, sample, n_rows)
        blob, encode_s = median_call(lambda: self._encoded(ids_RK, logps_RK, counts_R, lse_R))
        decoded, decode_s = median_call(lambda: self._decoded(blob, n_rows))
        self._file.write(blob)
        self._file.write(sample.input_ids.astype("<i4").tobytes())
        self._sums += (n_rows, len(blob), encode_s, decode_s)
        return lambda temperature: self._dense(*decoded, temperature)

    def close(self) -> Totals:
        self._file.close()
        n_rows, blob_bytes, encode_s, decode_s = self._sums
        return Totals(int(n_rows), int(blob_bytes), Path(self._file.name).stat().st_size, encode_s, decode_s)

    def _entries(self, sample_id: int, sample: LogitsSample, n_rows: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
        """(ids [R, K], log-probs [R, K], entries of each row [R], log-sum-exps [R]), the nucleus first."""
        rng = np.random.default_rng(sample_id)
        n_most = min(MOST, self._vocab_size)
        n_kept = min(n_most + DRAWN, self._vocab_size)
        parts = []
        for logits_NV in iter_logit_chunks(sample.logits, np.arange(n_rows), vocab_size=self._vocab_size):
            peak_N1 = logits_NV.max(axis=1, keepdims=True)
            lse_N1 = peak_N1 + np.log(np.exp(logits_NV - peak_N1).sum(axis=1, keepdims=True, dtype=np.float64))
            logp_NV = (logits_NV - lse_N1).astype(np.float32)
            top_NK = topk_with_tail(logits_NV, n_most).ids.astype(np.int64)
            before_NK = np.exp(np.take_along_axis(logp_NV, top_NK, axis=1).astype(np.float64)).cumsum(axis=1)
            nucleus_N = 1 + (before_NK[:, :-1] < TOP_P).sum(axis=1)
            counts_N = np.minimum(nucleus_N + DRAWN, self._vocab_size)
            keys_NV = logp_NV - np.log(
                rng.standard_exponential(logp_NV.shape, np.float32)
            )  # Gumbel: the 24 greatest: drawn by p
            row, rank = np.nonzero(np.arange(n_most) < nucleus_N[:, None])
            keys_NV[row, top_NK[row, rank]] = -np.inf
            n_drawn = min(DRAWN, self._vocab_size)
            drawn_NM = np.argpartition(-keys_NV, n_drawn - 1, axis=1)[:, :n_drawn]
            slot_K = np.arange(n_kept)
            from_top_NK = np.take_along_axis(top_NK, np.minimum(slot_K, n_most - 1)[None], axis=1)
            drawn_slot_NK = (slot_K - nucleus_N[:, None]).clip(0, n_drawn - 1)
            is_top_NK = slot_K < nucleus_N[:, None]
            ids_NK = np.where(is_top_NK, from_top_NK, np.take_along_axis(drawn_NM, drawn_slot_NK, axis=1))
            parts.append((ids_NK, np.take_along_axis(logp_NV, ids_NK, axis=1), counts_N, lse_N1[:, 0]))
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _encoded(self, ids_RK: NDArray, logps_RK: NDArray, counts_R: NDArray, lse_R: NDArray) -> bytes:
        kept_RK = np.arange(ids_RK.shape[1]) < counts_R[:, None]
        ids_E = ids_RK[kept_RK].astype(np.uint32)
        steps_E = np.rint(np.minimum(-logps_RK[kept_RK], _REACH) * (65535 / _REACH)).astype("<u2")
        bits_EB = (ids_E[:, None] >> np.arange(self._id_bits, dtype=np.uint32)) & 1
        packed = np.packbits(bits_EB.astype(np.uint8).reshape(-1), bitorder="little")
        planes = (counts_R.astype(np.uint8), lse_R.astype("<f4"), packed, steps_E)
        return b"".join(plane.tobytes() for plane in planes)

    def _decoded(self, blob: bytes, n_rows: int) -> tuple[NDArray, NDArray, NDArray]:
        """(ids [E], log-probs [E] float32, entries of each row [R])."""
        counts_R = np.frombuffer(blob, np.uint8, n_rows).astype(np.int64)
        n_entries = int(counts_R.sum())
        n_packed = (n_entries * self._id_bits + 7) // 8
        packed = np.frombuffer(blob, np.uint8, n_packed, 5 * n_rows)
        bits_EB = np.unpackbits(packed, count=n_entries * self._id_bits, bitorder="little").reshape(n_entries, -1)
        ids_E = bits_EB.astype(np.int64) @ (1 << np.arange(self._id_bits))
        steps_E = np.frombuffer(blob, "<u2", n_entries, 5 * n_rows + n_packed)
        return ids_E, (steps_E * np.float32(-_REACH / 65535)).astype(np.float32), counts_R

    def _dense(self, ids_E: NDArray, logps_E: NDArray, counts_R: NDArray, temperature: float) -> NDArray[np.float32]:
        dense_RV = np.empty((len(counts_R), self._vocab_size), np.float32)
        ends = counts_R.cumsum()
        for count in np.unique(counts_R):
            rows = np.flatnonzero(counts_R == count)
            entries = (ends[rows] - count)[:, None] + np.arange(count)
            dense_RV[rows] = missing_mass_uniform(ids_E[entries], logps_E[entries], self._vocab_size, temperature)
        return dense_RV
