"""The distillation loss.

    L = alpha * T^2 * KL(p_teacher || p_student) + (1 - alpha) * CE(labels, student),   p = softmax(logits / T)

Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2: the soft term's gradients scale as 1 / T^2, hence
the factor T^2. alpha weighs the *teacher* (in torchdistill and Keras it weighs the labels). Both terms are
means over the batch; torch's `kl_div(reduction="mean")` would also divide by the number of classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["Loss", "distillation_loss", "label_loss"]


class Loss(NamedTuple):
    """`total` = alpha * distillation + (1 - alpha) * student; one value for each lane, where there are lanes."""

    total: Float[Tensor, "*lanes"]
    distillation: Float[Tensor, "*lanes"]
    student: Float[Tensor, "*lanes"]


def distillation_loss(
    student_logits: Float[Tensor, "*lanes batch classes"],
    teacher_logits: Float[Tensor, "*#lanes batch classes"],
    labels: Int64[Tensor, "*#lanes batch"],
    alpha: float | Float[Tensor, "*lanes"],
    temperature: float | Float[Tensor, "*lanes"],
    scale_by_t_squared: bool = True,
) -> Loss:
    """The loss of one batch, or of each lane's batch; continuous over alpha in [0, 1] and temperature > 0.

    Without `scale_by_t_squared` it is the recipe's formula to the letter.
    """
    at = temperature[..., None, None] if isinstance(temperature, Tensor) else temperature
    soft_predictions = F.log_softmax(student_logits / at, dim=-1)
    soft_labels = F.log_softmax(teacher_logits / at, dim=-1)
    divergence = F.kl_div(soft_predictions, soft_labels.expand_as(soft_predictions), reduction="none", log_target=True)
    distillation = divergence.sum(-1).mean(-1)
    if scale_by_t_squared:
        distillation = distillation * temperature**2
    student = label_loss(student_logits, labels)
    return Loss(alpha * distillation + (1 - alpha) * student, distillation, student)


def label_loss(
    logits: Float[Tensor, "*lanes batch classes"], labels: Int64[Tensor, "*#lanes batch"]
) -> Float[Tensor, "*lanes"]:
    """Cross-entropy with the true labels, the mean over the batch."""
    chosen = labels.expand(logits.shape[:-1])[..., None]
    return -F.log_softmax(logits, dim=-1).gather(-1, chosen).squeeze(-1).mean(-1)
