"""The picture of the winner's curse for the guide: one simulated study of `benchmarks.honesty`.

    python -m benchmarks.curse docs/results/honesty.png

Left, what a study sees: each student measured once. Right, what is true of the same students. The
smallest that met the bar once is marked, and the smallest that repeats are sure of.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.honesty import BAR, _options, draw
from kdexp.runs.plots import BLUE, GREEN, GREY, ORANGE

SEED = 3


def main(file: Path) -> None:
    """Draw it."""
    trained = draw(_options([]), 0.15, SEED)
    sizes = [recipe.size for recipe in trained.every]
    once = [recipe.first.accuracy for recipe in trained.every]
    trained.repeat_all()
    lucky = min((s, n) for n, (s, a) in enumerate(zip(sizes, once, strict=True)) if a >= BAR)[1]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    marks = [(lucky, ORANGE, "smallest that met the bar once")]
    if (sure := trained.sure()) is not None:
        marks.append((sure, BLUE, "smallest that its repeats are sure of"))
    for axes, accuracy, title in (
        (left, once, "measured once"),
        (right, trained.true, "true: the mean over all seeds and images"),
    ):
        _panel(axes, sizes, accuracy, title)
        for trial, colour, label in marks:
            at = sizes[trial], 100 * accuracy[trial]
            axes.plot(*at, "o", ms=13, mfc="none", mew=2, color=colour, label=label)
    left.set_ylabel("accuracy, %")
    right.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=110)


def _panel(axes: Axes, sizes: list[int], accuracy: list[float], title: str) -> None:
    axes.scatter(sizes, [100 * value for value in accuracy], s=12, color=GREY)
    axes.axhline(100 * BAR, color=GREEN, linewidth=1, label="the bar")
    axes.set(xscale="log", xlabel="parameters", title=title)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
