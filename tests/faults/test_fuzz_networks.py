"""A thousand random networks through the real training: what is recorded is what the stored module
does, and the weights are those that torch's own autograd and optimizer give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F

from kdexp.config import Augment, Data, Distillation, Student, Training
from kdexp.distill import stacked, train
from kdexp.distill.batches import pixels
from kdexp.distill.datasets import Splits
from kdexp.distill.guard import stored_correct
from kdexp.distill.models import ModelError, outline
from kdexp.distill.packs import Execution, Lane, fresh, plan_for
from kdexp.distill.randomness import seed_of
from kdexp.distill.train import draw, learning_rate

STEPS, BATCH = 2, 16
CLOSE = 1e-4  # a step is 0.01; where a gradient is 0 but for rounding, Adam makes up to 1e-5 of it
DATA = Data(dataset="digits", channels=1, augment=Augment(flip=False, shift=0))


@pytest.fixture(scope="module")
def few(digits: Splits) -> Splits:
    """Two batches to train on, some to judge by."""
    return Splits(
        digits.train.take(torch.arange(STEPS * BATCH)), digits.validation.take(torch.arange(60))
    )


def lane_of(number: int) -> Lane:
    optimizer = ("adam", "adamw", "sgd")[number % 3]
    training = Training(
        batch_size=BATCH,
        epochs=1,
        optimizer=optimizer,
        learning_rate=0.01,
        weight_decay=1e-3,
        seed=number,
    )
    return Lane(
        Student(architecture="faults.networks:build", options={"number": number}),
        training,
        Distillation(),
    )


def by_torch_alone(lane: Lane, splits: Splits) -> dict[str, torch.Tensor]:
    """The state after the same steps of the module itself under torch's own optimizer."""
    module = fresh(lane, splits.train).to(torch.float64, memory_format=torch.channels_last)
    how = lane.training
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    extra = {"momentum": 0.9, "nesterov": True} if how.optimizer == "sgd" else {}
    optimizer = kinds[how.optimizer](
        module.parameters(), lr=0.0, weight_decay=how.weight_decay, **extra
    )
    order, _ = draw(how.seed, 1, len(splits.train), 1)
    for step, samples in enumerate(order.split(BATCH)):
        optimizer.param_groups[0]["lr"] = learning_rate(how, step, STEPS)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_of(how.seed, "dropout", step))
            logits = module(pixels(splits.train, samples).double())
        optimizer.zero_grad()
        F.cross_entropy(logits, splits.train.labels[samples]).backward()
        optimizer.step()
    return module.state_dict()


def drops(module: torch.nn.Module) -> bool:
    """Whether it has a dropout that drops: stacked, its masks are kdexp's own."""
    return any(isinstance(layer, torch.nn.Dropout) and layer.p for layer in module.modules())


def faults_of(lane: Lane, splits: Splits, stacks: bool) -> Iterator[str]:
    """What is not as it must be with this network."""
    ((report,),) = train.train([lane], splits, DATA, how=Execution(), dtype=torch.float64)
    module = outline(lane.network, splits.train).double()
    module.load_state_dict(report.weights)
    like = splits.validation
    correct = int(
        (
            module.eval()(pixels(like, torch.arange(len(like))).double()).argmax(1) == like.labels
        ).sum()
    )
    if correct != report.val_correct:
        yield f"{report.val_correct} recorded, {correct} by the stored module"
    stored_correct(lane.network, report.weights, report.val_correct, like)  # raises
    if not (stacks and drops(module)):
        for name, expected in by_torch_alone(lane, splits).items():
            if not torch.allclose(
                report.weights[name].double(),
                expected.double(),
                rtol=1e-6,
                atol=CLOSE,
                equal_nan=True,
            ):
                yield f"{name} is not what torch makes of it"


def check(numbers: range, splits: Splits) -> Counter[str]:
    """Train all of these; how many were stacked and how many stepped."""
    counts: Counter[str] = Counter()
    for number in numbers:
        lane = lane_of(number)
        stacks = plan_for(lane, splits.train) is not None
        kind = "stacked" if stacks else "stepped"
        try:
            faults = list(faults_of(lane, splits, stacks))
        except ModelError as error:
            faults, kind = [str(error)], "refused"
            # torch itself cannot train all of them: a gradient needs what was overwritten
            with suppress(RuntimeError):
                by_torch_alone(lane, splits)
                kind = "wrongly refused"
        counts[kind] += 1
        assert kind == "refused" or not faults, (
            f"{number}, {kind}: {faults[0]}\n{outline(lane.network, splits.train)}"
        )
    return counts


def test_random_networks_train_as_torch_trains_them_and_store_what_they_record(few) -> None:
    counts = check(range(60), few)
    assert min(counts["stacked"], counts["stepped"]) >= 15, counts


def test_the_fault_that_this_was_written_for_is_noticed_by_the_guard_and_without_it_by_the_fuzz(
    few, monkeypatch
) -> None:
    """A plan that leaves out what stands twice, and asks no layer what else it is."""
    once = [number for number in range(60) if is_changed(number, few)]
    monkeypatch.setattr(stacked, "_prove", lambda module, owned: None)
    monkeypatch.setattr(stacked, "_flat", without_repeats)
    guarded = [number for number in once if noticed(number, few)]
    monkeypatch.setattr(train, "check_plan", lambda *_: None)
    unguarded = [number for number in once if noticed(number, few)]
    assert min(len(guarded), len(unguarded)) >= 3, (once, guarded, unguarded)


def is_changed(number: int, splits: Splits) -> bool:
    """Whether it steps, though all its layers are of kinds that can be stacked."""
    module = outline(lane_of(number).network, splits.train)
    known = all(
        type(layer) in (*stacked.LIFTED, torch.nn.Sequential, torch.nn.Identity)
        for layer in module.modules()
    )
    return known and plan_for(lane_of(number), splits.train) is None


def without_repeats(name: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    if isinstance(module, torch.nn.Sequential):
        for key, child in module.named_children():
            yield from without_repeats(f"{name}.{key}" if name else key, child)
    elif type(module) is not torch.nn.Identity:
        yield name, module


def noticed(number: int, splits: Splits) -> bool:
    try:
        return bool(list(faults_of(lane_of(number), splits, stacks=True)))
    except (ModelError, RuntimeError, KeyError, AssertionError):  # refused, or it does not run
        return True


@pytest.mark.slow
def test_many_random_networks_train_as_torch_trains_them_and_store_what_they_record(few) -> None:
    counts = check(range(60, 460), few)
    assert min(counts["stacked"], counts["stepped"]) >= 100, counts
