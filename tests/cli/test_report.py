"""The report page: complete in itself, well formed, escaped, legible; and the plain-text tables."""

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from logitstore_trainer.plots import DARK_SERIES, LIGHT_SERIES, short_number
from logitstore_trainer.report import (
    Paragraph,
    Plot,
    Preformatted,
    Section,
    Series,
    Table,
    bar_plot,
    cell_text,
    format_table,
    line_plot,
    render_html,
    scatter_plot,
    write_report,
)

_VOID = {"meta", "br", "hr", "img", "input", "link"}
_NASTY = "<b>&\"' $x_1$ </script><script>alert(1)</script>"


class _Page(HTMLParser):
    """Tag nesting, references, ids and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in _VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in _VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text += data


def _full_page() -> str:
    series = [Series("one " + _NASTY, [1, 2], [3, 4], labels=[_NASTY, "b"]), Series("two", [1, 2], [4, 3])]
    sections = [
        Section("First " + _NASTY, [Paragraph("para " + _NASTY), Preformatted("pre " + _NASTY)]),
        Section("Second", [Table(["head " + _NASTY], [["cell " + _NASTY]], "table caption " + _NASTY)]),
        Section("Third", [Plot(line_plot(series, x_label="x (bytes)", y_label="y (nats)"), "plot caption " + _NASTY)]),
        Section("Fourth", [Plot(bar_plot([_NASTY], {"g": [1.0]}, value_label="time (ms)"))]),
    ]
    return render_html("Title " + _NASTY, sections, "sub " + _NASTY)


def test_page_refers_to_nothing_outside_itself():
    text = _full_page()
    page = _Page(text)
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert set(re.findall(r'(\S+)="https?://', text)) <= {"xmlns", "xmlns:xlink"}


def test_page_is_nested_properly_and_its_ids_are_unique_and_resolve():
    page = _Page(_full_page())
    assert page.open_tags == []
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)


def test_all_text_is_escaped_and_reads_as_it_was_written():
    page = _Page(_full_page())
    for start in ("Title", "sub", "First", "para", "pre", "head", "cell", "table caption", "plot caption", "one"):
        assert f"{start} {_NASTY}" in page.text, start


def test_page_has_both_colour_schemes_and_a_viewport():
    text = _full_page()
    assert "@media (prefers-color-scheme:dark)" in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "overflow-x:auto" in text


def test_plots_are_the_same_every_time_and_share_no_ids():
    def drawn(last):
        return line_plot([Series("s", [1, 2], [1, last])], x_label="x (s)", y_label="y (s)")

    first, again, other = drawn(2), drawn(2), drawn(3)
    assert first == again
    ids, other_ids = (set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, other))
    assert ids
    assert not ids & other_ids


def test_a_long_line_has_few_markers():
    def n_marks(xs):
        return line_plot([Series("s", xs, xs)], x_label="x (s)", y_label="y (s)").count("<use ")  # ticks among them

    beyond_two = {n: n_marks(list(range(n))) - n_marks([0, n - 1]) for n in (25, 26, 500)}
    assert beyond_two == {25: 23, 26: 11, 500: 23}


def test_an_axis_from_zero_has_a_tick_there():
    series = [Series("s", [1, 2, 3], [100.0, 101.0, 102.0])]
    shown = {
        from_zero: _svg_texts(line_plot(series, x_label="x (s)", y_label="y (s)", y_from_zero=from_zero))
        for from_zero in (True, False)
    }
    assert "0" in shown[True]
    assert "0" not in shown[False]


@pytest.mark.parametrize("plot", [line_plot, scatter_plot])
def test_points_that_an_axis_cannot_show_are_left_out(plot):
    series = [
        Series("s", [1, 2, None, 4, -5, 6], [1.0, float("nan"), 3.0, 0.0, 5.0, float("inf")], labels=list("abcdef"))
    ]
    texts = _svg_texts(plot(series, x_label="x (B)", y_label="y (nats)", log_x=True, log_y=True))
    assert "a" in texts
    assert not set("bcdef") & set(texts)
    texts = _svg_texts(plot(series, x_label="x (B)", y_label="y (nats)"))
    assert {"a", "d", "e"} <= set(texts)


def test_axes_carry_their_labels_and_bars_their_values():
    texts = _svg_texts(
        bar_plot(["read", "loss"], {"p50": [12.345, 4560.0], "p80": [None, 0.5]}, value_label="time (ms)")
    )
    assert {"time (ms)", "read", "loss", "p50", "p80", "12.3", "4,560", "0.5"} <= set(texts)
    texts = _svg_texts(
        scatter_plot([Series("s", [1], [2])], x_label="size (bytes)", y_label="KL (nats)", title="T = 1")
    )
    assert {"size (bytes)", "KL (nats)", "T = 1"} <= set(texts)


def test_an_interval_is_drawn_around_the_end_of_its_bar():
    """Whiskers widen the axis to their ends: its last tick is beyond 30, without them it is not."""

    def last_tick(**settings):
        texts = _svg_texts(bar_plot(["a", "b"], {"g": [10.0, 20.0]}, value_label="right (%)", **settings))
        return max(float(text) for text in texts if re.fullmatch(r"[\d.]+", text))

    assert last_tick() < 30
    assert last_tick(intervals={"g": [(8.0, 34.0), (20.0, 20.0)]}) > 30


def test_colours_contrast_with_their_background():
    for colours, background in ((LIGHT_SERIES, "#ffffff"), (DARK_SERIES, "#14171a")):
        assert len(set(colours)) == 6
        assert min(_contrast(colour, background) for colour in colours) >= 3.0


def test_series_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="series 's' has 2 x values and 1 y values"):
        Series("s", [1, 2], [1])
    with pytest.raises(ValueError, match="series 's' has 1 labels for 2 points"):
        Series("s", [1, 2], [1, 2], labels=["a"])
    with pytest.raises(ValueError, match="group 'g' has 1 values for 2 categories"):
        bar_plot(["a", "b"], {"g": [1.0]}, value_label="x (s)")
    with pytest.raises(ValueError, match="group 'g' has 1 intervals for 2 categories"):
        bar_plot(["a", "b"], {"g": [1.0, 2.0]}, value_label="x (s)", intervals={"g": [(0.5, 1.5)]})


def test_cells_are_written_as_people_read_them():
    values = [None, 0, 1234567, 0.0123456, 98304.4, 1e-9, "text", True, 0.0]
    values += [5.0, 5.0001, 4.99996, 999.96, 0.5, math.inf]
    assert [cell_text(value) for value in values] == [
        "-", "0", "1,234,567", "0.01235", "98,304", "1e-09", "text", "True", "0", "5", "5.000", "5.000",
        "1000", "0.5", "inf",
    ]  # fmt: skip


def test_numbers_on_axes_are_short():
    assert [short_number(v) for v in (0.0, 0.00123, 12.34, 123.4, 4560, 1e6, 1e-6, 1e9)] == [
        "0", "0.00123", "12.3", "123", "4,560", "1,000,000", "1e-06", "1e+09",
    ]  # fmt: skip


def test_terminal_table_is_aligned():
    table = format_table(["codec", "bytes", "note"], [["int8", 54.06, "a"], ["raw", 53432.0, None]])
    assert table == (
        "codec   bytes  note\n"
        "-----  ------  ----\n"
        "int8    54.06  a\n"
        "raw    53,432  -"
    )  # fmt: skip


def test_long_cells_of_a_page_wrap_and_short_ones_and_numbers_do_not():
    table = Table(
        ["configuration", "KL T=1", "n"], [["predicted, p >= 0.005, log 0.5, tail step 0.08", "0.1 +- 0.01", 3]]
    )
    page = render_html("t", [Section("s", [table])])
    assert '<th class="long">configuration</th><th>KL T=1</th><th class="num">n</th>' in page
    assert '<td class="long">predicted' in page
    assert ".long{white-space:normal" in page


def test_rows_that_do_not_fit_the_header_are_refused():
    with pytest.raises(ValueError, match=r"table row 1 has 1 cells, the header has 2: \['a', 'b'\]"):
        format_table(["a", "b"], [[1, 2], [3]])
    with pytest.raises(ValueError, match="table row 0 has 3 cells"):
        Table(["a", "b"], [[1, 2, 3]])


def test_a_plot_is_an_svg():
    with pytest.raises(ValueError, match="must be an <svg> element, got text that starts with '<p>hello</p>'"):
        Plot("<p>hello</p>")


def test_writing_makes_folders_and_replaces_an_older_page_in_one_step(tmp_path):
    path = tmp_path / "new folder" / "report.html"
    assert write_report(path, "Old", [Section("s", [Paragraph("before")])]) == path
    with pytest.raises(TypeError, match="a section holds Paragraph, Table, Plot or Preformatted, got str"):
        write_report(path, "New", [Section("s", ["not an element"])])
    assert "before" in path.read_text(encoding="utf-8")
    write_report(path, "New", [Section("s", [Paragraph("after")])])
    assert "after" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def _svg_texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]


def _contrast(colour: str, background: str) -> float:
    """The WCAG contrast ratio of two #rrggbb colours."""

    def luminance(text):
        channels = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(colour), luminance(background)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
