"""Hooks that break the contract: what they return is not equal to what autograd saved, in dtype or in shape.

That must be a RuntimeError. What else could happen is a wrong value or a read of foreign memory, which may
end the process, so the cases run in a process of their own:

    python violations.py gaussian_nll|VIDLoss BACKEND DEVICE FIRST_SEED END

It prints "seed N" before each case and "failed: ..." after one that went wrong.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import vid_cases
from cases import make_case
from execute import NllCall
from paths import RandomCall, Refused
from places import Place
from torch import Tensor
from vid_execute import VidCall

_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
VIOLATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "wider dtype": lambda x: x.double() if x.dtype is not torch.float64 else x.float(),
    "narrower dtype": lambda x: x.half() if x.dtype is not torch.float16 else x.bfloat16(),
    "integers": lambda x: x.to(_SAME_SIZE[x.element_size()]),
    "integers of one byte": lambda x: x.to(torch.int8),
    "complex": lambda x: x.to(torch.complex64),
    "shorter": lambda x: x[:-1],
    "longer": lambda x: torch.cat([x, x]),
    "only one": lambda x: x.flatten()[0],
    "empty": lambda x: x.new_empty(0),
    "another shape": lambda x: x.flatten() if x.dim() > 1 else x.unsqueeze(1),
    "one more dimension": lambda x: x.unsqueeze(0),
    "repeated": lambda x: x.expand(2, *x.shape),
    "on meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
}
# These leave a single number without dimensions as it is, or cannot be done to it.
_OF_DIMENSIONS = ("shorter", "longer", "only one", "another shape")
PATHS = ("grad", "grad", "retained", "create_graph")


class Violation:
    """One call whose hook breaks the contract for one of the saved tensors."""

    def __init__(self, what: str, place: Place, seed: int) -> None:
        rng = Random(seed)
        self.kind = rng.choice(list(VIOLATIONS))
        self.victim = rng.randrange(8)
        self.path = rng.choice(PATHS)
        plain = {
            "path": "grad",
            "hook": "none",
            "values": "normal",
            "sentinel": "nan",
            "outputs": "plain",
            "g": 3.5,
        }
        self.call: RandomCall
        if what == "VIDLoss":
            vid = vid_cases.make_case(seed)
            # fused, and without pooling: every saved tensor is the library's
            plain.update(
                inplace=True, module="fp32", student="fp32", teacher="bf16", student_size=vid.teacher_size
            )
            # one value everywhere would be rounded the same way in every sum
            plain.update(student_layout="contiguous", teacher_layout="contiguous")
            self.call = VidCall(replace(vid, wanted="sa012", asked="sa012", **plain))
        else:
            case = make_case(seed)
            # with alpha, so that every saved tensor is needed
            wanted = rng.choice(("a", "ma") if case.strategy == "one_pass" else ("a", "ma", "mta", "ta"))
            reduction = "mean" if case.reduction == "none" else case.reduction
            self.call = NllCall(
                # nothing before or behind the call, so that every saved tensor is the library's
                replace(
                    case,
                    wanted=wanted,
                    asked=wanted,
                    reduction=reduction,
                    weight=1.0,
                    inplace=False,
                    incoming="plain",
                    **plain,
                ),
                place,
            )

    def __str__(self) -> str:
        return f"{self.kind!r} for saved tensor {self.victim}, {self.path}: {self.call.case}"

    def run(self) -> str | None:
        """What went wrong, or None."""
        call, count = self.call, itertools.count()

        def pack(x: Tensor) -> tuple[bool, Tensor]:
            breakable = x.numel() > 0 and (x.dim() > 0 or self.kind not in _OF_DIMENSIONS)
            hit = breakable and next(count) == self.victim
            return hit, x.detach().clone()

        def unpack(saved: tuple[bool, Tensor]) -> Tensor:
            hit, x = saved
            return VIOLATIONS[self.kind](x) if hit else x

        x = call.leaves()
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                loss = call.run(x)
        except Refused:
            return None
        hit = self.victim < next(count)
        try:
            options = {"retained": {"retain_graph": True}, "create_graph": {"create_graph": True}}
            grads: dict[str, Any] = call.grad(loss, x, call.g(), **options.get(self.path, {}))
        except RuntimeError:
            return None if hit else "an error where the contract was kept"
        except Exception as error:
            return f"{type(error).__name__} instead of RuntimeError: {error}"
        if self.path == "create_graph":  # plain PyTorch differentiates there, and may take other dtypes
            return None
        try:
            call.check(loss.detach(), {k: g.detach() for k, g in grads.items()}, call.g())
        except AssertionError as error:
            return f"a wrong value: {str(error).strip().splitlines()[0][:160]}"
        return "no error, though the values are right" if hit else None


def run_apart(what: str, place: Place, seeds: range) -> list[tuple[int, str]]:
    """Runs the seeds in processes of their own, a new one after each crash: (seed, what went wrong)."""
    failed: list[tuple[int, str]] = []
    first = seeds.start
    while first < seeds.stop:
        command = [sys.executable, "-W", "ignore", __file__, what, place.name, str(place.device)]
        done = subprocess.run(
            [*command, str(first), str(seeds.stop)],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        last = first - 1
        for line in done.stdout.splitlines():
            if line.startswith("seed "):
                last = int(line.split()[1])
            elif line.startswith("failed: "):
                failed.append((last, line))
        if done.returncode == 0:
            break
        failed.append((last, f"the process ended with {done.returncode}: {done.stderr[-600:]}"))
        if last < first or len(failed) > 200:
            break
        first = last + 1
    return failed


def main(what: str, name: str, device: str, first: str, end: str) -> None:
    """In the process of its own."""
    place = Place(name, torch.device(device), None)
    for seed in range(int(first), int(end)):
        print("seed", seed, flush=True)
        found = Violation(what, place, seed).run()
        if found:
            print("failed:", found.replace("\n", " "), flush=True)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1] / "core"))
    main(*sys.argv[1:])
