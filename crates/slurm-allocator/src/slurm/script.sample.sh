#!/bin/sh
# The workers of swarm s-1, submission 2.
#SBATCH --job-name=drover-s-1.2
#SBATCH --comment=drover:s-1:2
#SBATCH --partition=mi2508x
#SBATCH --nodes=4
#SBATCH --ntasks=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=00:10:00
#SBATCH --signal=TERM@60
#SBATCH --output=/work1/drover/codeswarm/swarms/s-1/job-%j.log
#SBATCH --error=/work1/drover/codeswarm/swarms/s-1/job-%j.log
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --account=lab
#SBATCH --exclusive

# What the environment of sbatch says of another node is not meant for these.
unset DROVER_NODE_ID DROVER_NODE_DIR DROVER_GENERATION DROVER_JOB_ID DROVER_IDENTITY DROVER_JOB_ENDS
export DROVER_SWARM_ID='s-1'
export DROVER_MAILBOX='/work1/drover/codeswarm/mailbox'
export DROVER_AGENT='echo'
export DROVER_CONFIG='/work1/drover/codeswarm/swarms/s-1/drover.yaml'
export DROVER_SLURM_DIR='/work1/drover/codeswarm/swarms/s-1'
export DROVER_JOB_ENDS="$(($(date +%s) + 600))"
export DROVER_STATE_DIR='/var/tmp'/drover-"$(id -u)"
export PATH="$PATH":'/work1/drover/codeswarm/tools/bin'
export DROVER_WORKER__SANDBOX_MODE='read-only'

exec srun --export=ALL --label --kill-on-bad-exit=0 --wait=0 --ntasks-per-node=1 '/work1/drover/codeswarm/bin/0123456789abcdef/drover' 'daemon' 'worker' --slurm
