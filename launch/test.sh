#!/usr/bin/env bash
# Set-up + lint, types and all tests. Further arguments go to pytest: bash launch/test.sh -m "not dist" for the quick ones.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff format --check .
ruff check .
pyright
python -m pytest "$@"
