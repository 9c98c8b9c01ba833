"""What MLflow shows of a run in words: its description, in Markdown. Pure."""

from __future__ import annotations

from kdexp.config import Network, Recipe, Selection, Sweep
from kdexp.distill.models import Size
from kdexp.distill.teacher import CachedTeacher
from kdexp.runs.outcome import Outcome

__all__ = ["concluded", "named", "of_study", "of_teacher", "of_training"]


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
    outcome: Outcome, recipe: Recipe, bad_step: int | None, teacher: CachedTeacher
) -> str:
    """A training's run once it has ended."""
    how = {
        "complete": "Trained to the end",
        "pruned": "Pruned",
        "diverged": f"Diverged (loss not finite from step {bad_step})",
    }[outcome.state]
    low, high = outcome.val_interval
    if recipe.data.train_on_validation:
        accuracy = "Trained on train and validation together,"
    else:
        accuracy = (
            f"**{outcome.val_accuracy:.2%}** validation accuracy (95 % interval {low:.2%} to"
            f" {high:.2%})"
        )
    return (
        f"{accuracy} with **{outcome.size.parameters:,}** parameters. {how} after {outcome.epochs} "
        f"epochs; weights of epoch {outcome.kept_epoch}.\n\n"
        f"Train it again, bit for bit: `kdexp reproduce {outcome.run_id}`\n\n"
        f"{of_training(recipe, outcome.size, teacher)}"
    )


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
    rule, unit = sweep.selection, sweep.selection.size.replace("_", "-")
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
        f" validation accuracy reaches **{rule.accuracy_bar:.2%}**{_limit(rule, unit)}, {aim}. Each"
        " child run is one trial. Trial 0 is the documented defaults, trial 1 the same without the"
        f" teacher (alpha = 0).{again}"
    )


def _limit(rule: Selection, unit: str) -> str:
    return f" with at most {rule.limit:,} {unit}" if rule.limit else ""


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
