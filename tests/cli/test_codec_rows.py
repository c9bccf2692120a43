"""The text that codecs are fitted on and the text that they are measured on: no paragraph is in both."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "fixtures"


@pytest.fixture(scope="module")
def codec_rows():
    """benchmarks/quality/codec_rows.py as a module."""
    folder = ROOT / "benchmarks" / "quality"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("codec_rows", folder / "codec_rows.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def test_no_paragraph_of_the_documentation_is_in_two_parts(codec_rows) -> None:
    fit, choose, measured = (
        codec_rows.passages(codec_rows.documentation(*part)) for part in ((0.6, 1.0), (0.5, 0.6), (0.0, 0.5))
    )
    assert min(len(fit), len(measured)) > 500
    assert len(choose) > 100
    assert fit & measured == fit & choose == choose & measured == set()


def test_source_that_no_fit_sees_is_in_no_paragraph_of_the_documentation(codec_rows) -> None:
    source = codec_rows.passages(codec_rows.python_source())
    assert len(source) > 1000
    assert source & codec_rows.passages(codec_rows.documentation(0.5, 1.0)) == set()


def test_passages_are_paragraphs_of_four_words_or_more_whatever_their_spaces(codec_rows) -> None:
    assert codec_rows.passages(["Example:\n\none two  three\nfour", "a b c"]) == {"one two three four"}


@pytest.mark.shared
@pytest.mark.skipif(not DATA.is_dir(), reason="the text of the other kinds is not beside this checkout")
def test_no_measured_paragraph_of_any_kind_is_in_what_is_fitted_or_chosen_on(codec_rows) -> None:
    fit = codec_rows.passages_of_kinds(codec_rows.fit_documents(DATA))
    choose = dict(codec_rows.choose_documents(DATA))
    for kind, texts in choose.items():
        assert len(texts) > 5, kind
    chosen_on = codec_rows.passages_of_kinds(choose)
    assert chosen_on & fit == set()
    for kind, texts in codec_rows.measured_documents(DATA):
        assert len(texts) > 5, kind
        assert codec_rows.passages(texts) & (fit | chosen_on) == set(), kind
    shared = codec_rows.passages(codec_rows.prompts_and_completions(DATA / "instructions-eval.jsonl")) & fit
    assert shared  # what there is to leave out
