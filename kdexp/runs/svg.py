"""Pictures inside a page: SVG as text, the same for the same numbers, with a word on each dot.

Letters stay letters, so that the page's own fonts show them and a reader can search them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import accumulate
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from kdexp.runs.plots import BLUE, GREEN, GREY, ORANGE, drawing

__all__ = ["Dot", "frontier", "reliability", "slice_of"]

INK = "#333333"
NAMELESS = re.compile(r'<g id="[^"]*"')  # of many pictures in one page
DOTS = "dots-"


@dataclass(frozen=True)
class Dot:
    """A student: how large or what it was trained with, and its accuracy, 0 to 1."""

    x: float
    accuracy: float
    interval: tuple[float, float] | None
    meets: bool
    selected: bool
    control: bool
    said: str
    """What a pointer on it is told."""


def frontier(
    dots: Sequence[Dot],
    bar: float,
    limit: int | None,
    teacher: float | None,
    labels_only: float | None,
    unit: str,
    lucky: float | None = None,
) -> str:
    """Validation accuracy over size: the dots, the bar, the limit, and the best up to each size as
    a step line; the accuracies of the teacher and of labels only as dashed lines; between the bar
    and `lucky` a pale band.
    """
    figure, axes = _figure(9.0, 4.6)
    dots = sorted(dots, key=lambda dot: dot.x)
    axes.axhline(100 * bar, color=GREEN, linewidth=1.4, zorder=1)
    if lucky is not None:
        axes.axhspan(100 * bar, 100 * lucky, color=GREEN, alpha=0.12, linewidth=0, zorder=0)
    for dot in dots:
        if dot.interval and (dot.selected or dot.control):
            axes.plot([dot.x] * 2, _percent(dot.interval), color=GREY, linewidth=1, zorder=1)
    best = accumulate((dot.accuracy for dot in dots), max)
    (line,) = axes.step([dot.x for dot in dots], _percent(list(best)), where="post", zorder=2)
    line.set(color=BLUE, linewidth=1, alpha=0.6)
    for accuracy, colour in ((teacher, INK), (labels_only, ORANGE)):
        if accuracy is not None:
            dashed = axes.axhline(100 * accuracy, color=colour, linewidth=1, zorder=1)
            dashed.set_linestyle((0, (5, 4)))
    if limit:
        axes.axvline(limit, color=GREY, linewidth=1.2, linestyle=(0, (1, 3)), zorder=1)
    _dots(axes, dots)
    axes.set(xlabel=f"{unit} (log scale)", ylabel="validation accuracy, %")
    if dots and dots[0].x == dots[-1].x and not limit:  # one size: it stands in the middle
        axes.set_xlim(dots[0].x / 2, 2 * dots[0].x)
    _log(axes)
    return _text(figure, f"frontier {unit}", dots)


def slice_of(dots: Sequence[Dot], bar: float, log: bool, name: str) -> str:
    """Validation accuracy over one searched number."""
    figure, axes = _figure(4.4, 3.0)
    axes.axhline(100 * bar, color=GREEN, linewidth=1.4, zorder=1)
    _dots(axes, dots)
    axes.set(xlabel=name, ylabel="validation accuracy, %")
    if log:
        _log(axes)
    return _text(figure, name, dots)


def reliability(dots: Sequence[Dot]) -> str:
    """Share of right answers over the probability that they were given, with the line where both
    are equal.
    """
    figure, axes = _figure(4.4, 3.4)
    axes.plot([0, 100], [0, 100], color=GREEN, linewidth=1.4, zorder=1)
    for dot in dots:
        if dot.interval:
            axes.plot([100 * dot.x] * 2, _percent(dot.interval), color=GREY, linewidth=1, zorder=1)
    placed = [replace(dot, x=100 * dot.x) for dot in dots]
    _dots(axes, placed)
    axes.set(xlabel="probability of the answer, %", ylabel="right answers, %")
    axes.set(xlim=(0, 103), ylim=(0, 103))
    return _text(figure, "reliability", placed)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))  # margins by hand, in inches
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    figure.subplots_adjust(
        left=0.62 / width, right=1 - 0.12 / width, bottom=0.52 / height, top=1 - 0.1 / height
    )
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, width=0.6)
    return figure, axes


def _groups(dots: Sequence[Dot]) -> list[tuple[bool, bool, list[Dot]]]:
    """Whether they meet the bar, whether they are controls, and which they are, in the order in
    which they are drawn.
    """
    kinds = ((False, False), (True, False), (False, True), (True, True))
    of = [(*kind, [dot for dot in dots if (dot.meets, dot.control) == kind]) for kind in kinds]
    return [group for group in of if group[2]]


def _dots(axes: Axes, dots: Sequence[Dot]) -> None:
    for number, (meets, control, group) in enumerate(_groups(dots)):
        # a line's marks, not a scatter: each is one short element, in this order
        axes.plot(
            [dot.x for dot in group],
            _percent([dot.accuracy for dot in group]),
            linestyle="none",
            marker="D" if control else "o",
            markersize=5.5 if control else 5,
            color=BLUE if meets else GREY,
            markeredgecolor=INK if control else "white",
            markeredgewidth=1 if control else 0.5,
            zorder=4,
            gid=f"{DOTS}{number}",
        )
    for dot in dots:
        if dot.selected:
            (ring,) = axes.plot(dot.x, 100 * dot.accuracy, "o", markersize=12, zorder=3)
            ring.set(markerfacecolor="none", markeredgecolor=ORANGE, markeredgewidth=2.2)


def _log(axes: Axes) -> None:
    axes.set_xscale("log")
    lowest, highest = axes.get_xlim()
    few = highest < 100 * lowest
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axes.xaxis.set_minor_locator(NullLocator() if few else LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.12g}")


def _percent(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


def _text(figure: Figure, name: str, dots: Sequence[Dot]) -> str:
    """The picture without the file's head and without names that would stand twice in a page."""
    stream = io.StringIO()
    # letters stay letters; by the salt no two pictures of a page share the name of a part
    own: Any = {"svg.fonttype": "none", "svg.hashsalt": name}
    with drawing, matplotlib.rc_context(own):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    whole = stream.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", whole[whole.index("<svg") :], flags=re.S)
    for number, (_, _, group) in enumerate(_groups(dots)):
        drawn = _told(drawn, f'<g id="{DOTS}{number}">', [dot.said for dot in group])
    drawn = re.sub(r"<!--.*?-->", "", NAMELESS.sub("<g", drawn), flags=re.S)
    drawn = re.sub(r"<style.*?</style>", "", drawn, flags=re.S)  # the page has one for all
    drawn = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", drawn, count=1)
    drawn = re.sub(r"font-family: [^;\"]+;", "", drawn)
    return re.sub(r"\n\s*", "\n", drawn)


def _told(drawn: str, mark: str, said: Sequence[str]) -> str:
    """The picture with a title in each dot of a group, in their order."""
    head, _, rest = drawn.partition(mark)
    uses, end = re.split(r"(?<=</g>)\s*</g>", rest, maxsplit=1)
    style = re.search(r'<use [^>]*(style="[^"]*")/>', uses)  # the same for all: once is enough
    words = iter(said)
    titled = re.sub(
        r"<use ([^>]*?)(?: style=\"[^\"]*\")?/>",
        lambda use: f"<use {use[1]}><title>{escape(next(words))}</title></use>",
        uses,
    )
    return f"{head}<g {style[1] if style else ''}>{titled}</g>{end}"
