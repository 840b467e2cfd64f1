#!/usr/bin/env bash
# All GPUs of this machine, or NPROC processes:
#   harness launch --print torchrun > torchrun.sh; bash torchrun.sh --config gpt2_124m
# Several machines: start it on each, with the same RDZV (host:port of one of them) and NNODES.
set -euo pipefail

NNODES=${NNODES:-1}
NPROC=${NPROC:-gpu}
RDZV=${RDZV:-localhost:0}

# With torch's shared store a node that comes back finds the addresses of processes that are dead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# How long a stop may take before torchrun kills: the step under way, lag_steps more, and the save. Its own: 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_S:-110}

exec torchrun \
  --nnodes "$NNODES" --nproc-per-node "$NPROC" \
  --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "${RUN_ID:-harness}" \
  --max-restarts "${MAX_RESTARTS:-3}" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 \
  -m harness.train "$@"
