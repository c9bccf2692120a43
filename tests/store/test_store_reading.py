"""Reading: the samples that were written, from any process, and in any tool that reads Parquet."""

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import logitstore
from logitstore.tables import put_tokenizer_folder

from .conftest import assert_same, make_samples, make_spec, write


@pytest.mark.parametrize("shard_samples", [None, 150, 64, 7])
def test_samples_come_back_in_any_layout(tmp_path: Path, samples, shard_samples: int | None) -> None:
    path = tmp_path / "x.parquet"
    write(path, samples, shard_samples=shard_samples)
    store = logitstore.open(path)
    assert len(store) == 150
    for i in np.random.default_rng(0).permutation(150):
        assert_same(store[int(i)], samples[i])
    assert_same(store[-1], samples[-1])
    assert [s.sample_id for s in store] == [s.sample_id for s in samples]
    assert store.n_tokens == sum(len(s.input_ids) for s in samples)
    assert store.n_present_rows == sum(int(s.targets.present.sum()) for s in samples)
    assert store.spec == make_spec()
    assert path.is_file() == (shard_samples is None)
    assert not path.with_name("x.parquet.work").exists()
    if path.is_dir():
        expected = [f"part-{i:05d}.parquet" for i in range(-(-150 // shard_samples))]
        assert sorted(p.name for p in path.iterdir()) == expected


def test_an_empty_store_is_a_store(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", [])
    store = logitstore.open(tmp_path / "x.parquet")
    assert len(store) == 0
    assert store.verify().ok
    with pytest.raises(IndexError, match="sample 0 of a store of 0"):
        store[0]


def test_index_errors_name_the_store(store_path: Path) -> None:
    store = logitstore.open(store_path)
    for i in (150, -151):
        with pytest.raises(IndexError, match=f"sample {i} of a store of 150"):
            store[i]


def _ids_in_child(store: logitstore.LogitStore, queue) -> None:
    queue.put([store[i].sample_id for i in (3, 149, 0)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_used_store_works_in_child_processes(store_path: Path, samples, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    store = logitstore.open(store_path)
    assert_same(store[0], samples[0])
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=_ids_in_child, args=(store, queue))
    child.start()
    assert queue.get() == [samples[i].sample_id for i in (3, 149, 0)]
    child.join(20)
    assert child.exitcode == 0


def test_threads_share_a_store(store_path: Path, samples) -> None:
    store = logitstore.open(store_path)
    with ThreadPoolExecutor(4) as pool:
        for sample, written in zip(pool.map(store.__getitem__, range(150)), samples, strict=True):
            assert_same(sample, written)


def test_pickled_store_reads(store_path: Path, samples) -> None:
    store = logitstore.open(store_path)
    store[1]
    assert_same(pickle.loads(pickle.dumps(store))[1], samples[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_torch_data_loader_takes_it(store_path: Path, samples, num_workers: int) -> None:
    data = pytest.importorskip("torch.utils.data")
    loader = data.DataLoader(logitstore.open(store_path), batch_size=16, num_workers=num_workers, collate_fn=list)
    read = [sample for batch in loader for sample in batch]
    assert len(read) == 150
    for sample, written in zip(read, samples, strict=True):
        assert_same(sample, written)


@pytest.fixture(scope="module", params=[None, 40])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, samples) -> Path:
    path = tmp_path_factory.mktemp("tools") / "x.parquet"
    write(path, samples, shard_samples=request.param)
    return path


class TestOtherTools:
    """The same file, whole and as a folder of shards, in pyarrow, pandas and DuckDB."""

    def _check(self, columns: dict, samples) -> None:
        assert list(columns["sample_id"]) == [s.sample_id for s in samples]
        assert list(columns["source_row"]) == [s.source_row for s in samples]
        assert list(columns["n_tokens"]) == [len(s.input_ids) for s in samples]
        assert [list(ids) for ids in columns["input_ids"]] == [s.input_ids.tolist() for s in samples]
        assert [list(mask) for mask in columns["loss_mask"]] == [s.loss_mask.tolist() for s in samples]
        codec = make_spec().codec
        for blob, s in zip(columns["blob"], samples, strict=True):
            np.testing.assert_array_equal(codec.decode(bytes(blob), s.input_ids).logps, s.targets.logps)

    def test_pyarrow(self, path: Path, samples) -> None:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(path, page_checksum_verification=True)
        assert not any(table.schema.field(name).nullable for name in table.column_names)
        self._check(table.to_pydict(), samples)

    def test_pandas(self, path: Path, samples) -> None:
        frame = pytest.importorskip("pandas").read_parquet(path)
        self._check({name: frame[name].tolist() for name in frame}, samples)

    def test_duckdb(self, path: Path, samples) -> None:
        duckdb = pytest.importorskip("duckdb")
        source = str(path) if path.is_file() else str(path / "*.parquet")
        found = duckdb.execute("select * from read_parquet(?) order by sample_id", [source])
        names = [column[0] for column in found.description]
        self._check(dict(zip(names, zip(*found.fetchall(), strict=True), strict=True)), samples)


def test_label_shift_is_found_and_the_right_alignment_passes(tmp_path: Path) -> None:
    samples = make_samples(60, seed=1)
    write(tmp_path / "good.parquet", samples)
    report = logitstore.verify(tmp_path / "good.parquet")
    assert report.ok
    assert report.label_probability[0] > 0.3
    assert max(report.label_probability[-1], report.label_probability[1]) < 0.01
    codec = make_spec().codec
    with logitstore.create(tmp_path / "slipped.parquet", make_spec()) as writer:
        rng = np.random.default_rng(2)
        for i in range(60):  # the slip that several pipelines shipped: row t describes token t
            input_ids = rng.integers(0, 400, 20)
            logits = rng.standard_normal((20, 400)).astype(np.float32)
            logits[np.arange(20), input_ids] += 6
            writer.append(i, input_ids, codec.targets_from_logits(logits, input_ids))
    report = logitstore.verify(tmp_path / "slipped.parquet")
    assert not report.ok
    assert "shift -1" in report.faults[0]
    assert "row t must describe token t + 1" in report.faults[0]


def test_tokenizer_folder_is_checked(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    path = tmp_path / "x.parquet"
    digest = put_tokenizer_folder(source, path)
    assert put_tokenizer_folder(source, path) == digest
    write(path, make_samples(2), make_spec(tokenizer_files_sha256=digest))
    store = logitstore.open(path)
    assert store.tokenizer_folder == tmp_path / "x.parquet.tables" / f"{digest}.tokenizer"
    (store.tokenizer_folder / "tokenizer.json").write_text("{ }")
    with pytest.raises(logitstore.CorruptionError, match="tokenizer files .* copy them again"):
        _ = store.tokenizer_folder
    write(tmp_path / "alone.parquet", make_samples(2), make_spec(tokenizer_files_sha256=digest))
    assert logitstore.open(tmp_path / "alone.parquet").tokenizer_folder is None


def test_a_tokenizer_from_a_private_folder_is_as_readable_as_the_store(tmp_path) -> None:
    source = tmp_path / "private"
    source.mkdir(mode=0o700)
    (source / "tokenizer.json").write_text("{}")
    digest = put_tokenizer_folder(source, tmp_path / "x.parquet")
    folder = tmp_path / "x.parquet.tables" / f"{digest}.tokenizer"
    assert folder.stat().st_mode == folder.parent.stat().st_mode != source.stat().st_mode
