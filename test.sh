#!/usr/bin/env bash
# All tests, in the repository's own virtual environment. Under 10 minutes on 2 CPU cores.
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
export OMP_NUM_THREADS=1  # the tensors are tiny: threads only get into each other's way
exec .venv/bin/python -m pytest -q --durations=10 "$@"
