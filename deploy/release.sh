#!/usr/bin/env bash
# Build a release in dist/: a wheel, a source distribution and a software bill of materials (CycloneDX JSON). Then install
# the wheel in an empty environment and generate one clip with it.
#
#   bash deploy/release.sh [--no-build]     with --no-build, only test the wheel in dist/
#
# PYTHON is an interpreter with the package `build`, and `cyclonedx-py` in the same folder (default: .venv/bin/python).
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
trial=$(mktemp -d)
trap 'rm -rf "$trial"' EXIT

if [[ ${1:-} != --no-build ]]; then
    rm -rf dist
    "$python" -m build --outdir dist .
fi
wheel=$(ls dist/omnivideo-*.whl)
unzip_list=$("$python" -m zipfile --list "$wheel")
grep -q 'omnivideo/weights/tiny/.*safetensors' <<<"$unzip_list" || { echo "release: the wheel has no tiny weights" >&2; exit 1; }

"$python" -m venv "$trial/venv"
if command -v nvidia-smi >/dev/null; then torch='torch>=2.11'; else torch='torch==2.13.0'; fi
"$trial/venv/bin/pip" install --quiet --disable-pip-version-check "${TORCH:-$torch}" "$wheel"
# The bill of materials lists exactly what this environment contains: the wheel and its dependencies.
"$(dirname "$python")/cyclonedx-py" environment "$trial/venv/bin/python" --output-format JSON \
    --output-file "${wheel%.whl}.cdx.json"
cd "$trial" # so that the checkout is not importable
env -u PYTHONPATH "$trial/venv/bin/omnivideo" generate "a small red circle moving right" -o clip.mp4
[[ -s clip.mp4 ]]
echo "release: $(basename "$wheel") generates a clip in an empty environment"
