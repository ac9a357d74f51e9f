#!/bin/bash
#SBATCH --job-name=clipfh
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# A sweep on the nodes of a Slurm job. Given again, or requeued, it goes on with the sweep that is in OUT.
# Usage: sbatch cluster/slurm.sh FILE.yaml CATALOGUE OUT [options of clipfh sweep]
# CATALOGUE and OUT are in a bucket, s3://... or gs://..., or on a disk that all nodes see.
set -euo pipefail

file=$1 catalogue=$2 out=$3
shift 3
. "${SLURM_SUBMIT_DIR:-.}/cluster/env.sh"
resume=()
if clipfh status "$out" > /dev/null 2>&1; then resume=(--resume); fi
[ -e ~/.ray/auth_token ] || ray get-auth-token --generate > /dev/null
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk 'NR == 1')
address=$(getent ahostsv4 "$head" | awk 'NR == 1 { print $1 }'):6379

# One Ray on each node, the command on the first, which trains like the others; all end with the command.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
srun ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" -- \
    clipfh sweep "$file" "$catalogue" --out "$out" "${resume[@]}" "$@" --address "$address"
