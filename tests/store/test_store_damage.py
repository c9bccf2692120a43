"""Damage: every flipped bit and every cut is an error of ours, and never a wrong number."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import logitstore
from logitstore.blob import HEADER_BYTES
from logitstore.shard_index import KEY as INDEX_KEY

from .conftest import assert_same, make_samples, make_spec, write

FLIPS = int(os.environ.get("LOGITSTORE_FAULTS", "400"))


def _outcome(path: Path, samples) -> str:
    """ "detected", or "no effect" where everything still reads as it was written; wrong numbers fail the test."""
    try:
        store = logitstore.open(path)
        assert len(store) == len(samples)
        for i, written in enumerate(samples):
            assert_same(store[i], written)
        assert store.spec == make_spec()
    except logitstore.LogitStoreError as error:
        assert str(path) in str(error), "an error says which file it is about"
        return "detected"
    return "no effect"


def test_flipped_bits_are_detected_or_without_effect(tmp_path: Path) -> None:
    """Bits that no reader of ours uses (statistics, page headers, levels) are found by verify instead."""
    samples = make_samples(8)
    path = tmp_path / "x.parquet"
    write(path, samples)
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    found = {"detected": 0, "no effect": 0, "found by verify": 0}
    for bit in rng.choice(8 * len(sound), min(FLIPS, 8 * len(sound)), replace=False):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        outcome = _outcome(path, samples)
        found[outcome] += 1
        if outcome == "no effect" and not logitstore.verify(path).ok:
            found["found by verify"] += 1
    assert found["detected"] > 0.4 * sum(found.values())
    # what neither finds are the parts of Parquet's own footer that our reader does not use
    assert found["found by verify"] > 0


def test_every_bit_of_the_data_pages_is_found_by_verify(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write(path, make_samples(3))
    sound = path.read_bytes()
    end = logitstore.open(path).shards[0].index.data_end
    for position in range(0, end, 3):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        report = logitstore.verify(path)
        if report.ok:
            # a page header has fields that say nothing about its content (statistics, encodings of levels)
            assert _outcome(path, make_samples(3)) == "no effect"
    path.write_bytes(sound)
    assert logitstore.verify(path).ok


def test_every_truncation_is_detected(tmp_path: Path) -> None:
    samples = make_samples(3)
    path = tmp_path / "x.parquet"
    write(path, samples)
    sound = path.read_bytes()
    for size in range(0, len(sound), 7):
        path.write_bytes(sound[:size])
        with pytest.raises(logitstore.LogitStoreError, match=r"x\.parquet"):
            logitstore.open(path)
    path.write_bytes(sound[:-9] + sound[-8:])
    with pytest.raises(logitstore.LogitStoreError):
        logitstore.open(path)


def test_swapped_blobs_are_detected(tmp_path: Path) -> None:
    """A blob beside another text: its header has the CRC of the text that it belongs to."""
    codec = make_spec().codec
    a, b = make_samples(2, seed=5)
    with pytest.raises(logitstore.CorruptionError, match="belongs to another text"):
        codec.decode(codec.encode(a.targets, a.input_ids), b.input_ids)
    same_length = b.input_ids[np.arange(len(a.input_ids)) % len(b.input_ids)]
    with pytest.raises(logitstore.CorruptionError, match="belongs to another text"):
        codec.decode(codec.encode(a.targets, a.input_ids), same_length)


def test_blob_damage_never_decodes() -> None:
    written = make_samples(30)[4]
    codec = make_spec().codec
    blob = codec.encode(written.targets, written.input_ids)
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << (bit % 8)
        try:
            decoded = codec.decode(bytes(damaged), written.input_ids)
        except logitstore.LogitStoreError:
            continue
        np.testing.assert_array_equal(decoded.logps, written.targets.logps)
        np.testing.assert_array_equal(decoded.ids, written.targets.ids)
    for size in range(len(blob)):
        with pytest.raises(logitstore.LogitStoreError):
            codec.decode(blob[:size], written.input_ids)
    with pytest.raises(logitstore.CorruptionError):
        codec.decode(blob + b"\0", written.input_ids)


def _crafted(payload: bytes, **frame: bool) -> bytes:
    import zstandard

    options = {"write_checksum": True, "write_content_size": True, **frame}
    return zstandard.ZstdCompressor(**options).compress(payload)


def test_crafted_blobs_raise_what_is_wrong_with_them() -> None:
    """Blobs whose checksums hold, made to break one rule each."""
    import zstandard

    codec = make_spec().codec
    written = make_samples(30)[4]
    n_rows = len(written.input_ids) - 1
    payload = zstandard.ZstdDecompressor().decompress(codec.encode(written.targets, written.input_ids))

    def refused(changed: bytes, error: type, message: str, **frame: bool) -> None:
        with pytest.raises(error, match=message):
            codec.decode(_crafted(changed, **frame), written.input_ids)

    def with_bytes(at: int, new: bytes) -> bytes:
        return payload[:at] + new + payload[at + len(new) :]

    refused(payload, logitstore.FormatError, "no checksum or no content size", write_checksum=False)
    refused(payload, logitstore.FormatError, "no checksum or no content size", write_content_size=False)
    refused(with_bytes(0, b"XXXX"), logitstore.FormatError, "starts with b'XXXX'")
    refused(with_bytes(4, b"\x63\0"), logitstore.FormatError, "format version 99.*update logitstore")
    refused(with_bytes(6, b"\x63\0"), logitstore.SpecMismatchError, "written by codec 99")
    refused(with_bytes(20, b"\1\0\0\0"), logitstore.SpecMismatchError, "vocabulary of 1, the codec 400")
    refused(with_bytes(28, b"\1\0\0\0"), logitstore.SpecMismatchError, "configuration 0x00000001")
    refused(with_bytes(12, b"\xff\xff\0\0"), logitstore.CorruptionError, "claims 65535 present of")
    refused(with_bytes(HEADER_BYTES, b"\x07\0"), logitstore.CorruptionError, "row counts add up to")
    refused(payload[:-1], logitstore.CorruptionError, "content ends at byte")
    refused(payload + b"\0", logitstore.CorruptionError, "the rest is not ours")
    refused(payload[:10], logitstore.CorruptionError, "claims 10 bytes of content")
    refused(payload + bytes(1 << 20), logitstore.CorruptionError, r"claims 1,0\d\d,\d\d\d bytes of content")
    moments = HEADER_BYTES + 2 * n_rows
    refused(with_bytes(moments, b"\xff\xff"), logitstore.CorruptionError, "one tail moment says")
    refused(with_bytes(moments, b"\xfe\xff"), logitstore.CorruptionError, "a tail moment has a code above")
    n_present = int(written.targets.present.sum())
    ids = moments + 8 * n_present
    refused(with_bytes(ids, b"\xff") [: ids + 1] + with_bytes(ids + len(written.targets.ids), b"\xff")[ids + 1 :],
            logitstore.CorruptionError, "an id outside 0..399|a token id twice")  # fmt: skip


class TestFolders:
    """Shards of a folder belong together, and none is missing."""

    @pytest.fixture
    def path(self, tmp_path: Path, samples) -> Path:
        write(tmp_path / "x.parquet", samples, shard_samples=40)
        return tmp_path / "x.parquet"

    def test_missing_first(self, path: Path) -> None:
        (path / "part-00000.parquet").unlink()
        with pytest.raises(logitstore.FormatError, match="shard 0 is missing, part-00001"):
            logitstore.open(path)

    def test_missing_last(self, path: Path) -> None:
        (path / "part-00003.parquet").unlink()
        with pytest.raises(logitstore.FormatError, match="3 shards here.*not the last one"):
            logitstore.open(path)

    def test_doubled(self, path: Path) -> None:
        shutil.copy(path / "part-00001.parquet", path / "part-00001b.parquet")
        with pytest.raises(logitstore.FormatError, match="shard 2 is missing"):
            logitstore.open(path)

    def test_mixed(self, path: Path, tmp_path: Path, samples) -> None:
        write(tmp_path / "y.parquet", samples, make_spec(teacher_sha256="other"), shard_samples=40)
        shutil.copy(tmp_path / "y.parquet" / "part-00002.parquet", path / "part-00002.parquet")
        with pytest.raises(logitstore.SpecMismatchError, match="different specs"):
            logitstore.open(path)

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for function in (logitstore.open, logitstore.verify):
            with pytest.raises(logitstore.FormatError, match="without .parquet files"):
                function(tmp_path / "empty")


def test_what_is_no_store_says_what_it_is(tmp_path: Path, store_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no store at"):
        logitstore.open(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("hello, this is no Parquet file")
    with pytest.raises(logitstore.FormatError, match="not a Parquet file"):
        logitstore.open(tmp_path / "text.parquet")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(parquet.read_table(store_path), tmp_path / "rewritten.parquet")
    with pytest.raises(logitstore.FormatError, match=r"without 'logitstore\.\w+'.*another tool"):
        logitstore.open(tmp_path / "rewritten.parquet")
    newer = store_path.read_bytes()
    assert INDEX_KEY.encode() in newer
    report = logitstore.verify(tmp_path / "text.parquet")
    assert not report.ok
    assert "not a Parquet file" in report.faults[0]


def test_a_footer_from_a_newer_version_is_refused(tmp_path: Path) -> None:
    from logitstore.spec import StoreSpec

    text = make_spec().to_json()
    assert StoreSpec.from_json(text) == make_spec()
    with pytest.raises(logitstore.FormatError, match="direct/9.*update logitstore"):
        StoreSpec.from_json(text.replace("direct/1", "direct/9"))
    with pytest.raises(logitstore.FormatError, match="unknown fields later"):
        StoreSpec.from_json(text.replace('"dataset":', '"later":1,"dataset":'))
    with pytest.raises(logitstore.FormatError, match="no codec is named 'new'"):
        StoreSpec.from_json(text.replace('"name":"topk"', '"name":"new"'))
    with pytest.raises(logitstore.FormatError, match="not one of ours"):
        StoreSpec.from_json("[]")
