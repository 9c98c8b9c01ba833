"""Training: deterministic, one lane like many, schedules as published, every epoch told the truth
about.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from kdexp.config import Augment, Data, Distillation, Student, Training
from kdexp.distill.datasets import Splits
from kdexp.distill.models import weights_hash
from kdexp.distill.packs import Execution, Lane
from kdexp.distill.randomness import seed_of
from kdexp.distill.train import EpochReport, TeacherLogits, draw, epochs_of, learning_rate, train

DATA = Data(
    dataset="digits", channels=1, validation_fraction=0.2, augment=Augment(flip=False, shift=1)
)


def lane(alpha: float = 0.3, temperature: float = 5.0, channels=(4, 8), **training) -> Lane:
    settings = {"epochs": 2, "learning_rate": 0.01, **training}
    return Lane(
        Student(channels=channels, hidden=16),
        Training(**settings),
        Distillation(alpha=alpha, temperature=temperature),
    )


def logits(splits: Splits, seed: int = 0) -> TeacherLogits:
    generator = torch.Generator().manual_seed(seed)
    return TeacherLogits(torch.randn(9, len(splits.train), 10, generator=generator).half())


def run(
    lanes: list[Lane], splits: Splits, soft: TeacherLogits | None
) -> list[tuple[EpochReport, ...]]:
    return list(train(lanes, splits, DATA, soft))


def facts(reports: list[EpochReport]) -> list:
    return [
        (
            r.epoch,
            r.loss,
            r.distillation_loss,
            r.student_loss,
            r.val_accuracy,
            r.val_loss,
            weights_hash(r.weights) if r.weights else "",
        )
        for r in reports
    ]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(digits) -> None:
    one, same, other = (
        facts([r for (r,) in run([lane(seed=seed)], digits, logits(digits))]) for seed in (1, 1, 2)
    )
    assert one == same != other


def test_global_random_state_is_neither_used_nor_changed(digits) -> None:
    torch.manual_seed(1)
    one = facts([r for (r,) in run([lane()], digits, logits(digits))])
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert facts([r for (r,) in run([lane()], digits, logits(digits))]) == one
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_lane_does_not_depend_on_its_neighbours(digits, optimizer) -> None:
    soft = logits(digits)
    lanes = [lane(alpha=a, temperature=t, learning_rate=lr, seed=s, optimizer=optimizer)
             for a, t, lr, s in ((0.0, 5.0, 0.01, 1), (0.5, 2.0, 0.003, 1), (1.0, 9.0, 1e35, 2))]  # fmt: skip
    together = run(lanes, digits, soft)
    assert not together[-1][2].finite  # the third diverges: neither of the others notices
    for place, one in enumerate(lanes[:2]):
        others = Execution(lanes=3, shared=False)
        again = list(train([one] * 3, digits, DATA, soft, others))
        assert facts([epoch[place] for epoch in together]) == facts(
            [epoch[place] for epoch in again]
        )


def test_a_lane_that_takes_over_a_place_trains_as_if_it_had_begun_there(digits) -> None:
    soft, how = logits(digits), Execution(lanes=2, shared=False)
    early = lane(epochs=3, seed=1)
    late = lane(epochs=3, seed=5, alpha=0.8)
    stays = lane(epochs=3, seed=2)
    training = train([early, stays], digits, DATA, soft, how)
    first = next(training)
    second = training.send({0: late})
    rest = list(training)
    assert [r.epoch for r in (first[0], second[0], rest[0][0], rest[1][0])] == [1, 1, 2, 3]
    assert rest[1][1] is None  # its neighbour has come to its end
    began = facts([r for r, _ in train([late, stays], digits, DATA, soft, how)])
    assert facts([second[0], rest[0][0], rest[1][0]]) == began


def test_a_place_given_up_leaves_the_others_as_they_are(digits) -> None:
    lanes, how = [lane(epochs=3, seed=1), lane(epochs=3, seed=1, alpha=0.9)], Execution(lanes=2)
    training = train(lanes, digits, DATA, logits(digits), how)
    first = next(training)
    second = training.send({0: None})
    assert second[0] is None
    whole = list(train(lanes, digits, DATA, logits(digits), how))
    assert facts([first[1], second[1], next(training)[1]]) == facts([epoch[1] for epoch in whole])
    with pytest.raises(StopIteration):
        next(training)


def test_lanes_that_share_their_batches_start_together(digits) -> None:
    training = train([lane(), lane()], digits, DATA, None)
    next(training)
    with pytest.raises(ValueError, match="start together"):
        training.send({0: lane()})


def test_lanes_of_different_shapes_do_not_share_a_pack(digits) -> None:
    with pytest.raises(ValueError, match="fuse key"):
        run([lane(channels=(4, 8)), lane(channels=(2, 4))], digits, None)
    assert (
        lane(alpha=0.1, learning_rate=1e-3, seed=3).fuse_key
        == lane(alpha=0.9, learning_rate=1e-2, seed=4).fuse_key
    )
    assert lane(epochs=2).fuse_key != lane(epochs=3).fuse_key


def test_the_teacher_reaches_the_student_at_alpha_1_and_not_at_alpha_0(digits) -> None:
    for alpha, matters in ((0.0, False), (1.0, True)):
        one, other = (
            run([lane(alpha=alpha)], digits, logits(digits, seed))[-1][0] for seed in (0, 1)
        )
        assert (one.val_loss != other.val_loss) is matters


def test_the_logits_of_the_drawn_view_of_the_drawn_sample_are_used(digits) -> None:
    """A teacher whose logits name (sample's label) in every view: a student of it alone must learn
    the labels.
    """
    soft = (
        (10.0 * torch.nn.functional.one_hot(digits.train.labels, 10))
        .half()
        .expand(9, -1, -1)
        .contiguous()
    )
    report = run(
        [lane(alpha=1.0, temperature=1.0, channels=(8, 16), epochs=16)], digits, TeacherLogits(soft)
    )[-1][0]
    assert report.val_accuracy > 0.85


def test_logits_by_epoch_teach_what_logits_by_view_teach(digits) -> None:
    """Row e - 1 holds each sample in the view drawn for it in epoch e: the same training, to the
    bit.
    """
    by_view, one = logits(digits), lane(epochs=3, seed=4)
    every = torch.arange(len(digits.train))
    rows = [by_view.logits[draw(4, epoch, len(digits.train), 9)[1], every] for epoch in (1, 2, 3)]
    by_epoch = TeacherLogits(torch.stack(rows), "epoch")
    assert facts([r for (r,) in run([one], digits, by_epoch)]) == facts(
        [r for (r,) in run([one], digits, by_view)]
    )


def test_reports_add_up(digits) -> None:
    for (report,) in run([lane(alpha=0.3)], digits, logits(digits)):
        assert report.loss == pytest.approx(
            0.3 * report.distillation_loss + 0.7 * report.student_loss, rel=1e-5
        )
        assert report.val_accuracy == report.val_correct / len(digits.validation)
        assert report.finite


def test_keep_best_hands_out_weights_only_when_validation_improves(digits) -> None:
    reports = [r for (r,) in run([lane(epochs=6)], digits, logits(digits))]
    best = list(itertools.accumulate((r.val_correct for r in reports), max))
    improved = [True, *(now > before for before, now in itertools.pairwise(best))]
    assert [r.weights is not None for r in reports] == improved
    assert all(r.weights is not None for (r,) in run([lane(epochs=3, keep="last")], digits, None))


def test_a_diverging_training_is_reported_as_not_finite(digits) -> None:
    (report,) = run(
        [lane(optimizer="sgd", learning_rate=1e30, schedule="constant", epochs=1)], digits, None
    )[0]
    assert not report.finite


def test_max_steps_caps_the_steps_and_the_schedule(digits) -> None:
    per_epoch = len(digits.train) // 128
    training = Training(epochs=500, max_steps=per_epoch + 3)
    assert epochs_of(training, len(digits.train)) == 2
    reports = run([lane(epochs=500, max_steps=per_epoch + 3)], digits, None)
    assert [r.epoch for (r,) in reports] == [1, 2]
    assert reports[-1][0].learning_rate < reports[0][0].learning_rate


def test_a_dataset_smaller_than_a_batch_is_one_batch(digits) -> None:
    small = Splits(digits.train.take(torch.arange(20)), digits.validation)
    reports = list(train([lane(epochs=1)], small, DATA, None))
    assert len(reports) == 1
    assert reports[0][0].finite


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_the_schedules_are_torchs(schedule) -> None:
    steps, training = 50, Training(learning_rate=0.1, schedule=schedule, final_learning_rate=1e-3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    if schedule == "cosine":
        reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-3)
    else:
        reference = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=steps, cycle_momentum=False
        )
    for step in range(steps):
        assert learning_rate(training, step, steps) == pytest.approx(
            reference.get_last_lr()[0], rel=1e-6
        )
        optimizer.step()
        reference.step()


def test_a_constant_schedule_is_constant_and_the_cosine_never_rises_above_its_peak() -> None:
    assert {learning_rate(Training(schedule="constant"), step, 10) for step in range(10)} == {3e-4}
    tiny = Training(learning_rate=1e-8)  # below the cosine's end
    assert {learning_rate(tiny, step, 10) for step in range(10)} == {1e-8}


def test_seeds_for_different_purposes_differ_and_never_change() -> None:
    assert seed_of(8787, "order", 1) == 32_063_668_250_047_303
    assert (
        len({seed_of(s, p, e) for s in range(5) for p in ("order", "dropout") for e in range(5)})
        == 50
    )


def test_random_erasing_needs_the_logits_of_what_is_left(digits) -> None:
    with pytest.raises(ValueError, match="teacher logits must be by epoch"):
        run([lane(random_erasing=0.5)], digits, logits(digits))
    rows = TeacherLogits(logits(digits).logits[:2], "epoch")
    one, same, whole = (
        facts([r for (r,) in run([lane(random_erasing=share)], digits, rows)])
        for share in (0.5, 0.5, 0.0)
    )
    assert one == same != whole


def test_lanes_of_other_seeds_erase_other_rectangles(digits) -> None:
    """Each as it would alone, in a pack of the same form."""
    lanes = [lane(random_erasing=0.5, seed=seed) for seed in (1, 2)]
    how = Execution(2, shared=False)
    together = list(train(lanes, digits, DATA, None, how))
    for place, one in enumerate(lanes):
        alone = list(train([one] * 2, digits, DATA, None, how))
        assert facts([epoch[place] for epoch in together]) == facts(
            [epoch[place] for epoch in alone]
        )


def test_a_moving_average_is_kept_and_the_training_itself_goes_its_way(digits) -> None:
    plain, averaged = (
        run([lane(ema=ema, epochs=3, keep="last")], digits, None) for ema in (0.0, 0.95)
    )
    assert [r.loss for (r,) in plain] == [r.loss for (r,) in averaged]
    assert [r.val_loss for (r,) in plain] != [r.val_loss for (r,) in averaged]
