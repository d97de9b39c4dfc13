#!/usr/bin/env bash
# From nothing to text: a virtual environment, a corpus that every Python has, a small LRT, its BPB, a sample.
# 5 to 7 minutes on 2 CPU cores (2026-11-22). Everything it makes is in .venv, data_stdlib and runs.
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
export PATH="$PWD/.venv/bin:$PATH"
export OMP_WAIT_POLICY=passive  # threads that wait, sleep, and leave the cores to others

python prepare_data.py stdlib --out data_stdlib
python train.py --data data_stdlib --depth 4 --lrt shared \
    --aspect-ratio 32 --head-dim 64 --max-seq-len 256 --window-pattern L \
    --total-batch-size 4096 --num-iterations 250 \
    --eval-every 125 --eval-tokens 16384 --decode-tokens 4096
echo
echo "BPB without memory (pass 0, no memory) and with it (merged: in parallel; decode: the exact recurrence):"
python eval_core.py --split val --rows 64 --decode-rows 16
echo
echo "Text, with memory carried from token to token:"
python sample.py --prompt "import os" --max-new-tokens 128 --temperature 1 --seed 1
