#!/usr/bin/env bash
# All that needs a GPU, in under 9 minutes: tests, throughput, FP8 against BF16, memory against plan, kernels, what watching
# costs, whole steps.
#     benchmarks/gpu_suite.sh                          # CSVs go to benchmarks/results
#     PYTHON=/opt/venv/bin/python OUT=/tmp/out benchmarks/gpu_suite.sh
# Nothing is installed and no network is used. A part that fails does not keep the others from running; exit code 1 says
# that one did. ONLY="tests fp8_check" runs those parts alone.
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python}
PYTHON=${PYTHON:-python3}
RESULTS=${OUT:-benchmarks}/results
LOGS=${OUT:-$(mktemp -d)}/logs

GPU_TESTS="tests/gpu $(grep -rl --include='test_*.py' 'mark\.gpu' tests | sort | tr '\n' ' ')"
ONE_B="--config configs/demo.yaml --smallest 1024 --steps 10 --set model.preset=1b data.seq_len=2048 batch.tokens=16384
 batch.micro=4 model.overrides.num_hidden_layers=4 optim.kind=adamw optim.lr=0.0003 compute.compile=default"
ONE_B=${ONE_B//$'\n'/}
SAME_CODE="--set compute.attention=sdpa compute.kernels=off" # or the gate in fp32 would compare different kernels

# name | seconds | CSV | needs this file | command. One line is one part; seconds add up to less than 9 minutes.
PARTS="
tests       | 130 | -               | tests/gpu                 | -m pytest -m gpu -p no:cacheprovider --junitxml=$LOGS/tests.xml $GPU_TESTS
throughput  |  95 | throughput.csv  | benchmarks/throughput.py  | benchmarks/throughput.py --budget 80 --out $RESULTS
fp8_check   |  80 | fp8_check.csv   | benchmarks/fp8_check.py   | benchmarks/fp8_check.py $ONE_B --out $RESULTS
plan_memory |  70 | plan_memory.csv | benchmarks/plan_memory.py | benchmarks/plan_memory.py --models tiny 100m --out $RESULTS
rssm_kernel |  40 | rssm_kernel.csv | benchmarks/rssm_kernel.py | benchmarks/rssm_kernel.py --out $RESULTS/rssm_kernel.csv
shards      |  25 | shards_kernel.csv | benchmarks/shards_kernel.py | benchmarks/shards_kernel.py --out $RESULTS
overhead    |  45 | predict_overhead.csv | benchmarks/predict_overhead.py | benchmarks/predict_overhead.py --models 100m 1b --rounds 3 --out $RESULTS
train_step  |  40 | train_step.csv  | benchmarks/train_step.py  | benchmarks/train_step.py --steps 5 --rounds 2 $SAME_CODE --out $RESULTS
"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  "$PYTHON" -c 'import torch' || { echo "gpu_suite: error: $PYTHON has no torch (set PYTHON=)" >&2; exit 1; }
  echo "no GPU: nothing was measured"
  exit 0
fi
mkdir -p "$RESULTS" "$LOGS"
echo "results: $RESULTS, logs: $LOGS"
summary=$(printf '%-12s %8s  %-24s %s' part seconds outcome CSV)
code=0

trim() { local text=$1; text=${text#"${text%%[![:space:]]*}"}; printf '%s' "${text%"${text##*[![:space:]]}"}"; }

while IFS='|' read -r name limit csv needs command; do
  name=$(trim "$name") limit=$(trim "$limit") csv=$(trim "$csv") needs=$(trim "$needs")
  [ -n "$name" ] || continue
  case " ${ONLY:-$name} " in *" $name "*) ;; *) continue ;; esac
  began=$SECONDS
  if [ ! -e "$needs" ]; then
    outcome="skipped: no $needs"
  else
    echo "== $name (at most $limit s)"
    gpus=${CUDA_VISIBLE_DEVICES:-$([ "$name" = tests ] || echo 0)} # Trainer of Hugging Face would take them all
    # shellcheck disable=SC2086  # the command is words
    env ${gpus:+CUDA_VISIBLE_DEVICES=$gpus} timeout -k 5 "$limit" "$PYTHON" $command >"$LOGS/$name.log" 2>&1 </dev/null
    status=$?
    case $status in
      0) outcome=ok ;;
      124 | 137) outcome="failed: over $limit s" code=1 ;;
      *) outcome="failed: exit code $status" code=1 ;;
    esac
    tail -n "$([ "$outcome" = ok ] && echo 25 || echo 60)" "$LOGS/$name.log"
  fi
  [ -e "$RESULTS/$csv" ] || csv=-
  summary+=$'\n'$(printf '%-12s %8d  %-24s %s' "$name" $((SECONDS - began)) "$outcome" "$csv")
done <<<"$PARTS"

echo "$summary"
exit $code
