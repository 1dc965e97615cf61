"""The native extension; csrc/bindings.cpp."""

from typing import TypeAlias

version: str
sources: str

def cpu_forward(
    mean: int, mean_stride: int, mean_dtype: int,
    target: int, target_stride: int, target_dtype: int,
    alpha: int, alpha_dtype: int,
    outer: int, channels: int, inner: int, k: float, eps: float, full: bool,
    positions: int, positions_are_bytes: bool, totals: int,
    loss: int, loss_dtype: int, sum_sq: int, threads: int, /,
) -> None: ...  # fmt: skip
def cpu_forward_grad(
    mean: int, mean_stride: int, mean_dtype: int,
    target: int, target_stride: int, target_dtype: int,
    alpha: int, alpha_dtype: int,
    outer: int, channels: int, inner: int, k: float, eps: float, full: bool,
    positions: int, positions_are_bytes: bool, totals: int,
    loss: int, loss_dtype: int, grad_mean: int, grad_stride: int, grad_alpha: int, threads: int, /,
) -> None: ...  # fmt: skip
def cpu_backward(
    mean: int, mean_stride: int, mean_dtype: int,
    target: int, target_stride: int, target_dtype: int,
    alpha: int, alpha_dtype: int,
    outer: int, channels: int, inner: int, k: float, eps: float, full: bool,
    positions: int, positions_are_bytes: bool, totals: int,
    g: int, g_dtype: int, sum_sq: int,
    grad_mean: int, grad_mean_stride: int, grad_target: int, grad_target_stride: int, grad_alpha: int, threads: int, /,
) -> None: ...  # fmt: skip
def cpu_total(
    positions: int, positions_are_bytes: bool, positions_are_f64: bool, count: int,
    factor: int, factor_dtype: int, k: float, channels: int, totals: int, threads: int, /,
) -> None: ...  # fmt: skip

# The arguments of csrc/bindings.h, heteroscedastic_problem, by vidfast/heteroscedastic/native.py.
_Problem: TypeAlias = tuple[object, ...]

def cpu_heteroscedastic_forward(problem: _Problem, loss: int, loss_dtype: int, threads: int, /) -> None: ...
def cpu_heteroscedastic_forward_grad(
    problem: _Problem, loss: int, loss_dtype: int,
    grad_mean: int, grad_mean_stride: int, grad_raw: int, grad_raw_stride: int, threads: int, /,
) -> None: ...  # fmt: skip
def cpu_heteroscedastic_backward(
    problem: _Problem, g: int, g_dtype: int,
    grad_mean: int, grad_mean_stride: int, grad_target: int, grad_target_stride: int,
    grad_raw: int, grad_raw_stride: int, threads: int, /,
) -> None: ...  # fmt: skip
def cpu_vector_function(name: str, f64: bool, source: int, result: int, n: int, /) -> None: ...
def cpu_scale(
    g: int, g_dtype: int, outer: int, row: int,
    src: int, src_stride: int, dst: int, dst_stride: int, dtype: int,
    channels: int, grad_alpha: int, grad_alpha_out: int, alpha_dtype: int, threads: int, /,
) -> None: ...  # fmt: skip
def cpu_rectify(x: int, dtype: int, rounded: int, positive: bool, n: int, threads: int, /) -> None: ...
def cpu_rectify_backward(
    gradient: int, activation: int, out: int, dtype: int, rounded: int, n: int, threads: int, /,
) -> None: ...  # fmt: skip
def cpu_head_instructions(module: int, layers: int, /) -> str | None: ...

class CpuHead:
    def __init__(
        self, batch: int, channels: int, positions: int,
        student: tuple[int, int, int, int, int], target: tuple[int, int, int, int, int],
        layers: list[tuple[int, int, int, int, int, int, int, int]], alpha: int, alpha_dtype: int,
        eps: float, k: float, module: int, grad_student: tuple[int, int, int, int, int], grad_alpha: int,
        weights: int, weights_are_bytes: bool, values: float, /,
    ) -> None: ...  # fmt: skip
    def workspace_bytes(self, threads: int, /) -> int: ...
    def run(self, loss: int, workspace: int, threads: int, /) -> None: ...

class CpuBlock:
    def __init__(self, nbytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def cpu_block_bytes() -> tuple[int, int, int]: ...
def cpu_release_idle_blocks() -> None: ...
def cpu_isa() -> str: ...
def cpu_select_isa(name: str) -> bool: ...
def cpu_openmp_runtime() -> str: ...
