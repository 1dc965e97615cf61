#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: builds, tests, checks under compute-sanitizer, benchmarks.
#
#   bench/gpu.sh [FOLDER]        results in FOLDER (default: runs/gpu-<name of the GPU>)
#
# Variables: PYTHON (with torch and pytest, default python3), VIDFAST_GPU_INSTALL=0 (vidfast is already installed),
# SECONDS_BENCH (given to the benchmarks, default 150), SECONDS_SANITIZER (to each of four tools, default 30).
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1) || { echo "there is no NVIDIA GPU" >&2; exit 2; }
out=${1:-runs/gpu-$(echo "$gpu" | tr -cs 'A-Za-z0-9\n' '-' | sed 's/-*$//')}
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=0

# step NAME SECONDS COMMAND...: its output in NAME.log, its verdict in summary.txt
: >"$out/summary.txt"
step() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed=1
  printf '%-24s %-8s %4d s   %s\n' "$name" "$([ $status -eq 0 ] && echo ok || echo "FAILED $status")" \
    $((SECONDS - begin)) "$(tail -n 1 "$out/$name.log" | cut -c 1-120)" | tee -a "$out/summary.txt"
}

nvidia-smi >"$out/nvidia-smi.txt"

if [ "${VIDFAST_GPU_INSTALL:-1}" = 1 ]; then
  step build 240 env VIDFAST_CUDA=1 "$PYTHON" -m pip install --no-build-isolation --no-deps -v -e .
fi
step info 60 "$PYTHON" -c 'import json, vidfast; print(json.dumps(vidfast.info(), indent=1, default=str))'
step available 60 "$PYTHON" -c '
from vidfast import dispatch
reasons = {n: dispatch.load(n).unavailable() for n in ("cuda", "triton")}
print(reasons)
raise SystemExit(reasons["cuda"] is not None)'

step tests-cuda 120 "$PYTHON" -m pytest -q -p no:cacheprovider tests/cuda/test_cuda_gpu.py tests/cuda/test_cuda_backend.py
step tests-core-cuda 150 env VIDFAST_TEST_BACKEND=cuda VIDFAST_TEST_SMALL=20000000 \
  "$PYTHON" -m pytest -q -p no:cacheprovider -m backend tests/core
step tests-core-triton 120 env VIDFAST_TEST_BACKEND=triton VIDFAST_TEST_SMALL=2000000 \
  "$PYTHON" -m pytest -q -p no:cacheprovider -m backend tests/core/test_values.py

# One call of every mapping and primitive; the caching allocator is off, so that each tensor has its own bounds.
cat >"$out/sanitized.py" <<'PYTHON'
import torch
import vidfast

shapes = [(2, 3, 40, 40), (3, 24, 7, 7), (5, 21, 14, 14), (33, 1000), (4000, 8), (5, 1, 77), (2, 5, 1030)]
for shape in shapes:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for other in (dtype, torch.float32):
            mean = torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()
            target = torch.randn(shape, device="cuda", dtype=other).requires_grad_()
            alpha = torch.randn(shape[1], device="cuda").requires_grad_()
            for strategy, weight in (("one_pass", 1.0), ("two_pass", 3.0)):
                t = target.detach() if strategy == "one_pass" else target
                loss = vidfast.gaussian_nll(mean, t, alpha, strategy=strategy, backend="cuda")
                (loss * weight).backward()
torch.cuda.synchronize()
print("done")
PYTHON
sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck initcheck synccheck; do
    step "sanitizer-$tool" "${SECONDS_SANITIZER:-30}" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
      --error-exitcode 9 --kernel-regex kns=vidfast "$PYTHON" "$out/sanitized.py"
  done
else
  echo "compute-sanitizer: not on this machine, not run" | tee -a "$out/summary.txt"
fi

step benchmarks "${SECONDS_BENCH:-150}" "$PYTHON" -m pytest bench -q -p no:cacheprovider --bench-device=cuda \
  --benchmark-json="$out/benchmarks.json"
step launches 60 "$PYTHON" - <<'PYTHON'
# Launches and host time of a step on a shape too small to matter: what the wrapper costs.
import time

import torch
import vidfast

mean = torch.randn(8, 16, 7, 7, device="cuda", requires_grad=True)
target, alpha = torch.randn_like(mean), torch.randn(16, device="cuda", requires_grad=True)


def forward():
    return vidfast.gaussian_nll(mean, target, alpha, backend=backend)


def step():
    torch.autograd.grad(forward(), (mean, alpha))


for backend in ("cuda", "triton", "reference"):
    try:
        step()
    except RuntimeError as error:
        print(backend, error)
        continue
    for name, call in (("forward", forward), ("forward and backward", step)):
        times = []
        for _ in range(200):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        print(f"{backend:10s} {name:22s} {sorted(times)[100] * 1e6:7.1f} us of host time")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [e.name for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA]
    print(f"{backend:10s} {len(events)} device operations a step")
PYTHON

echo "results in $out"
exit $failed
