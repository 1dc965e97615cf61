"""LwF: the teacher's logits from the student's last features, for a teacher of other classes.

Both forms put a linear layer W on the student's penultimate features s; z_t are the teacher's logits:

    "mse"       1/2 || z_t - W s ||^2, the form of the VID paper (Ahn et al., CVPR 2019, section 2.2), equation 7
                with unit variance;
    "softened"  - sum_n p_n log p'_n,  p = softmax(z_t / T),  p' = softmax(W s / T), the knowledge distillation
                loss of Learning without Forgetting (Li and Hoiem, TPAMI 2017, equations 2 and 3), T = 2.

Li and Hoiem's student starts as a copy of the teacher; here it may be any network and W starts at random.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vidfast.arguments import ScalarReduction
from vidfast.regressor import regress

from ..choices import LwFForm
from ..weighting import Factor, selected, times, weighted
from .base import METHODS, Batch, Method
from .fitnet import half_squared_error
from .kd import check_temperature
from .pairs import place, wide
from .penultimate import check_layer, penultimate, sample_weights
from .variational import check_reduction


@METHODS.register("lwf")
class LwF(Method):
    """The error of the teacher's logits as a linear function of the student's penultimate features.

    layer: the student's penultimate layer, of (B, D) or, as an average pool gives it, (B, D, 1, 1), or the
        classifier's input, "fc.input". A map with
        more positions is an error: whether the classifier averages or flattens it is not for this term to guess.
    form: "mse" or "softened".
    temperature: T of form "softened".
    scale_by_temperature: multiply form "softened" by T^2, as KD does. Li and Hoiem do not: the default.
    reduction: for form "mse" "mean" over samples and logits, "batchmean" (summed over logits, averaged over the
        batch: the equation's) or "sum". Form "softened" is summed over the classes by definition: "mean" and
        "batchmean" both average over the batch.
    bias: whether the linear layer has one. The paper's has none.
    weight: what the term is multiplied by.

    Any floating dtypes; errors and softmaxes are formed in fp32 or wider.

    Raises ValueError for options out of range, and, when built, for features or logits of another shape;
    TypeError for a layer that is no name.
    """

    default_name: ClassVar[str] = "lwf"
    takes_mask: ClassVar[bool] = True
    head: nn.Linear

    def __init__(
        self,
        layer: str,
        form: LwFForm = "mse",
        temperature: float = 2.0,
        scale_by_temperature: bool = False,
        reduction: ScalarReduction = "mean",
        bias: bool = False,
        *,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        if form not in ("mse", "softened"):
            raise ValueError(f"wanted form 'mse' or 'softened', got {form!r}")
        self.student_layers = (check_layer(layer),)
        self.form, self.bias = form, bias
        self.temperature = check_temperature(temperature)
        self.scale_by_temperature = scale_by_temperature
        self.reduction = check_reduction(reduction)

    def build(self, batch: Batch) -> None:
        student, teacher = penultimate(batch, self.student_layers[0])
        if self.form == "softened" and teacher.shape[1] == 1:
            raise ValueError(
                f"wanted a teacher of two or more classes for form 'softened', got logits {tuple(teacher.shape)}: the "
                "softmax of one logit is 1, whatever it is; take form 'mse'"
            )
        head = nn.Linear(student.shape[1], teacher.shape[1], bias=self.bias)
        place(head, student)
        self.head = head

    def forward(self, batch: Batch, factor: Factor) -> Tensor:
        student, teacher = penultimate(batch, self.student_layers[0])
        mask = sample_weights(batch, student, self.student_layers[0])
        student, teacher = selected(student, teacher, mask)
        predicted = regress(self.head, student, teacher.shape)
        if self.form == "mse":
            return half_squared_error(predicted, teacher, self.reduction, factor, mask)
        targets = torch.softmax(wide(teacher) / self.temperature, dim=1)
        log_predicted = torch.log_softmax(wide(predicted) / self.temperature, dim=1)
        if self.scale_by_temperature:
            factor = factor * self.temperature**2
        if mask is not None:
            return times(
                weighted((targets * log_predicted).sum(1, keepdim=True), mask, self.reduction), -factor
            )
        if self.reduction != "sum":
            factor = factor / student.shape[0]
        return times((targets * log_predicted).sum(), -factor)

    def extra_repr(self) -> str:
        form = f"softened, T={self.temperature:g}" if self.form == "softened" else "mse"
        return f"{self.student_layers[0]}; {super().extra_repr()}, {form}, reduction={self.reduction}"
