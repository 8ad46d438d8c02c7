#!/bin/bash
# sbatch docs/slurm.sh configs/NAME.py [options]     from the clone, which all hosts must see
#SBATCH --job-name=dsjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@180
#SBATCH --output=dsjax-%j.log

# One task a host takes all its GPUs. SIGTERM comes 180 s before the time limit: a checkpoint is
# saved then, and the same command with --resume goes on from it.
exec srun --label --kill-on-bad-exit=1 \
  python3 -m uv run --extra gpu run.py train "$@" --out "${OUT:-runs/slurm}"
