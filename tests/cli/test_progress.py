"""Progress in a log file: lines with rate and time left, none for what is quick; and the stages of a fit."""

import pytest
from logitstore_trainer import progress
from logitstore_trainer.progress import FIT_STAGES, Progress, StageProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[seconds]: what the clock says. Standard error is no terminal here."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_and_one_at_the_end(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    with Progress(total=40, desc="work", unit="rows") as shown:
        for clock[0] in (5.0, 10.0, 15.0, 20.0):
            shown.update(5)
        clock[0] = 25.0
        shown.update(20)
    assert capsys.readouterr().err.splitlines() == [
        "work: 10/40 (25 %) rows, 1 rows/s, 10 s, 00:30 left",
        "work: 20/40 (50 %) rows, 1 rows/s, 20 s, 00:20 left",
        "work: 40/40 (100 %) rows, 1.6 rows/s, 25 s",
    ]


def test_the_last_line_is_not_printed_twice(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    with Progress(total=40, desc="work", unit="rows") as shown:
        clock[0] = 10.0
        shown.update(40)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_work_that_goes_on_counts_from_where_it_was_and_figures_stand_behind(
    clock: list[float], capsys: pytest.CaptureFixture
) -> None:
    with Progress(total=40, desc="work", unit="rows", start=20) as shown:
        clock[0] = 10.0
        shown.note("loss 3")
        shown.update(10)
        clock[0] = 20.0
        shown.note("loss 2")
        shown.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "work: 30/40 (75 %) rows, 1 rows/s, 10 s, 00:10 left; loss 3",
        "work: 40/40 (100 %) rows, 1 rows/s, 20 s; loss 2",
    ]


def test_what_is_quick_is_not_shown(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    with Progress(total=40, desc="work", unit="rows") as shown:
        clock[0] = 1.9
        shown.update(40)
    assert capsys.readouterr().err == ""


def test_each_stage_of_a_fit_is_shown_with_its_own_rate(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    said = []
    with StageProgress() as display:
        say = display.between_stages(lambda line: said.append((line, capsys.readouterr().err)))
        for clock[0], done in ((0.0, 100), (4.0, 400)):
            display("rows", done, None)
        say("a line between")
        for clock[0], done in ((5.0, 1), (15.0, 30), (17.0, 60)):
            display("steps", done, 60)
        say("another")
    assert said == [
        ("a line between", "read the sample: 400 rows, 100 rows/s, 4 s\n"),
        (
            "another",
            "fit the tail model: 30/60 (50 %) steps, 3 steps/s, 10 s, 00:10 left\n"
            "fit the tail model: 60/60 (100 %) steps, 5 steps/s, 12 s\n",
        ),
    ]
    assert capsys.readouterr().err == ""
    assert set(FIT_STAGES) == {"rows", "rows again", "metric", "steps", "basis", "texts"}
