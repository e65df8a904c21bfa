#!/usr/bin/env bash
# Run the published models, or random weights of their shapes, on one GPU, and write what was measured to OUT.
#
#   bash benchmarks/gpu.sh                        random weights: placement, bf16 against fp32, peak memory, time per step
#   bash benchmarks/gpu.sh --weights FOLDER       clips of fixed prompts and seeds, with what to expect of each
#   bash benchmarks/gpu.sh --wheels FOLDER ...    install omnivideo from wheels first; nothing is fetched from a network
#   bash benchmarks/gpu.sh --dry-run              the same with the tiny preset on the CPU, in a few seconds
#
# Other options go to benchmarks/gpu.py (--help). PYTHON names the interpreter; the default is .venv/bin/python.
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
      python3 -m venv .venv-gpu
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
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total,memory.free,driver_version --format=csv
exec "$python" -m benchmarks.gpu ${options[@]+"${options[@]}"}
