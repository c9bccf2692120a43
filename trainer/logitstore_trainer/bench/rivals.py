"""What people store today, measured in the same run as our codecs: raw fp16, Parquet lists, DistillKit.

Each is given its best reading. The lists and DistillKit store no tail: what their entries lack to a mass of 1 is
spread uniformly over the other tokens (at least 1e-8 a token, DistillKit's own floor in `densify`), the row is
normalised, and only then tempered. DistillKit is used only where a clone of it can be imported (put it on PYTHONPATH;
it needs torch and pydantic); nothing of it is part of this project.

Letters: L sequence length, R = L - 1 rows, N rows of several sequences, K entries kept, V vocabulary, W bytes a row.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from logitstore.blob import ZSTD_LEVEL
from logitstore.logits_source import iter_logit_chunks
from logitstore_trainer.bench.candidates import TEMPERATURES, Candidate, Reconstruction
from logitstore_trainer.bench.full_vocabulary_rivals import LlamaCppLayout
from logitstore_trainer.bench.list_file import ListFile, Totals
from logitstore_trainer.bench.logits_file import LogitsSample
from logitstore_trainer.bench.nucleus_rival import NucleusAndSamples
from logitstore_trainer.bench.readings import log_softmax_rows, missing_mass_uniform, top_entries
from logitstore_trainer.bench.timing import median_call, one_torch_thread


class RawFp16Zstd:
    """All logits in float16, one zstd frame a sample; the container adds the ids of the text, 4 bytes each."""

    codec = "raw fp16 + zstd"
    table_bytes = 0
    temperatures = TEMPERATURES
    budget = None
    decoded = None
    reads_hidden = False

    def __init__(self, vocab_size: int) -> None:
        self.config = {"vocab_size": vocab_size, "dtype": "float16", "zstd_level": ZSTD_LEVEL}
        self._vocab_size = vocab_size

    def open(self, folder: Path) -> None:
        self._file = (folder / "logits.fp16.zst").open("wb")
        self._sums = np.zeros(4)

    def add(self, sample_id: int, sample: LogitsSample) -> Reconstruction:
        rows = np.arange(len(sample.input_ids) - 1)
        parts = iter_logit_chunks(sample.logits, rows, vocab_size=self._vocab_size)
        logits_RV = np.concatenate([part.astype(np.float16) for part in parts])
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
        blob, encode_s = median_call(lambda: compressor.compress(logits_RV.data), repeats=1)
        decoded, decode_s = median_call(
            lambda: np.frombuffer(zstandard.ZstdDecompressor().decompress(blob), "<f2"), repeats=1
        )
        self._file.write(blob)
        self._file.write(sample.input_ids.astype("<i4").tobytes())
        self._sums += (len(rows), len(blob), encode_s, decode_s)
        decoded_RV = decoded.reshape(logits_RV.shape)
        return lambda temperature: log_softmax_rows(decoded_RV, temperature)

    def close(self) -> Totals:
        self._file.close()
        n_rows, blob_bytes, encode_s, decode_s = self._sums
        return Totals(int(n_rows), int(blob_bytes), Path(self._file.name).stat().st_size, encode_s, decode_s)


class ParquetLists:
    """Top-k ids and float32 log-probs as lists of lists, one Parquet row a sample, compressed by Parquet."""

    codec = "parquet lists"
    table_bytes = 0
    temperatures = TEMPERATURES
    budget = None
    decoded = None
    reads_hidden = False

    def __init__(self, vocab_size: int, *, k: int, id_dtype: str, compression: str) -> None:
        self.config = {"vocab_size": vocab_size, "k": k, "ids": id_dtype, "logprobs": "float32"}
        self.config["compression"] = compression
        self._vocab_size, self._k, self._id_dtype, self._compression = vocab_size, k, id_dtype, compression

    def open(self, folder: Path) -> None:
        self._file = ListFile(folder / "lists.parquet", self._compression)

    def add(self, sample_id: int, sample: LogitsSample) -> Reconstruction:
        ids_RK, logps_RK = top_entries(sample, self._k, self._vocab_size)
        ids_RK = ids_RK.astype(self._id_dtype)
        self._file.append(sample.input_ids, {"ids": ids_RK, "logprobs": logps_RK})
        return lambda temperature: missing_mass_uniform(ids_RK, logps_RK, self._vocab_size, temperature)

    def close(self) -> Totals:
        return self._file.close()


class DistillKit:
    """One of DistillKit's configurations, through its own compressor; in a Parquet file of its own schema."""

    table_bytes = 0
    temperatures = TEMPERATURES
    budget = None
    decoded = None
    reads_hidden = False

    def __init__(self, name: str, vocab_size: int, options: Mapping[str, Any]) -> None:
        from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

        self.codec = f"DistillKit {name}"
        self.config = {"d": vocab_size, **options}
        self._compressor = LogprobCompressor(config=DistributionQuantizationConfig(d=vocab_size, **options))
        self._vocab_size, self._k = vocab_size, int(options["k"])

    def open(self, folder: Path) -> None:
        self._file = ListFile(folder / "distillkit.parquet", "snappy")
        self._sums = np.zeros(4)

    def entries(self, sample: LogitsSample) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(ids [R, K], log-probs [R, K]) of a sample as they are read back."""
        entries_1RK = self._top_entries(sample)
        ids_1RK, logps_1RK = self._compressor.decompress_to_sparse(self._compressor.compress_from_sparse(*entries_1RK))
        return ids_1RK[0].numpy(), logps_1RK[0].float().numpy()

    def bytes_per_row(self, sample: LogitsSample) -> float:
        """Bytes a row of what the compressor gives for a sample."""
        planes = self._compressor.compress_from_sparse(*self._top_entries(sample)).values()
        return sum(plane.nbytes / plane[0].shape[0] for plane in planes)

    def _top_entries(self, sample: LogitsSample) -> tuple[Any, Any]:
        import torch

        ids_RK, logps_RK = top_entries(sample, self._k, self._vocab_size)
        return torch.from_numpy(ids_RK).long()[None], torch.from_numpy(logps_RK)[None]

    def add(self, sample_id: int, sample: LogitsSample) -> Reconstruction:
        ids_1RK, logps_1RK = self._top_entries(sample)
        with one_torch_thread():
            row, encode_s = median_call(lambda: self._compressor.compress_from_sparse(ids_1RK, logps_1RK))
            decoded, decode_s = median_call(lambda: self._compressor.decompress_to_sparse(row))
        planes = {name: plane[0].numpy() for name, plane in row.items()}
        self._file.append(sample.input_ids, planes)
        blob_bytes = sum(plane.nbytes for plane in planes.values())
        self._sums += (ids_1RK.shape[1], blob_bytes, encode_s, decode_s)
        ids, logps = decoded[0][0].numpy(), decoded[1][0].float().numpy()
        return lambda temperature: missing_mass_uniform(ids, logps, self._vocab_size, temperature)

    def close(self) -> Totals:
        container = self._file.close()
        _, blob_bytes, encode_s, decode_s = self._sums
        return container._replace(blob_bytes=int(blob_bytes), encode_s=encode_s, decode_s=decode_s)


_DK_RECOMMENDED = {
    "k": 128, "exact_k": 16, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    "term_dtype": "float32", "residual_bins": [], "delta_encoding": False, "error_diffusion": False,
}  # fmt: skip
_DK_SMALL_FIT = {**_DK_RECOMMENDED, "polynomial_terms": [0, 1, "sqrt"]}
_DK_FOUR_BIT_BIN = {"scale_dtype": "float16", "element_bits": 4, "num_elements": 60}
DISTILLKIT_OPTIONS: dict[str, dict[str, Any]] = {
    "recommended": _DK_RECOMMENDED,
    "recommended, normalize_t": {**_DK_RECOMMENDED, "normalize_t": True},
    "budget": {**_DK_SMALL_FIT, "k": 50, "exact_k": 1},
    "tuned": {**_DK_SMALL_FIT, "k": 64, "exact_k": 4, "residual_bins": [_DK_FOUR_BIT_BIN]},
}


def rivals(vocab_size: int, *, quick: bool) -> tuple[list[Candidate], list[str]]:
    """(candidates, notes on what could not be measured and why)."""
    found: list[Candidate] = [RawFp16Zstd(vocab_size), LlamaCppLayout(vocab_size), NucleusAndSamples(vocab_size)]
    lists = [(64, "int64", "snappy"), (64, "int32", "zstd"), *([] if quick else [(128, "int32", "zstd")])]
    for k, id_dtype, compression in lists:
        if k <= vocab_size:
            found.append(ParquetLists(vocab_size, k=k, id_dtype=id_dtype, compression=compression))
    notes = []
    if importlib.util.find_spec("distillkit") is None:
        notes.append(
            "DistillKit was not measured: it is not importable here. Put a clone of github.com/arcee-ai/DistillKit on "
            "PYTHONPATH (it needs torch and pydantic) and run again."
        )
    else:
        usable = {name: options for name, options in DISTILLKIT_OPTIONS.items() if options["k"] <= vocab_size}
        found += [DistillKit(name, vocab_size, options) for name, options in usable.items()]
    return found, notes
