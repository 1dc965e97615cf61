#!/usr/bin/env bash
# The first minutes of a GPU: builds, checks and measures in order of value. What is done at any moment is whole.
#
#   bench/gpu.sh [--limit SECONDS] [--only STAGE] [--small] [--out FOLDER]
#
# PYTHON names the interpreter (with torch, triton, numpy, pybind11, cmake, ninja, pytest, psutil; default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
  echo "bench/gpu.sh: PYTHON must name an interpreter, got $python" >&2
  exit 2
fi
exec "$python" -m bench.gpu "$@"
