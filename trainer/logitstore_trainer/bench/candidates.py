"""What `bench storage` can measure: the interface of a candidate, and our own codecs behind it.

Letters: L sequence length, R = L - 1 rows, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import logitstore
from logitstore import TeacherTargets
from logitstore.codecs.byte_split import byte_split
from logitstore.codecs.topk import TopKCodec
from logitstore.errors import CorruptionError
from logitstore_trainer.bench.list_file import Totals
from logitstore_trainer.bench.logits_file import LogitsSample
from logitstore_trainer.bench.timing import median_call, one_torch_thread

TEMPERATURES = (1.0, 2.0)
Reconstruction = Callable[[float], NDArray[np.float32]]  # temperature -> ln q_T [R, V]


class Candidate(Protocol):
    """One way to store distributions, driven by `bench storage`: open, add every sample, close.

    codec and config name it in results.json; temperatures are those at which its rows say something; budget: the bytes
    a token that it was chosen for, None where it was not. add() encodes and decodes the sample, on one core, and
    returns what can be read back; the reduction from logits to what encode takes is not timed, it is the same for
    everyone. decoded: the last sample as targets of ours, None for others. reads_hidden: whether add() wants hidden
    states and head where the file has them; others get full logits, multiplied out once for all. open() starts anew.
    """

    codec: str
    config: dict[str, Any]
    table_bytes: int
    temperatures: tuple[float, ...]
    budget: float | None
    decoded: TeacherTargets | None
    reads_hidden: bool

    def open(self, folder: Path) -> None: ...

    def add(self, sample_id: int, sample: LogitsSample) -> Reconstruction: ...

    def close(self) -> Totals: ...


@dataclass(eq=False)
class StoreCandidate:
    """One of our codecs, and a store written with it as the container; drives as rivals.Candidate says."""

    made: Any
    codec: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    table_bytes: int = 0
    temperatures: tuple[float, ...] = TEMPERATURES
    budget: float | None = None
    decoded: TeacherTargets | None = None
    reads_hidden: bool = False

    def __post_init__(self) -> None:
        self.reads_hidden = self.made.tail == "predicted"
        self.config = dict(self.made.config)
        self.codec = str(self.config.pop("name"))
        if self.reads_hidden:
            self.config["tail_rank"] = self.made.tail_rank
        if self.made.tables is not None:
            self.table_bytes = len(self.made.tables.file_bytes)
        if self.made.tail == "sampled":
            self.temperatures = (1.0,)

    def open(self, folder: Path) -> None:
        self._path = folder / "store.parquet"
        self._writer = logitstore.create(
            self._path, logitstore.StoreSpec(codec=self.made, vocab_size=self.made.vocab_size)
        )
        self._writer.__enter__()
        self._n_rows, self._blob_bytes, self._encode_s, self._decode_s, self._tail_s = 0, 0, 0.0, 0.0, 0.0
        self._bytes_of: dict[str, float] = {}

    def add(self, sample_id: int, sample: LogitsSample) -> Reconstruction:
        targets = self.made.targets_from_logits(sample.logits, sample.input_ids)
        blob, encode_s = median_call(lambda: self.made.encode(targets, sample.input_ids))
        decoded, decode_s = median_call(lambda: self.made.decode(blob, sample.input_ids))
        for name in ("offsets", "ids", "logps", "tail_logmass", "tail_logmoment_half"):
            if not np.array_equal(getattr(targets, name), getattr(decoded, name), equal_nan=True):
                raise CorruptionError(
                    f"{self.codec} {self.config}: {name} of sample {sample_id} decodes to other values"
                )
        self._writer.append(sample_id, sample.input_ids, targets)
        self._n_rows += int(decoded.present.sum())
        self._blob_bytes += len(blob)
        self._encode_s += encode_s
        self._decode_s += decode_s
        if decoded.tail_model is not None:
            with one_torch_thread():
                self._tail_s += median_call(lambda: decoded.tail_model.predicted([decoded]))[1]
        if isinstance(self.made, TopKCodec):
            for part, n_bytes in byte_split(self.made, targets, blob).items():
                self._bytes_of[part] = self._bytes_of.get(part, 0.0) + n_bytes
        self.decoded = decoded
        return decoded.dense_logprobs

    def close(self) -> Totals:
        self._writer.__exit__(None, None, None)
        store = logitstore.open(self._path)
        if store.n_present_rows != self._n_rows:
            raise CorruptionError(f"{self._path} holds {store.n_present_rows} rows, {self._n_rows} were written")
        seconds = self._encode_s, self._decode_s, self._tail_s
        return Totals(self._n_rows, self._blob_bytes, _bytes_on_disk(self._path), *seconds, self._bytes_of)


def _bytes_on_disk(store_path: Path) -> int:
    """All files of the store: the shard or folder of shards, and the tables beside it."""
    roots = (store_path, store_path.with_name(store_path.name + ".tables"))
    files = (file for root in roots for file in ([root] if root.is_file() else root.rglob("*")))
    return sum(file.stat().st_size for file in files if file.is_file())
