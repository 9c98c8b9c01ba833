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

__all__ = ["Loss", "distillation_loss"]


class Loss(NamedTuple):
    """`total` = alpha * distillation + (1 - alpha) * student."""

    total: Float[Tensor, ""]
    distillation: Float[Tensor, ""]
    student: Float[Tensor, ""]


def distillation_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int64[Tensor, " batch"],
    alpha: float,
    temperature: float,
    scale_by_t_squared: bool = True,
) -> Loss:
    """The loss of one batch, continuous over alpha in [0, 1] and temperature > 0.

    Without `scale_by_t_squared` it is the recipe's formula to the letter.
    """
    soft_predictions = F.log_softmax(student_logits / temperature, dim=1)
    soft_labels = F.log_softmax(teacher_logits / temperature, dim=1)
    distillation = F.kl_div(soft_predictions, soft_labels, reduction="batchmean", log_target=True)
    if scale_by_t_squared:
        distillation = distillation * temperature**2
    student = F.cross_entropy(student_logits, labels)
    return Loss(alpha * distillation + (1 - alpha) * student, distillation, student)
