#!/usr/bin/env bash
# Everything that only a GPU can show, in one call: the kernels against the oracle, no host synchronisation in a
# guarded step, two ranks on one GPU, the benchmarks. On a machine without CUDA it runs the same on the CPU, as a
# rehearsal, with the parts that need a GPU skipped. Results lie in docs/benchmarks/ and, if $OUT is set, there too.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}
failed=()

part() { # NAME LIMIT_S COMMAND...
  local name=$1 limit_s=$2 began=$SECONDS
  shift 2
  echo "== $name: $*"
  timeout --kill-after=10 "$limit_s" "$@" || failed+=("$name")
  echo "-- $((SECONDS - began)) s"
}

"$PYTHON" - <<'EOF'
import torch
print("torch", torch.__version__, "| CUDA", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
EOF
has_gpu=$("$PYTHON" -c 'import torch; print(int(torch.cuda.is_available()))')

part "tests on the GPU" 240 "$PYTHON" -m pytest -q -p no:cacheprovider \
  tests/gpu tests/numerics/test_statistics_kernels.py tests/numerics/test_adamw_kernels.py
if ((has_gpu)); then
  part "cost of the guard" 120 "$PYTHON" scripts/bench_monitor.py --models gpt2-124m llama-1b --rounds 50 \
    --out docs/benchmarks/monitor-cuda
  part "AdamW by torch and by Triton" 60 "$PYTHON" scripts/bench_adamw.py
  # 32,768 tokens a step; a bare step has neither guard nor clipping.
  part "cost of a 124M step" 180 "$PYTHON" scripts/bench_loop.py --name loop-124m --segments 6 --steps 15 \
    -- --config gpt2_124m
  part "beside other trainers" 120 "$PYTHON" scripts/bench_trainers.py --turns 4 --steps 15 -- --config gpt2_124m
  part "cost of a 1B step" 120 "$PYTHON" scripts/bench_loop.py --name loop-1b --segments 5 --steps 8 \
    -- --config llama_1b --parallel.strategy=auto --loop.global_batch=8 --loop.micro_batch=null
else
  part "cost of the guard" 600 "$PYTHON" scripts/bench_monitor.py
  part "cost of the loop" 600 "$PYTHON" scripts/bench_loop.py --segments 10 --steps 20
  part "beside other trainers" 900 "$PYTHON" scripts/bench_trainers.py --turns 4 --steps 10
fi

if [[ -n "${OUT:-}" ]]; then
  cp docs/benchmarks/*cuda* "$OUT"/ 2>/dev/null || true
fi
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all parts passed"
