"""Mistakes that users make, each marked: a type checker must find them and nothing else (test_typing.py).

Never run or imported.
"""

from __future__ import annotations

import torch
from torch import nn

import vidfast
from vidfast.distill import (
    KD,
    METHODS,
    MIMKD,
    VID,
    VIDLP,
    Distiller,
    FitNet,
    Infomax,
    LwF,
    Method,
    PointwiseStack,
)
from vidfast.distill.models import build
from vidfast.distill.trainer import Trainer, TrainOptions

x = torch.randn(2, 3)
pairs = {"group3": "layer4"}
student = nn.Linear(3, 3)

# The losses
vidfast.gaussian_nll(x, x, x[0], reduction="maen")  # mistake
vidfast.gaussian_nll(x, x, x[0], strategy="onepass")  # mistake
vidfast.gaussian_nll(x, x, x[0], backend="cdua")  # mistake
vidfast.GaussianNLL(3, reduction="maen")  # mistake
vidfast.VIDLoss(3, 4, 5, backend="cdua")  # mistake
vidfast.gaussian_nll(x, x, x[0], wieght=0.5)  # mistake
vidfast.gaussian_nll(x, x, "alpha")  # mistake
vidfast.vid_head(x, x, x[0], [x], reduction="none")  # mistake
vidfast.vid_head(x, x, x[0], "weights")  # mistake
vidfast.GaussianNLL("256")  # mistake
vidfast.VIDLoss(64, 512)  # mistake
text: str = vidfast.gaussian_nll(x, x, x[0])  # mistake
text = vidfast.GaussianNLL(3)(x, x)  # mistake
text = vidfast.VIDLoss(3, 4, 5)(x, x)  # mistake
vidfast.GaussianNLL(3)(x)  # mistake
vidfast.VIDLoss(3, 4, 5)(student_feature=x, teacher_feature=x)  # mistake
vidfast.VIDLoss(3, 4, 5, reduction="none")  # mistake
vidfast.functional.gaussian_nll(x, x, x[0], reduction="maen")  # mistake
vidfast.log_likelihood_map(x, x)  # mistake
vidfast.info().lower()  # mistake
vidfast.gausian_nll(x, x, x[0])  # mistake

# Methods
VID(pairs, regresor="conv3")  # mistake
VID(pairs, reduction="maen")  # mistake
VID(pairs, backend="cdua")  # mistake
VID(pairs, weight="1")  # mistake
VID(3)  # mistake
VIDLP("pool", reduction="batch_mean")  # mistake
Infomax("group1", alpha_lr="fast")  # mistake
FitNet(pairs, reduction="none")  # mistake
KD(temprature=4.0)  # mistake
LwF("pool", form="soft")  # mistake
MIMKD(pairs, critic="concatenated")  # mistake
PointwiseStack(depth="3")  # mistake


@METHODS.register(3)  # mistake
class Registered(Method):
    pass


# The Distiller
distiller = Distiller(student, student, [KD()], example=x)
loss: str = distiller(x, x).loss  # mistake
distiller(x).backward()  # mistake
distiller(x, labls=x)  # mistake
distiller(x, scale="half")  # mistake
distiller(x, mask=[1, 0])  # mistake
Distiller(student, student, terms=[nn.Linear(3, 3)])  # mistake
Distiller(student, student, exmaple=x)  # mistake
distiller.parameter_groups(learning_rate=0.1)  # mistake
logits: str = build("wrn-10-1", in_channels=1, num_classes=3)(x)  # mistake

# Training
TrainOptions(optimizer="sdg")  # mistake
TrainOptions(schedule="cosin")  # mistake
TrainOptions(mixed_precision="bfloat16")  # mistake
TrainOptions(device="gpu")  # mistake
TrainOptions(eval_every="epochs")  # mistake
TrainOptions(batchsize=64)  # mistake
TrainOptions(lr="0.1")  # mistake
Trainer(distiller, [], TrainOptions()).fit(resume=1.5)  # mistake
