#!/usr/bin/env bash
# ruff and all tests, in the repository's own virtual environment. Under 10 minutes on 2 CPU cores.
# Arguments go to pytest: `bash test.sh -k prefill`; `bash test.sh -m slow` runs what takes longer.
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
export OMP_NUM_THREADS=1  # the tensors are tiny: threads only get into each other's way
.venv/bin/ruff check
exec .venv/bin/python -m pytest -q --durations=10 "$@"
