"""The cache of fitted tail models: found for the same rows, never for others, never when damaged."""

import multiprocessing
import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from made_up_teacher import SETTINGS, V, teacher_samples

import logitstore
from logitstore import fit_cache
from logitstore.fit_cache import FitCache, default_cache_folder, fit_sha256
from logitstore.tail_fit import fit_tail_model
from logitstore.tail_model import TailModel
from logitstore.tail_rows import TailRows, tail_rows

QUICK = replace(SETTINGS, rows_seen=1)


@pytest.fixture(scope="module")
def rows() -> TailRows:
    return tail_rows(teacher_samples(0, 8), V)


@pytest.fixture(scope="module")
def model(rows: TailRows):
    return fit_tail_model(rows, QUICK)


def not_again():
    pytest.fail("it fitted again")


def same(a, b) -> bool:
    return all(np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays | b.arrays)


def test_a_second_fit_of_the_same_rows_is_found_and_said(rows: TailRows, model, tmp_path: Path) -> None:
    said: list[str] = []
    cache = FitCache(tmp_path / "new" / "cache", said.append)
    assert cache.fitted(rows, QUICK, lambda: model) is model
    assert said == []
    again = tail_rows(teacher_samples(0, 8), V)
    assert same(cache.fitted(again, QUICK, not_again), model)
    (path,) = (tmp_path / "new" / "cache").iterdir()
    assert said == [f"fitted tables found in {path}"]


@pytest.mark.parametrize("name", [field.name for field in fields(TailRows)])
def test_the_hash_depends_on_every_array_of_the_rows(rows: TailRows, name: str) -> None:
    value = getattr(rows, name)
    if name == "tokens":
        changed = (value[0] + 1, *value[1:])
    else:
        changed = value.clone()
        changed.view(-1)[-1] += 1
    assert fit_sha256(replace(rows, **{name: changed}), QUICK) != fit_sha256(rows, QUICK)


def test_the_hash_depends_on_the_settings_and_on_the_code_of_the_fit(
    rows: TailRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fit_sha256(rows, QUICK)
    assert fit_sha256(rows, replace(QUICK, seed=1)) != before
    assert fit_sha256(rows, replace(QUICK, lr=1e-3)) != before
    source = fit_cache.inspect.getsource
    for module in ("tail_fit", "tail_loss", "tail_model"):
        with monkeypatch.context() as patch:
            patch.setattr(
                "logitstore.fit_cache.inspect.getsource",
                lambda m, module=module: source(m) + (" " if m.__name__.endswith(module) else ""),
            )
            assert fit_sha256(rows, QUICK) != before


def test_one_bit_of_damage_anywhere_is_noticed_and_fitted_anew(rows: TailRows, model, tmp_path: Path) -> None:
    FitCache(tmp_path).fitted(rows, QUICK, lambda: model)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    places = [*range(0, 40), *np.linspace(40, len(whole) - 1, 30).astype(int)]
    for damaged in (*(_flipped(whole, int(place)) for place in places), whole[:-1], whole[:20], b""):
        path.write_bytes(damaged)
        said: list[str] = []
        assert FitCache(tmp_path, said.append).fitted(rows, QUICK, lambda: model) is model
        assert said == [f"fitted tables in {path} do not have their checksum; fitting anew"]
        assert path.read_bytes() == whole


def _flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 16
    return bytes(changed)


def test_a_folder_that_cannot_be_written_costs_the_entry_and_not_the_fit(rows: TailRows, model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said: list[str] = []
    assert FitCache(tmp_path / "file" / "cache", said.append).fitted(rows, QUICK, lambda: model) is model
    assert said[0].startswith("the fit cannot be kept for another run: ")
    assert "Not a directory" in said[0]


def test_the_last_used_ones_stay(rows: TailRows, model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_cache, "KEPT", 3)
    cache = FitCache(tmp_path)
    for seed in range(3):
        cache.fitted(rows, replace(QUICK, seed=seed), lambda: model)
    paths = [tmp_path / f"{fit_sha256(rows, replace(QUICK, seed=seed))}.tail" for seed in range(4)]
    for path, age_s in zip(paths, (30, 20, 10), strict=False):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age_s))
    cache.fitted(rows, replace(QUICK, seed=0), not_again)  # the oldest is used, so the second oldest goes
    cache.fitted(rows, replace(QUICK, seed=3), lambda: model)
    assert set(tmp_path.iterdir()) == {paths[0], paths[2], paths[3]}


def _keep_many_times(path: Path, model: TailModel) -> None:
    cache = FitCache(path.parent, pytest.fail)
    for _ in range(20):
        fit_cache._write(path, model)
        assert same(fit_cache._read(path, V), model)
        cache._drop_the_oldest()


def test_processes_that_write_the_same_entry_never_read_half_of_one(
    rows: TailRows, model: TailModel, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    path = tmp_path / f"{fit_sha256(rows, QUICK)}.tail"
    writers = [context.Process(target=_keep_many_times, args=(path, model)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_calibrate_takes_a_cache_and_reports_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids, _ = map(list, zip(*teacher_samples(0, 8), strict=True))
    codec = logitstore.make_codec("topk", vocab_size=V, k=8, head="log", tail="predicted", tail_step=0.3)
    calls: list[tuple[str, int, int | None]] = []
    cache = FitCache(tmp_path)
    first = logitstore.calibrate(codec, logits, ids, on_progress=lambda *call: calls.append(call), cache=cache)
    steps = [call for call in calls if call[0] == "steps"]
    assert steps == [("steps", i, 100) for i in range(1, 101)]
    assert [call for call in calls if call[0] == "rows"] == [("rows", 39 * i, None) for i in range(1, 9)]
    assert [call for call in calls if call[0] == "texts"] == [("texts", i, 8) for i in range(1, 9)]
    monkeypatch.setattr("logitstore.fit_codec.fit_tail_model", lambda *a, **k: not_again())
    assert logitstore.calibrate(codec, logits, ids, cache=cache).config == first.config


def test_calibrate_prints_nothing(capfd: pytest.CaptureFixture) -> None:
    logits, ids, _ = map(list, zip(*teacher_samples(0, 8), strict=True))
    logitstore.calibrate(logitstore.make_codec("topk", vocab_size=V, k=8, tail="predicted"), logits, ids)
    assert tuple(capfd.readouterr()) == ("", "")


def test_progress_of_a_residual_codec_and_of_more_than_64_entries() -> None:
    logits, ids, _ = map(list, zip(*teacher_samples(0, 3), strict=True))
    fit = {"metric", "steps", "basis"}
    for options, stages in (({}, {"rows"}), ({"tail": "predicted"}, {"rows", *fit, "rows again"})):
        calls: list[tuple[str, int, int | None]] = []
        codec = logitstore.make_codec("topk", vocab_size=V, head="log", k=70, **options)
        logitstore.calibrate(codec, logits, ids, on_progress=lambda *call, calls=calls: calls.append(call))
        assert {stage for stage, _, _ in calls} == stages
        assert ("rows", 3 * 39, None) in calls
        for stage in stages & fit:  # each ends at its total
            done, total = [call[1:] for call in calls if call[0] == stage][-1]
            assert done == total


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("LOGITSTORE_CACHE", "/own")
    assert default_cache_folder() == Path("/own")
    monkeypatch.delenv("LOGITSTORE_CACHE")
    assert default_cache_folder() == Path("/xdg/logitstore")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / ".cache" / "logitstore"

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ValueError, match="no home folder to keep fitted tables in; set LOGITSTORE_CACHE to a folder"):
        default_cache_folder()
