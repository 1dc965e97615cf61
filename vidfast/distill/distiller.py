"""Distiller: a student, a teacher and weighted methods as one module with one loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vidfast._torch import is_compiled, version_of

from .inputs import Picker, call, cast, devices_of, picked, pickers, tensors_of
from .methods.base import Activations, Batch, Method
from .modes import eval_mode
from .probing import check_training_logits
from .processes import wrapper_in
from .sharing import Shared
from .stream import kept_random_state
from .taps import Taps
from .task import Count, TaskLoss, count_of, mean_loss
from .teacher import Followed, in_dtype, move
from .terms import check_groups, named, refuse_masks
from .weighting import Factor, check_mask, check_scale, share_of


class Losses(NamedTuple):
    """What one forward pass gives.

    loss: the scalar to call backward on. logits: the student's, (B, classes).
    terms: each term's share of the loss by name, detached, on the device; "task" is the labels' term.
    """

    loss: Tensor
    logits: Tensor
    terms: dict[str, Tensor]


class Distiller(nn.Module):
    """A student that learns from labels and from a teacher.

        distiller = Distiller(
            student, teacher, terms=[VID(pairs={"group3": "layer4"}, weight=1.0)], example=images)
        optimizer = torch.optim.SGD(distiller.parameter_groups(lr=0.05, weight_decay=5e-4), momentum=0.9)
        for images, labels in loader:
            distiller(images, labels).loss.backward()
            optimizer.step(); optimizer.zero_grad()

    student, teacher: any nn.Modules. The teacher may be None if no term needs it.
    terms: the methods, each with its own weight; their names of layers are as in `Taps`.
    example: one batch of inputs. Both networks run on it once, in eval mode, without gradients and without
        touching the random state, to find the shapes from which the terms make their parameters; the student once
        more if its classes look at their mode (`probing.py`). Only a Distiller without terms can do without.
    task_weight: the weight of the loss on the labels. task_loss: (logits, labels) -> scalar.
    task_count: (labels) -> what task_loss divides by, a number or a scalar tensor, such as the number of labels
        that it does not ignore. Not needed for torch's cross_entropy and nll_loss (also with `functools.partial`)
        and their modules. Where it is given or known, the labels' term of a batch in which it is 0 is 0 with zero
        gradients, and not NaN, and a Trainer counts the parts of a batch by it; else by their images.
    teacher_dtype: the floating-point type that the teacher is run in, outside of autocast, such as torch.bfloat16:
        its inputs are cast, and its activations reach the terms in this type. A teacher of another type is copied,
        and `distiller.teacher` is the copy, which follows what is loaded into the teacher or trained in it.
    clone_taps: copy every tapped activation, for layers whose output is modified in place afterwards.
    logits: finds the logits in what a network returns: a function, the name of an element such as "[0]" or
        "[logits]", or a pair (student's, teacher's) of these. None: the Tensor itself, or what is called "logits" in
        it. What the student returns in training mode must suit it too.

    Inputs are a tensor, a tuple (positional arguments) or a mapping (keyword arguments) of what the networks
    take.

    The teacher is not a submodule: it is absent from parameters(), state_dict() and train(), and runs in eval
    mode and without gradients whatever is called; between its runs it has the modes that it had. It does follow
    .to(), .cuda(), .half() and the like, unless Accelerate has dispatched it or transformers has quantised it. So a
    checkpoint holds what was learned (student, regressors, variances) and not a copy of a frozen input.

    Student and teacher may share modules without parameters, and layers that stay frozen.

    Raises TypeError or ValueError for arguments that do not fit, UnknownNameError for unknown layers, TapError for
    layers that cannot be tapped.
    """

    student: nn.Module
    teacher: nn.Module | None
    terms: nn.ModuleDict

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        terms: Sequence[Method] = (),
        *,
        example: Any = None,
        task_weight: float = 1.0,
        task_loss: TaskLoss = nn.functional.cross_entropy,
        task_count: Count | None = None,
        teacher_dtype: torch.dtype | None = None,
        clone_taps: bool = False,
        logits: Picker | str | tuple[Picker | str | None, Picker | str | None] | None = None,
    ) -> None:
        super().__init__()
        self._removed = False
        if isinstance(terms, nn.Module):
            raise TypeError(f"wanted a sequence of Method objects as terms, got one {type(terms).__name__}")
        terms = tuple(terms)
        if not isinstance(student, nn.Module) or not isinstance(teacher, (nn.Module, type(None))):
            raise TypeError(
                f"wanted nn.Modules as student and teacher, got {type(student).__name__}, "
                f"{type(teacher).__name__}"
            )
        if not math.isfinite(task_weight):
            raise ValueError(f"wanted a finite task_weight, got {task_weight}")
        if teacher_dtype is not None and not teacher_dtype.is_floating_point:
            raise ValueError(f"wanted a floating-point teacher_dtype, got {teacher_dtype}")
        if task_count is not None and not callable(task_count):
            raise TypeError(f"wanted task_count as a function of the labels, got {type(task_count).__name__}")
        self.task_weight, self.task_loss = float(task_weight), task_loss
        self.pick_logits, self.pick_teacher_logits = pickers(logits)
        self.given_count = task_count
        self.teacher_dtype = teacher_dtype
        self._shared = Shared()
        self._followed: Followed | None = None
        if teacher is not None:
            Shared.between([student], teacher)
            if teacher_dtype is not None:
                given, teacher = teacher, in_dtype(teacher, teacher_dtype)
                self._followed = Followed(given, teacher)
        self.student = student
        self.__dict__["teacher"] = teacher
        self.terms = nn.ModuleDict(named(terms, has_teacher=teacher is not None))
        if terms and example is None:
            raise ValueError(
                "wanted example=, one batch of inputs: the terms make their parameters from its feature shapes"
            )

        student_layers = [layer for term in terms for layer in term.student_layers]
        teacher_layers = [layer for term in terms for layer in term.teacher_layers]
        self._teacher_taps: Taps | None = None
        self._student_taps = Taps(student, student_layers, clone=clone_taps, role="student")
        try:
            if teacher is not None:
                self._teacher_taps = Taps(teacher, teacher_layers, clone=clone_taps, role="teacher")
            if terms:
                # Parameters of inference mode could not be trained.
                with torch.inference_mode(False):
                    batch = self._probe(example)
                    for term in terms:
                        term.build(batch)
            check_groups(self, self.parameter_groups(lr=1.0))
            self._check_student()
        except BaseException:
            self.remove_taps()
            raise
        for term in terms:
            term.built = True

    def forward(
        self,
        inputs: Any,
        labels: Tensor | None = None,
        *,
        scale: Factor = 1.0,
        task_scale: Factor | None = None,
        teacher: Activations | None = None,
        mask: Tensor | None = None,
    ) -> Losses:
        """The loss of one batch.

        labels: what task_loss takes, (B,) class numbers by default; None leaves the task's term out.
        scale: multiplies the whole loss, a part's share of the batch's images for instance. It is folded into every
            term's weight, so that `loss.backward()` reaches the kernels with a gradient of exactly 1. A tensor of one
            number, such as a part's share of all positions that count in all processes, stays on the device, and
            is not waited for.
        task_scale: multiplies the labels' term in place of scale, a number or a scalar tensor: the part's share of
            what task_loss divides by, where labels are ignored or classes weighted.
        teacher: what `teacher_activations` gave for these inputs, to use instead of running the teacher.
        mask: a weight of 0 or more for each position (a pixel, a token, a sample) by which the terms' means weigh it:
            bool, integers or floats, without gradient, on the inputs' device. (B, *spatial) or (B, 1, *spatial), of the
            inputs' size or a feature's, such as (B, L) of tokens; or (B,), a weight a sample. Each pair averages it
            down to its own size; where a feature has no positions, a sample weighs the mean of its positions. Where a
            weight is 0 the features are not used, NaN or not. Where nothing is selected a term is 0, with zero
            gradients. The labels' term knows nothing of it: it has its ignored labels.

        Raises RuntimeError if a network modifies its inputs in place, or after `remove_taps`; TapError for a
        layer that gives no usable activation; TypeError or ValueError for activations of another batch or other
        layers, a scale or mask that does not fit, and a mask for a term that takes none.
        """
        if self._removed:
            raise RuntimeError(
                "the Distiller's taps were removed by remove_taps(), so it cannot be called; make a new one"
            )
        if not isinstance(scale, float):
            scale = check_scale(scale, devices_of(inputs, self.student))
        if mask is not None:
            refuse_masks(self.terms)
            mask = check_mask(mask, devices_of(inputs, self.student))
        self._follow_student()
        batch = self._run(inputs, labels, teacher, mask)
        if not batch.student.logits.numel():
            raise ValueError(f"the batch is empty: the logits are {tuple(batch.student.logits.shape)}")
        terms: dict[str, Tensor] = {}
        if labels is not None:
            factor = self.task_weight * (scale if task_scale is None else task_scale)
            terms["task"] = mean_loss(self.task_loss, self.task_count, batch.student.logits, labels, factor)
        share = share_of(scale, mask)
        for name, term in self.terms.items():
            assert isinstance(term, Method)
            terms[name] = term(batch, term.weight * share)
        if not terms:
            raise ValueError("nothing to learn from: no labels were given and there are no terms")
        loss = sum(list(terms.values())[1:], next(iter(terms.values())))
        return Losses(loss, batch.student.logits, {name: term.detach() for name, term in terms.items()})

    if TYPE_CHECKING:  # nn.Module's gives Any

        def __call__(
            self,
            inputs: Any,
            labels: Tensor | None = None,
            *,
            scale: Factor = 1.0,
            task_scale: Factor | None = None,
            teacher: Activations | None = None,
            mask: Tensor | None = None,
        ) -> Losses: ...

    @property
    def task_count(self) -> Count | None:
        """(labels) -> what task_loss divides by; None where that is not known."""
        return self.given_count or count_of(self.task_loss)

    @torch.no_grad()
    def teacher_activations(self, inputs: Any) -> Activations:
        """What the teacher gives for a batch: its tapped layers and logits, to keep and to hand to
        `forward(..., teacher=...)`. That is right only if the inputs will be the same ones: a student that sees
        augmented images needs the teacher's activations on the images augmented likewise.

        Raises ValueError if there is no teacher.
        """
        if self.teacher is None:
            raise ValueError("there is no teacher")
        if self._followed is not None and not torch.compiler.is_compiling():
            self._followed.follow()
        # In training mode, batch statistics of the student's data would leak in.
        with eval_mode(self.teacher):
            if self.teacher_dtype is None:
                found = self._activations(self.teacher, self._teacher_taps, inputs, "teacher")
            else:
                with torch.autocast(devices_of(inputs, self.teacher)[0].type, enabled=False):
                    inputs = cast(inputs, self.teacher_dtype)
                    found = self._activations(self.teacher, self._teacher_taps, inputs, "teacher")
        if not torch.compiler.is_compiling():
            # Older releases of torch keep, for autocast, weights in 16 bits that were made without gradients, and a
            # network that is a student too would get none.
            torch.clear_autocast_cache()
        return found

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Every parameter, once, as groups for a torch optimizer.

        Each has params, lr, weight_decay and a name: "student", then what each term asks for, such as
        "vid.regressor" and "vid.alpha" (no weight decay, a learning rate of its own). What is frozen now is among
        them, as in `model.parameters()`: an optimizer leaves parameters without a gradient alone, and trains them
        once they are unfrozen.
        """
        groups = [
            {
                "params": list(self.student.parameters()),
                "lr": lr,
                "weight_decay": weight_decay,
                "name": "student",
            }
        ]
        for name, term in self.terms.items():
            assert isinstance(term, Method)
            for group in term.parameter_groups():
                groups.append(
                    {
                        "params": list(group.params),
                        "lr": lr * group.lr_factor,
                        "weight_decay": weight_decay if group.decay else 0.0,
                        "name": f"{name}.{group.name}" if group.name else name,
                    }
                )
        return [group for group in groups if group["params"]]

    def remove_taps(self) -> None:
        """Take what hooks there are off both networks, when done; the Distiller cannot be called afterwards."""
        self._removed = True
        self._student_taps.remove()
        if self._teacher_taps is not None:
            self._teacher_taps.remove()

    def detach_taps(self) -> None:
        """Take hooks off that stayed on networks which were compiled; the next call puts on what it needs."""
        self._student_taps.detach()
        if self._teacher_taps is not None:
            self._teacher_taps.detach()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher":
            # nn.Module would register it, and the optimizer and the checkpoints would take it in.
            raise AttributeError(
                "a Distiller's teacher is fixed: its terms were built for it; make a new Distiller"
            )
        super().__setattr__(name, value)

    def _follow_student(self) -> None:
        """Look at a student that was put in place of the one before, as at the first."""
        before = self._student_taps
        if before.network is not self.student:
            self._check_student()
            self._student_taps = Taps(self.student, before.layers, clone=before.clone, role="student")
            before.remove()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.teacher is not None:
            move(self.teacher, fn, self.teacher_dtype)
        return self

    @property
    def _networks(self) -> list[nn.Module]:
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    def _run(
        self,
        inputs: Any,
        labels: Tensor | None,
        teacher: Activations | None = None,
        mask: Tensor | None = None,
    ) -> Batch:
        if teacher is not None:
            teacher = self._given(teacher)
        elif self.teacher is not None and self.terms:
            teacher = self.teacher_activations(inputs)
        with self._shared.unchanged():
            student = self._activations(self.student, self._student_taps, inputs, "student")
        if teacher is not None and len(teacher.logits) != len(student.logits):
            raise ValueError(
                f"wanted the teacher's activations of this batch of {len(student.logits)}, got those of "
                f"{len(teacher.logits)}"
            )
        return Batch(inputs, labels, student, teacher, mask)

    def _given(self, teacher: Activations) -> Activations:
        """Activations that the caller kept: complete, and without gradients."""
        if not isinstance(teacher, Activations):
            raise TypeError(
                f"wanted what teacher_activations() gave as teacher=, got {type(teacher).__name__}"
            )
        wanted = () if self._teacher_taps is None else self._teacher_taps.layers
        missing = [layer for layer in wanted if layer not in teacher.taps]
        if missing:
            raise ValueError(f"the teacher's activations lack {', '.join(map(repr, missing))}")
        return Activations({layer: teacher.taps[layer].detach() for layer in wanted}, teacher.logits.detach())

    def _activations(self, network: nn.Module, taps: Taps | None, inputs: Any, role: str) -> Activations:
        assert taps is not None
        # The other network and the terms get the same inputs. Without terms they are not read again.
        # torch.compile cannot trace versions: there the probe has looked. Inference tensors have none.
        watched = self.terms and not torch.compiler.is_compiling()
        before = [(t, version_of(t)) for t in tensors_of(inputs) if not t.is_inference()] if watched else []
        with taps.recording() as activations:
            output = call(network, inputs)
            if any(version_of(tensor) != version for tensor, version in before):
                raise RuntimeError(
                    f"the {role} ({type(network).__name__}) modified its inputs in place (as an in-place ReLU at "
                    "its start does), and the other network and the terms need them: give it a network that "
                    "copies its inputs first"
                )
            pick = self.pick_logits if role == "student" else self.pick_teacher_logits
            return Activations(activations(), picked(pick, output, role, type(network).__name__))

    def _probe(self, example: Any) -> Batch:
        """Both networks' activations on `example`, leaving no trace in them or in the random state."""
        # One that was given in eval mode may stay in it.
        trains = getattr(self.student, "training", True)
        parameters = (p for network in self._networks for p in network.parameters())
        devices = {p.device.index for p in parameters if p.device.type == "cuda"}
        # Eagerly, also where a network is compiled: once is not worth it, and a tap sees more in eager mode.
        compiled = any(is_compiled(module) for network in self._networks for module in network.modules())
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with eval_mode(self.student), torch.no_grad(), kept_random_state(sorted(devices)), eager:
            batch = self._run(example, None)
            if trains:
                check_training_logits(self.student, example, self.pick_logits, batch.student.logits)
        student = replace(batch.student, kinds=self._student_taps.kinds())
        if batch.teacher is None or self._teacher_taps is None:
            return replace(batch, student=student)
        return replace(
            batch, student=student, teacher=replace(batch.teacher, kinds=self._teacher_taps.kinds())
        )

    def _check_student(self) -> None:
        """It shares nothing with the teacher that is trained, and has no wrapper that leaves the terms out."""
        if self.teacher is not None:
            self._shared = Shared.between([self.student, *self.terms.values()], self.teacher)
        wrapper, name = wrapper_in(self.student), next((n for n, _ in self.terms.named_parameters()), None)
        if wrapper is not None and name is not None:
            raise ValueError(
                f"wanted a student without {wrapper}, got one with it: the gradients of the terms' parameters, such "
                f"as {name!r}, would not be averaged over the processes, and these parameters diverge; give the bare "
                f"network, and wrap the Distiller: {wrapper}(Distiller(network, ...))"
            )
