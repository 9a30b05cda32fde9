#!/usr/bin/env bash
# Train with several processes on this machine, or on several: launch/torchrun.sh --help
set -eu
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$here/.venv/bin/python}"
[ -x "$python" ] || python=python3
export PYTHONPATH="$here:$here/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m scale.cluster.supervise "$@"
