"""What a person sees: progress while a study runs, tables when it is done."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from kdexp.config import Recipe, Selection, Size, Variant
from kdexp.distill import models
from kdexp.distill.datasets import Inspection
from kdexp.distill.deploy import available
from kdexp.distill.folders import listed
from kdexp.distill.images import shown
from kdexp.distill.logits import CacheProgress
from kdexp.distill.teacher import CachedTeacher, WeightsRead
from kdexp.distill.train import EpochReport
from kdexp.runs import describe
from kdexp.runs.describe import duration, short_on_test
from kdexp.runs.outcome import Outcome
from kdexp.search.check import Check, Looked, Study, Teaching
from kdexp.search.scheduler import TrialTaken, WorkerLost
from kdexp.search.study import IN_VAIN
from kdexp.search.sweep import (
    EpochDone,
    Misremembered,
    NothingLeft,
    TeacherReady,
    TrialFailed,
    TrialFinished,
    TrialGivenUp,
    TrialSkipped,
    TrialStarted,
)
from kdexp.select.benchmark import Benchmark, Form
from kdexp.select.confirm import Confirmation, Verdict
from kdexp.select.export import Exported
from kdexp.select.fresh import Elsewhere, Retraining, SeedDone
from kdexp.select.listing import StudyRow, TrialRow
from kdexp.select.predict import Predictions, Reading
from kdexp.select.promote import Promotion, load_call
from kdexp.select.reproduce import Checked, Comparison, Difference
from kdexp.select.status import Status, in_words
from kdexp.selection import (
    AS_TRAINED,
    LEVEL,
    Candidate,
    clears,
    passes,
    requirement,
    said,
    size_of,
    standing,
)
from kdexp.urls import sqlite_file
from kdexp.workers.pool import PoolSize

__all__ = [
    "Screen",
    "differences_table",
    "interval",
    "percent",
    "show_benchmark",
    "show_comparison",
    "show_confirmation",
    "show_export",
    "show_predictions",
    "show_promotion",
    "show_status",
    "show_studies",
    "show_trials",
    "teacher_line",
    "trials_table",
    "watch_status",
]

ROWS = 20  # trials shown; the rest are in the UI
WATCH_SECONDS = 5.0


class Screen:
    """Live progress on a terminal, with a bar for each training under way; one line per trial
    elsewhere.
    """

    def __init__(
        self,
        console: Console,
        trials: int | None = None,
        rule: Selection | None = None,
        repeats: bool = False,
    ) -> None:
        """`repeats`: whether a trial that meets the bar is trained again until it is sure."""
        self.console, self.trials, self.rule, self.repeats = console, trials, rule, repeats
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.study: TaskID | None = None
        self.bars: dict[int | None, TaskID] = {}
        """By trial number; None is a training outside a study, such as the teacher's."""
        self.labels: dict[int | None, str] = {}
        self.shares: dict[int | None, float] = {}
        """How far the trials under way are, 0 to 1."""
        self.skipped: list[TrialSkipped] = []
        """Not trained since the last line about it."""
        self.read: Inspection | None = None
        """What was last said of the images."""
        self.done = 0
        self.best: Outcome | None = None
        self.smallest: int | None = None

    def __enter__(self) -> Screen:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def show(self, event: Any) -> None:
        """Show one event of a sweep, a training or a reproduction."""
        match event:
            case TeacherReady():
                self._end(None)
                self.console.print(teacher_line(event.prepared.teacher))
                self.done = event.done
                self.study = self.progress.add_task(
                    "study", total=self.trials, completed=event.done, note=""
                )
            case PoolSize():
                if self.done < (self.trials or 0):
                    self.console.print(_pool_line(event))
            case TrialStarted():
                self._not_trained()
                self._end(None)  # the teacher of its fold
                again = (
                    ""
                    if not event.retried
                    else f" (from epoch {event.epoch + 1})"
                    if event.epoch
                    else " (again)"
                )
                what = (
                    _values(event.recipe)
                    if event.repeats is None
                    else f"repeats trial {event.repeats} on fold {event.recipe.data.fold}"
                )
                self.labels[event.number] = f"trial {event.number:<3} {what:<42}{again}"
            case EpochDone():
                self._epoch(event.report, event.number)
            case Inspection():
                self._read(event)
            case EpochReport():
                self._epoch(event, None)
            case CacheProgress():
                self._step(None, "teacher's logits", event.done, event.rows, f"{event.per}s")
            case Reading():
                self._step(None, "images", event.done, event.total, "")
            case Looked():
                self._looked(event)
            case WeightsRead():
                self.console.print(f"weights   {event.said}", markup=False)
            case TrialFinished():
                self._finished(event)
            case TrialSkipped():
                self.skipped.append(event)
            case NothingLeft():
                self._not_trained()
                self.console.print(_nothing_left(event), style="yellow")
            case Misremembered():
                self.console.print(_misremembered(event), style="yellow", markup=False)
            case TrialGivenUp():
                self.done = max(self.done, event.done)
                self.console.print(
                    f"trial {event.number:<3} {_values(event.recipe)}  [yellow]given up[/]:"
                    f" {event.why}"
                )
            case Retraining():
                self._retraining(event)
            case SeedDone():
                self._seed_done(event)
            case Elsewhere():
                self.console.print(
                    f"seed {event.number} is left to another command: waiting for it"
                )
            case Verdict():
                said = "[green]confirmed[/]" if event.confirmed else "[yellow]not confirmed[/]"
                self.console.print(
                    f"trial {event.candidate.trial}  val {event}  {said}"
                    f" ({requirement(event.rule)})"
                )
            case Checked(differences=()):
                self.console.print(
                    "checked   code, libraries, machine, data and teacher are as recorded"
                )
            case Checked(differences=found):
                self.console.print(differences_table(found))
            case TrialFailed():
                self._end(event.number)
                self.console.print(
                    f"trial {event.number} failed: {event.why}", style="yellow", markup=False
                )
            case TrialTaken():
                self._end(event.number)
                self.console.print(
                    f"trial {event.number} was taken over by another command while this one was cut"
                    " off: what was trained of it here is dropped",
                    style="yellow",
                )
            case WorkerLost():
                for trial in event.trials:
                    self._end(trial)
                self.console.print(str(event), style="yellow", markup=False)

    def _epoch(self, report: EpochReport, trial: int | None) -> None:
        note = f"val {percent(report.val_accuracy)}  loss {report.loss:.3f}"
        label = self.labels.get(trial, "teacher" if self.study is not None else "training")
        self._step(trial, label, report.epoch, report.epochs, note)
        if self.study is not None:
            if trial is not None:
                self.shares[trial] = report.epoch / report.epochs
            self.progress.update(self.study, completed=self.done + sum(self.shares.values()))
        elif not self.console.is_terminal:
            self.console.print(
                f"epoch {report.epoch}/{report.epochs}  {note}  {report.seconds:.1f} s"
            )

    def _read(self, event: Inspection) -> None:
        """What was read of an image folder; once, where it is read again."""
        if event != self.read:
            self.console.print(f"images    {event}", markup=False, soft_wrap=True)
            for note in event.notes:
                self.console.print(
                    f"          {note}", style="yellow", markup=False, soft_wrap=True
                )
        self.read = event

    def _finished(self, event: TrialFinished) -> None:
        # workers' news may overtake each other
        result, self.done = event.outcome, max(self.done, event.done)
        self._end(event.number)
        state = (
            ""
            if result.state == "complete"
            else f"  [yellow]{result.state} after {result.epochs} epochs[/]"
        )
        label, found = self.labels.pop(event.number), event.sureness
        self.console.print(
            f"{label}  {result.size.parameters:>9,} parameters  val"
            f" {percent(result.val_accuracy)}{state}{f'  {said(found)}' if found else ''}"
        )
        if self.best is None or result.val_accuracy > self.best.val_accuracy:
            self.best = result
        if self.rule and self._passes(event, self.rule):
            size = int(getattr(result.size, self.rule.size))
            if size <= min(self.rule.limit or size, self.smallest or size):
                self.smallest = size
        what = "smallest sure" if self.repeats else "smallest over the bar"
        small = f", {what} {self.smallest:,}" if self.smallest else ""
        if self.study is not None:
            note = f"best val {percent(self.best.val_accuracy)}{small}"
            self.progress.update(
                self.study, completed=self.done + sum(self.shares.values()), note=note
            )

    def _passes(self, event: TrialFinished, rule: Selection) -> bool:
        if self.repeats:
            return event.sureness is not None and event.sureness.state == "sure"
        return clears(event.outcome.val_accuracy, event.outcome.val_samples, rule)

    def _retraining(self, event: Retraining) -> None:
        """A bar for the seeds of a candidate, in the place of the one before."""
        if self.study is not None:
            self.progress.remove_task(self.study)
        self.done = 0
        self.labels = {number + 1: f"seed {number + 1}" for number in range(event.seeds)}
        self.study = self.progress.add_task(
            f"trial {event.candidate.trial}", total=event.seeds, note="fresh seeds"
        )
        self.console.print(
            f"trial {event.candidate.trial}  {event.candidate.parameters:,} parameters, again with"
            f" {event.seeds} fresh seeds, trained on {event.images}"
        )

    def _seed_done(self, event: SeedDone) -> None:
        assert self.study is not None
        self.done += 1
        self._end(None)  # the teacher, where it had to be made ready first
        self._end(event.number)
        accuracy = event.run.metrics.get("val_accuracy")
        val = f"val {percent(accuracy)}" if accuracy is not None else "done"
        state = "  [yellow]diverged[/]" if event.run.tags.get("kdexp.state") == "diverged" else ""
        self.console.print(
            f"seed {event.number}  {val}{state}{'' if event.new else '  (trained before)'}"
        )
        self.progress.update(self.study, completed=self.done)

    def _not_trained(self) -> None:
        """Proposals come in crowds: one line for all since the last."""
        if self.skipped:
            proposals = "1 proposal" if len(self.skipped) == 1 else f"{len(self.skipped)} proposals"
            self.console.print(
                f"          {proposals} not trained: {self.skipped[-1].why}", style="dim"
            )
            self.skipped.clear()

    def _step(self, trial: int | None, label: str, done: int, total: int, note: str) -> None:
        if trial not in self.bars:
            self.bars[trial] = self.progress.add_task(label, total=total, note=note)
        self.progress.update(
            self.bars[trial], description=label, completed=done, total=total, note=note
        )

    def _looked(self, event: Looked) -> None:
        """A line that goes when the answer is there."""
        self._end(None)
        self.bars[None] = self.progress.add_task(f"looking at {event.what}", total=None, note="")

    def _end(self, trial: int | None) -> None:
        """A training is over: take its bar away."""
        self.shares.pop(trial, None)
        if trial in self.bars:
            self.progress.remove_task(self.bars.pop(trial))


def percent(share: float) -> str:
    """0.9312 as '93.12 %'."""
    return f"{100 * share:.2f} %"


def teacher_line(teacher: CachedTeacher) -> str:
    """The teacher in one line."""
    rows = len(teacher.soft.logits)
    return (
        f"teacher   {teacher.parameters:,} parameters, val {percent(teacher.val_accuracy)}, "
        f"{rows} {teacher.soft.per}{'s' if rows > 1 else ''} cached, sha256 {teacher.sha256[:12]}"
    )


def _pool_line(size: PoolSize) -> str:
    workers, threads = (
        f"{n} {what}{'s' if n > 1 else ''}"
        for n, what in ((size.workers, "worker"), (size.threads, "thread"))
    )
    return f"workers   {workers}, {threads}{' each' if size.workers > 1 else ''}"


def _misremembered(event: Misremembered) -> str:
    which = f"trial{'s' if len(event.trials) > 1 else ''} {', '.join(map(str, event.trials))}"
    return (
        f"Optuna's storage holds something else of {which} than the run in MLflow: the search goes"
        " on by what it holds, every verdict rests on the run (kdexp reproduce says whether that"
        " is true)"
    )


def _nothing_left(event: NothingLeft) -> str:
    than = (
        f"smaller than trial {event.smallest.trial}'s {event.smallest.size:,}"
        if event.smallest
        else "new"
    )
    return (
        f"Of the last {IN_VAIN} proposals none was {than}: the study ends after {event.done}"
        " trials."
    )


def trials_table(trials: Sequence[Candidate], rule: Selection, selected: Candidate | None) -> Table:
    """The trials, smallest first, those over the bar marked."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    varied = any(c.variant != AS_TRAINED for c in trials)
    units: list[Size] = ["parameters", *([rule.size] if rule.size != "parameters" else [])]
    for name in (
        "trial",
        *(["variant"] if varied else []),
        *(unit.replace("_", "-") for unit in units),
        "val accuracy",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(requirement(rule), no_wrap=True)
    table.add_column("run ID", no_wrap=True)
    shown = sorted(
        trials, key=lambda c: (not passes(c, rule), size_of(c, rule.size), -c.val_accuracy)
    )[:ROWS]
    for c in sorted(shown, key=lambda c: (size_of(c, rule.size), -c.val_accuracy)):
        mark = standing(c, rule)
        if c == selected:
            mark = "selected" if mark == "yes" else f"{mark} (selected)"
        first = (
            str(c.trial),
            *([c.variant] if varied else []),
            *(f"{size_of(c, unit):,}" for unit in units),
        )
        style = "bold green" if c == selected else None
        table.add_row(*first, percent(c.val_accuracy), mark, c.run_id, style=style)
    # where a terminal is narrower it breaks lines; no run ID is cut
    table.width = Console(width=1000).measure(table).maximum
    return table


def show_promotion(console: Console, done: Promotion, tracking: str) -> None:
    """The table, what distillation gained, the selected model, and the next commands."""
    trials, chosen = done.trials, done.candidate
    console.print()
    console.print(trials_table(trials, done.rule, chosen))
    if len(trials) > ROWS:
        console.print(f"({len(trials) - ROWS} more trials in the UI)")
    console.print()
    if done.gain:
        console.print(
            f"Distillation: trial 0 (documented defaults) over trial 1 (labels only). {done.gain}"
        )
    if done.rule.size == "bytes" and not available():
        hint = (
            "Smaller variants of the trials do not compete, they need ONNX: pip install"
            " 'kdexp[export]'"
        )
        console.print(hint, markup=False)
    variant = "" if chosen.variant == AS_TRAINED else f" as {chosen.variant}, folded"
    again = done.test_repeats is not None
    look = "looked at once" if done.new_look else "recorded when it was first looked at"
    console.print(
        f"Selected: trial {chosen.trial}{variant}, {_sizes(chosen)}\n"
        f"{_sure_lines(done)}"
        f"{'Model:    the first of them: ' if again else '          '}"
        f"val accuracy  {percent(done.val_accuracy)}"
        f" (95 % interval {interval(done.val_interval)})\n"
        f"          test accuracy {percent(done.test_accuracy)}"
        f" (95 % interval {interval(done.test_interval)}, {done.test_samples:,} images, {look})\n"
        f"{_tta_line(done.test_accuracy_tta)}Run ID:   {done.run_id}",
        style="bold",
    )
    if chosen.verdict is None and done.rule.goal == "smallest":
        console.print(
            "Not sure: one training met the bar, it may have been the luckiest of many.",
            style="yellow",
        )
    short = short_on_test(done.rule, done.test_accuracy, done.test_samples, done.test_repeats)
    if short:
        console.print(short, style="yellow")
    _note_looks(console, done.looks)
    console.print(
        "\nNext:     kdexp ui                    browse the study in MLflow\n"
        f"          kdexp report {shlex.quote(done.study)}   the answer on one page, as a file\n"
        f"          kdexp reproduce {done.run_id}\n"
        f"{_load_line(tracking, done.model, done.candidate.variant)}"
        + (
            ""
            if chosen.verdict
            else f"\n          kdexp confirm {shlex.quote(done.study)}"
            "   was it luck? the same with fresh seeds"
        ),
        markup=False,
    )


def show_confirmation(console: Console, done: Confirmation, tracking: str) -> None:
    """The confirmed recipe, its models' look at test, and the next commands."""
    chosen, runs = done.verdict.candidate, ", ".join(run.run_id for run in done.runs)
    tta = f"\n          flip TTA      {done.tta}" if done.tta else ""
    console.print(
        f"\nConfirmed: trial {chosen.trial}, {_sizes(chosen)}\n"
        f"          val accuracy  {done.verdict}\n"
        f"          test accuracy {done.test} ({done.test.samples:,} images,"
        f" each model looked at once, trained on {done.images}){tta}\n"
        f"Run IDs:  {runs}",
        style="bold",
    )
    _note_looks(console, done.looks)
    console.print(
        f"\nNext:     kdexp reproduce {done.runs[0].run_id}\n{_load_line(tracking, done.model)}",
        markup=False,
    )


def _sure_lines(done: Promotion) -> str:
    """What its repeats say, on the folds they held out and on test."""
    found, test = done.candidate.verdict, done.test_repeats
    if found is None or test is None:
        return ""
    level = 100 * (done.rule.confidence or LEVEL)
    spread = f" ± {100 * test.sd:.2f}" if len(test.correct) > 1 else ""
    return (
        f"Sure:     {said(found)}: at {level:g} % above {percent(found.low)}"
        f" (bar {percent(done.rule.accuracy_bar)})\n"
        f"          on test {100 * test.mean:.2f}{spread} % over the"
        f" {len(test.correct)} repeats, each model looked at once\n"
    )


def _sizes(size: models.Size | Candidate) -> str:
    return (
        f"{size.parameters:,} parameters, {size.multiply_adds:,} multiply-adds,"
        f" {size.bytes:,} bytes"
    )


def _tta_line(accuracy: float | None) -> str:
    return (
        f"          flip TTA      {percent(accuracy)} on test, never used in choosing\n"
        if accuracy is not None
        else ""
    )


def _load_line(tracking: str, model: str, variant: Variant = AS_TRAINED) -> str:
    if model:
        place = json.dumps(tracking, ensure_ascii=False)  # also a literal of Python's
        file, call = sqlite_file(tracking), load_call(model, variant)
        # MLflow would decode the path once more, where it does not copy
        if file and unquote(str(file)) != str(file):
            call = f'{call.removesuffix(")")}, dst_path=__import__("tempfile").mkdtemp())'
        return f"          mlflow.set_tracking_uri({place}); {call}   in Python"
    return "(not registered: torch.export cannot export this network; its weights are in the run)"


def _note_looks(console: Console, looks: int) -> None:
    if looks > 1:
        console.print(
            f"Note: {looks} models of this study have now been looked at on test; choosing between"
            " them by those numbers would make the test set a validation set.",
            style="yellow",
        )


def show_export(console: Console, done: Exported) -> None:
    """The file, its sizes, and its accuracy beside that of the student as it was trained."""
    found = done.validation
    seen = "" if done.held_out else " on images that it was trained on"
    accuracy = f"{percent(found.accuracy)} (95 % interval {interval(found.interval)})"
    shape = ", ".join(map(str, done.shape))
    console.print(
        f"Written:  {done.file}, {done.file_bytes:,} bytes\n"
        f"          {_sizes(done.size)} of weights\n"
        f"          val accuracy {accuracy}{seen}, measured by running the file;"
        f" as trained {percent(done.trained_accuracy)}\n\n"
        f'Next:     onnxruntime.InferenceSession("{done.file}").run(None, {{"pixels": images}})'
        "   in Python\n"
        f"          images: uint8, 0 to 255, of shape (any number, {shape})",
        markup=False,
    )


def show_predictions(console: Console, done: Predictions, file: Path | None) -> None:
    """A row for each image where they are few, what could not be read, and how many of each class
    there are.
    """
    if len(done.rows) <= ROWS:
        console.print(_predictions_table(done))
        console.print()
    for line in done.unreadable[:ROWS]:
        console.print(f"not read  {line}", style="yellow", markup=False)
    if len(done.unreadable) > ROWS:
        console.print(f"not read  and {len(done.unreadable) - ROWS:,} more", style="yellow")
    for note in done.notes:
        console.print(f"          {note}", style="yellow", markup=False)
    counts = sorted(done.counts.items(), key=lambda pair: -pair[1])
    broken = f", {len(done.unreadable):,} not read" if done.unreadable else ""
    console.print(
        f"Images:   {len(done.rows):,}{broken}{_left_out(done.left_out)}\n"
        f"Answers:  {', '.join(f'{count:,} × {name}' for name, count in counts)}\n"
        f"Student:  run {done.run_id}, {done.variant}",
        markup=False,
    )
    if file:
        console.print(f"Written:  {shown(file)}, {len(done.rows):,} rows", markup=False)
    elif len(done.rows) > ROWS:
        console.print("Each image by itself: --out predictions.csv")


def _left_out(kinds: Mapping[str, int]) -> str:
    listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    return f", {sum(kinds.values()):,} left out: {listed}" if kinds else ""


def _predictions_table(done: Predictions) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("image", "label", "probability", "second label", "probability"):
        right = name == "probability"
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in done.rows:  # Text: names may hold what rich takes for markup
        first = (Text(row.path), Text(row.label), percent(row.probability))
        table.add_row(*first, Text(row.second_label), percent(row.second_probability))
    table.width = Console(width=1000).measure(table).maximum
    return table


def show_benchmark(console: Console, done: Benchmark) -> None:
    """The forms side by side, what the numbers are, and what may have to be installed."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("form", no_wrap=True)
    for name in BENCHMARK:
        table.add_column(name, justify="right", no_wrap=True)
    for form in done.forms:
        style = "bold green" if form == done.chosen else None
        table.add_row(form.variant, *_form_cells(done, form), style=style)
    table.width = Console(width=1000).measure(table).maximum
    console.print(table)
    seen = "" if done.held_out else " on images that it was trained on"
    chosen = done.chosen
    console.print(
        f"\nChosen:   {chosen.variant}: val accuracy {percent(chosen.accuracy)} (95 % interval"
        f" {interval(done.interval(chosen))}, {done.samples:,} images){seen}\n"
        "          activations: the most that are live at once for one image, in float32\n"
        "          p50, p90: for one image; images a second: 100 at once; measured now, on one"
        " thread\n"
        f"Run ID:   {done.run_id}",
        markup=False,
    )
    if done.missing:
        console.print(f"Not here: {done.missing}", style="yellow", markup=False)


def show_studies(console: Console, rows: Sequence[StudyRow]) -> None:
    """A line for each study of the store: how far it is, and what it selected."""
    if not rows:
        console.print("No study there yet: kdexp sweep sweeps/digits.yaml")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("study", no_wrap=True)
    for name in ("trials", "bar", "selected parameters", "val accuracy", "test accuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("run ID", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(row.study),
            f"{row.trials}",
            _percent_or_nothing(row.accuracy_bar),
            "" if row.selected_parameters is None else f"{row.selected_parameters:,}",
            _percent_or_nothing(row.selected_val_accuracy),
            _percent_or_nothing(row.selected_test_accuracy),
            row.run_id,
        )
    _print_whole(console, table)


def show_status(console: Console, found: Sequence[Status]) -> None:
    """How studies stand: how far, who is at it, what is sure so far, how long yet."""
    console.print(in_words(found), markup=False, soft_wrap=True)


def watch_status(console: Console, look: Callable[[], Sequence[Status]]) -> None:
    """The same, looked at anew every few seconds, until all are finished or Ctrl-C."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found = look()
            live.update(Text(in_words(found)), refresh=True)
            if all(each.state == "finished" for each in found):
                return
            time.sleep(WATCH_SECONDS)


def show_trials(console: Console, rows: Sequence[TrialRow]) -> None:
    """A line for each trial of a study, smallest first, those without a size last."""
    if not rows:
        console.print("No trial of this study has begun.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    searched = list(dict.fromkeys(path for row in rows for path in row.searched))
    for name in ("trial", *(path.rpartition(".")[2] for path in searched), "parameters"):
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for name in ("val accuracy", "test accuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("state", "meets the bar", "run ID"):
        table.add_column(name, no_wrap=True)
    for row in sorted(rows, key=_smallest_first):
        table.add_row(
            str(row.trial),
            *(Text(_short(row.searched.get(path))) for path in searched),
            "" if row.parameters is None else f"{row.parameters:,}",
            _percent_or_nothing(row.val_accuracy),
            _percent_or_nothing(row.test_accuracy),
            row.state,
            row.standing if row.repeats is None else f"repeats trial {row.repeats}",
            row.run_id,
        )
    _print_whole(console, table)


def _smallest_first(row: TrialRow) -> tuple[float, float, int]:
    return (row.parameters or math.inf, -(row.val_accuracy or 0), row.trial)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def _percent_or_nothing(share: float | None) -> str:
    return "" if share is None else percent(share)


def _print_whole(console: Console, table: Table) -> None:
    """A narrow terminal breaks its lines; nothing in it is cut."""
    table.width = Console(width=1000).measure(table).maximum
    console.print(table)


BENCHMARK = (
    "bytes",
    "file bytes",
    "multiply-adds",
    "activations",
    "val accuracy",
    "points over as trained",
    "same answers",
    "p50",
    "p90",
    "images/s",
)


def _form_cells(done: Benchmark, form: Form) -> tuple[str, ...]:
    difference, (low, high) = done.against(form)
    points = f"{100 * difference:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
    return (
        f"{form.bytes:,}",
        f"{form.file_bytes:,}",
        f"{form.multiply_adds:,}",
        "?" if form.activation_bytes is None else f"{form.activation_bytes:,}",
        percent(form.accuracy),
        "" if form.variant == AS_TRAINED else points,
        "" if form.variant == AS_TRAINED else percent(form.same),
        f"{1e3 * form.latency.p50:.3f} ms",
        f"{1e3 * form.latency.p90:.3f} ms",
        f"{form.latency.images_a_second:,.0f}",
    )


def differences_table(differences: Sequence[Difference]) -> Table:
    """What differs between a run and its reproduction, the first ones of many."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("differs", "original", "here"):
        table.add_column(name)
    for difference in differences[:ROWS]:
        table.add_row(difference.what, difference.original, difference.again)
    return table


def show_comparison(console: Console, done: Comparison, tolerance: float | None) -> None:
    """What is equal, what differs, what could not be compared, and where both runs are."""
    if done.identical:
        weights = f" and the SHA-256 of the weights ({done.weights[:16]}…)" if done.weights else ""
        console.print(
            f"identical: {done.compared} metric values{weights} are equal, bit for bit",
            style="bold green",
        )
        console.print(f"as are    {', '.join(done.covered)}", markup=False)
    elif done.within(tolerance):
        text = (
            f"within tolerance: {done.compared} metric values differ by at most {done.largest:.3g}"
        )
        console.print(text, style="bold green")
    if done.differences:
        console.print(differences_table(done.differences))
    for what, names in (
        ("not recorded", done.unrecorded),
        ("not known to this version", done.unknown),
    ):
        if names:
            console.print(f"{what}: {', '.join(names)}", style="yellow", markup=False)
    for note in done.notes:
        console.print(note, style="yellow", markup=False)
    console.print(f"original  {done.original.run_id}\nagain     {done.again.run_id}")


def show_check(console: Console, done: Check) -> None:
    """What a sweep would do, part by part."""
    images, sweep = done.images, done.sweep
    height, width = images.size
    where = f" in {sweep.data.path}" if sweep.data.path else ""
    lines = [
        f"images    {sweep.data.dataset}{where}: {images.training:,} training,"
        f" {images.validation:,} validation, {images.test:,} test",
        f"          {height} x {width} pixels, {_count(images.channels, 'channel')}",
        f"          {len(images.classes)} classes: {listed(images.classes)}",
        f"          the smallest is {images.smallest}: {_count(images.fewest, 'training image')}",
        *_teacher_lines(done.teaching, describe.named(sweep.teacher), sweep.teacher.members),
        f"trial 0   {' '.join(_values(sweep.recipe).split())},"
        f" {_count(done.largest.epochs, 'epoch')}, batch {sweep.training.batch_size},"
        f" {sweep.distillation.loss}",
        "",
    ]
    for line in lines:
        console.print(line, markup=False)
    console.print(_students_table(done))
    console.print(f"\n{_sizes_line(done)}", markup=False)
    console.print(_machine_lines(done), markup=False)
    for line in _study_lines(done):
        console.print(line, markup=False)
    for note in done.notes:
        console.print(f"          {note}", style="yellow", markup=False)


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def _teacher_lines(teaching: Teaching, name: str, members: int) -> list[str]:
    many = f"{members} networks, " if members > 1 else ""
    first = f"teacher   {name}, {many}{teaching.size.parameters:,} parameters"
    if teaching.networks:
        step = f" ({duration(teaching.step)} a step)" if teaching.step else ""
        what = f"{_count(teaching.networks, 'network')} to train" if members > 1 else "to train"
        found = [f"{first}: {what}{step}"]
    else:
        found = [f"{first}: there already"]
    logits = (
        f"{teaching.passes:,} images through it" if teaching.passes else "its logits are cached"
    )
    found.append(f"          {logits}; together about {duration(teaching.seconds)}")
    if teaching.others:
        found.append(
            f"          repeats hold out other folds: up to {_count(teaching.others, 'teacher')}"
            f" more, {duration(teaching.other_seconds)}"
        )
    return found


def _students_table(done: Check) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("student", no_wrap=True)
    live = done.sweep.selection.size == "activation_bytes"
    units = ["parameters", "multiply-adds", "bytes", *(["activations"] if live else [])]
    for name in (*units, "step", "training"):
        table.add_column(name, justify="right", no_wrap=True)
    for which, one in (("smallest", done.smallest), ("largest", done.largest)):
        size = one.sized.size
        memory = [f"{size.activation_bytes or 0:,}"] if live else []
        cells = (f"{size.parameters:,}", f"{size.multiply_adds:,}", f"{size.bytes:,}", *memory)
        times = duration(one.pace.step), duration(one.seconds)
        name = describe.named(one.sized.recipe.student)
        table.add_row(Text(f"{which}  {name}"), *cells, *times)
    table.width = Console(width=1000).measure(table).maximum
    return table


def _sizes_line(done: Check) -> str:
    sizes, rule = done.sizes, done.sweep.selection
    these = "students" if sizes.whole else "students looked at, of more"
    limit = (
        f"{sizes.within:,} of them within selection.limit, {rule.limit:,} {rule.size}"
        if rule.limit
        else "selection.limit is not set"
    )
    broken = f"; {sizes.unbuildable:,} cannot be built" if sizes.unbuildable else ""
    return f"search    {sizes.students:,} {these}; {limit}{broken}"


def _machine_lines(done: Check) -> str:
    how = done.largest.how
    compiled = "compiled" if how.compiled else "not compiled"
    packed = f", {done.pack} trials as one" if done.pack > 1 else ""
    memory = (
        f"\n          about {done.memory / 2**20:,.0f} MiB each: measured on a few images, and all"
        " added"
        if done.memory
        else ""
    )
    return f"{_pool_line(done.pool)}{packed}; {compiled}, {how.precision}{memory}"


def _study_lines(done: Check) -> list[str]:
    study, trials = done.study, done.sweep.study.trials
    begun = f", {done.done} of them are done" if done.done else ""
    most = " at most" if done.ends_early else ""
    if done.done >= trials:
        return [f"study     {_count(trials, 'trial')}{begun}: nothing is left to train"]
    low, middle, high = study.trials
    lines = [
        f"study     {_count(trials, 'trial')}{begun}: {duration(middle)}{most}"
        f" (all the smallest {duration(low)}, the largest {duration(high)})",
        f"          {duration(study.start)} to start, {duration(done.proposal)} to propose a"
        f" trial, {duration(done.record)} to record it",
    ]
    return [*lines, _whole_study(study, most)]


def _whole_study(study: Study, most: str) -> str:
    if study.most == study.least:
        return f"in all    about {duration(study.most)}{most}"
    return (
        f"in all    about {duration(study.most)}{most} with every fold's teacher,"
        f" {duration(study.least)} with the first alone"
    )


def interval(pair: tuple[float, float]) -> str:
    """(0.8894, 0.9013) as '88.94 to 90.13 %'."""
    return f"{100 * pair[0]:.2f} to {percent(pair[1])}"


def _values(recipe: Recipe) -> str:
    student, how = recipe.student, recipe.distillation
    name = "-".join(map(str, student.channels)) if student.channels else student.architecture
    hidden = f"/{student.hidden}" if student.hidden else ""
    return (
        f"{name + hidden:<16} α {how.alpha:<5.3g} T {how.temperature:<5.3g} lr"
        f" {recipe.training.learning_rate:<8.3g}"
    )
