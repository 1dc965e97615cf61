"""What a distillation method is: a module that turns both networks' activations into one term of the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..kinds import Kind
from ..registry import Registry
from ..weighting import Factor

METHODS: Registry[type[Method]] = Registry("method")

_TAKEN = frozenset(dir(nn.ModuleDict()))


@dataclass(frozen=True)
class Activations:
    """What one network gave in one forward pass: the tapped layers by name, and the logits (B, classes).

    kinds: what the layers' classes tell of their features, by name; a Distiller's probe has it, and nothing else needs
        to.
    """

    taps: Mapping[str, Tensor]
    logits: Tensor
    kinds: Mapping[str, Kind] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Everything a method may look at.

    teacher: None where there is no teacher. labels: None where unlabelled.
    mask: the positions' weights as the caller gave them, None where all count alike; `vidfast.distill.weighting` brings
        them to a feature's positions (`fitted`) and makes means of them (`weighted`).
    """

    inputs: Any
    labels: Tensor | None
    student: Activations
    teacher: Activations | None
    mask: Tensor | None = None

    @property
    def from_teacher(self) -> Activations:
        """The teacher's activations, for a method that has declared that it needs them."""
        if self.teacher is None:
            raise RuntimeError("this method needs a teacher, and the Distiller has none")
        return self.teacher


@dataclass
class ParameterGroup:
    """Parameters that an optimizer treats alike.

    lr_factor: multiplies the learning rate. decay: whether weight decay applies. name: what follows the term's
    name and a dot in the group's; "" for nothing.
    """

    params: list[nn.Parameter]
    lr_factor: float = 1.0
    decay: bool = True
    name: str = ""


class Method(nn.Module):
    """One weighted term of a `Distiller`'s loss. Subclass it and register the class to add a method:

        @METHODS.register("hint")
        class Hint(Method):
            def __init__(self, layer, *, weight=1.0, name=None):
                super().__init__(weight=weight, name=name)
                self.student_layers = self.teacher_layers = (layer,)

            def build(self, batch):            # shapes are known here: make the parameters
                ...

            def forward(self, batch, factor):  # factor is the weight and all else the loss is multiplied by
                ...
                return factor * loss

    student_layers, teacher_layers: names of the layers whose activations `forward` will find in `batch`, as `Taps`
        takes them.
    needs_teacher: False for a method that works without one.
    takes_mask: True for a method whose loss is a mean that batch.mask weighs; a Distiller with another one refuses
        masks. A subclass with a `forward` (or `pair_loss`) of its own says it anew.
    """

    default_name: ClassVar[str] = ""
    needs_teacher: ClassVar[bool] = True
    takes_mask: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        # What is computed anew may leave the mask out, and nothing would tell.
        if ("forward" in own or "pair_loss" in own) and "takes_mask" not in own:
            cls.takes_mask = False

    def __init__(self, *, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__()
        if not math.isfinite(weight):
            raise ValueError(f"wanted a finite weight, got {weight}")
        self.weight = float(weight)
        if name is not None and not isinstance(name, str):
            raise TypeError(f"wanted a str as name, got {type(name).__name__}")
        self.name = name or self.default_name or type(self).__name__.lower()
        if "." in self.name:
            raise ValueError(
                f"a term's name is part of its parameters' names and has no dot, got {self.name!r}"
            )
        if self.name in _TAKEN:
            raise ValueError(
                f"the terms are an nn.ModuleDict, which has an attribute {self.name!r} of its own: give the "
                "term another name"
            )
        self.student_layers: tuple[str, ...] = ()
        self.teacher_layers: tuple[str, ...] = ()
        self.built = False

    def build(self, batch: Batch) -> None:
        """Make the parameters, from the shapes of one probe batch. Called once, by the Distiller."""

    # Any, so that a user's forward may say `factor: float` where no scale is a tensor.
    def forward(self, batch: Batch, factor: Any) -> Tensor:
        """The term's loss times `factor`, a scalar.

        factor: the term's weight times what the trainer multiplies the whole loss by. It is handed in, and
        not multiplied on outside, so that a fused kernel can fold it in and see an incoming gradient of
        exactly 1. A number, or a tensor of no dimensions where the caller's scale is one.
        """
        raise NotImplementedError

    if TYPE_CHECKING:  # nn.Module's gives Any

        def __call__(self, batch: Batch, factor: Factor) -> Tensor: ...

    def parameter_groups(self) -> list[ParameterGroup]:
        """Every parameter of the method, once. Override to treat some of them apart."""
        params = list(self.parameters())
        return [ParameterGroup(params)] if params else []

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}"
