# shellcheck shell=bash
# What all job scripts share: preflight, training on every node, checkpoint and requeue. A job script sources this file
# and calls `scale_job CONFIG key=value ...`. docs/slurm.md describes it and the variables that may be set.

readonly EXIT_STOPPED=75  # scale/errors.py: stopped on request, after writing a checkpoint
readonly LAST_WORDS=120   # seconds that nodes have to end after the first did; launchers need up to 105
readonly ANSWER_WITHIN=60 # seconds in which a living node starts a step
SIGNALS=0                 # how many signals have been handled

say() { echo "slurm: $(date '+%F %T') $*"; }

scale_job() {
  PYTHON=${PYTHON:-$SCALE_HOME/.venv/bin/python}
  if [[ ! -x $PYTHON ]]; then PYTHON=$(command -v python3); fi
  export PYTHON PYTHONPATH="$SCALE_HOME:$SCALE_HOME/kernels${PYTHONPATH:+:$PYTHONPATH}"
  RUNS=$("$PYTHON" -m scale.cluster.runs_folder "$@") # a wrong config ends the job here, with exit code 2
  mkdir -p "$RUNS"
  plan_job
  if ((RESTARTS > MAX_RESTARTS)); then
    say "restarted more often than SCALE_MAX_RESTARTS = $MAX_RESTARTS allows: submit again to go on"
    exit "$EXIT_STOPPED"
  fi
  trap 'ask_to_stop USR1' USR1
  trap 'ask_to_stop TERM' TERM
  preflight
  train "$@"
}

# What this start of the job runs on. A requeued job keeps its id, so whatever must be new has RESTARTS in it.
plan_job() {
  RESTARTS=${SLURM_RESTART_COUNT:-0}
  MAX_RESTARTS=${SCALE_MAX_RESTARTS:-100}
  GPUS=$(gpus_per_node)
  RANKS_PER_NODE=${SCALE_RANKS_PER_NODE:-$((GPUS > 0 ? GPUS : 1))}
  HOST=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
  PORT=$((20000 + (SLURM_JOB_ID * 31 + RESTARTS) % 1250 * 8)) # eight each, below those of outgoing connections
  export SCALE_STOP_FILE=$RUNS/.stop-$SLURM_JOB_ID
  rm -f "$SCALE_STOP_FILE" # left by the start before this one
  trap 'rm -f "$SCALE_STOP_FILE"' EXIT
  say "job $SLURM_JOB_ID, start $((RESTARTS + 1)): $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST)," \
    "$RANKS_PER_NODE ranks on each, rendezvous $HOST:$PORT"
}

# GPUs asked for on each node; without such a request, those allocated with this node.
gpus_per_node() {
  local job asked
  job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
  asked=$(sed -nE 's/.*TresPerNode=[^ ]*gres[:\/]gpu([:=][A-Za-z][^:=, ]*)?[:=]([0-9]+).*/\2/p' <<<"$job")
  echo "${asked:-${SLURM_GPUS_ON_NODE:-0}}"
}

# The address under which Slurm reaches a node: its name need not be one that the network knows.
address_of() {
  local node
  node=$(scontrol --oneliner show node "$1")
  sed -nE 's/.*NodeAddr=([^ ]+).*/\1/p' <<<"$node"
}

# A step on every node of the job. srun binds a lone task to one core unless told otherwise.
on_nodes() {
  local gpus=()
  if ((GPUS > 0)); then gpus=(--gpus-per-node="$GPUS"); fi
  srun --nodes="$SLURM_JOB_NUM_NODES" "${gpus[@]}" --cpu-bind=none --overcommit "$@"
}

preflight() {
  local options=(--folder "$RUNS" --host "$HOST" --port $((PORT + 7)))
  if ((GPUS > 0)); then options+=(--gpus); fi
  watch on_nodes --ntasks=$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE)) --ntasks-per-node="$RANKS_PER_NODE" \
    "$PYTHON" "$SCALE_HOME/launch/preflight.py" "${options[@]}"
  if stop_asked; then requeue; fi
  if ((CODE != 0)); then
    say "preflight failed (see above): nothing was started"
    exit "$CODE"
  fi
}

train() {
  # shellcheck disable=SC2016 # SLURM_NODEID differs from node to node
  watch on_nodes --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --wait="$LAST_WORDS" \
    bash -c 'exec "$0" --node-rank "$SLURM_NODEID" "$@"' "$SCALE_HOME/launch/torchrun.sh" \
    --nodes "$SLURM_JOB_NUM_NODES" --host "$HOST" --port "$PORT" --ranks-per-node "$RANKS_PER_NODE" "$@"
  local ended=$CODE
  say "training ended with exit code $ended"
  case $ended in
    0 | 2) exit "$ended" ;; # done, or a usage error
    "$EXIT_STOPPED") requeue ;;
  esac
  # More than 128: the launcher itself was killed, which no failing rank does. A dead node is not always as clear.
  if ((ended > 128)) || ! nodes_answer; then
    say "a node or its part of the run was lost"
    requeue
  fi
  exit "$ended"
}

nodes_answer() {
  watch timeout --foreground "$ANSWER_WITHIN" \
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --overlap true
  ((CODE == 0))
}

ask_to_stop() {
  SIGNALS=$((SIGNALS + 1))
  say "$1: asking the ranks to write a checkpoint and end"
  touch "$SCALE_STOP_FILE"
}

stop_asked() { [[ -e $SCALE_STOP_FILE ]]; }

# Put the job back into the queue; it resumes from its last checkpoint. A cancelled job stays cancelled: its state is no
# longer RUNNING by the time its processes are signalled.
requeue() {
  if [[ $(scontrol --oneliner show job "$SLURM_JOB_ID") != *" JobState=RUNNING "* ]]; then
    say "the job was cancelled or is out of time: not requeued"
  elif ((RESTARTS >= MAX_RESTARTS)); then
    say "SCALE_MAX_RESTARTS = $MAX_RESTARTS reached: not requeued; submit again to go on"
  else
    say "requeued"
    trap '' TERM USR1 # Slurm now ends what is left of this start
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$EXIT_STOPPED"
}

# Run a command while signals are handled at once (bash handles none during a foreground command); exit code in CODE.
watch() {
  local seen process
  "$@" &
  process=$!
  while true; do
    seen=$SIGNALS
    CODE=0
    wait "$process" || CODE=$?
    if ((SIGNALS == seen)); then break; fi # else it was a signal that ended the wait
  done
}
