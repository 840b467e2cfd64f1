#!/usr/bin/env bash
# Everything that only a GPU can show, in one call: the kernels against the oracle, no host synchronisation in a
# guarded step, two ranks on one GPU, the benchmarks. On a machine without CUDA it runs the same on the CPU, as a
# rehearsal, with the parts that need a GPU skipped. Results lie in docs/benchmarks/ and, if $OUT is set, there too.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD"
PYTHON=${PYTHON:-python3}
failed=()

part() {
  local name=$1
  shift
  echo "== $name: $*"
  "$@" || failed+=("$name")
}

"$PYTHON" - <<'EOF'
import torch
print("torch", torch.__version__, "| CUDA", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
EOF

runs=$(mktemp -d)
part "tests on the GPU" "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests
part "two gloo ranks" env OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node=2 \
  harness/train.py --config configs/inject_nan.yaml --runs_dir "$runs"
part "a run in bf16" "$PYTHON" harness/train.py --runs_dir "$runs" --loop.steps 60 --loop.precision bf16
part "cost of the loop" "$PYTHON" scripts/bench_loop.py --segments 10 --steps 20
if [[ $("$PYTHON" -c 'import torch; print(torch.cuda.is_available())') == True ]]; then
  # 32,768 tokens a step; a bare step has neither guard nor clipping.
  part "cost of a 124M step" "$PYTHON" scripts/bench_loop.py --name loop-124m --segments 8 --steps 20 \
    -- --config configs/gpt2_124m.yaml
  part "cost of a 1B step" "$PYTHON" scripts/bench_loop.py --name loop-1b --segments 5 --steps 10 \
    -- --config configs/llama_1b.yaml --parallel.strategy=auto --loop.micro_batch=null
fi
part "cost of the guard" "$PYTHON" scripts/bench_monitor.py

if [[ -n "${OUT:-}" ]]; then
  cp docs/benchmarks/*cuda* "$OUT"/ 2>/dev/null || cp docs/benchmarks/loop.* docs/benchmarks/monitor-cpu.json "$OUT"/
fi
rm -rf "$runs"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all parts passed"
