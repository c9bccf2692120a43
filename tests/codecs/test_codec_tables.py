"""Files of codec tables: what is damaged, cut, swapped, missing or not of this vocabulary is an error of ours."""

import contextlib
import errno
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

import logitstore
from logitstore.codec_tables import CodecTables, tables_from_bytes
from logitstore.codecs import conformance
from logitstore.fingerprint import sha256_json

VOCAB_SIZE = 60
METADATA = {"logitstore.tables": "1"}


def fitted(head: str = "log", k: int = 8) -> logitstore.codecs.topk.TopKCodec:
    return conformance.fitted(logitstore.make_codec("topk", vocab_size=VOCAB_SIZE, k=k, head=head))


def refused(content: bytes, message: str, vocab_size: int = VOCAB_SIZE) -> None:
    with pytest.raises((logitstore.CorruptionError, logitstore.FormatError), match=message):
        tables_from_bytes(content, vocab_size=vocab_size)


def test_a_file_gives_its_tables_back() -> None:
    content = fitted().tables.file_bytes
    tables = tables_from_bytes(content, vocab_size=VOCAB_SIZE)
    assert isinstance(tables, CodecTables)
    assert tables.file_bytes == content
    assert tables.sha256 == hashlib.sha256(content).hexdigest()


def with_first(array: np.ndarray, value: int) -> np.ndarray:
    return np.concatenate([[value], array[1:]]).astype(array.dtype)


DAMAGE = [
    ("by_frequency", lambda a: with_first(a, a[1]), "by_frequency is not a permutation of the 60"),
    ("by_frequency", lambda a: a[:-1], "by_frequency is not a permutation"),
    ("by_frequency", lambda a: a.astype(np.int64), "by_frequency is not a permutation"),
]
for lists in ("after", "beside", "together"):
    DAMAGE += [
        (f"{lists}.offsets", lambda a: with_first(a, 1), f"offsets of the candidate lists '{lists}' do not rise"),
        (f"{lists}.offsets", lambda a: a[:-1], f"candidate lists '{lists}' are int32"),
        (f"{lists}.offsets", lambda a: a.astype(np.int64), f"candidate lists '{lists}' are int64"),
        (f"{lists}.members", lambda a: with_first(a, VOCAB_SIZE), f"'{lists}' hold an id outside the vocabulary of 60"),
        (f"{lists}.members", lambda a: with_first(a, -1), f"'{lists}' hold an id outside the vocabulary of 60"),
        (f"{lists}.members", lambda a: a[:-1], f"offsets of the candidate lists '{lists}' do not rise"),
        (f"{lists}.members", lambda a: a[:, None], f"candidate lists '{lists}' are int32"),
    ]
for kind in ("odds", "excess", "counts", "values", "ids"):
    DAMAGE += [
        (f"symbols.{kind}", lambda a: a + np.uint16(1), "do not add up to 65,536"),
        (f"symbols.{kind}", lambda a: a[:, :-1], r"expected uint16 \[C, 272\]"),
        (f"symbols.{kind}", lambda a: np.concatenate([a, a]), f"symbols.{kind} has .* contexts, expected"),
        (f"symbols.{kind}", lambda a: a.astype(np.int32), "symbol frequencies are int32"),
    ]


@pytest.mark.parametrize(("name", "damaged", "message"), DAMAGE, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(DAMAGE)])
def test_each_array_is_checked(name: str, damaged, message: str) -> None:
    arrays = load(fitted().tables.file_bytes)
    changed = np.ascontiguousarray(damaged(arrays[name]))
    refused(save({**arrays, name: changed}, metadata=METADATA), message)
    del arrays[name]
    refused(save(arrays, metadata=METADATA), f"not a file of codec tables: '{name}'")


def test_lists_that_are_too_long_for_their_codes_are_refused() -> None:
    arrays = load(fitted().tables.file_bytes)
    arrays["after.members"] = np.zeros(513, np.int32)
    arrays["after.offsets"] = np.repeat(np.array([0, 513], np.int32), [1, VOCAB_SIZE])
    refused(save(arrays, metadata=METADATA), "'after' hold one of 513 ids, expected 512 at most")


def test_another_vocabulary_or_version_and_other_files_are_refused() -> None:
    content = fitted().tables.file_bytes
    refused(content, "candidate lists 'after' are int32", vocab_size=VOCAB_SIZE + 1)
    refused(save(load(content), metadata={"logitstore.tables": "2"}), "version '2', this logitstore reads '1'; update")
    refused(save(load(content)), "not a file of codec tables")
    refused(b"", "not a file of codec tables")
    refused(b"\x08\0\0\0\0\0\0\0nonsense", "not a file of codec tables")
    for size in range(0, len(content), 997):
        refused(content[:size], "not a file of codec tables")


def test_a_changed_byte_is_an_error_of_ours_or_makes_tables() -> None:
    """Without the hash, which load_codec and the store check first, some bytes of a list can still be told."""
    content = fitted().tables.file_bytes
    rng = np.random.default_rng(0)
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    positions = [*range(header_bytes), *rng.integers(header_bytes, len(content), 300)]
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 256))
        with contextlib.suppress(logitstore.LogitStoreError):
            assert isinstance(tables_from_bytes(bytes(damaged), vocab_size=VOCAB_SIZE), CodecTables)


def tables_file(folder: Path, codec: logitstore.codecs.topk.TopKCodec) -> Path:
    return folder / f"{codec.tables_sha256}.safetensors"


def test_a_saved_codec_with_damaged_swapped_or_missing_tables_is_refused(tmp_path: Path) -> None:
    codec, other = fitted(), fitted(k=3)
    codec.save(tmp_path)
    path = tables_file(tmp_path, codec)
    content = path.read_bytes()
    assert content == codec.tables.file_bytes
    damaged = bytearray(content)
    damaged[-1] ^= 1
    for wrong in (bytes(damaged), content[:-1], b"", other.tables.file_bytes):
        path.write_bytes(wrong)
        with pytest.raises(
            logitstore.CorruptionError, match="have SHA-256 .*, not that of their name; copy them again"
        ):
            logitstore.load_codec(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="codec tables .* are missing; copy the folder along"):
        logitstore.load_codec(tmp_path)
    with pytest.raises(ValueError, match="tables have SHA-256 .*, the codec names"):
        codec.with_tables(other.tables)
    for method in ("encode", "decode"):
        bare = logitstore.make_codec(**codec.config)
        case = conformance.cases(VOCAB_SIZE)[0]
        targets = codec.targets_from_logits(*case[1:])
        subject = targets if method == "encode" else codec.encode(targets, case.input_ids)
        with pytest.raises(logitstore.SpecMismatchError, match="codec needs its tables [0-9a-f]{64}: open the store"):
            getattr(bare, method)(subject, case.input_ids)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_save_that_is_interrupted_before_it_is_on_the_disk_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise error

    codec = fitted()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(type(error)):
            codec.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    codec.save(tmp_path)
    assert logitstore.load_codec(tmp_path) == codec


def test_tables_of_another_vocabulary_are_refused() -> None:
    other = logitstore.make_codec("topk", vocab_size=VOCAB_SIZE + 1, k=8, head="log")
    with pytest.raises(logitstore.SpecMismatchError, match="tables are for a vocabulary of 60, the codec has 61"):
        other.with_tables(fitted().tables)


@pytest.mark.parametrize("name", [5, "", "../../x", "ab" * 31, "AB" * 32, "g" * 64, "0" * 64 + "\n", b"0" * 64])
def test_tables_are_named_by_a_hash_and_nothing_else(name, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tables must be a SHA-256 of 64 lower-case hex digits, or None, got"):
        logitstore.make_codec("topk", vocab_size=VOCAB_SIZE, tables=name)
    if isinstance(name, bytes):
        return
    config = {**fitted().config, "tables": name}
    (tmp_path / "codec.json").write_text(json.dumps({"config": config, "sha256": sha256_json(config)}))
    with pytest.raises(logitstore.FormatError, match="tables must be a SHA-256"):
        logitstore.load_codec(tmp_path)


def test_a_codec_without_anything_fitted_has_no_tables() -> None:
    with pytest.raises(ValueError, match="codec 'rskd' has nothing that is fitted"):
        logitstore.make_codec("rskd", vocab_size=10, tables="0" * 64)
    codec = logitstore.make_codec("rskd", vocab_size=VOCAB_SIZE)
    assert logitstore.calibrate(codec, [], []) is codec
    with pytest.raises(ValueError, match="has nothing that is fitted"):
        codec.with_tables(fitted().tables)


def test_a_store_names_the_tables_that_it_lacks_and_refuses_damaged_ones(tmp_path: Path) -> None:
    codec, path = fitted(), tmp_path / "x.parquet"
    case = conformance.cases(VOCAB_SIZE)[0]
    with logitstore.create(path, logitstore.StoreSpec(codec=codec, vocab_size=VOCAB_SIZE, teacher="t")) as writer:
        writer.append(0, case.input_ids, codec.targets_from_logits(case.logits, case.input_ids))
    tables = tables_file(tmp_path / "x.parquet.tables", codec)
    expected = codec.targets_from_logits(case.logits, case.input_ids)
    conformance.require_same(logitstore.open(path)[0].targets, expected, "the store's targets")
    assert logitstore.verify(path).ok
    moved = tmp_path / "elsewhere"
    shutil.move(tables, moved)
    with pytest.raises(logitstore.SpecMismatchError, match=f"tables that are missing: copy {tables} along with it"):
        logitstore.open(path)[0]
    content = bytearray(moved.read_bytes())
    content[len(content) // 2] ^= 1
    for wrong in (bytes(content), b"", fitted(k=3).tables.file_bytes):
        tables.write_bytes(wrong)
        with pytest.raises(logitstore.CorruptionError, match=f"codec tables {tables} have SHA-256"):
            logitstore.open(path)
        assert not logitstore.verify(path).ok


def test_each_array_of_a_predicted_tail_is_checked() -> None:
    rng = np.random.default_rng(0)
    logits = [(4 * rng.standard_normal((30, VOCAB_SIZE))).astype(np.float32) for _ in range(8)]
    input_ids = [rng.integers(0, VOCAB_SIZE, 30) for _ in logits]
    codec = logitstore.make_codec("topk", vocab_size=VOCAB_SIZE, k=8, head="log", tail="predicted", tail_step=0.5)
    arrays = load(logitstore.calibrate(codec, logits, input_ids).tables.file_bytes)
    names = [name for name in arrays if name.startswith(("tail.", "corrections.", "symbols.corrections"))]
    assert len(names) > 15
    message = "tail model|corrections|symbol frequencies|not a file of codec tables"
    for name in names:
        array = arrays[name]
        changes = [array.astype(np.int64), array[:-1], array[None]]
        if array.dtype.kind == "f":
            changes.append(np.where(np.arange(array.size).reshape(array.shape) == 0, np.nan, array).astype(array.dtype))
        for changed in changes:
            refused(save({**arrays, name: np.ascontiguousarray(changed)}, metadata=METADATA), message)
        rest = {other: array for other, array in arrays.items() if other != name}
        if name == "corrections.step":  # without it nothing of a tail is corrected, which the codec then refuses
            tables = tables_from_bytes(save(rest, metadata=METADATA), vocab_size=VOCAB_SIZE)
            with pytest.raises(logitstore.SpecMismatchError, match="tail_step 0.5, its tables are for tail_step None"):
                codec.with_tables(tables)
        else:
            refused(save(rest, metadata=METADATA), message)
    other_step = save({**arrays, "corrections.step": np.array([0.25])}, metadata=METADATA)
    with pytest.raises(logitstore.SpecMismatchError, match="tail_step 0.5, its tables are for tail_step 0.25"):
        codec.with_tables(tables_from_bytes(other_step, vocab_size=VOCAB_SIZE))
