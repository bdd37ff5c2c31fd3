#!/usr/bin/env bash
# What one GPU is asked: that the model is the CPU's there, the studies of balancing and MTP, and the speed of `small`.
# Usage: bench/gpu.sh FOLDER (raw results go there). Takes about nine minutes on an H100.
set -u
out=$1
export PYTHONPATH=. PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
python3 -m pytest -W default -o addopts= -p no:cacheprovider -q tests/model/test_gpu.py tests/kernels 2>&1 | tail -n 25 | tee "$out/tests.txt"
settings="train.tokens=2e6 train.micro_batch_size=16 train.precision=bf16"
timeout 230 python3 bench/ablate_balance.py --jobs 8 --json "$out/balance.json" $settings 2>&1 | tee "$out/balance.txt"
timeout 160 python3 bench/ablate_mtp.py --jobs 8 --json "$out/mtp.json" $settings 2>&1 | tee "$out/mtp.txt"
timeout 120 python3 -c '
import sys
from counterflow.config.load import load_run
from counterflow.train.loop import train
sys.exit(train(load_run("small", ["train.tokens=4e6", "train.batch_size=32", "train.batch_start=0", "keep.folder=/tmp/small", "keep.eval_samples=8"])))
' 2>&1 | tee "$out/small.txt"
cp /tmp/small/metrics.jsonl "$out/small-metrics.jsonl"
