"""The distillation loss against a float64 reference, at the ends of its ranges, and in its
scale.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from kdexp.config import Distillation
from kdexp.distill.losses import Term, distillation_loss, label_loss


def batch(seed: int, samples: int = 6, classes: int = 10, spread: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(samples, classes, generator=generator, dtype=torch.float64) * spread
    teacher = torch.randn(samples, classes, generator=generator, dtype=torch.float64) * spread
    return student, teacher, torch.randint(classes, (samples,), generator=generator)


def reference(student, teacher, labels, alpha, temperature, scale) -> float:
    """Hinton et al. 2015 in numpy, float64, sample by sample."""
    total = 0.0
    for s, t, label in zip(student.numpy(), teacher.numpy(), labels.numpy(), strict=True):
        soft, prediction = log_softmax(t / temperature), log_softmax(s / temperature)
        kl = float(np.sum(np.exp(soft) * (soft - prediction)))
        total += alpha * kl * (temperature**2 if scale else 1) - (1 - alpha) * log_softmax(s)[label]
    return total / len(labels)


@given(
    st.integers(0, 10_000),
    st.floats(0, 1),
    st.floats(0.05, 200),
    st.booleans(),
    st.integers(1, 9),
    st.integers(2, 12),
)
def test_it_equals_the_float64_reference(seed, alpha, temperature, scale, samples, classes) -> None:
    student, teacher, labels = batch(seed, samples, classes)
    loss = distillation_loss(student, teacher, labels, alpha, temperature, Term("kl", scale))
    assert loss.total.item() == pytest.approx(
        reference(student, teacher, labels, alpha, temperature, scale), rel=1e-9, abs=1e-9
    )


def test_float32_is_as_good_as_its_precision_allows() -> None:
    student, teacher, labels = batch(1)
    loss = distillation_loss(student.float(), teacher.float(), labels, 0.3, 5.0)
    assert loss.total.item() == pytest.approx(
        reference(student, teacher, labels, 0.3, 5.0, True), rel=1e-5
    )


def test_alpha_0_is_cross_entropy_and_alpha_1_is_the_soft_term() -> None:
    student, teacher, labels = batch(2)
    alone = torch.nn.functional.cross_entropy(student, labels).item()
    assert distillation_loss(student, teacher, labels, 0.0, 5.0).total.item() == pytest.approx(
        alone, rel=1e-14
    )
    loss = distillation_loss(student, teacher, labels, 1.0, 5.0)
    assert loss.total == loss.distillation


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_it_is_continuous_at_both_ends_of_alpha(alpha: float) -> None:
    student, teacher, labels = batch(3)
    inside = abs(alpha - 1e-9)
    at, near = (
        distillation_loss(student, teacher, labels, a, 5.0).total.item() for a in (alpha, inside)
    )
    assert at == pytest.approx(near, abs=1e-6)


def test_at_temperature_1_the_soft_term_is_the_plain_divergence() -> None:
    student, teacher, labels = batch(4)
    scaled, plain = (
        distillation_loss(student, teacher, labels, 1.0, 1.0, Term("kl", scale))
        for scale in (True, False)
    )
    assert scaled.total == plain.total


def test_a_student_equal_to_its_teacher_has_no_soft_loss() -> None:
    _, teacher, labels = batch(5)
    assert distillation_loss(teacher, teacher, labels, 1.0, 4.0).total.item() == pytest.approx(
        0, abs=1e-12
    )


def test_at_large_temperature_it_matches_logits() -> None:
    """Hinton et al., section 2.1: for large T the soft term tends to 1 / (2 N) of the squared
    distance of centred logits.
    """
    student, teacher, labels = batch(6)
    difference = (student - student.mean(1, keepdim=True)) - (
        teacher - teacher.mean(1, keepdim=True)
    )
    expected = difference.square().sum(1).mean().item() / (2 * student.shape[1])
    assert distillation_loss(student, teacher, labels, 1.0, 1e4).total.item() == pytest.approx(
        expected, rel=1e-3
    )


def gradient(kind: str, temperature: float, scale: bool, spread: float = 1.0) -> float:
    student, teacher, labels = batch(7, samples=64, spread=spread)
    student.requires_grad_()
    distillation_loss(
        student, teacher, labels, 1.0, temperature, Term(kind, scale)
    ).total.backward()
    return student.grad.norm().item()


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("kind", ["kl", "standardized", "decoupled", "correlation"])
def test_by_default_the_soft_gradients_keep_their_scale_whatever_the_temperature_and_the_loss(
    kind, spread
) -> None:
    """So alpha weighs the teacher alike at every T; the other way round they change with T²."""
    default = Distillation(loss=kind).times_t_squared
    found = [gradient(kind, t, default, spread) for t in (1.0, 2.0, 3.0, 5.0, 10.0, 20.0)]
    assert max(found) / min(found) < 4
    other = [gradient(kind, t, not default, spread) for t in (1.0, 20.0)]
    assert max(other) / min(other) > 80


def test_a_mean_over_samples_not_over_classes() -> None:
    """The field's most repeated bug: reduction='mean' divides by the number of classes too."""
    student, teacher, labels = batch(8, samples=4)
    once = distillation_loss(student, teacher, labels, 0.3, 5.0).total
    twice = distillation_loss(
        student.repeat(2, 1), teacher.repeat(2, 1), labels.repeat(2), 0.3, 5.0
    ).total
    assert twice.item() == pytest.approx(once.item())
    assert once.item() == pytest.approx(reference(student, teacher, labels, 0.3, 5.0, True))


# --- other divergences in KL's place ---

KINDS = ["kl", "standardized", "decoupled", "correlation"]


def other_reference(kind: str, student, teacher, labels, temperature: float, beta: float) -> float:
    """Each as its paper writes it, in numpy, float64, sample by sample."""
    s, t, y = student.numpy(), teacher.numpy(), labels.numpy()

    def soft(x: np.ndarray) -> np.ndarray:
        return np.exp(log_softmax(x, axis=-1))

    def kl(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.sum(p * (np.log(p) - np.log(q))))

    if kind == "standardized":
        s, t = ((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True, ddof=1) for x in (s, t))
    p, q = soft(t / temperature), soft(s / temperature)
    if kind == "correlation":
        rows = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)]
        columns = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)]
        return float(np.mean(rows) + np.mean(columns))
    total = 0.0
    for a, b, label in zip(p, q, y, strict=True):
        if kind != "decoupled":
            total += kl(a, b)
            continue
        wrong = np.arange(len(a)) != label
        binary = kl(np.array([a[label], a[wrong].sum()]), np.array([b[label], b[wrong].sum()]))
        total += binary + beta * kl(a[wrong] / a[wrong].sum(), b[wrong] / b[wrong].sum())
    return total / len(y)


@given(
    st.sampled_from(KINDS),
    st.integers(0, 10_000),
    st.floats(0.5, 20),
    st.floats(0, 4),
    st.integers(2, 9),
)
def test_every_divergence_equals_its_papers_formula(kind, seed, temperature, beta, samples) -> None:
    student, teacher, labels = batch(seed, samples)
    if kind == "correlation":  # of a class that no sample is likely to be, it is anybody's guess
        temperature, samples = temperature + 4, samples + 2
        student, teacher, labels = batch(seed, samples)
    loss = distillation_loss(student, teacher, labels, 1.0, temperature, Term(kind, False, beta))
    expected = other_reference(kind, student, teacher, labels, temperature, beta)
    near = 1e-3 if kind == "correlation" else 1e-6
    assert loss.distillation.item() == pytest.approx(expected, rel=near, abs=1e-9)


def test_standardized_logits_are_their_authors_and_those_of_earlier_runs_stay_theirs() -> None:
    """github.com/sunshangquan/logit-standardization-KD: (logit - mean) / (1e-7 + std), torch's std
    over K - 1.
    """
    student, teacher, labels = batch(9)

    def authors(logits: torch.Tensor) -> torch.Tensor:
        return (logits - logits.mean(-1, keepdim=True)) / (1e-7 + logits.std(-1, keepdim=True))

    term = {name: Term("standardized", False, deviation=name) for name in ("sample", "population")}
    found = {
        name: distillation_loss(student, teacher, labels, 1.0, 2.0, how).distillation.item()
        for name, how in term.items()
    }
    plain = distillation_loss(
        authors(student), authors(teacher), labels, 1.0, 2.0, Term("kl", False)
    ).distillation.item()
    assert found["sample"] == pytest.approx(plain, rel=1e-6)
    wider = (student.shape[-1] / (student.shape[-1] - 1)) ** 0.5
    by_classes = (authors(logits) * wider for logits in (student, teacher))
    former = distillation_loss(*by_classes, labels, 1.0, 2.0, Term("kl", False)).distillation.item()
    assert found["population"] == pytest.approx(former, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_has_nothing_to_say_to_its_equal_whatever_the_divergence(kind) -> None:
    student, _, labels = batch(3)
    student.requires_grad_()
    loss = distillation_loss(student, student.detach(), labels, 1.0, 4.0, Term(kind))
    loss.total.backward()
    assert loss.total.item() == pytest.approx(0, abs=1e-9)
    assert student.grad.abs().max().item() == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_lanes_have_each_their_own_loss(kind) -> None:
    student, teacher, labels = batch(4)
    alpha, temperature = torch.tensor([0.2, 0.9]).double(), torch.tensor([1.5, 6.0]).double()
    both = distillation_loss(
        torch.stack([student, 2 * student]), teacher, labels, alpha, temperature, Term(kind)
    )
    for lane, own in enumerate((student, 2 * student)):
        alone = distillation_loss(
            own, teacher, labels, alpha[lane].item(), temperature[lane].item(), Term(kind)
        )
        assert both.total[lane].item() == pytest.approx(alone.total.item(), rel=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_torchs(smoothing) -> None:
    student, _, labels = batch(5)
    expected = torch.nn.functional.cross_entropy(student, labels, label_smoothing=smoothing)
    assert label_loss(student, labels, smoothing).item() == pytest.approx(
        expected.item(), rel=1e-12
    )
