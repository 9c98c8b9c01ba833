"""From a study to its model: apply the selection rule, look at the test split once, register the
model.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from torch import nn

from kdexp import KdexpError
from kdexp.config import CONTROLS, Recipe, Selection, Sweep, Variant, recorded
from kdexp.distill.checkpoints import State
from kdexp.distill.datasets import Split, load_example, load_test
from kdexp.distill.deploy import available
from kdexp.distill.evaluate import evaluate
from kdexp.distill.models import FromPixels
from kdexp.intervals import mean_interval
from kdexp.repeats import Measure, Repeated
from kdexp.runs import describe, views
from kdexp.runs.outcome import Outcome
from kdexp.runs.plots import colour, frontier, save
from kdexp.runs.records import (
    FOLDS,
    LONGEST_NOTE,
    NOTE,
    PARTS,
    REPEATS,
    SELECTED_TRIAL,
    SURE,
    answer_of,
    input_of,
    load_student,
    recipe_of,
    seal,
    text_of,
)
from kdexp.runs.tracking import Kind, RunRecord, Tracking
from kdexp.search.claims import Claimant
from kdexp.select.mistakes import keep_mistakes
from kdexp.select.variants import (
    contenders,
    folder_of,
    load_variant,
    metrics_of,
    prefix_of,
    splits_of,
)
from kdexp.select.verify import verify
from kdexp.selection import (
    AS_TRAINED,
    Candidate,
    FreshSeeds,
    NothingPasses,
    clears,
    judged,
    of_one,
    passes,
    plan_of,
    select,
)
from kdexp.settings import Settings, without_credentials

__all__ = [
    "Gain",
    "Promotion",
    "candidates",
    "candidates_of",
    "ended",
    "gain",
    "its_repeats",
    "load_call",
    "look_at_test",
    "looks",
    "measured",
    "on_test",
    "promote",
    "register",
    "say_where",
    "sweep_of",
    "tell",
    "test_of",
    "under",
    "with_repeats",
]

log = logging.getLogger("kdexp")
LONGEST_CARD = 5000  # characters that MLflow takes as a registered model's description


@dataclass(frozen=True)
class Promotion:
    """The selected model and its one look at the test split."""

    study: str
    candidate: Candidate
    run_id: str
    """Of the model that is registered: the trial's own, or where its recipe was repeated, the first
    repeat's.
    """
    rule: Selection
    val_accuracy: float
    val_interval: tuple[float, float]
    test_accuracy: float
    test_interval: tuple[float, float]
    test_samples: int
    test_accuracy_tta: float | None
    """With flip test-time augmentation; None where the recipe does not flip, or a former version
    looked.
    """
    new_look: bool
    """False where this model had been looked at before: the number is the one recorded then."""
    looks: int
    """How many models of this study have been looked at on test."""
    trials: tuple[Candidate, ...]
    """What it was selected from: the study's trials and, where size is in bytes, such of their
    variants as came near.
    """
    model: str
    """Where MLflow loads it from: models:/name@alias; empty where the network cannot be
    exported.
    """
    test_repeats: FreshSeeds | None
    """What its repeats' models came to on test; None where there are none."""
    gain: Gain | None
    """What distillation gained."""


@dataclass(frozen=True)
class Gain:
    """Validation accuracy of trial 0 (documented defaults) over trial 1 (labels only), both with
    the same seeds on the same folds.
    """

    differences: tuple[float, ...]
    """Of each pair of trainings."""

    @property
    def mean(self) -> float:
        """Over all pairs."""
        return fmean(self.differences)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The mean's 95 % interval (Student's t); None of a single pair."""
        return mean_interval(self.differences) if len(self.differences) > 1 else None

    def __str__(self) -> str:
        gained, pairs = f"{100 * self.mean:+.2f} points on validation", len(self.differences)
        if self.interval is None:
            return f"The teacher gave {gained}: one seed each, that says little."
        low, high = (100 * end for end in self.interval)
        effect = (
            "helped" if low > 0 else "did harm" if high < 0 else "made no difference to be sure of"
        )
        return (
            f"The teacher {effect}: {gained} (95 % interval {low:+.2f} to {high:+.2f},"
            f" {pairs} pairs of trainings alike but for it)."
        )


def promote(
    study: RunRecord,
    rule: Selection,
    settings: Settings,
    tracking: Tracking,
    device: torch.device,
    sure: bool = False,
) -> Promotion:
    """Select by `rule`, evaluate the selected model, and only it, on test, and register it.

    Where a study has repeated its trials, what is selected is sure. Where nothing is and `sure` is
    not asked for, one training decides. A model is looked at once: its recorded test accuracy is
    used from then on. Raises NothingPasses.
    """
    say_where(study, settings)
    with Claimant(settings) as claimant, claimant.lock(test_of(study)):
        return _promote(study, rule, settings, tracking, device, sure)


def test_of(study: RunRecord) -> str:
    """What is locked around a look at test: of two commands that finish together one looks, the
    other finds the number.
    """
    return f"test of study {study.run_id}"


def say_where(study: RunRecord, settings: Settings) -> None:
    """Warn where a study's commands meet on a storage that this one does not know."""
    if study.tags.get("kdexp.shared_storage") and settings.storage is None:
        name = study.tags["kdexp.study"]
        log.warning(
            "Study '%s' has a --storage of its own: give it here too, others may be at this", name
        )


def _promote(
    study: RunRecord,
    rule: Selection,
    settings: Settings,
    tracking: Tracking,
    device: torch.device,
    sure: bool,
) -> Promotion:
    trials, name = candidates(study, tracking), study.tags["kdexp.study"]
    known = under(rule, trials, study, tracking)
    trials = known if sure or any(passes(one, rule) for one in known) else trials
    if rule.size == "bytes" and available():
        trials = contenders(trials, rule, settings, tracking)
    try:
        chosen = select(trials, rule, name)
    except NothingPasses as error:
        _report_nothing(study, error, trials, rule, tracking)
        raise
    again = its_repeats(chosen, _trials(study, tracking))
    # where a recipe was repeated, the first of its repeats: none is chosen by its number
    run = again[0] if again else tracking.read(chosen.run_id)
    recipe = recipe_of(run, tracking)
    images = splits_of(run, recipe, settings)
    verify(run, recipe, chosen.variant, images, tracking, device)
    keep_mistakes(run, recipe, chosen.variant, images, tracking, device)
    new_look = "test_accuracy" not in metrics_of(run, chosen.variant)
    if new_look:
        why = f"**Selected** by study *{name}*{_as(chosen.variant)}."
        look_at_test(run, recipe, why, settings, tracking, device, chosen.variant)
        run = tracking.read(run.run_id)
    repeats = _look_at_repeats(study, chosen, again, settings, tracking, device)
    found = metrics_of(run, chosen.variant)
    text = (
        f"Validation accuracy {found['val_accuracy']:.2%}, test accuracy"
        f" {found['test_accuracy']:.2%}"
    )
    model = register(
        run, recipe, name, rule.goal.replace("_", "-"), text, settings, tracking, chosen.variant
    )
    for other in tracking.find(
        "trial",
        {"mlflow.parentRunId": study.run_id, "kdexp.selected": rule.goal},
        study.experiment_id,
    ):
        if other.run_id != run.run_id:
            tracking.tag(other.run_id, {"kdexp.selected": ""})
    tracking.tag(run.run_id, {"kdexp.selected": rule.goal})
    runs = _trials(study, tracking)
    promotion = Promotion(
        study=name,
        candidate=chosen,
        run_id=run.run_id,
        rule=rule,
        val_accuracy=found["val_accuracy"],
        val_interval=(found["val_accuracy_low"], found["val_accuracy_high"]),
        test_accuracy=found["test_accuracy"],
        test_interval=(found["test_accuracy_low"], found["test_accuracy_high"]),
        test_samples=int(found["test_samples"]),
        test_accuracy_tta=found.get("test_accuracy_tta"),
        new_look=new_look,
        looks=looks(study, tracking),
        trials=tuple(trials),
        model=model,
        test_repeats=repeats,
        gain=gain(runs),
    )
    answer = _report_on_study(study, promotion, runs, tracking)
    if model:
        card = describe.card(answer, recipe, input_of(run, tracking))
        tracking.describe_model(name, card[:LONGEST_CARD])
    return promotion


def candidates(study: RunRecord, tracking: Tracking) -> list[Candidate]:
    """Every trial of a study that ended with weights, by trial number, with its repeats."""
    return candidates_of(_trials(study, tracking))


def candidates_of(runs: Sequence[RunRecord]) -> list[Candidate]:
    """The same out of the runs of a study's trials that have ended: see `ended`."""
    repeats = _repeats(runs)
    first = {
        int(run.tags["kdexp.trial"]): Outcome.recorded(run)
        for run in runs
        if run.tags.get("kdexp.weights_sha256") and REPEATS not in run.tags
    }
    return [
        replace(
            end.candidate(number),
            repeated=with_repeats(
                Repeated(number, end.size.parameters, _measure(end, 0)),
                repeats[number],
                min((int(run.tags["kdexp.trial"]) for run in repeats[number]), default=None),
            ),
        )
        for number, end in first.items()
    ]


def under(
    rule: Selection, trials: Sequence[Candidate], study: RunRecord, tracking: Tracking
) -> list[Candidate]:
    """A study's trials, where it repeats them with the verdict of `rule` on each."""
    sweep = sweep_of(study, tracking)
    if not sweep.repeats or rule.goal != "smallest":
        return list(trials)
    if rule == sweep.selection:
        trials = [_settled(one, study) for one in trials]
    return judged(trials, plan_of(sweep.study, rule, int(study.tags[FOLDS])), rule)


def _settled(one: Candidate, study: RunRecord) -> Candidate:
    """What was found sure stays sure, whatever other recipes' repeats say later of the noise."""
    sure = str(one.trial) in study.tags.get(SURE, "").split()
    return (
        replace(one, repeated=replace(one.repeated, settled="sure"))
        if sure and one.repeated
        else one
    )


def gain(runs: Sequence[RunRecord]) -> Gain | None:
    """What distillation gained, by the runs of a study's trials and repeats."""
    accuracies: tuple[dict[str, float], ...] = ({}, {})
    for run in runs:
        number = int(run.tags.get(REPEATS, run.tags["kdexp.trial"]))
        if number < CONTROLS and not _is(run, "pruned"):
            drawn = f"{run.params.get('training.seed')} {run.params.get('data.fold', '0')}"
            accuracies[number][drawn] = run.metrics["val_accuracy"]
    taught, untaught = accuracies
    pairs = [taught[drawn] - untaught[drawn] for drawn in taught if drawn in untaught]
    return Gain(tuple(pairs)) if pairs else None


def _repeats(runs: Sequence[RunRecord]) -> dict[int, list[RunRecord]]:
    """By the trial whose recipe they repeat."""
    found: dict[int, list[RunRecord]] = defaultdict(list)
    for run in runs:
        if REPEATS in run.tags:
            found[int(run.tags[REPEATS])].append(run)
    return found


def with_repeats(known: Repeated, runs: Sequence[RunRecord], since: int | None) -> Repeated:
    """A recipe with what the runs of its repeats came to; `since` orders the recipes tried."""
    complete = [run for run in runs if _is(run, "complete")]
    return replace(
        known,
        repeats=tuple(
            _measure(Outcome.recorded(run), int(run.params["data.fold"])) for run in complete
        ),
        diverged=any(_is(run, "diverged") for run in runs),
        since=since,
    )


def _measure(end: Outcome, fold: int) -> Measure:
    return Measure(round(end.val_accuracy * end.val_samples), end.val_samples, fold)


def _is(run: RunRecord, state: State) -> bool:
    return run.tags.get("kdexp.state") == state


def sweep_of(study: RunRecord, tracking: Tracking) -> Sweep:
    """The sweep file a study was last run with."""
    text = text_of(study, "sweep.json", tracking)
    return recorded(text, f"study '{study.tags['kdexp.study']}', made by another version of kdexp")


def looks(study: RunRecord, tracking: Tracking) -> int:
    """How many models of a study have been looked at on test: those of its trials (each with its
    repeats), of their fresh seeds, and variants.
    """
    kinds: tuple[Kind, ...] = ("trial", "confirmation")
    runs = [
        run for kind in kinds for run in tracking.find(kind, {"mlflow.parentRunId": study.run_id})
    ]
    return len(
        {
            (run.tags.get(REPEATS, run.run_id), name)
            for run in runs
            for name in run.metrics
            if name.rpartition("/")[2] == "test_accuracy"
        }
    )


def ended(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Those of a study's trials that came to something, by number."""
    found = [run for run in runs if run.status == "FINISHED" and "val_accuracy" in run.metrics]
    return sorted(found, key=lambda run: int(run.tags["kdexp.trial"]))


def _trials(study: RunRecord, tracking: Tracking) -> list[RunRecord]:
    return ended(tracking.find("trial", {"mlflow.parentRunId": study.run_id}))


def its_repeats(chosen: Candidate, runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Of the runs of a study's trials those that a sure recipe's verdict rests on, the first one
    first.
    """
    if chosen.verdict is None or chosen.variant != AS_TRAINED:
        return []
    return [run for run in _repeats(runs)[chosen.trial] if _is(run, "complete")]


def _look_at_repeats(
    study: RunRecord,
    chosen: Candidate,
    runs: Sequence[RunRecord],
    settings: Settings,
    tracking: Tracking,
    device: torch.device,
) -> FreshSeeds | None:
    """Look at the models of a sure recipe's repeats on test, each once."""
    for run in (tracking.read(run.run_id) for run in runs):
        if "test_accuracy" not in run.metrics:
            recipe = recipe_of(run, tracking)
            images = splits_of(run, recipe, settings)
            verify(run, recipe, AS_TRAINED, images, tracking, device)
            why = f"**Repeats** trial {chosen.trial} of study *{study.tags['kdexp.study']}*."
            look_at_test(run, recipe, why, settings, tracking, device)
    found = [tracking.read(run.run_id) for run in runs]
    return measured(found, "test_accuracy", "test_samples") if found else None


def measured(runs: Sequence[RunRecord], accuracy: str, samples: str) -> FreshSeeds:
    """What runs of one recipe came to, by the metrics that hold it."""
    count = int(runs[0].metrics[samples])
    return FreshSeeds(tuple(round(run.metrics[accuracy] * count) for run in runs), count)


def look_at_test(
    run: RunRecord,
    recipe: Recipe,
    why: str,
    settings: Settings,
    tracking: Tracking,
    device: torch.device,
    variant: Variant = AS_TRAINED,
) -> None:
    """Evaluate a finished run's student on test and record it there; `why` opens the run's
    description.
    """
    test = load_test(recipe.data, settings.data_dir, device)
    module = load_variant(run, recipe, variant, test, tracking).to(device)
    found = on_test(module, recipe, test, variant)
    tracking.log_dataset(
        run.run_id, recipe.data.dataset, "test", test.fingerprint, {"samples": len(test)}
    )
    accuracy, low, high = (
        found[f"{prefix_of(variant)}test_accuracy{end}"] for end in ("", "_low", "_high")
    )
    note = describe.looked_at(why, accuracy, (low, high), len(test), run.tags[NOTE])
    # said together with what was seen, or not at all
    looked_at = datetime.now(UTC).isoformat("T", "seconds")
    tracking.log_metrics(run.run_id, found, tags={"kdexp.test_looked_at": looked_at, NOTE: note})


def on_test(module: nn.Module, recipe: Recipe, test: Split, variant: Variant) -> dict[str, float]:
    """What a student comes to on test, by metric."""
    result = evaluate(module, test)
    low, high = result.interval
    found = {
        "test_accuracy": result.accuracy,
        "test_accuracy_low": low,
        "test_accuracy_high": high,
        "test_loss": result.loss,
        "test_samples": float(result.samples),
    }
    if recipe.data.augment.flip:
        found["test_accuracy_tta"] = evaluate(module, test, mirrored=True).accuracy
    return {f"{prefix_of(variant)}{name}": value for name, value in found.items()}


def register(
    run: RunRecord,
    recipe: Recipe,
    name: str,
    alias: str,
    measured: str,
    settings: Settings,
    tracking: Tracking,
    variant: Variant = AS_TRAINED,
) -> str:
    """Register the run's student (once) under a name and point the alias to it; the address MLflow
    loads it from.

    Empty where the network cannot be exported.
    """
    parameters = int(metrics_of(run, variant)["parameters"])
    text = f"{measured}, {parameters:,} parameters{_as(variant)}. Takes pixels 0 to 255."
    tag = f"{prefix_of(variant)}kdexp.model_version"
    version = run.tags.get(tag)
    if version and tracking.registered(run.run_id, name, version):
        tracking.describe(name, version, text)
        tracking.alias(name, alias, version)
    else:
        if variant == AS_TRAINED and (why := _log_model(run, recipe, settings, tracking)):
            tracking.tag(run.run_id, {"kdexp.not_registered": without_credentials(why)[:500]})
            return ""
        version = tracking.register(run.run_id, name, alias, text, folder_of(variant))
        tracking.tag(run.run_id, {tag: version})
    tracking.tag_version(name, version, _facts(run, variant))
    return f"models:/{name}@{alias}"


def _facts(run: RunRecord, variant: Variant) -> dict[str, str]:
    """What the registry's tables show of a version."""
    found = metrics_of(run, variant)
    names = ("parameters", "model_bytes", "val_accuracy", "test_accuracy")
    trial = run.tags.get(REPEATS, run.tags.get("kdexp.trial"))
    return {
        "variant": variant,
        **({"trial": trial} if trial else {}),
        **{name: f"{found[name]:.6g}" for name in names if name in found},
    }


def tell(
    study: RunRecord, part: Literal["confirmed", "selected"], text: str, tracking: Tracking
) -> None:
    """Put one part of a study's description; the other stays."""
    new = {f"{PARTS}{part}": text[:LONGEST_NOTE]}
    note = answer_of({**tracking.read(study.run_id).tags, **new})
    tracking.tag(study.run_id, {**new, NOTE: note[:LONGEST_NOTE]})


def _log_model(run: RunRecord, recipe: Recipe, settings: Settings, tracking: Tracking) -> str:
    """The run's student as an MLflow model among its artifacts; or why torch.export cannot export
    it.
    """
    like = load_example(recipe.data, settings.data_dir)
    module = FromPixels(load_student(run, recipe, like, tracking), like).eval()
    example = like.images.float().expand(-1, like.channels, -1, -1).contiguous()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    except Exception as error:  # each network that it refuses in its own way
        return str(error) or type(error).__name__
    sums = tracking.log_model(run.run_id, module, like.images.numpy(), like.channels, like.classes)
    seal(run.run_id, sums, tracking)
    return ""


def load_call(model: str, variant: Variant = AS_TRAINED) -> str:
    """How a registered model is loaded in Python."""
    # no name holds a quote
    return f'mlflow.{"pytorch" if variant == AS_TRAINED else "onnx"}.load_model("{model}")'


def _as(variant: Variant) -> str:
    return "" if variant == AS_TRAINED else f" as {variant}"


def _report_on_study(
    study: RunRecord, done: Promotion, runs: Sequence[RunRecord], tracking: Tracking
) -> describe.Answer:
    """Metrics, description and picture of the study's run, and its view of the runs that count;
    what the description says.
    """
    chosen, alias = done.candidate, done.rule.goal.replace("_", "-")
    answer = describe.Answer(
        study=done.study,
        experiment_id=study.experiment_id,
        study_run=study.run_id,
        run_id=done.run_id,
        candidate=chosen,
        rule=done.rule,
        val_accuracy=done.val_accuracy,
        test_accuracy=done.test_accuracy,
        test_interval=done.test_interval,
        test_samples=done.test_samples,
        test_repeats=done.test_repeats,
        gain=str(done.gain or ""),
        trials=done.trials,
        alias=alias,
        load=load_call(done.model, chosen.variant) if done.model else "",
    )
    tell(study, "selected", describe.answered(answer), tracking)
    tracking.tag(study.run_id, {"kdexp.selected_run": done.run_id})
    metrics: dict[str, float] = {
        "trials": len({c.trial for c in done.trials}),
        "bar": done.rule.accuracy_bar,
        "selected_parameters": chosen.parameters,
        "selected_multiply_adds": chosen.multiply_adds,
        "selected_bytes": chosen.bytes,
        "selected_val_accuracy": done.val_accuracy,
        "selected_test_accuracy": done.test_accuracy,
    }
    if done.gain:
        metrics["distillation_gain"] = done.gain.mean
    if done.test_repeats:
        metrics["selected_test_mean"] = done.test_repeats.mean
    tracking.log_metrics(study.run_id, metrics)
    _draw(study, done.trials, done.rule, chosen, tracking)
    _show(study, done, runs, tracking)
    return answer


def _show(study: RunRecord, done: Promotion, runs: Sequence[RunRecord], tracking: Tracking) -> None:
    """Colour the trials by the rule, and put the selected one beside both controls. A page that is
    shown otherwise keeps no model back.
    """
    with suppress(KdexpError):
        sweep = sweep_of(study, tracking)
        rule = of_one(sweep.model_copy(update={"selection": done.rule}))
        for run in runs:
            wanted = _shown(run, rule, done)
            if any(run.tags.get(tag, "") != value for tag, value in wanted.items()):
                tracking.tag(run.run_id, wanted)
        controls = [run.run_id for run in runs if int(run.tags["kdexp.trial"]) < CONTROLS]
        these = list(dict.fromkeys([*controls, done.run_id]))
        tags = views.of_answer(sweep, these, time.time_ns() // 1_000_000)
        tracking.tag_experiment(study.experiment_id, tags)


def _shown(run: RunRecord, rule: Selection, done: Promotion) -> dict[str, str]:
    """A trial's tags for MLflow's table and charts. Where its recipe was repeated, the model is a
    repeat's: both are the selected one.
    """
    end, goal = Outcome.recorded(run), done.rule.goal
    over = clears(end.val_accuracy, end.val_samples, rule)
    chosen = run.run_id == done.candidate.run_id
    was = run.tags.get(SELECTED_TRIAL, "")
    mark = goal if chosen else "" if was == goal else was
    return colour(over, chosen or run.run_id == done.run_id) | {SELECTED_TRIAL: mark}


def _report_nothing(
    study: RunRecord,
    why: NothingPasses,
    trials: Sequence[Candidate],
    rule: Selection,
    tracking: Tracking,
) -> None:
    """Let the study's page say that nothing passes, unless something did by another rule."""
    if {"kdexp.selected_run", "kdexp.confirmed_run"} & study.tags.keys() or not trials:
        return
    with suppress(KdexpError):  # why nothing passes is what is to be heard
        _draw(study, trials, rule, None, tracking)
        text = describe.unanswered(str(why), trials, rule, study.experiment_id, study.run_id)
        tracking.tag(study.run_id, {NOTE: text[:LONGEST_NOTE]})


def _draw(
    study: RunRecord,
    trials: Sequence[Candidate],
    rule: Selection,
    chosen: Candidate | None,
    tracking: Tracking,
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        save(frontier(trials, rule, chosen), Path(temporary) / "frontier.png")
        seal(study.run_id, tracking.log_files(study.run_id, Path(temporary)), tracking)
