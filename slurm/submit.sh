#!/usr/bin/env bash
# Submit prepare -> (encode ->) train -> merge -> evaluate, each after the one before has ended well, and print the chain.
#   bash slurm/submit.sh [options] RECIPE [key.path=value ...]
# What the recipe does not say comes from options:
#   --captions FILE --images DIR                        pack data.train from these first
#   --validation-captions FILE --validation-images DIR  and data.validation
#   --source coco|csv|...   their form (coco)           --samples-per-shard N (1000)
#   --parts N               array tasks of packing (4)  --nodes N   of training and encoding (1)
#   --gpus N                of each node (8)            --encode DIR   train on vision features, kept there
#   --merged DIR            (RUN/merged)                --limit N   samples to evaluate (all)
# data.train must be there already without --captions; without data.validation nothing is evaluated.
set -euo pipefail
cd "$(dirname "$0")/.."
source "${QWENVL_SITE:-slurm/site.env}"
stop() { echo "error: $*" >&2; exit 2; }

source=coco parts=4 nodes=1 gpus=8 per_shard=1000
captions="" images="" validation_captions="" validation_images="" encode="" merged="" limit=""
while [[ ${1:-} == --* ]]; do
  case $1 in
    --captions | --images | --validation-captions | --validation-images | --source | --parts | --nodes | --gpus | --encode | --merged | --limit)
      name=${1#--} && declare "${name//-/_}=${2:?$1 needs a value}" ;;
    --samples-per-shard) per_shard=${2:?$1 needs a value} ;;
    *) stop "$1: no such option; the head of slurm/submit.sh lists them" ;;
  esac
  shift 2
done
[ $# -gt 0 ] || stop "name a recipe; the head of slurm/submit.sh tells more"
layout=$($QWENVL_PREFIX qwenvl-dist job layout "$@")
eval "$layout"  # run, base, train_shards, validation_shards, image_size, resize, dtype
merged=${merged:-$run/merged}

after=""  # the job that the next one waits for
submit() {  # LABEL, options and script of sbatch
  local label=$1 wait_for=${after:+--dependency=afterok:$after}
  shift
  job=$(sbatch --parsable --kill-on-invalid-dep=yes $wait_for $QWENVL_SBATCH_OPTIONS "$@")
  printf '%-9s job %s%s: %s\n' "${label%% *}" "$job" "${after:+ after ${after//:/, }}" "${label#* }"
  after=$job
}
pack() {  # SHARDS CAPTIONS IMAGES
  local input=(--source "$source" --captions "$2" --images "$3" --out "$1" --samples-per-shard "$per_shard")
  submit "prepare $1, $parts parts" $QWENVL_CPU_OPTIONS --array="0-$((parts - 1))" slurm/prepare.sbatch "${input[@]}"
  submit "prepare $1, manifest" $QWENVL_CPU_OPTIONS slurm/prepare.sbatch "${input[@]}"
}

[ -n "$train_shards" ] || [ -z "$captions$encode" ] ||
  stop "--captions and --encode: the recipe has data.mixture; pack or encode its sets by themselves"
[ -z "$validation_captions" ] || [ -n "$validation_shards" ] || stop "--validation-captions: the recipe has no data.validation"
packed=""
if [ -n "$validation_captions" ]; then
  pack "$validation_shards" "$validation_captions" "$validation_images"
  packed=$after after=""  # beside the other set
fi
if [ -n "$captions" ]; then pack "$train_shards" "$captions" "$images"; fi
after=${after:-$packed}${after:+${packed:+:$packed}}
if [ -n "$encode" ]; then
  submit "encode $encode" $QWENVL_GPU_OPTIONS --nodes="$nodes" --gpus-per-node="$gpus" slurm/encode.sbatch \
    "$train_shards" --base "$base" --out "$encode" --image-size "$image_size" --resize "$resize" --dtype "$dtype"
  set -- "$@" "data.train=$encode"
fi
submit "train $run" $QWENVL_GPU_OPTIONS --nodes="$nodes" --gpus-per-node="$gpus" slurm/train.sbatch "$@"
submit "merge $merged" $QWENVL_CPU_OPTIONS slurm/merge.sbatch "$run" --base "$base" --out "$merged" --verify
if [ -n "$validation_shards" ]; then
  submit "evaluate $run/evaluation" $QWENVL_GPU_OPTIONS slurm/evaluate.sbatch \
    "$merged" --shards "$validation_shards" --out "$run/evaluation" ${limit:+--limit "$limit"}
fi
