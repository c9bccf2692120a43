"""Speed of the store: encoding, decoding and reading one sample, next to a Parquet file of lists, and collation.

Run: make bench, or pytest benchmarks/test_store_speed.py --benchmark-only. The logits are made up (seeded), V = 32,000,
256 rows a sample, k = 64. extra_info: rows/s, and bytes a row. All of it runs on one core.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logitstore_trainer import collate
from logitstore_trainer.bench.logits_file import LogitsFile
from logitstore_trainer.bench.synthetic_logits import write_synthetic_logits

import logitstore

VOCAB_SIZE, K, N_SAMPLES, N_ROWS = 32_000, 64, 8, 256
HEADS = ("int8", "fp8", "fp16")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """The samples of a file of made-up logits."""
    path = tmp_path_factory.mktemp("logits") / "synthetic.safetensors"
    file = LogitsFile(write_synthetic_logits(path, n_samples=N_SAMPLES, length=N_ROWS + 1, vocab_size=VOCAB_SIZE))
    return [file[index] for index in range(len(file))]


@pytest.fixture(scope="module", params=HEADS)
def store(request, samples, tmp_path_factory):
    """A store of the samples with one of the head formats, verified."""
    path = tmp_path_factory.mktemp(request.param) / "store.parquet"
    codec = logitstore.make_codec("topk", vocab_size=VOCAB_SIZE, k=K, head=request.param)
    with logitstore.create(path, logitstore.StoreSpec(codec=codec, vocab_size=VOCAB_SIZE)) as writer:
        for sample_id, sample in enumerate(samples):
            writer.append(sample_id, sample.input_ids, codec.targets_from_logits(sample.logits, sample.input_ids))
    opened = logitstore.open(path)
    assert opened.verify().ok
    return opened


@pytest.fixture(scope="module")
def lists_path(samples, tmp_path_factory):
    """The same entries as Parquet lists, one row group a sample, as random access would need it."""
    path = tmp_path_factory.mktemp("lists") / "lists.parquet"
    codec = logitstore.make_codec("topk", vocab_size=VOCAB_SIZE, k=K, head="fp16")
    writer = None
    for sample in samples:
        targets = codec.targets_from_logits(sample.logits, sample.input_ids)
        table = _lists_table(sample.input_ids, targets)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    writer.close()
    return path


def _lists_table(input_ids, targets) -> pa.Table:
    offsets = pa.array(targets.offsets.astype(np.int32))
    columns = {"ids": targets.ids.astype(np.int64), "logprobs": targets.logps}
    lists = {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in columns.items()}
    rows = pa.array([0, len(offsets) - 1], pa.int32())
    nested = {name: pa.ListArray.from_arrays(rows, column) for name, column in lists.items()}
    return pa.table({"input_ids": pa.array([input_ids]), **nested})


def _measure(benchmark, group: str, call, n_bytes: int) -> None:
    benchmark.group = group
    benchmark.pedantic(call, rounds=30, warmup_rounds=2)
    benchmark.extra_info["rows_per_s"] = N_ROWS / benchmark.stats["median"]
    benchmark.extra_info["bytes_per_row"] = n_bytes / N_ROWS


def test_encode(benchmark, store):
    sample, codec = store[0], store.spec.codec
    blob = codec.encode(sample.targets, sample.input_ids)
    assert blob == store.read_stored(0)[0].blob
    _measure(benchmark, "encode a sample", lambda: codec.encode(sample.targets, sample.input_ids), len(blob))


def test_encode_lists(benchmark, samples):
    codec = logitstore.make_codec("topk", vocab_size=VOCAB_SIZE, k=K, head="fp16")
    targets = codec.targets_from_logits(samples[0].logits, samples[0].input_ids)

    def call():
        buffer = pa.BufferOutputStream()
        pq.write_table(_lists_table(samples[0].input_ids, targets), buffer, compression="zstd")
        return buffer.getvalue()

    _measure(benchmark, "encode a sample", call, call().size)


def test_decode(benchmark, store):
    stored, codec = store.read_stored(0)[0], store.spec.codec
    decoded = codec.decode(stored.blob, stored.input_ids)
    assert np.array_equal(decoded.ids, store[0].targets.ids)
    _measure(benchmark, "decode a sample", lambda: codec.decode(stored.blob, stored.input_ids), len(stored.blob))


def test_read_checksummed_bytes(benchmark, store):
    n_bytes = len(store.read_stored(3)[0].blob)
    _measure(benchmark, "read a sample from the page cache, no decoding", lambda: store.read_stored(3), n_bytes)


def test_read_and_decode(benchmark, store):
    n_bytes = len(store.read_stored(3)[0].blob)
    _measure(benchmark, "read and decode a sample from the page cache", lambda: store[3], n_bytes)


def test_read_and_decode_lists(benchmark, lists_path):
    with pq.ParquetFile(lists_path) as file:

        def call():
            table = file.read_row_group(3, use_threads=False)
            return [table.column(name).chunk(0).flatten().flatten().to_numpy() for name in ("ids", "logprobs")]

        assert len(call()[0]) == N_ROWS * K
        _measure(
            benchmark, "read and decode a sample from the page cache", call, lists_path.stat().st_size // N_SAMPLES
        )


def test_collate(benchmark, store):
    batch = [store[index] for index in range(4)]
    n_bytes = sum(tensor.nbytes for tensor in collate(batch).values())
    _measure(benchmark, "collate a batch of 4 samples (rows and bytes of one)", lambda: collate(batch), n_bytes // 4)
