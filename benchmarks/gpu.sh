#!/usr/bin/env bash
# Run the published models, or random weights of their shapes, on one GPU, and write what was measured to OUT.
#
#   bash benchmarks/gpu.sh                        random weights: placement, bf16 against fp32, peak memory, time per step
#   bash benchmarks/gpu.sh --weights FOLDER       clips of fixed prompts and seeds, with what to expect of each
#   bash benchmarks/gpu.sh --wheels FOLDER ...    install omnivideo from wheels first; nothing is fetched from a network
#   bash benchmarks/gpu.sh --dry-run              the same with the tiny preset on the CPU, in half a minute
#
# `pip wheel . -w FOLDER` makes that folder, on a machine with a network, of the same system and version of Python (3.11
# or newer). Other options go to benchmarks/gpu.py (--help). PYTHON names the interpreter; the default is
# .venv/bin/python, and with --wheels python3. OUT/report.json has the rows that are printed; the exit status is 1 if
# one of them has faults.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PIP_NO_INDEX=1
python=${PYTHON:-.venv/bin/python}
options=()
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels)
      wheels=${2:?--wheels needs a folder}
      shift 2
      if ! ls "$wheels"/omnivideo-*.whl >/dev/null 2>&1; then
        echo "--wheels: no omnivideo-*.whl in $wheels; make the folder with: pip wheel . -w $wheels" >&2
        exit 2
      fi
      "${PYTHON:-python3}" -m venv .venv-gpu
      .venv-gpu/bin/python -m pip install --quiet --no-index --find-links "$wheels" omnivideo
      python=.venv-gpu/bin/python
      ;;
    --weights)
      folder=${2:?--weights needs a folder}
      if [ ! -f "$folder/model_index.json" ]; then
        echo "--weights: no model_index.json in $folder; name a folder that omnivideo weights import wrote" >&2
        exit 2
      fi
      options+=("$1" "$folder")
      shift 2
      ;;
    *)
      options+=("$1")
      shift
      ;;
  esac
done
if [ ! -x "$python" ]; then
  echo "$python: no such interpreter; run deploy/setup.sh, set PYTHON, or give --wheels" >&2
  exit 2
fi
if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,memory.total,memory.free,driver_version --format=csv || true # torch says what it finds
fi
exec "$python" -m benchmarks.gpu ${options[@]+"${options[@]}"}
