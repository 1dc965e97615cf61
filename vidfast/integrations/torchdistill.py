"""The fused VID loss in torchdistill's YAML files; importing this registers `VidfastDistributor` and `VidfastVIDLoss`.

In a YAML file that works with torchdistill's own VID, two keys change, and `dependencies`, which torchdistill imports,
names this module:

    dependencies: ['vidfast.integrations.torchdistill']
    ...
    auxiliary_model_wrapper:
      key: 'VidfastDistributor'       # was VariationalDistributor4VID
    ...
    criterion:
      key: 'VidfastVIDLoss'           # was VIDLoss

Loss and gradients are the same (`reduction="mean"`), and checkpoints of the wrapper load. Maps of differing sizes,
which torchdistill does not pool, are pooled to the smaller.

With `distributed`, torchdistill's students and regressors each run under a DistributedDataParallel of their own, and so
do these: the criterion calls the loss through it, so gradients are averaged over the processes. A `wrapper` around
the whole student (DataParallel, DistributedDataParallel, FullyShardedDataParallel) and Accelerate with several
processes are not supported: torchdistill then does not call an auxiliary wrapper's `secondary_forward`, and the
criterion raises an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vidfast import VIDLoss

try:
    from torchdistill.losses.registry import register_mid_level_loss
    from torchdistill.models.registry import register_auxiliary_model_wrapper
    from torchdistill.models.util import wrap_if_distributed
    from torchdistill.models.wrapper import AuxiliaryModelWrapper
except ImportError as error:
    raise ImportError(
        f"vidfast.integrations.torchdistill needs torchdistill: pip install torchdistill ({error})"
    ) from error

__all__ = ["StudentHalf", "VidfastDistributor", "VidfastVIDLoss"]


class StudentHalf(NamedTuple):
    """What the criterion needs of the student for one pair; it has the teacher's feature itself.

    Attributes:
        feature: The student's feature, (B, in_channels, *spatial).
        loss: A :class:`vidfast.VIDLoss`, or the DistributedDataParallel around it.
    """

    feature: Tensor
    loss: nn.Module


class VidfastDistributor(AuxiliaryModelWrapper):  # type: ignore[misc]  # torchdistill has no types
    """A student and one :class:`vidfast.VIDLoss` a pair, in place of torchdistill's `VariationalDistributor4VID`.

    The losses are its modules `regressor_dict.<key>`: their parameters reach the optimizer and the checkpoints, under
    the keys of torchdistill's, but for `log_scale` in place of `soft_plus_param`, which loads too.
    The criterion :class:`VidfastVIDLoss` calls them; a hook on `regressor_dict.<key>` itself is never called.

    Args:
        student_model: The student.
        regressors: For each key, `path` and `io` of the student's feature, which `forward_hook` has to list, and
            `kwargs`: `in_channels`, `middle_channels`, `out_channels` and, if wanted, `init_pred_var` (5.0), `eps`
            (1e-5), and `reduction`, `inplace`, `backend` as in :class:`vidfast.VIDLoss`.
        device: Where student and losses are moved.
        device_ids: Of DistributedDataParallel.
        distributed: Whether the student and each loss are wrapped in a DistributedDataParallel.
        find_unused_parameters: Of DistributedDataParallel; None: where a parameter is frozen.
        **kwargs: Ignored, as by torchdistill's wrappers.

    Raises:
        TypeError: A regressor has an option of another name.
        ValueError: A regressor lacks `path`, `io` or `kwargs`, or a value of these does not fit.
    """

    def __init__(
        self,
        student_model: nn.Module,
        regressors: Mapping[str, Mapping[str, Any]],
        device: torch.device | str,
        device_ids: list[int] | None,
        distributed: bool,
        find_unused_parameters: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        options = (device, device_ids, distributed, find_unused_parameters)
        self.student_model = wrap_if_distributed(student_model, *options)
        self.regressor_dict = nn.ModuleDict()
        self._places: dict[str, tuple[str, str]] = {}
        for key, config in regressors.items():
            if not {"path", "io", "kwargs"} <= config.keys():
                raise ValueError(
                    f"`regressors['{key}']` must have `path`, `io` and `kwargs`, got {sorted(config)}"
                )
            self.regressor_dict[key] = wrap_if_distributed(_loss(**config["kwargs"]), *options)
            self._places[key] = (config["path"], config["io"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's output."""
        return self.student_model(*args, **kwargs)

    def secondary_forward(self, io_dict: dict[str, dict[str, Any]]) -> None:
        """Adds a :class:`StudentHalf` for each loss to `io_dict`, as the output of `regressor_dict.<key>`.

        Args:
            io_dict: Inputs and outputs of the student's modules, by path; changed.

        Raises:
            KeyError: A regressor's feature is not among them.
        """
        # Not by a hook: the loss is computed, and gradients are averaged, once the teacher's feature is there too.
        for key, (path, io) in self._places.items():
            half = StudentHalf(_recorded(io_dict, path, io, "student"), self.regressor_dict[key])
            io_dict.setdefault(f"regressor_dict.{key}", {})["output"] = half


class VidfastVIDLoss(nn.Module):
    """The sum over pairs of `weight` times equation 5 (Ahn et al., CVPR 2019), in place of torchdistill's `VIDLoss`.

    A pair's `weight` is computed with the loss and costs nothing; one of the whole term scales gradients afterwards.

    Args:
        feature_pairs: For each name `teacher` and `student`, each with `path` and `io`, and a `weight` (1.0). The
            student's path is `regressor_dict.<key>` of :class:`VidfastDistributor`.
        **kwargs: Ignored, as by torchdistill's loss.

    Raises:
        ValueError: There is no pair.
    """

    def __init__(self, feature_pairs: Mapping[str, Mapping[str, Any]], **kwargs: Any) -> None:
        super().__init__()
        if not feature_pairs:
            raise ValueError("`feature_pairs` must have one pair or more, got none")
        self.feature_pairs = feature_pairs

    def forward(
        self,
        student_io_dict: Mapping[str, Mapping[str, Any]],
        teacher_io_dict: Mapping[str, Mapping[str, Any]],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            student_io_dict: Inputs and outputs of the student's modules, by path.
            teacher_io_dict: The teacher's.
            *args: Ignored; torchdistill gives the labels.
            **kwargs: Ignored.

        Raises:
            TypeError: The student's path of a pair is not that of a loss of :class:`VidfastDistributor`, or
                torchdistill did not call its `secondary_forward`.
            KeyError: A teacher's feature is not in `teacher_io_dict`.
            ValueError: A teacher's feature does not fit the student's.
        """
        losses = []
        for name, pair in self.feature_pairs.items():
            at = pair["student"]
            half = student_io_dict.get(at["path"], {}).get(at["io"])
            if not isinstance(half, StudentHalf):
                raise TypeError(
                    f"the student's `path` and `io` of `feature_pairs['{name}']` must be those of a loss, "
                    f"`regressor_dict.<key>` and `output`, got {at['path']!r} and {at['io']!r}, where "
                    f"{type(half).__name__} was found. "
                    "The student's `auxiliary_model_wrapper` must be VidfastDistributor, without a `wrapper` around it"
                )
            # DistributedDataParallel's module, which has the weight
            getattr(half.loss, "module", half.loss).weight = pair.get("weight", 1.0)
            teacher = _recorded(teacher_io_dict, **pair["teacher"], model="teacher")
            # Called without hooks: torchdistill's would keep the loss for its next step, and fail there.
            losses.append(half.loss.forward(half.feature, teacher))
        return torch.stack(losses).sum()


def _recorded(io_dict: Mapping[str, Mapping[str, Any]], path: str, io: str, model: str) -> Any:
    """What a forward hook of torchdistill's recorded."""
    if io not in io_dict.get(path, {}):
        there = ", ".join(sorted(f"{p} ({i})" for p, ios in io_dict.items() for i in ios))
        raise KeyError(
            f"the {model}'s `forward_hook` must list {path!r} under `{io}`, got records of {there or 'no module'}"
        )
    return io_dict[path][io]


def _loss(
    in_channels: int,
    middle_channels: int,
    out_channels: int,
    eps: float = 1e-5,
    init_pred_var: float = 5.0,
    **options: Any,
) -> VIDLoss:
    """The loss for a regressor's `kwargs`."""
    if unknown := options.keys() - {"reduction", "inplace", "backend"}:
        raise TypeError(
            "a regressor's `kwargs` must be in_channels, middle_channels, out_channels, eps, init_pred_var, reduction, "
            f"inplace or backend, got {', '.join(sorted(unknown))}"
        )
    return VIDLoss(in_channels, middle_channels, out_channels, init_pred_var, eps, **options)


register_auxiliary_model_wrapper(VidfastDistributor)
register_mid_level_loss(VidfastVIDLoss)
