#!/usr/bin/env bash
# All that needs a GPU, the most valuable first: throughput, tests, FP8 against BF16, kernels, memory against plan, what
# watching costs, whole steps. Two halves of under 8 minutes each.
#     benchmarks/gpu_suite.sh                           # CSVs go to benchmarks/results
#     ONLY=first OUT=/tmp/out benchmarks/gpu_suite.sh   # then ONLY=second; or names: ONLY="tests fp8_check"
#     DRY=1 OUT=/tmp/out benchmarks/gpu_suite.sh        # does it run? Every part at toy size on a CPU
# With OUT, all that was written comes as one archive, OUT/gpu_suite.tar.gz, packed anew after every part.
# PYTHON=/opt/venv/bin/python chooses an interpreter. Nothing is installed and no network is used. A part that fails or is
# too slow does not keep the others from running, and leaves the rows it had; exit code 1 says that one failed. What a part
# started ends with it.
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE # some images set it, and no gate in fp32 would hold
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python}
PYTHON=${PYTHON:-python3} DRY=${DRY:-}
[ "${1:-}" != --dry-run ] || DRY=1
WORK=$(mktemp -d)
RESULTS=$WORK/results LOGS=$WORK/logs
[ -n "${OUT:-}${DRY:+dry}" ] || RESULTS=benchmarks/results

GPU_TESTS="tests/gpu $(grep -rl --include='test_*.py' 'mark\.gpu' tests | grep -v '^tests/gpu/' | sort | tr '\n' ' ')"
ONE_B="--config configs/demo.yaml --smallest 1024 --steps 10 --set model.preset=1b data.seq_len=2048 batch.tokens=16384
 batch.micro=4 model.overrides.num_hidden_layers=4 optim.kind=adamw optim.lr=0.0003 compute.compile=default"
ONE_B=${ONE_B//$'\n'/}
SAME_CODE="--set compute.attention=sdpa compute.kernels=off" # or the gate in fp32 would compare different kernels
JUNIT="-p no:cacheprovider -v --junitxml=$LOGS/tests.xml"

# name | half | seconds | CSV | on a GPU | dry. One line is one part, in the order of value.
PARTS="
throughput  | first  | 170 | throughput.csv       | benchmarks/throughput.py --budget 160         | benchmarks/throughput.py --tiny --layouts packed
tests       | first  | 170 | -                    | -m pytest -m gpu $JUNIT @TIMEOUT $GPU_TESTS   | -m pytest $JUNIT @TIMEOUT tests/gpu
fp8_check   | first  |  90 | fp8_check.csv        | benchmarks/fp8_check.py $ONE_B                | benchmarks/fp8_check.py --quick
shards      | second |  30 | shards_kernel.csv    | benchmarks/shards_kernel.py                   | benchmarks/shards_kernel.py --sizes 100000 --rounds 2
rssm_kernel | second |  40 | rssm_kernel.csv      | benchmarks/rssm_kernel.py                     | benchmarks/rssm_kernel.py --hidden 16 --paths 1 --horizon 3 --rounds 2 --threads 1
plan_memory | second | 110 | plan_memory.csv      | benchmarks/plan_memory.py --models tiny 100m --limit 50 | benchmarks/plan_memory.py --quick
overhead    | second |  60 | predict_overhead.csv | benchmarks/predict_overhead.py --models 100m 1b --rounds 3 | benchmarks/predict_overhead.py --models tiny --rounds 1 --rows 2 --seq-len 64
train_step  | second |  60 | train_step.csv       | benchmarks/train_step.py --steps 5 --rounds 2 $SAME_CODE | benchmarks/train_step.py --quick
"
SLOW_CPU=10 # times the seconds of a GPU, in a dry run

stop() { # an error before anything ran
  echo "gpu_suite: error: $1" >&2
  rm -rf "$WORK"
  exit 1
}

missing() { # those of the given modules that cannot be imported
  "$PYTHON" - "$@" <<'PY'
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
PY
}

check() { # what every part needs, and what some are left out without
  lacking=$(missing torch transformers accelerate peft tokenizers safetensors numpy scipy matplotlib rich yaml packaging \
    pydantic pydantic_core annotated_types typing_inspection) || stop "$PYTHON cannot run (set PYTHON=)"
  [ -z "$lacking" ] || stop "$PYTHON lacks ${lacking/yaml/PyYAML}: carry their wheels here (pip download --no-deps), then \
pip install --no-index --no-deps --target FOLDER *.whl and PYTHONPATH=FOLDER"
  lacking=$(missing triton torchao liger_kernel datasets pytest pytest_timeout deepspeed torchtitan)
  [ -z "$lacking" ] || echo "not installed, so what needs them is left out: $lacking"
  case " $lacking " in *" pytest_timeout "*) TIMEOUT="" ;; *) TIMEOUT="--timeout $((${DRY:+$SLOW_CPU *} 60))" ;; esac
}

survivors() { # end whatever a part has left behind, in whatever session
  for environment in /proc/[0-9]*/environ; do
    if grep -qzx "SCALE_GPU_SUITE=$$" "$environment" 2>/dev/null; then
      process=${environment#/proc/} process=${process%/environ}
      kill -KILL "$process" 2>/dev/null && echo "ended process $process, which $name had left behind"
    fi
  done
}

pack() {
  [ -n "${OUT:-}" ] || return 0
  mkdir -p "$OUT" && printf '%s\n' "$summary" >"$WORK/summary.txt" && tar -czf "$OUT/gpu_suite.tar.gz" -C "$WORK" .
}

ended() { # asked to stop: the part that runs first, then what it left
  trap '' INT TERM
  [ -z "${running:-}" ] || { kill -INT "$running"; wait "$running"; } 2>/dev/null
  survivors
  summary+=$'\n'"stopped during $name"
  pack
  echo "$summary"
  exit 130
}

trim() { local text=$1; text=${text#"${text%%[![:space:]]*}"}; printf '%s' "${text%"${text##*[![:space:]]}"}"; }

if [ -z "$DRY" ]; then
  "$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)'
  case $? in
    0) ;;
    3) rm -rf "$WORK"
       ! command -v nvidia-smi >/dev/null || stop "torch of $PYTHON sees no GPU, but nvidia-smi is here (another build of torch?)"
       echo "no GPU: nothing was measured" && exit 0 ;;
    *) stop "torch of $PYTHON cannot be imported (set PYTHON=)" ;;
  esac
fi
check
[ -z "$DRY" ] || export CUDA_VISIBLE_DEVICES="" GPU_TESTS_ON=cpu
mkdir -p "$RESULTS" "$LOGS"
echo "results: $RESULTS, logs: $LOGS${OUT:+, archive: $OUT/gpu_suite.tar.gz}"
summary=$(printf '%-12s %8s  %-24s %s' part seconds outcome CSV)
code=0 name=""
trap ended INT TERM

while IFS='|' read -r name half limit csv command dry; do
  name=$(trim "$name") half=$(trim "$half") limit=$(trim "$limit") csv=$(trim "$csv")
  [ -n "$name" ] || continue
  case " ${ONLY:-$half} " in *" $name "* | *" $half "*) ;; *) continue ;; esac
  [ -z "$DRY" ] || command=$dry limit=$((limit * SLOW_CPU))
  command=${command/@TIMEOUT/$TIMEOUT}
  case $csv in -) ;; rssm_kernel.csv) command+=" --out $RESULTS/$csv" ;; *) command+=" --out $RESULTS" ;; esac
  [ -n "$DRY" ] || cp -n "benchmarks/results/$csv" "$RESULTS/" 2>/dev/null # rows of other machines stay in it
  before=$(stat -c %y "$RESULTS/$csv" 2>/dev/null)
  began=$SECONDS
  echo "== $name (at most $limit s)"
  gpus=${CUDA_VISIBLE_DEVICES-$([ "$name" = tests ] || echo 0)} # Trainer of Hugging Face would take them all
  # shellcheck disable=SC2086  # the command is words
  env --default-signal=INT SCALE_GPU_SUITE=$$ ${gpus:+CUDA_VISIBLE_DEVICES=$gpus} \
    timeout -s INT -k 10 "$limit" "$PYTHON" $command >"$LOGS/$name.log" 2>&1 </dev/null &
  running=$!
  wait "$running"
  status=$? running=""
  survivors
  case $status in
    0) outcome=ok ;;
    124 | 137) outcome="failed: over $limit s" code=1 ;;
    *) outcome="failed: exit code $status" code=1 ;;
  esac
  tail -n "$([ "$outcome" = ok ] && echo 25 || echo 60)" "$LOGS/$name.log"
  if [ "$(stat -c %y "$RESULTS/$csv" 2>/dev/null)" = "$before" ]; then
    [ "$RESULTS" = benchmarks/results ] || rm -f "$RESULTS/$csv"
    csv=-
  fi
  summary+=$'\n'$(printf '%-12s %8d  %-24s %s' "$name" $((SECONDS - began)) "$outcome" "$csv")
  pack
done <<<"$PARTS"

echo "$summary"
exit $code
