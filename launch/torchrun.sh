#!/usr/bin/env bash
# All GPUs of this machine, or NPROC processes:  launch/torchrun.sh --config gpt2_124m
# Several machines: start it on each, with the same RDZV (host:port of one of them) and NNODES.
set -euo pipefail
cd "$(dirname "$0")/.."

NNODES=${NNODES:-1}
NPROC=${NPROC:-gpu}
RDZV=${RDZV:-localhost:0}

exec torchrun \
  --nnodes "$NNODES" --nproc-per-node "$NPROC" \
  --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "${RUN_ID:-harness}" \
  --max-restarts "${MAX_RESTARTS:-3}" \
  harness/train.py "$@"
