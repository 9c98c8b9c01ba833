"""What a study comes to, gathered for one page: its answer, what that was chosen from, how sure it
is, what it cost, how to do it again.

Everything is read from the records, by the functions that select, judge and describe elsewhere.
Nothing is trained, measured or looked at; what no record holds is left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import yaml

from kdexp import KdexpError, __version__
from kdexp.config import CONTROLS, Precision, Range, Recipe, Selection, Sweep, Variant
from kdexp.distill.inputs import Input
from kdexp.distill.models import Size
from kdexp.intervals import wilson_interval
from kdexp.repeats import Verdict
from kdexp.runs.describe import named
from kdexp.runs.records import REPEATS, environment_of_run, input_of, recipe_of, values_of
from kdexp.runs.tracking import RunRecord, Tracking, TrackingAway, TrackingGone
from kdexp.search.learned import importances, not_trained
from kdexp.select.benchmark import Timed, timed
from kdexp.select.fresh import TRAIN_ONLY
from kdexp.select.mistakes import Mistakes, mistakes_of
from kdexp.select.promote import (
    candidates_of,
    ended,
    gain,
    its_repeats,
    load_call,
    looks,
    measured,
    sweep_of,
    under,
)
from kdexp.select.variants import metrics_of, prefix_of
from kdexp.selection import (
    AS_TRAINED,
    LEVEL,
    Candidate,
    FreshSeeds,
    NothingPasses,
    passes,
    rank,
    requirement,
    said,
    select,
    size_of,
    standing,
)
from kdexp.settings import Settings

__all__ = [
    "Again",
    "Answer",
    "Cost",
    "Form",
    "Learned",
    "Look",
    "Measured",
    "Report",
    "Row",
    "Slice",
    "State",
    "Teacher",
    "gathered",
]

State = Literal["confirmed", "sure", "once", "unseen", "nothing"]
"""How sure an answer is: by fresh seeds; by repeats; of one training; of one training, and not
looked at on test yet; there is none.
"""
ENOUGH = 30  # trials, for an importance to mean something
ROUNDING = 1e-9
EDGE = 3  # smallest students over the bar that share an end of a range
SLICES = ("distillation.alpha", "distillation.temperature", "training.learning_rate")


@dataclass(frozen=True)
class Measured:
    """An accuracy, its 95 % interval, and on how many images; of these None where a former version
    recorded none.
    """

    accuracy: float
    interval: tuple[float, float] | None
    images: int | None

    @classmethod
    def recorded(cls, metrics: Mapping[str, float], split: Literal["val", "test"]) -> Measured:
        """As a run's metrics hold it. Raises KeyError."""
        accuracy, images = metrics[f"{split}_accuracy"], metrics.get(f"{split}_samples")
        low, high = (metrics.get(f"{split}_accuracy_{end}") for end in ("low", "high"))
        interval = None if low is None or high is None else (low, high)
        if interval is None and images:
            interval = wilson_interval(round(accuracy * images), int(images))
        return cls(accuracy, interval, int(images) if images else None)


@dataclass(frozen=True)
class Row:
    """A student of the study, as it competes."""

    candidate: Candidate
    network: str
    val: Measured
    test: Measured | None
    """None where it was not looked at."""
    sized: int
    """Its size in the rule's unit."""
    standing: str
    """Whether it meets the bar, in a few words."""
    meets: bool
    frontier: bool
    """Whether no other is both as small and as accurate."""
    values: Mapping[str, Any]
    """What it has of what was searched, by path."""


@dataclass(frozen=True)
class Teacher:
    """The students' teacher."""

    network: str
    parameters: int | None
    val: Measured
    run_id: str


@dataclass(frozen=True)
class Answer:
    """The study's model, or why there is none."""

    state: State
    said: str
    """How sure it is, or what was nearest."""
    row: Row | None = None
    run: RunRecord | None = None
    """Of the model itself: the trial's own, or that of a repeat or fresh seed of its recipe."""
    test: Measured | None = None
    """Of that model."""
    over: FreshSeeds | None = None
    """On test, of all models that were trained by its recipe and looked at."""
    beside: tuple[str, ...] = ()
    """How it compares with the teacher and with trial 0."""


@dataclass(frozen=True)
class Form:
    """One form of the model that was measured."""

    variant: Variant
    size: Size
    val: Measured | None
    """None where its recipe held out nothing."""
    change: float | None
    """Of that accuracy against the model as trained."""


@dataclass(frozen=True)
class Look:
    """A model that was looked at on test."""

    what: str
    run_id: str
    val: Measured | None
    test: Measured


@dataclass(frozen=True)
class Slice:
    """One searched number, and what each trial came to with it."""

    path: str
    log: bool
    points: tuple[tuple[Row, float], ...]


@dataclass(frozen=True)
class Learned:
    """What the search says of the searched values."""

    complete: int
    """Recipes that were trained to the end: what all of this rests on."""
    importance: Mapping[str, float]
    """Of accuracy; empty where the trials are too few."""
    slices: tuple[Slice, ...]
    rules: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """What the study took."""

    trials: Mapping[str, int]
    """How many ended how."""
    repeats: int
    """How many of them were repeats of a recipe."""
    not_trained: int | None
    """Proposals that were not worth it; None where no record here says."""
    budget: int
    minutes: float
    finished: bool


@dataclass(frozen=True)
class Again:
    """How the model is trained, loaded, and used again."""

    address: str
    """In the registry; empty where it is not registered."""
    load: str
    """In Python; empty as well."""
    takes: Input | None
    channels: int
    """That the model as trained takes."""
    recipe: str
    """As YAML."""
    hashes: Mapping[str, str]
    versions: Mapping[str, str]
    """Of what it was trained with."""


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    study: str
    sweep: Sweep
    rule: Selection
    answer: Answer
    rows: tuple[Row, ...]
    """Smallest first."""
    teacher: Teacher | None
    gain: str
    forms: tuple[Form, ...]
    timed: Timed | None
    """How fast these were when they were last measured."""
    mistakes: Mistakes | None
    learned: Learned
    looks: tuple[Look, ...]
    looked: int
    """How many models have been looked at, repeats of one recipe counted as one."""
    tried: int
    """How many recipes were repeated."""
    confirmations: Mapping[int, str]
    """What fresh seeds said, by trial."""
    cost: Cost
    again: Again | None
    version: str = __version__

    @property
    def controls(self) -> tuple[Row, ...]:
        """Trials 0 and 1, as far as they are there."""
        trained = (row for row in self.rows if row.candidate.variant == AS_TRAINED)
        found = [row for row in trained if row.candidate.trial < CONTROLS]
        return tuple(sorted(found, key=lambda row: row.candidate.trial))


def gathered(study: RunRecord, rule: Selection, settings: Settings, tracking: Tracking) -> Report:
    """What the records say of a study, its answer chosen by `rule`. Raises KdexpError."""
    sweep = sweep_of(study, tracking)
    every = tracking.find("trial", {"mlflow.parentRunId": study.run_id}, study.experiment_id)
    runs = {run.run_id: run for run in ended(every)}
    known = under(rule, candidates_of(list(runs.values())), study, tracking)
    trials = _with_variants(known, runs)
    rows = _rows(trials, runs, sweep, rule)
    teacher = _teacher(sweep, list(runs.values()), tracking)
    fresh = _fresh_seeds(study, tracking)
    answer = _answer(study, sweep, rule, rows, runs, fresh, tracking)
    if answer.row:
        answer = replace(answer, beside=tuple(_beside(answer, rows, teacher, sweep, rule)))
    found = gain(list(runs.values()))
    return Report(
        study=study.tags["kdexp.study"],
        sweep=sweep,
        rule=rule,
        answer=answer,
        rows=rows,
        teacher=teacher,
        gain=str(found) if found else "",
        forms=_forms(answer),
        timed=timed(answer.run) if answer.run else None,
        mistakes=mistakes_of(answer.run, _variant(answer), tracking) if answer.run else None,
        learned=_learned(rows, runs, sweep, rule),
        looks=tuple(_looks(runs, fresh)),
        looked=looks(study, tracking),
        tried=sum(bool(one.repeated and one.repeated.begun) for one in known),
        confirmations={
            int(run.tags["kdexp.trial"]): run.tags["kdexp.confirmed"]
            for run in runs.values()
            if run.tags.get("kdexp.confirmed")
        },
        cost=_cost(study, sweep, every, settings),
        again=_again(study, answer, rule, settings, tracking),
    )


# --- the students ------------------------------------------------------------------------------


def _with_variants(trials: Sequence[Candidate], runs: Mapping[str, RunRecord]) -> list[Candidate]:
    """The trials, and such of their variants as were measured."""
    return [
        *trials,
        *(
            _variant_of(one, form, found)
            for one in trials
            for form in get_args(Precision)
            if {"model_bytes", "val_accuracy"}
            <= (found := metrics_of(runs[one.run_id], form)).keys()
        ),
    ]


def _variant_of(one: Candidate, form: Precision, found: Mapping[str, float]) -> Candidate:
    size = Size.recorded(found)
    return replace(
        one,
        variant=form,
        parameters=size.parameters,
        multiply_adds=size.multiply_adds,
        bytes=size.bytes,
        activation_bytes=size.activation_bytes,
        val_accuracy=found["val_accuracy"],
    )


def _rows(
    trials: Sequence[Candidate], runs: Mapping[str, RunRecord], sweep: Sweep, rule: Selection
) -> tuple[Row, ...]:
    """Every student that competes by the rule, smallest first: its variants do by their bytes."""
    competing = [c for c in trials if c.variant == AS_TRAINED or rule.size == "bytes"]
    order = sorted(
        competing, key=lambda c: (size_of(c, rule.size), -c.val_accuracy, c.trial, c.variant)
    )
    best, rows = -1.0, list[Row]()
    for one in order:
        run = runs[one.run_id]
        found = metrics_of(run, one.variant)
        values = values_of(run, sweep.search)
        rows.append(
            Row(
                candidate=one,
                network=_network(sweep, values),
                val=Measured.recorded({**_images(run), **found}, "val"),
                test=Measured.recorded(found, "test") if "test_accuracy" in found else None,
                sized=size_of(one, rule.size),
                standing=standing(one, rule),
                meets=passes(one, rule),
                frontier=one.val_accuracy > best,
                values=values,
            )
        )
        best = max(best, one.val_accuracy)
    return tuple(rows)


def _images(run: RunRecord) -> dict[str, float]:
    """Of a run's variants it is not recorded again."""
    return {name: run.metrics[name] for name in ("val_samples",) if name in run.metrics}


def _network(sweep: Sweep, values: Mapping[str, Any]) -> str:
    with suppress(KdexpError, ValueError):  # recorded by a version that had other keys
        own = {path: value for path, value in values.items() if path.startswith("student.")}
        return named(sweep.recipe.replace(own).student)
    return ""


def _teacher(sweep: Sweep, runs: Sequence[RunRecord], tracking: Tracking) -> Teacher | None:
    """Of the first trial: repeats may have others, on their own folds."""
    run_id = next((run.tags.get("kdexp.teacher_run", "") for run in runs), "")
    if not run_id:
        return None
    try:
        run = tracking.read(run_id)
    except TrackingGone:
        return None
    if "val_accuracy" not in run.metrics:
        return None
    parameters = run.metrics.get("parameters")
    val = Measured.recorded(run.metrics, "val")
    return Teacher(
        named(sweep.teacher), None if parameters is None else int(parameters), val, run_id
    )


# --- the answer --------------------------------------------------------------------------------


def _answer(
    study: RunRecord,
    sweep: Sweep,
    rule: Selection,
    rows: Sequence[Row],
    runs: Mapping[str, RunRecord],
    fresh: Sequence[RunRecord],
    tracking: Tracking,
) -> Answer:
    """What the rule picks, without what fresh seeds have refuted by it, else what they confirmed;
    of a study with repeats what one training meets counts where nothing is sure and that was
    selected and looked at.
    """
    name, heard = study.tags["kdexp.study"], _heard(rows, rule, runs)
    refuted = [row for row in rows if heard.get(row.candidate.run_id, "").startswith("no")]
    held = [row for row in rows if heard.get(row.candidate.run_id, "").startswith("yes")]
    best = min(held, key=lambda row: rank(row.candidate, rule), default=None)
    left = [row for row in rows if row not in refuted]
    try:
        chosen = select([row.candidate for row in left], rule, name)
        if best is None or rank(chosen, rule) < rank(best.candidate, rule):
            return _selected(next(row for row in left if row.candidate == chosen), rule, runs)
    except NothingPasses as error:
        if best is None:
            once = _once(rows, rule, name, runs) if sweep.repeats and not refuted else None
            return once or Answer("nothing", _why(error, refuted, heard))
    verdict = heard[best.candidate.run_id]
    return _confirmed(best, verdict, study, list(runs.values()), fresh, tracking)


def _heard(rows: Sequence[Row], rule: Selection, runs: Mapping[str, RunRecord]) -> dict[str, str]:
    """What fresh seeds said of trials by this rule ('yes: …', 'no: …'), by their runs."""
    said = {
        row.candidate.run_id: runs[row.candidate.run_id].tags.get("kdexp.confirmed", "")
        for row in rows
        if row.candidate.variant == AS_TRAINED and (not rule.limit or row.sized <= rule.limit)
    }
    return {run: text for run, text in said.items() if text.endswith(_required(rule))}


def _required(rule: Selection) -> str:
    return f", required {requirement(rule)}"


def _why(error: NothingPasses, refuted: Sequence[Row], heard: Mapping[str, str]) -> str:
    if not refuted:
        return str(error)
    each = (f"trial {row.candidate.trial} ({heard[row.candidate.run_id]})" for row in refuted)
    return f"What met the bar was not confirmed by fresh seeds: {'; '.join(each)}."


def _selected(row: Row, rule: Selection, runs: Mapping[str, RunRecord]) -> Answer:
    """By repeats, or by one training."""
    chosen = row.candidate
    again = its_repeats(chosen, list(runs.values()))
    run = again[0] if again else runs[chosen.run_id]
    test = _test(run, chosen.variant)
    if chosen.verdict:
        seen = [each for each in again if "test_accuracy" in each.metrics]
        over = measured(seen, "test_accuracy", "test_samples") if seen else None
        return Answer("sure", _sure(chosen.verdict, rule), row, run, test, over)
    return _of_one(row, run, test)


def _of_one(row: Row, run: RunRecord, test: Measured | None) -> Answer:
    if test is None:
        text = "One training meets the bar. Nobody has looked at it on test yet"
        return Answer("unseen", text, row, run)
    text = "One training met the bar: it may have been the luckiest of many"
    return Answer("once", text, row, run, test)


def _once(
    rows: Sequence[Row], rule: Selection, name: str, runs: Mapping[str, RunRecord]
) -> Answer | None:
    """The model that one training selects where nothing is sure, if it was looked at."""
    plain = {row.candidate.trial: row for row in rows if row.candidate.variant == AS_TRAINED}
    alone = [replace(row.candidate, verdict=None) for row in plain.values()]
    with suppress(NothingPasses):
        row = plain[select(alone, rule, name).trial]
        if row.test:
            text = (
                "One training met the bar, but no recipe is sure to: it may have been the luckiest"
                " of many"
            )
            return Answer("once", text, row, runs[row.candidate.run_id], row.test)
    return None


def _sure(found: Verdict, rule: Selection) -> str:
    level = 100 * (rule.confidence or LEVEL)
    return (
        f"{said(found)}: at {level:g} % above {100 * found.low:.2f} % (bar"
        f" {100 * rule.accuracy_bar:.2f} %)"
    )


def _confirmed(
    row: Row,
    verdict: str,
    study: RunRecord,
    runs: Sequence[RunRecord],
    fresh: Sequence[RunRecord],
    tracking: Tracking,
) -> Answer:
    """By fresh seeds, where a study repeats after its own repeats of the recipe. The model is the
    one that is registered.
    """
    chosen, text = row.candidate, verdict.removeprefix("yes: ")
    own = [
        *(run for run in runs if run.tags.get(REPEATS) == str(chosen.trial)),
        *(run for run in fresh if run.tags.get("kdexp.confirms") == chosen.run_id),
    ]
    seen = [run for run in own if "test_accuracy" in run.metrics]
    if not seen:
        return Answer("confirmed", text, row)
    registered = _registered(f"models:/{study.tags['kdexp.study']}@confirmed", tracking)
    run = next((run for run in seen if run.run_id == registered), seen[-1])
    like = [each for each in seen if _trained_on(each) == _trained_on(run)]
    over: FreshSeeds | None = measured(like, "test_accuracy", "test_samples")
    said = study.metrics.get("confirm_test_mean", -1.0)
    ours = study.tags.get("kdexp.confirmed_run") == chosen.run_id
    if over and (not ours or abs(over.mean - said) > ROUNDING):  # confirm looked at other models
        over = None
    return Answer("confirmed", text, row, run, _test(run, AS_TRAINED), over)


def _trained_on(run: RunRecord) -> str:
    return run.tags.get("kdexp.trained_on", TRAIN_ONLY)


def _fresh_seeds(study: RunRecord, tracking: Tracking) -> list[RunRecord]:
    """The runs of fresh seeds that were looked at on test."""
    found = tracking.find("confirmation", {"mlflow.parentRunId": study.run_id}, study.experiment_id)
    return [run for run in found if "test_accuracy" in run.metrics]


def _registered(address: str, tracking: Tracking) -> str:
    """The run of a registered model; nothing where there is none."""
    try:
        return tracking.model_version(address)[0]
    except TrackingAway:
        raise
    except KdexpError:
        return ""


def _variant(answer: Answer) -> Variant:
    return answer.row.candidate.variant if answer.row else AS_TRAINED


def _test(run: RunRecord, variant: Variant) -> Measured | None:
    found = metrics_of(run, variant)
    return Measured.recorded(found, "test") if "test_accuracy" in found else None


def _beside(
    answer: Answer, rows: Sequence[Row], teacher: Teacher | None, sweep: Sweep, rule: Selection
) -> list[str]:
    """The model against its teacher and against trial 0, in words."""
    row, run = answer.row, answer.run
    assert row
    said = []
    if teacher and teacher.parameters:
        size = _times(row.candidate.parameters, teacher.parameters)
        known = f"{teacher.parameters:,} parameters"
        said.append(f"{size} the teacher ({known}); {_against(teacher, run, sweep)}")
    first = next((one for one in rows if one.candidate.trial == 0), None)
    if row.candidate.trial == 0:
        said.append("it is trial 0, the sweep file's own values")
    elif first:
        unit = rule.size.replace("_", "-")
        said.append(
            f"{_times(row.sized, first.sized)} trial 0, the sweep file's own values"
            f" ({first.sized:,} {unit}, {100 * first.val.accuracy:.2f} % on validation)"
        )
    return said


def _times(size: int, other: int) -> str:
    """'13 times smaller than', 'as large as', '1.2 times larger than'."""
    if size == other or not size or not other:
        return "as large as" if size == other else "not to be compared with"
    ratio, how = (other / size, "smaller") if size < other else (size / other, "larger")
    return f"{ratio:.0f} times {how} than" if ratio >= 10 else f"{ratio:.2g} times {how} than"


def _against(teacher: Teacher, run: RunRecord | None, sweep: Sweep) -> str:
    """A model's accuracy beside its teacher's, as a difference where both are of the same images:
    a repeat's are of its own fold, and so is its teacher unless one serves all.
    """
    known = run is not None and {"val_accuracy", "teacher_val_accuracy"} <= run.metrics.keys()
    if run is None or not known:
        return f"that has {100 * teacher.val.accuracy:.2f} % on validation"
    own, its = run.metrics["val_accuracy"], run.metrics["teacher_val_accuracy"]
    both = f"{100 * own:.2f} % on validation, its teacher {100 * its:.2f} %"
    if sweep.teacher.shared and run.params.get("data.fold", "0") != str(sweep.data.fold):
        return f"it has {both}"
    points = round(100 * (own - its), 2)
    how = f"{abs(points):.2f} points {'less' if points < 0 else 'more'}" if points else "the same"
    return f"it has {both}: {how}"


def _forms(answer: Answer) -> tuple[Form, ...]:
    """The forms of the model that its run has numbers of."""
    if answer.run is None:
        return ()
    whole = answer.run.metrics.get("val_accuracy")
    forms = []
    for variant in get_args(Variant):
        found = metrics_of(answer.run, variant)
        if not {"model_bytes", "parameters", "multiply_adds"} <= found.keys():
            continue
        known = "val_accuracy" in found
        val = Measured.recorded({**_images(answer.run), **found}, "val") if known else None
        change = None if val is None or whole is None else val.accuracy - whole
        forms.append(Form(variant, Size.recorded(found), val, change))
    return tuple(forms)


# --- what the search learned -------------------------------------------------------------------


def _learned(
    rows: Sequence[Row], runs: Mapping[str, RunRecord], sweep: Sweep, rule: Selection
) -> Learned:
    first = [row for row in rows if row.candidate.variant == AS_TRAINED]
    whole = [
        row
        for row in first
        if runs[row.candidate.run_id].tags.get("kdexp.state") == "complete"
        and row.values.keys() == sweep.search.keys()
    ]
    trained = [(row.values, row.val.accuracy) for row in whole]
    return Learned(
        complete=len(whole),
        importance=importances(sweep.search, trained) if len(whole) >= ENOUGH else {},
        slices=tuple(_slices(first, sweep)),
        rules=tuple(_rules(first, sweep, rule)),
    )


def _slices(rows: Sequence[Row], sweep: Sweep) -> list[Slice]:
    found = []
    for path in SLICES:
        dimension = sweep.search.get(path)
        if isinstance(dimension, Range):
            shown = [row for row in rows if path in row.values]
            # a control without the teacher has alpha 0, which a log scale does not
            shown = [row for row in shown if row.values[path] > 0 or not dimension.log]
            points = tuple((row, row.values[path]) for row in shown)
            found.append(Slice(path, dimension.log, points))
    return found


def _rules(rows: Sequence[Row], sweep: Sweep, rule: Selection) -> list[str]:
    """Where the smallest students over the bar all stand at an end of what was searched: the
    search may have been too narrow.
    """
    over = [row for row in rows if row.val.accuracy >= rule.accuracy_bar][:EDGE]
    if len(over) < EDGE:
        return []
    found = []
    for path, dimension in sweep.search.items():
        values = [row.values.get(path) for row in over]
        if not isinstance(dimension, Range) or any(value != values[0] for value in values):
            continue
        for end, edge, do in (("low", dimension.low, "lower"), ("high", dimension.last, "raise")):
            if values[0] == edge:
                found.append(
                    f"The {EDGE} smallest students over the bar all have {path} = {edge}, the"
                    f" {end} end of what was searched: {do} search.{path}.{end} to look further."
                )
    return found


# --- how sure, and what it cost ----------------------------------------------------------------


def _looks(runs: Mapping[str, RunRecord], fresh: Sequence[RunRecord]) -> list[Look]:
    """Every model that was looked at on test, with both numbers."""
    found = []
    for run in (*runs.values(), *fresh):
        for variant in get_args(Variant):
            metrics = metrics_of(run, variant)
            if "test_accuracy" in metrics:
                known = "val_accuracy" in metrics
                val = Measured.recorded({**_images(run), **metrics}, "val") if known else None
                test = Measured.recorded(metrics, "test")
                found.append(Look(_what(run, variant), run.run_id, val, test))
    return found


def _what(run: RunRecord, variant: Variant) -> str:
    again, trial = run.tags.get(REPEATS), run.tags.get("kdexp.trial", "")
    what = f"trial {trial}, a repeat of trial {again}" if again else f"trial {trial}"
    if "kdexp.confirms" in run.tags:
        what = run.name or "a fresh seed"
    return what if variant == AS_TRAINED else f"{what} as {variant}"


def _cost(study: RunRecord, sweep: Sweep, every: Sequence[RunRecord], settings: Settings) -> Cost:
    """A trial that was begun anew has more runs than one: its best counts."""
    runs = dict[str, RunRecord]()
    for run in sorted(every, key=lambda run: _ending(run)[1]):
        runs.setdefault(run.tags.get("kdexp.trial", run.run_id), run)
    seconds = sum(run.metrics.get("train_seconds", 0.0) for run in every)
    return Cost(
        trials=Counter(_ending(run)[0] for run in runs.values()),
        repeats=sum(REPEATS in run.tags for run in runs.values()),
        not_trained=not_trained(sweep, study.run_id, settings),
        budget=sweep.study.trials,
        minutes=seconds / 60,
        finished=study.status == "FINISHED",
    )


def _ending(run: RunRecord) -> tuple[str, int]:
    """How a trial's run ended, in words, and how much that counts beside others, least first."""
    if run.status == "FINISHED":
        state = run.tags.get("kdexp.state", "complete")
        words = {"complete": "trained to the end", "pruned": "stopped early"}
        return words.get(state, state), 0
    if run.status == "RUNNING":
        return "under way", 1
    return ("failed", 2) if run.status == "FAILED" else ("interrupted", 3)


# --- again -------------------------------------------------------------------------------------


def _again(
    study: RunRecord, answer: Answer, rule: Selection, settings: Settings, tracking: Tracking
) -> Again | None:
    run, variant = answer.run, _variant(answer)
    if run is None:
        return None
    recipe = recipe_of(run, tracking)
    alias = "confirmed" if answer.state == "confirmed" else rule.goal.replace("_", "-")
    address = f"models:/{study.tags['kdexp.study']}@{alias}"
    there = f"{prefix_of(variant)}kdexp.model_version" in run.tags
    if not there or _registered(address, tracking) != run.run_id:
        address = ""
    place = json.dumps(settings.tracking_shown, ensure_ascii=False)
    load = f"mlflow.set_tracking_uri({place})\nmodel = {load_call(address, variant)}"
    return Again(
        address=address,
        load=load if address else "",
        takes=input_of(run, tracking),
        channels=recipe.data.channels,
        recipe=_yaml(recipe),
        hashes={
            name.removeprefix("kdexp.").removesuffix("_sha256"): value
            for name, value in sorted(run.tags.items())
            if name.startswith("kdexp.") and name.endswith("_sha256") and value
        },
        versions=_environment(run, tracking),
    )


def _yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(
        recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
    )


def _environment(run: RunRecord, tracking: Tracking) -> dict[str, str]:
    try:
        return environment_of_run(run, tracking)
    except TrackingAway:
        raise
    except KdexpError:  # a former version's
        return {}
