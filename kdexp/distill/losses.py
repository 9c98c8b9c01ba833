"""The distillation loss.

    L = alpha * T^2 * KL(p_teacher || p_student) + (1 - alpha) * CE(labels, student)
    p = softmax(logits / T)

Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2: the soft term's gradients scale as 1 /
T^2, hence the factor T^2. alpha weighs the *teacher* (in torchdistill and Keras it weighs the
labels). Both terms are means over the batch; torch's `kl_div(reduction="mean")` would also divide
by the number of classes.

In the place of KL, `kind` may put another divergence of soft labels and predictions, none with
parameters of its own:

    standardized   KL of logits with mean 0 and standard deviation 1 in each sample
                   (arXiv:2403.01427, eq. 10), the standard deviation over classes - 1, as in its
                   authors' code
    decoupled      KL of (right class, all others) + beta * KL among the wrong classes
                   (DKD, arXiv:2203.08679, eq. 7)
    correlation    1 - Pearson's correlation, of the classes within a sample and of the samples
                   within a class (DIST, arXiv:2205.10536, eq. 8 and 9)

The factor T^2 keeps the strength of the first three nearly constant in T (from T 1 to 20 within a
third), so that alpha means the same at every T. A correlation does not change with its arguments'
scale: its gradient hardly falls with T (0.51, 0.35, 0.33 at T 1, 5 and 20), and with the factor it
would grow as T^2. So by default it has none.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["Divergence", "Loss", "Term", "distillation_loss", "label_loss"]

Divergence = Literal["kl", "standardized", "decoupled", "correlation"]
Deviation = Literal["sample", "population"]
TINY = 1e-8  # keeps a standard deviation of 0 out of a denominator
OUT = -1e4  # a logit that no softmax gives any share


class Loss(NamedTuple):
    """`total` = alpha * distillation + (1 - alpha) * student; one value for each lane, where there
    are lanes.
    """

    total: Float[Tensor, "*lanes"]
    distillation: Float[Tensor, "*lanes"]
    student: Float[Tensor, "*lanes"]


class Term(NamedTuple):
    """How the teacher is listened to: what all lanes of a pack share."""

    kind: Divergence = "kl"
    scale_by_t_squared: bool = True
    """Off: the recipe's formula to the letter."""
    beta: float = 2.0
    """decoupled: weight of the wrong classes among each other."""
    deviation: Deviation = "sample"
    """standardized: over classes - 1, or over classes."""


HINTON = Term()


def distillation_loss(
    student_logits: Float[Tensor, "*lanes batch classes"],
    teacher_logits: Float[Tensor, "*#lanes batch classes"],
    labels: Int64[Tensor, "*#lanes batch"],
    alpha: float | Float[Tensor, "*lanes"],
    temperature: float | Float[Tensor, "*lanes"],
    term: Term = HINTON,
    label_smoothing: float = 0.0,
) -> Loss:
    """The loss of one batch, or of each lane's batch; continuous over alpha in [0, 1] and
    temperature > 0.
    """
    at = temperature[..., None, None] if isinstance(temperature, Tensor) else temperature
    teacher_logits = teacher_logits.expand_as(student_logits)
    if term.kind == "standardized":
        student_logits_at, teacher_logits_at = (
            _standardized(logits, term.deviation) / at
            for logits in (student_logits, teacher_logits)
        )
    else:
        student_logits_at, teacher_logits_at = student_logits / at, teacher_logits / at
    if term.kind == "decoupled":
        distillation = _decoupled(student_logits_at, teacher_logits_at, labels, term.beta)
    elif term.kind == "correlation":
        distillation = _uncorrelated(student_logits_at.softmax(-1), teacher_logits_at.softmax(-1))
    else:
        distillation = _kl(student_logits_at, teacher_logits_at)
    if term.scale_by_t_squared:
        distillation = distillation * temperature**2
    student = label_loss(student_logits, labels, label_smoothing)
    return Loss(alpha * distillation + (1 - alpha) * student, distillation, student)


def label_loss(
    logits: Float[Tensor, "*lanes batch classes"],
    labels: Int64[Tensor, "*#lanes batch"],
    smoothing: float = 0.0,
) -> Float[Tensor, "*lanes"]:
    """Cross-entropy with the true labels, the mean over the batch.

    Of a label, `smoothing` is spread over all classes (arXiv:1512.00567, section 7).
    """
    log_shares = F.log_softmax(logits, dim=-1)
    right = log_shares.gather(-1, _chosen(logits, labels)).squeeze(-1).mean(-1)
    if not smoothing:
        return -right
    return -((1 - smoothing) * right + smoothing * log_shares.mean(-1).mean(-1))


def _kl(student: Tensor, teacher: Tensor) -> Float[Tensor, "*lanes"]:
    """KL(softmax(teacher) || softmax(student)), the mean over the batch."""
    predictions, soft_labels = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    return F.kl_div(predictions, soft_labels, reduction="none", log_target=True).sum(-1).mean(-1)


def _standardized(logits: Tensor, deviation: Deviation) -> Tensor:
    """Mean 0, standard deviation 1 over the classes of each sample."""
    centred = logits - logits.mean(-1, keepdim=True)
    if deviation == "population":  # of runs of former versions, to the bit
        return centred / (centred.square().mean(-1, keepdim=True) + TINY).sqrt()
    return centred / (centred.square().sum(-1, keepdim=True) / (logits.shape[-1] - 1) + TINY).sqrt()


def _decoupled(
    student: Tensor, teacher: Tensor, labels: Tensor, beta: float
) -> Float[Tensor, "*lanes"]:
    chosen = _chosen(student, labels)

    # two logits whose softmax is (share of the right class, of all others)
    def right_or_wrong(logits: Tensor) -> Tensor:
        wrong = _without(logits, chosen).logsumexp(-1, keepdim=True)
        return torch.cat([logits.gather(-1, chosen), wrong], -1)

    among_wrong = _kl(_without(student, chosen), _without(teacher, chosen))
    return _kl(right_or_wrong(student), right_or_wrong(teacher)) + beta * among_wrong


def _uncorrelated(student: Tensor, teacher: Tensor) -> Float[Tensor, "*lanes"]:
    between_classes = 1 - _correlation(student, teacher, -1)
    between_samples = 1 - _correlation(student, teacher, -2)
    return between_classes.mean(-1) + between_samples.mean(-1)


def _correlation(one: Tensor, other: Tensor, dim: int) -> Tensor:
    one, other = one - one.mean(dim, keepdim=True), other - other.mean(dim, keepdim=True)
    norms = (one.square().sum(dim) * other.square().sum(dim) + TINY**2).sqrt()
    return (one * other).sum(dim) / norms


def _chosen(logits: Tensor, labels: Tensor) -> Int64[Tensor, "*lanes batch 1"]:
    return labels.expand(logits.shape[:-1])[..., None]


def _without(logits: Tensor, chosen: Tensor) -> Tensor:
    """Logits of the wrong classes."""
    return logits.scatter(-1, chosen, OUT)
