"""Memory of large gradients on the CPU: kept for the next one, bounded, and a tensor like any other."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from problems import BF16
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import vidfast
from vidfast import memory
from vidfast.layout import rows_of

MIB = 1 << 20
pytestmark = pytest.mark.skipif(memory._C is None, reason="the extension is not built")


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    gc.collect()
    vidfast.empty_cache()
    assert memory.kept_memory().in_use == 0
    yield
    vidfast.empty_cache()


def large(mebibytes: int) -> Tensor:
    """Kept memory. Only the first element is written, so that the pages of the rest are never made."""
    count = mebibytes * MIB // 4
    found = memory.empty_dense(torch.empty(1).expand(count), (1,), torch.float32)
    found[0] = 1.0
    return found


def test_is_used_again() -> None:
    x = large(64)
    address = x.data_ptr()
    assert address % (2 * MIB) == 0
    assert memory.kept_memory()[:2] == (64 * MIB, 0)
    del x
    assert memory.kept_memory()[:2] == (0, 64 * MIB)
    assert large(60).data_ptr() == address, "60 of 64 MiB are close enough"


def test_lives_as_long_as_the_last_tensor_that_sees_it() -> None:
    x = large(64)
    row = x.view(16, -1)[3]
    del x
    assert memory.kept_memory().in_use == 64 * MIB
    del row
    assert memory.kept_memory().in_use == 0


def test_holds_no_more_than_twice_what_was_in_use_at_once() -> None:
    for sizes in ((40, 80, 160), (160, 40, 80), (36, 72), (200,), (34, 34, 34, 34, 34), (100, 100), (5, 9)):
        held = [large(mebibytes) for mebibytes in sizes]
        now = memory.kept_memory()
        assert sum(sizes) * MIB <= now.in_use <= 1.125 * sum(sizes) * MIB
        del held
        now = memory.kept_memory()
        assert now.in_use == 0
        assert now.idle <= 2 * now.most
        assert now.most <= 1.125 * 280 * MIB


@pytest.mark.parametrize("sizes", [(128, 64, 34), (34, 64, 128), (160, 40, 10), (50, 50)], ids=str)
def test_sizes_that_take_turns_push_nobody_out(sizes: tuple[int, ...]) -> None:
    """Gradients of several layers, one after the other: the second round has nothing to allocate."""

    def one_round() -> list[int]:
        return [large(mebibytes).data_ptr() for mebibytes in sizes]

    one_round()
    again, idle = one_round(), memory.kept_memory().idle
    assert one_round() == again
    assert memory.kept_memory().idle == idle


def test_a_small_tensor_that_is_held_does_not_pin_a_large_ones_memory() -> None:
    held = []
    for _ in range(20):
        large(64)
        held.append(large(5))
    now = memory.kept_memory()
    assert now.in_use <= 1.125 * 20 * 5 * MIB
    assert now.in_use + now.idle <= 2 * 1.125 * (64 + 20 * 5) * MIB


def test_can_be_given_back() -> None:
    x, y = large(64), large(64)
    del x
    vidfast.empty_cache()
    assert memory.kept_memory() == (64 * MIB, 0, 64 * MIB), "what a tensor holds stays"
    assert y[0] == 1.0
    del y
    vidfast.empty_cache()
    assert memory.kept_memory() == (0, 0, 0)


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_environment_says_whether_to_keep(value: str) -> None:
    code = (
        "import torch; from vidfast import memory\n"
        "x = memory.empty_dense(torch.empty(1).expand(9 << 20), (1,), torch.float32); x[0] = 1; del x\n"
        "print(memory.kept_memory().idle)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"VIDFAST_KEEP_MEMORY": value, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(done.stdout) > 0) == (value == "1")


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_take_it_from_4_mib_on(strategy: str, channels_last: bool) -> None:
    shape = (16, 64, 32, 33)
    alpha = torch.zeros(64, requires_grad=True)
    mean, target = torch.randn(shape), torch.randn(shape)
    if channels_last:
        mean = mean.contiguous(memory_format=torch.channels_last)
        target = target.contiguous(memory_format=torch.channels_last)
    mean.requires_grad_()
    addresses = set()
    for _ in range(3):
        loss = vidfast.gaussian_nll(mean, target, alpha, strategy=strategy)
        (gradient,) = torch.autograd.grad(loss, mean)
        assert memory.kept_memory().in_use > 0
        assert gradient.stride() == mean.stride()
        addresses.add(gradient.data_ptr())
        exact = (mean.detach() - target) / (torch.log(torch.tensor(2.0)) + 1e-5) / mean.numel()
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-12)
        del gradient, loss
    assert len(addresses) == 1
    assert memory.kept_memory().in_use == 0


def test_small_gradients_do_not() -> None:
    mean = torch.randn(16, 64, 32, 31, requires_grad=True)
    vidfast.gaussian_nll(mean, torch.randn(mean.shape), torch.zeros(64)).backward()
    assert memory.kept_memory().in_use == 0


def test_is_a_tensor_like_any_other() -> None:
    x = large(33)
    x.zero_()[7] = 3.0
    for other in (x.clone(), copy.deepcopy(x), pickle.loads(pickle.dumps(x[:9])), x.numpy(), x.double()):
        assert float(other[7]) == 3.0
    x.share_memory_()
    assert x.is_shared()
    assert x[7] == 3.0
    with pytest.raises(RuntimeError, match="not resizable"):
        large(33).resize_(34 * MIB)
    parameter = torch.nn.Parameter(torch.zeros(33 * MIB // 4))
    parameter.grad = large(33)
    torch.optim.SGD([parameter], 0.5).step()
    assert parameter[0] == -0.5


def test_16_bits_and_any_order_of_dimensions() -> None:
    x = torch.empty(4, 64, 512, 512, dtype=BF16).permute(0, 2, 3, 1).transpose(1, 2)
    y = memory.empty_dense(x, rows_of(x, 3).dense, x.dtype)
    assert memory.kept_memory().in_use == x.nbytes
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), BF16)


def test_fake_tensors_have_no_memory() -> None:
    with FakeTensorMode():
        fake = torch.empty(64, 1 << 20)
        x = memory.empty_dense(fake, rows_of(fake, 1).dense, fake.dtype)
    assert x.shape == (64, 1 << 20)
    assert memory.kept_memory().in_use == 0


def test_from_many_threads() -> None:
    wrong = []

    def work(number: int) -> None:
        for turn in range(200):
            x = large(34 + 2 * ((number + turn) % 3))
            x[0] = number
            y = large(34)
            y[0] = -number
            if x[0] != number or x.data_ptr() == y.data_ptr():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    now = memory.kept_memory()
    assert now.in_use == 0
    assert now.idle <= 2 * now.most


def test_a_fork_does_not_wait_for_a_lock() -> None:
    code = (
        "import os, threading, torch\n"
        "from vidfast import memory\n"
        "def take(): memory.empty_dense(torch.empty(1).expand(2 << 20), (1,), torch.float32)\n"
        "stop = []\n"
        "def work():\n"
        "    while not stop: take()\n"
        "threads = [threading.Thread(target=work) for _ in range(2)]\n"
        "[t.start() for t in threads]\n"
        "for _ in range(30):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        take()\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "stop.append(1)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)


def test_outlives_the_interpreter() -> None:
    code = (
        "import torch, vidfast, builtins\n"
        "m = torch.randn(64, 64, 64, 64, requires_grad=True)\n"
        "vidfast.gaussian_nll(m, torch.randn(m.shape), torch.zeros(64)).backward()\n"
        "builtins.kept = m.grad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
