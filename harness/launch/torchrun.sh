#!/usr/bin/env bash
# All GPUs of this machine, or NPROC processes:
#   harness launch --print torchrun > torchrun.sh; bash torchrun.sh --config gpt2_124m
# Several machines: start it on each, with the same RDZV (host:port of one of them, which has to outlive the job) and
# NNODES: their number, or MIN:MAX; then the job goes on without a machine that is lost, and takes it in again.
set -euo pipefail

NNODES=${NNODES:-1}
NPROC=${NPROC:-gpu}
RDZV=${RDZV:-localhost:0}

# With torch's shared store a node that comes back finds the addresses of processes that are dead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# How long a stop may take before torchrun kills: the step under way, lag_steps more, and the save. Its own: 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_S:-110}

# At a restart an agent that has been silent for 10 s is not waited for, nor are further ones for more than 3 s once MIN
# are there. torchrun's own: 15 and 30 s. At 3 s the agents of busy machines lose sight of each other.
RDZV_CONF=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=10
LOCAL_ADDR=()
if [[ $NNODES != 1 ]]; then
  # torchrun goes by the machine's name, which may be 127.0.1.1 here and nothing elsewhere.
  read -r IS_HOST ADDRESS < <(python -m harness.network "${RDZV%:*}")
  # On the machine of RDZV its name may lead to no address but that one; the others know the name.
  [[ -z $ADDRESS ]] || LOCAL_ADDR=(--local-addr "$ADDRESS")
  RDZV_CONF+=,is_host=$IS_HOST
fi

# torchrun, but for a machine that is cut off: its agent ends, where torchrun's would go on waiting for the others.
exec python -m harness.agent \
  --nnodes "$NNODES" --nproc-per-node "$NPROC" ${LOCAL_ADDR[@]+"${LOCAL_ADDR[@]}"} \
  --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "${RUN_ID:-harness}" --rdzv-conf "$RDZV_CONF" \
  --max-restarts "${MAX_RESTARTS:-3}" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 \
  -m harness.train "$@"
