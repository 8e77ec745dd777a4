#!/usr/bin/env bash
# Train a recipe on all GPUs of one machine or of many; arguments are those of `python -m pixart.train`.
# Draw pictures on them where the first argument is generate; the others are those of `python -m pixart.generate`.
#
#   one machine   launch.sh sigma --output runs/sigma --parallel fsdp
#   4K            launch.sh sigma --stage 4096px-kv --parallel fsdp+sequence --sequence 4     (four share a picture)
#   pictures      launch.sh generate --prompts prompts.txt --model sigma-1024
#   Slurm         sbatch --nodes 4 --gpus-per-node 8 launch.sh sigma --output /shared/sigma ...
#   many by hand  NODES=4 HEAD=first-host:29500 launch.sh sigma ...       (the same on each of them)
#
# Every machine must see the same --output and data. The same command goes on with a run that was
# stopped, also on another number of machines. PROCESSES: on a machine; default one for each GPU.
#
#SBATCH --job-name=pixart
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=TERM@180
#SBATCH --open-mode=append
# (TERM: three minutes before the time is up, so that the run is saved.)
set -euo pipefail

rendezvous=(--standalone)
run=()
if [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
    NODES=$SLURM_NNODES
    # Two jobs may share their first machine: each has a port of its own.
    # Read to its end: a command whose reader leaves early ends with an error under pipefail.
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    HEAD=${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 20000))
    run=(srun --kill-on-bad-exit=1)
fi
if [[ ${NODES:-1} -gt 1 ]]; then
    : "${HEAD:?must be HOST:PORT of the first machine when NODES is more than 1}"
    id=pixart-${SLURM_JOB_ID:-0}
    rendezvous=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "$id")
fi
# torchrun would give up on a run that is being saved after 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-170}
module=pixart.train
if [[ ${1:-} == generate ]]; then
    module=pixart.generate
    shift
fi
# The bare -- keeps torchrun from reading our options as its own.
exec "${run[@]}" python -m torch.distributed.run "${rendezvous[@]}" \
    --nproc-per-node "${PROCESSES:-gpu}" -m -- "$module" "$@"
