"""Plots as inline SVG that follow the page: text and lines take their colours from the report's style sheet.

Matplotlib draws with sentinel colours, which become CSS variables with a fallback, so that one SVG is right
on a light page, on a dark page and as a file of its own. Text stays text (`svg.fonttype: none`), so it can
be searched and is drawn in the font of the reader. Ids derive from the drawing: equal data, equal bytes.

The six series colours (after Okabe and Ito) keep apart under the common colour-vision deficiencies and have a
contrast of 3 or more against both backgrounds; marker and dash differ too: nothing depends on colour alone.
"""

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # matplotlib takes half a second to import: `--help` must not pay for it
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

LIGHT_SERIES = ("#0072b2", "#c65200", "#007a5a", "#a3488a", "#946600", "#5a626b")
DARK_SERIES = ("#56b4e9", "#ff8c42", "#2bc99b", "#e39ac6", "#f0c24b", "#b0b7c0")
_SERIES_SENTINELS = tuple(f"#0a0b{i:02x}" for i in range(1, 7))
_TEXT_SENTINEL = "#010203"
_GRID_SENTINEL = "#010204"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">", "h")  # eleven, so that 66 series differ
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
_MOST_MARKERS = 25  # on a line; beyond, they hide it
_WIDTH_IN = 7.0
_HEIGHT_IN = 3.9
_LABEL_PT = 8.5
_LABEL_SIDES = (  # offset in points and alignment; a falling curve, the usual one, leaves the first two free
    (6, 3, "left", "bottom"),
    (-6, -3, "right", "top"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (6, -3, "left", "top"),
    (-6, 3, "right", "bottom"),
)


@dataclass(frozen=True)
class Series:
    """One named line or cloud of points, each with a short label and half an error bar (in y's unit) or none.

    connected: whether a line plot joins the points. Points whose x or y is None or not finite (or not positive on a
    log axis) are left out of the plot.
    """

    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    labels: Sequence[str] = ()
    y_error: Sequence[float | None] = ()
    connected: bool = True

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"series {self.name!r} has {len(self.x)} x values and {len(self.y)} y values")
        for what, values in (("labels", self.labels), ("error bars", self.y_error)):
            if len(values) not in (0, len(self.x)):
                raise ValueError(f"series {self.name!r} has {len(values)} {what} for {len(self.x)} points")


def line_plot(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    y_from_zero: bool = False,
) -> str:
    """An SVG of one line with markers for each series; axis labels name quantity and unit: "KL (nats)".

    y_from_zero: the y axis starts at zero, so that what hardly changes looks so.
    """
    return _xy_plot(
        series, x_label, y_label, title=title, log_x=log_x, log_y=log_y, with_lines=True, y_from_zero=y_from_zero
    )


def scatter_plot(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """An SVG of unconnected points, with their labels beside them where there is room."""
    return _xy_plot(series, x_label, y_label, title=title, log_x=log_x, log_y=log_y, with_lines=False)


def bar_plot(
    categories: Sequence[str],
    groups: Mapping[str, Sequence[float | None]],
    *,
    value_label: str,
    title: str = "",
    log: bool = False,
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> str:
    """An SVG of horizontal bars, one for each category and group, with the value written at its end.

    groups maps a legend name to one value for each category; None draws no bar. value_label has the
    quantity and its unit. intervals maps a group to (low, high) around each of its values, drawn as whiskers.
    Raises ValueError where a group has another number of values or intervals.
    """
    intervals = intervals or {}
    for name, values in groups.items():
        for what, given in (("values", values), ("intervals", intervals.get(name, values))):
            if len(given) != len(categories):
                raise ValueError(f"group {name!r} has {len(given)} {what} for {len(categories)} categories")
    n_bars = max(len(categories) * len(groups), 1)
    figure, axes = _new_axes(height_in=max(1.3, 0.8 + 0.27 * n_bars + 0.12 * len(categories)))
    thickness = 0.8 / max(len(groups), 1)
    for index, (name, values) in enumerate(groups.items()):
        centres = [row - 0.4 + thickness * (index + 0.5) for row in range(len(categories))]
        drawn = [(c, v) for c, v in zip(centres, values, strict=True) if _drawable(v, log)]
        whiskers = None
        if name in intervals:
            ends = [end for end, v in zip(intervals[name], values, strict=True) if _drawable(v, log)]
            whiskers = [[abs(end[side] - v) for end, (_, v) in zip(ends, drawn, strict=True)] for side in (0, 1)]
        bars = axes.barh(
            [c for c, _ in drawn],
            [v for _, v in drawn],
            thickness * 0.86,
            color=_SERIES_SENTINELS[index % 6],
            label=name,
            xerr=whiskers,
            error_kw={"ecolor": _TEXT_SENTINEL, "elinewidth": 1.2, "capsize": 3},
        )
        axes.bar_label(
            bars,
            labels=[short_number(v) for _, v in drawn],
            padding=3,
            color=_TEXT_SENTINEL,
            fontsize=_LABEL_PT,
        )
    axes.set_yticks(range(len(categories)), labels=list(categories))
    axes.set_ylim(len(categories) - 0.4, -0.6)
    axes.margins(x=0.16)
    if log:
        axes.set_xscale("log")
        smallest = min((v for values in groups.values() for v in values if _drawable(v, log)), default=1.0)
        axes.set_xlim(left=smallest / 3)  # a log axis has no zero: leave the shortest bar a visible length
    _finish_axes(axes, x_label=value_label, y_label="", title=title, log_x=log, log_y=False)
    axes.grid(visible=False, axis="y")
    if len(groups) > 1:
        _outside_legend(figure, axes)
    return figure_svg(figure)


def figure_svg(figure: "Figure") -> str:
    """The figure as an <svg> element: no external reference, no prolog, ids unique to the drawing."""
    import matplotlib

    buffer = io.StringIO()
    fixed = {"svg.fonttype": "none", "svg.hashsalt": "logitstore"}
    with matplotlib.rc_context(fixed):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.08, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: [^;\"]*?(\d+(?:\.\d+)?)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for sentinel, variable, fallback in _css_colours():
        svg = svg.replace(sentinel, f"var({variable}, {fallback})")
    svg = svg.replace(_TEXT_SENTINEL, "currentColor")
    prefix = "p" + hashlib.sha256(svg.encode()).hexdigest()[:8] + "-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{prefix}", svg)
    return svg.replace("<svg ", '<svg font-family="system-ui, sans-serif" role="img" ', 1)


def short_number(value: float) -> str:
    """The value with three significant digits and no exponent between 1e-4 and 1e8: 0.00123, 12.3, 4,560."""
    return f"{value:,.0f}" if 100 <= abs(value) < 1e8 else f"{value:.3g}"


def _css_colours() -> list[tuple[str, str, str]]:
    series = zip(_SERIES_SENTINELS, LIGHT_SERIES, strict=True)
    colours = [(sentinel, f"--series-{i}", light) for i, (sentinel, light) in enumerate(series, start=1)]
    return [*colours, (_GRID_SENTINEL, "--grid", "#d9dde2")]


def _new_axes(*, height_in: float = _HEIGHT_IN) -> "tuple[Figure, Axes]":
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10, "text.parse_math": False, "axes.unicode_minus": False}):
        figure = Figure(figsize=(_WIDTH_IN, height_in), facecolor="none", layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(facecolor="none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(_GRID_SENTINEL)
    axes.tick_params(which="both", color=_GRID_SENTINEL, labelcolor=_TEXT_SENTINEL)
    axes.set_axisbelow(True)
    return figure, axes


def _finish_axes(axes: "Axes", *, x_label: str, y_label: str, title: str, log_x: bool, log_y: bool) -> None:
    axes.grid(visible=True, which="major", color=_GRID_SENTINEL, linewidth=0.8)
    axes.set_xlabel(x_label, color=_TEXT_SENTINEL, parse_math=False)
    axes.set_ylabel(y_label, color=_TEXT_SENTINEL, parse_math=False)
    if title:
        axes.set_title(title, color=_TEXT_SENTINEL, loc="left", fontsize=11, fontweight="bold", parse_math=False)
    for is_log, axis in ((log_x, axes.xaxis), (log_y, axes.yaxis)):
        if is_log:
            _plain_log_ticks(axis)


def _plain_log_ticks(axis: "Axis") -> None:
    """Ticks as plain numbers: powers of ten, and values between them where the axis spans few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 and high > low else 1.0
    subs = (1.0,) if decades > 2.3 else (1.0, 2.0, 5.0) if decades > 0.9 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axis.set_minor_formatter(NullFormatter())


def _outside_legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        legend = figure.legend(
            handles,
            labels,
            loc="outside lower left",
            ncols=3,
            frameon=False,
            labelcolor=_TEXT_SENTINEL,
            fontsize=9,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def _drawable(value: float | None, is_log: bool) -> bool:
    return value is not None and math.isfinite(value) and not (is_log and value <= 0)


def _xy_plot(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    title: str,
    log_x: bool,
    log_y: bool,
    with_lines: bool,
    y_from_zero: bool = False,
) -> str:
    figure, axes = _new_axes()
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    labels: list[tuple[float, float, str, str]] = []
    for index, one in enumerate(series):
        colour = _SERIES_SENTINELS[index % 6]
        keep = [i for i in range(len(one.x)) if _drawable(one.x[i], log_x) and _drawable(one.y[i], log_y)]
        xs, ys = [one.x[i] for i in keep], [one.y[i] for i in keep]
        line = _DASHES[index % 6] if with_lines and one.connected else "none"
        every = -(-len(xs) // _MOST_MARKERS) if with_lines and one.connected else 1
        axes.plot(
            xs, ys, color=colour, marker=_MARKERS[index % len(_MARKERS)], markersize=5.5, linestyle=line,
            markevery=max(every, 1), label=one.name,
        )  # fmt: skip
        if one.y_error:
            axes.errorbar(xs, ys, yerr=[one.y_error[i] or 0.0 for i in keep], fmt="none", ecolor=colour, capsize=2)
        if one.labels:
            labels += [(x, y, one.labels[i], colour) for x, y, i in zip(xs, ys, keep, strict=True)]
    axes.margins(x=0.08, y=0.12)
    if y_from_zero:
        axes.set_ylim(0.0, 1.06 * axes.get_ylim()[1])
    _finish_axes(axes, x_label=x_label, y_label=y_label, title=title, log_x=log_x, log_y=log_y)
    if len(series) > 1:
        _outside_legend(figure, axes)
    _place_labels(figure, axes, labels)
    return figure_svg(figure)


def _place_labels(figure: "Figure", axes: "Axes", labels: list[tuple[float, float, str, str]]) -> None:
    """Writes each label on the first free side of its point; a label with no free side is left out."""
    if not labels:
        return
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    points = [axes.transData.transform((x, y)) for x, y, _, _ in labels]
    taken: list[Bbox] = []
    for (x, y, text, colour), own in zip(labels, points, strict=True):
        for dx, dy, ha, va in _LABEL_SIDES:
            note = axes.annotate(
                text,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                color=colour,
                fontsize=_LABEL_PT,
                parse_math=False,
                annotation_clip=False,
            )
            box = note.get_window_extent(renderer)
            others = (p for p in points if p is not own)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            clear = not any(box.overlaps(t) for t in taken) and not any(box.contains(*p) for p in others)
            if inside and clear:
                taken.append(box)
                break
            note.remove()
