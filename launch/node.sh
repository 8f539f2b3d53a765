#!/usr/bin/env bash
# This node's ranks among those of all nodes:  node.sh NODE_RANK NODES MAIN_HOST PORT train RECIPE [key.path=value ...]
# or ... preflight RECIPE [--option=value ...] or ... shards encode SHARDS [options]. Runs on each node; slurm/*.sbatch and
# multi_node.sh start it.
set -euo pipefail
cd "$(dirname "$0")/.."
source "${QWENVL_SITE:-slurm/site.env}"
node_rank=$1 nodes=$2 main_host=$3 port=$4
shift 4
per_node=${QWENVL_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

zero_stage=2 zero_file=ds_configs/zero2.json timeout_seconds=600
if [ "$1" = train ] || [ "$1" = preflight ]; then
  words=()
  for word in "${@:2}"; do [[ $word == --* ]] || words+=("$word"); done
  layout=$($QWENVL_PREFIX qwenvl-dist job layout "${words[@]}")
  eval "$layout"  # zero_stage, zero_file and timeout_seconds as the recipe has them
  if [ -n "$QWENVL_SCRATCH" ]; then
    if mkdir -p "$QWENVL_SCRATCH" && [ -w "$QWENVL_SCRATCH" ]; then
      set -- "$@" "data.cache_dir=$QWENVL_SCRATCH"
    else
      echo "warning: $(hostname): QWENVL_SCRATCH = $QWENVL_SCRATCH cannot be written; reading shards where they are" >&2
    fi
  fi
fi
if [ -n "$QWENVL_INTERFACE" ]; then export GLOO_SOCKET_IFNAME=$QWENVL_INTERFACE NCCL_SOCKET_IFNAME=$QWENVL_INTERFACE; fi
if [ "$QWENVL_DEVICE" = cpu ]; then export DS_ACCELERATOR=cpu; fi
export QWENVL_WORLD_SIZE=$((nodes * per_node))  # each rank makes sure that it is one of so many

trap "" USR1  # the scheduler's warning is for the ranks, which listen for it; their launcher would die of it
exec $QWENVL_PREFIX accelerate launch --config_file "launch/accelerate/${QWENVL_DEVICE}_zero${zero_stage}_multinode.yaml" \
  --deepspeed_config_file "$zero_file" --num_machines "$nodes" --num_processes "$QWENVL_WORLD_SIZE" \
  --machine_rank "$node_rank" --main_process_ip "$main_host" --main_process_port "$port" \
  --rdzv_conf "timeout=$timeout_seconds" -m qwenvl_dist "$@"  # so long the launchers wait for each other
