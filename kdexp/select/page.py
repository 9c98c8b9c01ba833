"""The report: one HTML file that answers what a study came to. It asks the network for nothing,
runs no script, and prints.

    kdexp report STUDY

report.py gathers the facts, templates/report.html says them; here numbers become text and pictures.
What people have named (networks, classes, studies) is escaped wherever it stands.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kdexp.config import Selection, Size
from kdexp.intervals import luckiest, wilson_interval
from kdexp.runs import svg
from kdexp.runs.describe import in_bytes, linked, short_on_test
from kdexp.runs.records import LONGEST_NOTE, NOTE, PARTS, log_text
from kdexp.runs.tracking import RunRecord, Tracking
from kdexp.runs.views import REPORT, artifact_page
from kdexp.select.mistakes import Mistakes
from kdexp.select.report import ENOUGH, Report, Row, Slice, gathered
from kdexp.selection import AS_TRAINED, requirement, size_of
from kdexp.settings import Settings, in_one_line

__all__ = ["html", "keep", "kept", "made"]

TEMPLATES = Path(__file__).parents[1] / "templates"
FOLDED = 300  # students of the folded table, of a study with more
DOTS = 1000  # of the frontier, and ...
FEWER = 300  # ... by its other sizes: with all three the page stays under 1 MB
FAR = 4  # times the largest student: a limit beyond is not drawn
SIZES: tuple[Size, ...] = ("parameters", "multiply_adds", "bytes")
MATRIX = 25  # classes of a confusion matrix that can be read
WORDS = {
    "confirmed": "Confirmed by fresh seeds",
    "sure": "Sure by repeats",
    "once": "One training only",
    "unseen": "Not looked at yet",
    "nothing": "Nothing meets the bar",
}
FILTERS: dict[str, Any] = {
    "percent": lambda share: f"{100 * share:.2f} %",
    "span": lambda pair: f"{100 * pair[0]:.2f} to {100 * pair[1]:.2f} %",
    "points": lambda share: f"{100 * share:+.2f}",
    "count": lambda number: f"{number:,}",
    "kb": in_bytes,
    "unit": lambda name: name.replace("_", "-"),
    "quoted": shlex.quote,
    "minutes": lambda minutes: _minutes(minutes),
}


def html(report: Report) -> str:
    """The whole page."""
    pages = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= FILTERS
    main = [row for row in report.rows if _in_front(row, report)]
    rest = [row for row in report.rows if not _in_front(row, report)]
    return pages.get_template(REPORT).render(
        r=report,
        state=_state(report),
        short=_short(report),
        required=requirement(report.rule),
        main=main,
        rest=rest[:FOLDED],
        left_out=len(rest[FOLDED:]),
        frontiers=_frontiers(report),
        lucky=_lucky(report),
        fewer=FEWER,
        trained=len(_trained(report)),
        dots=min(DOTS, len(_trained(report))),
        slices=[(one.path, _slice(one, report)) for one in report.learned.slices],
        limit_shown=_limit_shown(report),
        matrix=_matrix(report.mistakes),
        reliability=_reliability(report.mistakes),
        repeats=report.sweep.repeats,
        enough=ENOUGH,
        as_trained=AS_TRAINED,
    )


def _short(report: Report) -> str:
    """That the answer is under the bar on test; nothing where it is not, or was not looked at."""
    over, test = report.answer.over, report.answer.test
    if over:
        return short_on_test(report.rule, over.mean, over.samples)
    return short_on_test(report.rule, test.accuracy, test.images) if test and test.images else ""


def made(study: RunRecord, rule: Selection, settings: Settings, tracking: Tracking) -> str:
    """The page of a study, its model chosen by `rule`. Raises KdexpError."""
    return html(gathered(study, rule, settings, tracking))


def kept(study: RunRecord, rule: Selection, settings: Settings, tracking: Tracking) -> str:
    """Make the page and keep it with the study's run, as what a sweep leaves behind; or say in one
    line why there is none. Nothing that goes wrong here takes anything from the sweep.
    """
    try:
        with tracking.at_once():
            keep(made(study, rule, settings, tracking), study, tracking)
    except Exception as error:  # of whichever library: the model is selected, that is what counts
        again = shlex.join(["kdexp", "report", study.tags["kdexp.study"]])
        return f"No report was written: {in_one_line(error)} ({again} tries it again)"
    return ""


def keep(text: str, study: RunRecord, tracking: Tracking) -> None:
    """The page among the artifacts of the study's run, with a link in its description. Raises
    KdexpError.
    """
    log_text(study.run_id, REPORT, text, tracking)
    page = artifact_page(study.experiment_id, study.run_id, REPORT)
    tags = tracking.read(study.run_id).tags
    said = {
        tag: new[:LONGEST_NOTE]
        for tag in (NOTE, f"{PARTS}selected", f"{PARTS}confirmed")
        if tag in tags and (new := linked(tags[tag], "report", page)) != tags[tag]
    }
    if said:
        tracking.tag(study.run_id, said)


def _state(report: Report) -> str:
    """How sure the answer is, as a heading. That one training met the bar is not nothing."""
    rule = report.rule
    once = any(
        row.val.accuracy >= rule.accuracy_bar and row.sized <= (rule.limit or row.sized)
        for row in report.rows
    )
    if report.answer.state == "nothing" and once:
        return "Nothing is sure to meet the bar"
    return WORDS[report.answer.state]


def _in_front(row: Row, report: Report) -> bool:
    """Whether a student stands in the table that is not folded."""
    control = row in report.controls
    return row.frontier or control or row == report.answer.row or row.test is not None


def _trained(report: Report) -> list[Row]:
    return [row for row in report.rows if row.candidate.variant == AS_TRAINED]


def _frontiers(report: Report) -> list[tuple[str, str]]:
    """Accuracy against each size, that of the rule first. Without any trial there is none."""
    units = [report.rule.size, *(unit for unit in SIZES if unit != report.rule.size)]
    trained = bool(_trained(report))
    return [(FILTERS["unit"](unit), _frontier(unit, report)) for unit in units if trained]


def _frontier(unit: Size, report: Report) -> str:
    only = [row.val.accuracy for row in report.controls if row.candidate.trial == 1]
    rule, own = report.rule, unit == report.rule.size
    rows = _trained(report)[: DOTS if own else FEWER]
    return svg.frontier(
        [_dot(row, size_of(row.candidate, unit), report) for row in rows],
        rule.accuracy_bar,
        rule.limit if own and _limit_shown(report) else None,
        report.teacher.val.accuracy if report.teacher else None,
        only[0] if only else None,
        FILTERS["unit"](unit),
        _lucky(report),
    )


def _lucky(report: Report) -> float | None:
    """What the luckiest of the students that were trained would show, were all just at the bar."""
    rows = _trained(report)
    images = rows[0].val.images if rows else None
    return luckiest(report.rule.accuracy_bar, images, len(rows)) if images else None


def _limit_shown(report: Report) -> bool:
    """Whether the limit is near enough to be drawn: far away it would leave no room for dots."""
    rows, limit = _trained(report), report.rule.limit
    return limit is not None and bool(rows) and limit <= FAR * rows[-1].sized


def _slice(found: Slice, report: Report) -> str:
    dots = [_dot(row, value, report) for row, value in found.points[:DOTS]]
    return svg.slice_of(dots, report.rule.accuracy_bar, found.log, found.path)


def _dot(row: Row, x: float, report: Report) -> svg.Dot:
    one, chosen = row.candidate, report.answer.row
    return svg.Dot(
        x=x,
        accuracy=row.val.accuracy,
        interval=row.val.interval,
        meets=row.val.accuracy >= report.rule.accuracy_bar,
        selected=chosen is not None and chosen.candidate.trial == one.trial,
        control=row in report.controls,
        said=(
            f"trial {one.trial} · {row.network or 'network not on record'} · {one.parameters:,}"
            f" parameters · {100 * row.val.accuracy:.2f} % · run {one.run_id}"
        ),
    )


def _matrix(found: Mistakes | None) -> Sequence[tuple[str, Sequence[tuple[int, int]], int]]:
    """A confusion matrix by rows: a class, how often it was taken for each with the share in
    percent, and of how many images. Empty where nobody could read it.
    """
    if found is None or len(found.classes) > MATRIX:
        return []
    every = range(len(found.classes))
    rows = []
    for true in every:
        total = found.of_class[true]
        counts = [found.counts.get((true, taken), 0) for taken in every]
        shares = [(count, round(100 * count / total) if total else 0) for count in counts]
        rows.append((found.classes[true], shares, total))
    return rows


def _reliability(found: Mistakes | None) -> str:
    """Empty where a former version counted the mistakes."""
    if found is None or not found.bins:
        return ""
    dots = [
        svg.Dot(
            x=each.probability,
            accuracy=each.right / each.images,
            interval=wilson_interval(each.right, each.images),
            meets=True,
            selected=False,
            control=False,
            said=f"{each.right} of {each.images} right, at {100 * each.probability:.1f} %",
        )
        for each in found.bins
    ]
    return svg.reliability(dots)


def _minutes(minutes: float) -> str:
    if minutes >= 90:
        return f"{minutes / 60:.1f} hours"
    return f"{minutes:.0f} minutes" if minutes >= 2 else f"{60 * minutes:.0f} seconds"
