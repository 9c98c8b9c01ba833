"""What MLflow shows of a run in words: its description, in Markdown. Pure.

MLflow shows the first lines only until somebody asks for more: so the first one is the answer, and
the second says where to look on.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdexp.config import Network, Recipe, Selection, Sweep, flatten
from kdexp.distill.inputs import Input
from kdexp.distill.models import Size
from kdexp.distill.teacher import CachedTeacher
from kdexp.intervals import wilson_interval
from kdexp.runs.outcome import Outcome
from kdexp.runs.views import (
    REPEATED,
    TRIALS,
    WHY,
    model_page,
    picture,
    run_page,
    view_page,
)
from kdexp.selection import (
    AS_TRAINED,
    Candidate,
    FreshSeeds,
    clears,
    passes,
    requirement,
    size_of,
    standing,
)

__all__ = [
    "Answer",
    "InStudy",
    "Progress",
    "answered",
    "card",
    "concluded",
    "confirmed",
    "duration",
    "in_bytes",
    "linked",
    "looked_at",
    "named",
    "of_study",
    "of_teacher",
    "of_training",
    "short_on_test",
    "unanswered",
    "under_way",
]

ROWS = 30  # of a table of trials: MLflow cuts off a description of more than 8,000 characters


@dataclass(frozen=True)
class InStudy:
    """What a trial is held against: its study."""

    experiment_id: str
    run_id: str
    """The study's."""
    rule: Selection
    """By which one training is judged."""
    defaults: Recipe
    """What trial 0 trains."""
    repeats: int | None = None
    """The trial that this one repeats."""


@dataclass(frozen=True)
class Progress:
    """How far a study is."""

    done: int
    smallest: int | None
    """The size of the smallest that is sure, or where nothing is repeated, over the bar."""
    best: float | None
    """The best validation accuracy of one training."""
    seconds_left: float | None
    at: str
    """The time of day."""
    stopped: bool = False


@dataclass(frozen=True)
class Answer:
    """What a study came to: its selected model, looked at on test."""

    study: str
    experiment_id: str
    study_run: str
    run_id: str
    """Of the model."""
    candidate: Candidate
    rule: Selection
    val_accuracy: float
    test_accuracy: float
    test_interval: tuple[float, float]
    test_samples: int
    test_repeats: FreshSeeds | None
    gain: str
    """What distillation gained, in words; or nothing."""
    trials: Sequence[Candidate]
    alias: str
    load: str
    """How the model is loaded in Python; empty where it is not registered."""


def of_training(recipe: Recipe, size: Size, teacher: CachedTeacher) -> str:
    """A training's run, for someone who has never seen kdexp."""
    how, training = recipe.distillation, recipe.training
    if recipe.data.train_on_validation:
        seen = "it was trained on: no measure of it"
    else:
        fold = f", its fold {recipe.data.fold}" if recipe.data.fold else ""
        seen = f"held out of the training set{fold}"
    return "\n".join(
        [
            (
                f"A small network (the *student*, {named(recipe.student)}) learns"
                f" {recipe.data.dataset} from the labels and from the *soft labels* of a larger one"
                f" (the *teacher*, {named(recipe.teacher)})."
            ),
            "",
            "| | |",
            "|---|---|",
            (
                f"| student | {size.parameters:,} parameters, {size.multiply_adds:,} multiply-adds,"
                f" {size.bytes:,} bytes |"
            ),
            (
                f"| teacher | {teacher.parameters:,} parameters, {teacher.val_accuracy:.2%} on"
                " validation |"
            ),
            (
                f"| alpha | {how.alpha:.4g}: the teacher's weight in the loss; the labels have"
                f" {1 - how.alpha:.4g} |"
            ),
            (
                f"| temperature | {how.temperature:.4g} (T² factor"
                f" {'on' if how.times_t_squared else 'off'}) |"
            ),
            (
                f"| training | {training.epochs} epochs, {training.optimizer}, learning rate "
                f"{training.learning_rate:.3g} ({training.schedule}), batch {training.batch_size}, "
                f"seed {training.seed} |"
            ),
            "",
            (
                f"`val_accuracy` is measured on images {seen}; `epoch/…` are the curves. "
                "Artifacts: `config.json` is the whole recipe, `weights.safetensors` the student."
            ),
        ]
    )


def concluded(
    outcome: Outcome,
    recipe: Recipe,
    bad_step: int | None,
    teacher: CachedTeacher,
    study: InStudy | None = None,
) -> str:
    """A training's run once it has ended; of a trial, by the study's rule."""
    how = {
        "complete": "Trained to the end",
        "pruned": "Pruned",
        "diverged": f"Diverged (loss not finite from step {bad_step})",
    }[outcome.state]
    (low, high), judged = outcome.val_interval, ""
    if recipe.data.train_on_validation:
        accuracy = "Trained on train and validation together,"
    else:
        accuracy = (
            f"**{outcome.val_accuracy:.2%}** validation accuracy (95 % interval {low:.2%} to"
            f" {high:.2%})"
        )
        judged = f": **{_judged(outcome, study.rule)}**" if study else ""
    return (
        f"{accuracy} with **{outcome.size.parameters:,}** parameters{judged}.\n\n"
        f"{_place(recipe, study) if study else ''}"
        f"{how} after {outcome.epochs} epochs; weights of epoch {outcome.kept_epoch}.\n\n"
        f"Train it again, bit for bit: `kdexp reproduce {outcome.run_id}`\n\n"
        f"{of_training(recipe, outcome.size, teacher)}"
    )


def looked_at(
    why: str, accuracy: float, interval: tuple[float, float], images: int, before: str
) -> str:
    """A training's run once its model was looked at on test; `before` is what it said till then."""
    low, high = interval
    return (
        f"{why} Test accuracy **{accuracy:.2%}** (95 % interval {low:.2%} to {high:.2%},"
        f" {images:,} images, looked at once).\n\n{before}"
    )


def _judged(ended: Outcome, rule: Selection) -> str:
    """Whether one training meets the bar, and by how much it does not."""
    bar, short = f"the bar of {rule.accuracy_bar:.2%}", rule.accuracy_bar - ended.val_accuracy
    if short > 0:
        return f"misses {bar} by {100 * short:.2f} points"
    if rule.confidence and not clears(ended.val_accuracy, ended.val_samples, rule):
        return f"meets {bar}, but not at {100 * rule.confidence:g} % confidence"
    if rule.limit and size_of(ended.size, rule.size) > rule.limit:
        return f"meets {bar}, but is over the limit of {rule.limit:,} {_unit(rule)}"
    return f"meets {bar}"


def _place(recipe: Recipe, study: InStudy) -> str:
    """What a trial has of its own, and where the others are."""
    if study.repeats is not None:
        what = f"Trial {study.repeats} again, with another seed and on other images"
    elif changes := _changes(recipe, study.defaults):
        what = f"Unlike trial 0: {', '.join(changes)}"
    else:
        what = "The sweep file's own values, its *documented defaults*"
    links = _links(
        {
            "study": run_page(study.experiment_id, study.run_id),
            "all trials": view_page(study.experiment_id, TRIALS),
        }
    )
    return f"{what}.\n\n{links}\n\n"


def _changes(recipe: Recipe, defaults: Recipe) -> list[str]:
    """What a recipe has in place of the defaults, as 'learning rate 0.001 for 0.0003'."""
    own, theirs = flatten(recipe), flatten(defaults)
    paths = [path for path in own if own[path] != theirs.get(path)]
    return [
        f"{path.rpartition('.')[2].replace('_', ' ')} {_value(own[path])} for"
        f" {_value(theirs.get(path))}"
        for path in paths
    ]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else "none" if value is None else str(value)


def of_teacher(recipe: Recipe, teacher: CachedTeacher) -> str:
    """A teacher's run."""
    low, high = teacher.val_interval
    return (
        f"The teacher ({named(recipe.teacher)}, {teacher.parameters:,} parameters): "
        f"**{teacher.val_accuracy:.2%}** validation accuracy (95 % interval {low:.2%} to "
        f"{high:.2%}). Its soft labels train the students whose tag `kdexp.teacher_run` names this "
        "run."
    )


def of_study(sweep: Sweep) -> str:
    """A study's run."""
    rule, unit = sweep.selection, _unit(sweep.selection)
    searched = ", ".join(f"`{path}`" for path in sweep.search)
    passes = "is sure" if sweep.repeats else "passes"
    again = (
        f" A trial that meets the bar is repeated, up to {sweep.study.repeats} trainings in all,"
        " with other seeds on other folds, until it is sure."
        if sweep.repeats
        else ""
    )
    aim = {
        "smallest": (
            f"minimising {unit} (proposals no smaller than one that {passes} are not trained: their"
            " numbers are missing)"
        ),
        "accuracy": "maximising validation accuracy",
        "pareto": f"for the frontier of {unit} and validation accuracy",
    }[sweep.study.objective]
    what = "trainings" if sweep.repeats else "trials"
    return (
        f"A *study*: {sweep.study.trials} {what} search {searched} for the smallest student whose"
        f" validation accuracy reaches **{rule.accuracy_bar:.2%}**{_limit(rule)}, {aim}. Each"
        " child run is one trial. Trial 0 is the documented defaults, trial 1 the same without the"
        f" teacher (alpha = 0).{again}"
    )


def under_way(
    sweep: Sweep, found: Progress, experiment_id: str, run_id: str, shown: str, before: str
) -> str:
    """A study's run while its trials are trained; `shown` is the place of its picture, `before`
    what it had come to with fewer trials, if there is any.
    """
    unit, trials = _unit(sweep.selection), f"{found.done} of {sweep.study.trials}"
    what, sure = ("trainings", "sure") if sweep.repeats else ("trials", "over the bar")
    best = "" if found.best is None else f", best {found.best:.2%}"
    parts = [
        f"{trials} {what}",
        f"smallest {sure} so far {found.smallest:,} {unit}"
        if found.smallest
        else f"none {sure} yet{best}",
        *([_time_left(found.seconds_left)] if found.seconds_left else []),
    ]
    line = f"**{' · '.join(parts)}** (written at {found.at})"
    if found.stopped:
        line = f"Stopped: the same command goes on. {line}"
    links = _links({"all trials": view_page(experiment_id, TRIALS)})
    return "\n\n".join(
        filter(None, [line, links, shown and picture(run_id, shown), before or of_study(sweep)])
    )


def duration(seconds: float) -> str:
    """As people say it: '35 ms', '12 s', '3.5 min', '2.1 h'."""
    for unit, length, digits in (("h", 3600.0, 1), ("min", 60.0, 1), ("s", 1.0, 0)):
        if seconds >= 1.5 * length or (unit == "s" and seconds >= 1):
            shown = f"{seconds / length:.{digits if seconds < 10 * length else 0}f}"
            return f"{shown} {unit}"
    return f"{1000 * seconds:.0f} ms"


def _time_left(seconds: float) -> str:
    minutes = round(seconds / 60)
    hours = f"{minutes / 60:.1f} h" if minutes >= 100 else f"{minutes} min"
    return f"about {hours} left" if minutes else "under a minute left"


def answered(found: Answer) -> str:
    """A study's run once its model is selected."""
    chosen, low, high = found.candidate, *found.test_interval
    variant = "" if chosen.variant == AS_TRAINED else f" as {chosen.variant}"
    again = f" Train it again: `kdexp reproduce {found.run_id}`."
    short = short_on_test(found.rule, found.test_accuracy, found.test_samples, found.test_repeats)
    return "\n\n".join(
        [
            _answer(found),
            _ways_on(found),
            picture(found.study_run, "frontier.png"),
            (
                f"**Selected: trial {chosen.trial}{variant}**, run `{found.run_id}`:"
                f" {chosen.parameters:,} parameters, {chosen.multiply_adds:,} multiply-adds,"
                f" {chosen.bytes:,} bytes; {found.val_accuracy:.2%} on validation,"
                f" {found.test_accuracy:.2%} on test (95 % interval {low:.2%} to {high:.2%},"
                f" {found.test_samples:,} images){_on_test(found.test_repeats)}."
            ),
            *filter(None, [short, found.gain]),
            (
                f"Rule: {found.rule.goal.replace('_', ' ')} by {_unit(found.rule)}, validation"
                f" accuracy {requirement(found.rule)}{_limit(found.rule)}."
                + (f" Load it: `{found.load}`." if found.load else "")
                + again
            ),
            _table(found.trials, found.rule, chosen, found.experiment_id),
        ]
    )


def card(found: Answer, recipe: Recipe, takes: Input | None) -> str:
    """A registered model, for someone who is to use it; `takes` is None where an earlier version
    recorded its run.
    """
    low, high = found.test_interval
    address = f"models:/{found.study}@{found.alias}"
    served = "mlflow models serve --env-manager local --port 5001 --model-uri"
    curl = "curl localhost:5001/invocations --header 'Content-Type: application/json' --data"
    return "\n\n".join(
        [
            f"# {found.study} @{found.alias}",
            _answer(found),
            *([_takes(takes)] if takes else []),
            "\n".join(
                [
                    "| | accuracy | images |",
                    "|---|---|---|",
                    f"| validation | {found.val_accuracy:.2%} | held out of its training |",
                    (
                        f"| test | {found.test_accuracy:.2%} (95 % interval {low:.2%} to"
                        f" {high:.2%}) | {found.test_samples:,}, looked at once |"
                    ),
                ]
            ),
            (
                f"Trained on {recipe.data.dataset} under a teacher, {named(recipe.teacher)}: seed"
                f" {recipe.training.seed}, {recipe.training.epochs} epochs. Train it again, bit for"
                f" bit: `kdexp reproduce {found.run_id}`. Images of other kinds were not measured."
            ),
            (
                f"Label and probability of files: `kdexp predict {address} PATHS`. In Python:"
                f' `mlflow.pyfunc.load_model("{address}").predict(images)`. Over HTTP: `{served}'
                f" {address}`, then `{curl} '{{\"inputs\": […]}}'`."
            ),
        ]
    )


def _takes(found: Input) -> str:
    shown = ", ".join(found.classes[:ROWS])
    more = f", and {len(found.classes) - ROWS} more" if len(found.classes) > ROWS else ""
    return (
        f"Takes images of shape (any number, {found.channels}, {found.height}, {found.width}),"
        " uint8 from 0 to 255, and says a label and its probability for each."
        f" {len(found.classes)} classes: {shown}{more}."
    )


def confirmed(
    chosen: Candidate,
    rule: Selection,
    verdict: str,
    tested: str,
    run_id: str,
    load: str,
    failed: Sequence[str],
) -> str:
    """What fresh seeds say of a study's recipe: `verdict` on validation, `tested` on test."""
    load_it = f" The first of them: `{load}`." if load else ""
    return (
        f"**Confirmed: trial {chosen.trial}**, run `{chosen.run_id}`: {chosen.parameters:,}"
        f" parameters, validation accuracy **{verdict}** (required: {requirement(rule)}), test"
        f" accuracy {tested}.{load_it} Train it again: `kdexp reproduce {run_id}`."
        + (f"\n\nNot confirmed: {'; '.join(failed)}." if failed else "")
    )


def unanswered(
    why: str, trials: Sequence[Candidate], rule: Selection, experiment_id: str, run_id: str
) -> str:
    """A study's run where none of its trials passes, and why."""
    first, _, rest = why.partition(". ")
    return "\n\n".join(
        [
            f"**{first}.** {rest}",
            _links({"all trials": view_page(experiment_id, TRIALS)}),
            picture(run_id, "frontier.png"),
            _table(trials, rule, None, experiment_id),
        ]
    )


def linked(text: str, name: str, page: str) -> str:
    """A study's description with one link more beside those that it has; as it is, where it has
    that one, or none.
    """
    if f"[{name}](" in text:
        return text
    lines = text.split("\n")
    places = (n for n, line in enumerate(lines) if line.startswith("[") and "[all trials](" in line)
    for place in places:
        lines[place] += f" · {_links({name: page})}"
        break
    return "\n".join(lines)


def _answer(found: Answer) -> str:
    """What is selected, how good it is, and how sure that is, in one line."""
    chosen, bar = found.candidate, f"the bar of {found.rule.accuracy_bar:.2%}"
    if chosen.verdict:
        repeats = f"{chosen.verdict.repeats} repeat{'s' if chosen.verdict.repeats > 1 else ''}"
        sure = f"sure to meet {bar}: {chosen.verdict.mean:.2%} on validation over {repeats}"
    else:
        confirm = f"`kdexp confirm {shlex.quote(found.study)}`"
        sure = f"met {bar} once, by {found.val_accuracy:.2%} on validation: not sure, {confirm}"
    return (
        f"**{chosen.parameters:,} parameters · {in_bytes(chosen.bytes)} ·"
        f" {found.test_accuracy:.2%} on test** ({sure})"
    )


def _ways_on(found: Answer) -> str:
    """The pages that show more."""
    repeats = {"repeats": view_page(found.experiment_id, REPEATED)}
    model = {f"model @{found.alias}": model_page(found.study)}
    return _links(
        {
            "selected run": run_page(found.experiment_id, found.run_id),
            "all trials": view_page(found.experiment_id, TRIALS),
            "beside trials 0 and 1": view_page(found.experiment_id, WHY),
            **(repeats if found.test_repeats else {}),
            **(model if found.load else {}),
        }
    )


def short_on_test(
    rule: Selection, accuracy: float, images: int, repeats: FreshSeeds | None = None
) -> str:
    """That a model, or the mean of its repeats where there are any, is under the bar on test, and
    how much that says; nothing where it is not.
    """
    accuracy = repeats.mean if repeats else accuracy
    short = rule.accuracy_bar - accuracy
    if short <= 0:
        return ""
    low, high = wilson_interval(round(accuracy * images), images)
    why = (
        "so few images may differ by chance"
        if rule.accuracy_bar <= high
        else "more than chance: its images are harder than those held out of training"
    )
    return (
        f"On test it is {100 * short:.2f} points under the bar (95 % interval of {images:,} images:"
        f" {low:.2%} to {high:.2%}): {why}. The bar is held against images held out of training."
    )


def _on_test(repeats: FreshSeeds | None) -> str:
    if repeats is None:
        return ""
    spread = f" ± {100 * repeats.sd:.2f}" if len(repeats.correct) > 1 else ""
    return (
        f"; {100 * repeats.mean:.2f}{spread} % over its {len(repeats.correct)} repeats, each looked"
        " at once"
    )


def _table(
    trials: Sequence[Candidate], rule: Selection, chosen: Candidate | None, experiment_id: str
) -> str:
    """The trials, smallest first; of many, those that pass before the others."""
    order = sorted(trials, key=lambda c: (c != chosen, not passes(c, rule), *_by_size(c, rule)))
    shown = sorted(order[:ROWS], key=lambda c: _by_size(c, rule))
    size = "" if rule.size == "parameters" else f" {_unit(rule)} |"
    left = len(trials) - len(shown)
    more = f"\n\n{left} more: [all trials]({view_page(experiment_id, TRIALS)})" if left else ""
    rows = [
        (
            f"| [{c.trial}]({run_page(experiment_id, c.run_id)})"
            f"{'' if c.variant == AS_TRAINED else f' as {c.variant}'} | {c.parameters:,} |"
            + (f" {size_of(c, rule.size):,} |" if size else "")
            + f" {c.val_accuracy:.2%} | {standing(c, rule)}"
            f"{' **(selected)**' if c == chosen else ''} |"
        )
        for c in shown
    ]
    head = f"| trial | parameters |{size} validation accuracy | {requirement(rule)} |"
    rule_off = f"|---|---:|{'---:|' if size else ''}---:|---|"
    return "\n".join([head, rule_off, *rows]) + more


def _by_size(candidate: Candidate, rule: Selection) -> tuple[int, float]:
    return size_of(candidate, rule.size), -candidate.val_accuracy


def _links(pages: Mapping[str, str]) -> str:
    return " · ".join(f"[{text}]({page})" for text, page in pages.items())


def in_bytes(count: int) -> str:
    """27 KB, 1.2 MB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} KB"


def _unit(rule: Selection) -> str:
    return rule.size.replace("_", "-")


def _limit(rule: Selection) -> str:
    return f" with at most {rule.limit:,} {_unit(rule)}" if rule.limit else ""


def named(network: Network) -> str:
    """A network in a few characters: 'cnn 16-32-64/128', 'residual 4-8-16', '3 x resnet18'."""
    members = getattr(network, "members", 1)
    if members > 1:
        return f"{members} x {named(network.model_copy(update={'members': 1}))}"
    if network.channels:
        hidden = f"/{network.hidden}" if network.hidden else ""
        return f"{network.architecture} {'-'.join(map(str, network.channels))}{hidden}"
    options = (f"{key}={value}" for key, value in network.options.items())
    return " ".join([network.architecture, *options])
