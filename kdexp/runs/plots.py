"""Pictures: a run's learning curves, a study's accuracy against size; and the colours of runs."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure  # the object interface: no display, no global state
from matplotlib.ticker import LogLocator, NullLocator

from kdexp.config import Selection
from kdexp.selection import Candidate, passes, requirement, size_of

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "colour", "curves", "drawing", "frontier", "save"]

# Okabe and Ito's palette: distinct also to the colour-blind.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
drawing = threading.Lock()  # Matplotlib draws in one thread at a time


def colour(over_the_bar: bool, selected: bool = False) -> dict[str, str]:
    """A trial's colour in MLflow's table and charts, as its run's tag."""
    return {"mlflow.runColor": ORANGE if selected else BLUE if over_the_bar else GREY}


def save(figure: Figure, file: Path) -> None:
    """Draw a picture into a file."""
    with drawing:
        figure.savefig(file, dpi=110)


def curves(history: Sequence[Mapping[str, float]], title: str, kept: int) -> Figure:
    """Losses on the left, validation accuracy on the right, against epochs; `kept` marks the
    weights' epoch.
    """
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) <= 30 else None
    figure = Figure(figsize=(10, 4))  # margins by hand: solving for them takes longer than drawing
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.13, top=0.84, wspace=0.18)
    losses, accuracy = figure.subplots(1, 2)
    for name, label, colour in (
        ("loss", "total", BLUE),
        ("distillation_loss", "distillation (teacher)", ORANGE),
        ("student_loss", "student (labels)", GREEN),
    ):
        losses.plot(
            epochs,
            [row[name] for row in history],
            label=label,
            color=colour,
            marker=marker,
            markersize=3,
        )
    losses.plot(
        epochs, [row["val_loss"] for row in history], "--", label="validation (labels)", color=GREY
    )
    losses.set(xlabel="epoch", yscale="log", title="losses")
    lowest, highest = losses.get_ylim()
    losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest < 1e6 * lowest else (1,)))
    losses.yaxis.set_minor_locator(NullLocator())
    # plain text: 10⁻¹ as a formula takes a quarter of the drawing
    losses.yaxis.set_major_formatter("{x:g}")
    losses.legend(frameon=False)
    accuracy.plot(
        epochs,
        [100 * row["val_accuracy"] for row in history],
        color=BLUE,
        marker=marker,
        markersize=3,
    )
    best = next((row["val_accuracy"] for row in history if row["epoch"] == kept), None)
    if best is not None:
        accuracy.plot(
            [kept], [100 * best], "o", color=ORANGE, label=f"kept: epoch {kept}, {best:.2%}"
        )
        accuracy.legend(frameon=False, loc="lower right")
    accuracy.set(xlabel="epoch", title="validation accuracy, %")
    figure.suptitle(title)
    for axes in (losses, accuracy):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def frontier(
    candidates: Sequence[Candidate],
    rule: Selection,
    selected: Candidate | None,
    marked: str = "selected",
) -> Figure:
    """Every trial by size and validation accuracy, the bar and limit as lines, the selected one
    `marked`.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, colour, group in (
        ("meets the rule", BLUE, [c for c in candidates if passes(c, rule)]),
        ("does not", GREY, [c for c in candidates if not passes(c, rule)]),
    ):
        axes.scatter(
            [size_of(c, rule.size) for c in group],
            [100 * c.val_accuracy for c in group],
            color=colour,
            label=label,
        )
    for c in candidates:
        axes.annotate(
            str(c.trial),
            (size_of(c, rule.size), 100 * c.val_accuracy),
            (4, 3),
            textcoords="offset points",
            fontsize=7,
        )
    if selected:
        axes.plot(
            size_of(selected, rule.size),
            100 * selected.val_accuracy,
            "o",
            markersize=13,
            markerfacecolor="none",
            color=ORANGE,
            label=f"{marked}: trial {selected.trial}",
        )
    axes.axhline(
        100 * rule.accuracy_bar, color=GREEN, linewidth=1, label=f"bar: {requirement(rule)}"
    )
    if rule.limit:
        axes.axvline(
            rule.limit, color=GREY, linewidth=1, linestyle="--", label=f"limit {rule.limit:,}"
        )
    axes.set(xscale="log", xlabel=rule.size.replace("_", "-"), ylabel="validation accuracy, %")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
