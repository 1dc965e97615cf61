"""The head as a function of its tensors, for people with modules of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

from torch import Tensor, nn

from vidfast import backends
from vidfast.arguments import BackendName, ScalarReduction
from vidfast.head.arguments import check_head
from vidfast.head.stack import apply
from vidfast.head.way import head_nll
from vidfast.nll import gaussian_nll
from vidfast.pooling import without_unselected


def vid_head(
    student: Tensor,
    target: Tensor,
    alpha: Tensor,
    weights: Tensor | Sequence[Tensor] | nn.ParameterList,
    biases: Tensor | Sequence[Tensor | None] | nn.ParameterList | None = None,
    *,
    channel_dim: SupportsIndex = 1,
    eps: float = 1e-5,
    reduction: ScalarReduction = "mean",
    weight: float | Tensor = 1.0,
    backend: BackendName = "auto",
    mask: Tensor | None = None,
) -> Tensor:
    """-log q(t|s) of equation 5 (Ahn et al., CVPR 2019) with its mean function: a stack of layers and the loss at once.

    mu(s) = W_n relu(... relu(W_1 s + b_1) ...) + b_n at every position, and then :func:`vidfast.gaussian_nll`: ReLU
    between the layers, and none behind the last. They are those of 1x1 convolutions or of linear layers: either is a
    matrix over the channels, wherever those are. On the CPU, in fp32, bf16 and fp16, under autocast too, all is
    computed some positions at a time: the loss and every gradient, and no activation is stored for the whole batch.
    Inside torch.compile that stays one operator. Elsewhere (other devices, fp64, a target that requires grad, alpha's
    gradient alone, convolutions after torch.set_float32_matmul_precision("high")) the layers run one after the other,
    and the loss over their last output; the logger "vidfast" says why, at level DEBUG.

    Args:
        student: s, any shape of two or more dimensions, the batch in one of them; fp16, bf16, fp32 or fp64.
        target: t, student's shape but for its C channels; any of these dtypes, on student's device.
        alpha: (C,), any of these dtypes; sigma_c^2 = softplus(alpha_c) + eps. VIDLoss starts at a variance of 5.
        weights: One or more, from the student to the target: (out, in) each, or a convolution's (out, in, 1, ...).
            Student's dtype, but under autocast, which casts all of it. One tensor is one layer.
        biases: As many, (out,) or None each; None: none has any.
        channel_dim: Which dimension of student and target is the channels: 1 for (B, C, *spatial), -1 for tokens.
        eps: The smallest variance.
        reduction: "mean" over the target's elements, "sum" or "batchmean".
        weight: A factor of the loss; in here it costs nothing. Compiled, its first change makes a second graph,
            and no later one does. A number, or a tensor of one element on the student's device.
        backend: "auto", "reference" (plain PyTorch), or a back end by name; see :func:`vidfast.info`.
        mask: A weight for each position, as in :func:`vidfast.gaussian_nll`. Where it is 0 neither student nor target
            is used, NaN or not: 0 stands for the student's values before the first layer.

    Returns:
        A scalar, fp64 if the mean or the target is, else fp32. Its gradients are first derivatives; for a second one
        take backend="reference".

    Raises:
        TypeError, ValueError: An argument is not as above; the text says what was wanted and what came.
        RuntimeError: The back end asked for cannot run.
    """
    stack, alpha, call, given = check_head(
        student, target, alpha, weights, biases, channel_dim, eps, reduction, weight, backend, mask
    )
    backends.check_name(backend)
    loss = head_nll(stack, student, target, alpha, call, given)
    if loss is not None:
        return loss
    if given is not None and given.mask is not None:
        mask = given.mask
        student = without_unselected(student, mask, call.channel)
    return gaussian_nll(
        apply(stack, student, call.channel),
        target,
        alpha,
        channel_dim=call.channel,
        eps=call.eps,
        reduction=reduction,
        weight=weight,
        inplace=True,
        backend=backend,
        mask=mask,
    )
