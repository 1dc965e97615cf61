"""Digests of the results of many calls, recorded before a change that must alter no bit, compared after it.

    python tests/core/bits.py FILE             writes FILE, or, where it exists, says what differs from it
    python tests/core/bits.py FILE --modules   VIDLoss too
    python tests/core/bits.py FILE --every 7   every seventh problem, where each takes long

Back ends, devices and sizes are the suite's (conftest.py). Bits belong to one machine: its instruction set, its number
of threads, its version of torch. So no test holds them; two runs on one machine do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from places import Place, chosen_places
from problems import BF16, CASES, DTYPES, FP16, FP32, FP64, WAYS, Case, short
from torch import Tensor

import vidfast

Result = tuple[str, list[Tensor | None]]
# (reduction, eps, full, weight), dealt out to the problems in turn
OPTIONS = (
    ("mean", 1e-5, False, 1.0),
    ("sum", 1e-3, True, -0.3),
    ("batchmean", 0.5, False, 2.5),
)


def digest(tensors: list[Tensor | None]) -> str:
    """Of values, dtypes, shapes and strides; but the stride of a size of 1 means nothing."""
    found = hashlib.sha256()
    for x in tensors:
        if x is None:
            found.update(b"none")
        else:
            strides = [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1]
            found.update(f"{x.dtype}{tuple(x.shape)}{strides}".encode())
            values = x.detach().cpu().contiguous().reshape(-1)
            found.update(values.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:24]


def _grads(loss: Tensor, wanted: list[Tensor], g: float) -> list[Tensor | None]:
    incoming = torch.full_like(loss, g)
    return [loss, *torch.autograd.grad(loss, wanted, incoming)]


def calls(place: Place, case: Case, dtypes: tuple[torch.dtype, ...], turn: int) -> Iterator[Result]:
    """Every way through the library for one problem."""
    reduction, eps, full, weight = OPTIONS[turn % len(OPTIONS)]
    if reduction == "batchmean" and case.channel_dim % len(case.shape) == 0:
        reduction = "sum"
    options = {
        "channel_dim": case.channel_dim,
        "eps": eps,
        "reduction": reduction,
        "full": full,
        "weight": weight,
    }
    mean, target, alpha = case.tensors(*dtypes, device=place.device)
    yield "no_grad", [place.nll(mean, target, alpha, **options)]

    def leaves() -> list[Tensor]:
        return [x.detach().requires_grad_() for x in (mean, target, alpha)]

    for g in (1.0, -0.7):
        m, t, a = leaves()
        yield f"one_pass g={g}", _grads(place.nll(m, target, a, strategy="one_pass", **options), [m, a], g)
    m, t, a = leaves()
    yield (
        "one_pass, mean alone",
        _grads(place.nll(m, target, alpha, strategy="one_pass", **options), [m], 3.5),
    )
    yield "two_pass", _grads(place.nll(m, t, a, strategy="two_pass", **options), [m, t, a], -0.7)
    yield "two_pass, target alone", _grads(place.nll(mean, t, alpha, **options), [t], 1.5)
    yield "alpha alone", _grads(place.nll(mean, target, a, **options), [a], -0.7)
    loss = place.nll(m, t, a, strategy="two_pass", **options)
    first = torch.autograd.grad(loss, [m, a], create_graph=True)
    yield (
        "second derivative",
        [*first, *torch.autograd.grad(first[0].square().sum() + first[1].sum(), [m, t, a])],
    )
    m, t, a = leaves()
    own = m * 1
    try:
        loss = place.nll(own, target, a, strategy="one_pass", inplace=True, **options)
    except RuntimeError:
        return
    yield "inplace", [*_grads(loss, [m, a], 1.0), own]


def operators(place: Place, case: Case, dtypes: tuple[torch.dtype, ...]) -> Iterator[Result]:
    """What compiled graphs call."""
    mean, target, alpha = case.tensors(*dtypes, device=place.device)
    channel = case.channel_dim % len(case.shape)
    options = (channel, 1e-5, "mean", False, 1.5, place.name)
    loss, sum_sq = torch.ops.vidfast.gaussian_nll_two_pass_v2(mean, target, alpha, *options)
    yield "operator", [loss, sum_sq]
    g = torch.full_like(loss, -0.7)
    back = torch.ops.vidfast.gaussian_nll_backward
    yield (
        "operator backward",
        back(g, mean, target, alpha, sum_sq, list(mean.shape), *options, True, True, True),
    )
    yield "operator alpha", back(g, None, None, alpha, sum_sq, list(mean.shape), *options, False, False, True)


def modules(device: torch.device) -> Iterator[Result]:
    """VIDLoss, with the back end that "auto" takes."""
    for dtype in (FP32, BF16, FP16, FP64):
        for shape in ((4, 24, 9, 9), (8, 32, 28, 28), (3, 24), (2, 24, 17)):
            for inplace in (True, False):
                for frozen in (False, True):
                    torch.manual_seed(0)
                    module = vidfast.VIDLoss(shape[1], 40, 16, inplace=inplace).to(device, dtype)
                    student = torch.randn(shape).to(device, dtype).requires_grad_()
                    target = torch.randn(shape[0], 16, *shape[2:]).to(device, dtype)
                    if frozen:
                        module.regressor.requires_grad_(False)
                    loss = module(student, target)
                    wanted = [student, *(p for p in module.parameters() if p.requires_grad)]
                    title = f"VIDLoss {short(dtype)} {shape} inplace={inplace} frozen={frozen}"
                    yield title, _grads(loss, wanted, 1.0)
                    yield f"{title} -2", _grads(module(student, target), wanted, -2.0)
                    with torch.no_grad():
                        yield f"{title} no_grad", [module(student, target)]


def _named(title: str, results: Iterator[Result]) -> Iterator[tuple[str, str]]:
    for name, tensors in results:
        yield f"{title}: {name}", digest(tensors)


def everything(with_modules: bool, every: int) -> Iterator[tuple[str, str]]:
    """(what, digest) of all calls; those of the reference and the modules last."""
    places, _ = chosen_places()
    reference = Place("reference", torch.device("cpu"), 4096)
    for place in (*places, reference):
        for turn, case in enumerate(CASES):
            if turn % every or (place.limit is not None and math.prod(case.shape) > place.limit):
                continue
            pairs = [(a, b) for a in DTYPES for b in DTYPES] if case in WAYS else [(x, x) for x in DTYPES]
            for dtype, target_dtype in pairs:
                alpha_dtype = DTYPES[turn % 4] if case in WAYS else FP32
                dtypes = (dtype, target_dtype, alpha_dtype)
                title = f"{place.name} {case.name} {' '.join(short(d) for d in dtypes)}"
                yield from _named(title, calls(place, case, dtypes, turn))
                yield from _named(title, operators(place, case, dtypes))
    if with_modules:
        for device in {place.device for place in places}:
            yield from _named(str(device), modules(device))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--modules", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    arguments = parser.parse_args()
    found = dict(everything(arguments.modules, arguments.every))
    if not arguments.file.exists():
        arguments.file.write_text(json.dumps(found, indent=0))
        print(f"{len(found)} results are in {arguments.file}")
        return 0
    before = json.loads(arguments.file.read_text())
    differing = sorted(name for name in before.keys() | found.keys() if before.get(name) != found.get(name))
    print("\n".join(differing[:40]))
    print(f"{len(found)} results, of which {len(differing)} are not those of {arguments.file}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
