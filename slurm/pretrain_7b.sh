#!/usr/bin/env bash
# Pretrain the 7B preset on A100 or H100 nodes: sbatch --nodes=8 slurm/pretrain_7b.sh key=value ...
# SCALE_CONFIG names another config file. docs/slurm.md says the rest.
#SBATCH --job-name=pretrain_7b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

SCALE_HOME=${SCALE_HOME:-$SLURM_SUBMIT_DIR} # sbatch runs a copy of this file from a spool folder
# shellcheck source=slurm/common.sh
source "$SCALE_HOME/slurm/common.sh"
scale_job "${SCALE_CONFIG:-$SCALE_HOME/configs/pretrain/7b.yaml}" "$@"
