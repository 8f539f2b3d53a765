#!/usr/bin/env bash
# The main job in a few minutes, without GPU and network: generated pictures -> shards -> LoRA on two processes under ZeRO-2
# -> merge -> captions before and after. Results land in build/demo/.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
work=build/demo
rm -rf "$work"
say() { printf '\n== %s\n' "$*" >&2; }

say "1/5 draw captioned pictures and pack them into WebDataset shards"
qwenvl-dist synthetic scenes --out "$work/scenes" --count 2000 --validation-count 100 --seed 7 --style plain
for split in train validation; do
  qwenvl-dist shards pack --source coco --captions "$work/scenes/$split/captions.json" \
    --images "$work/scenes/$split/images" --out "$work/shards/$split" --samples-per-shard 250 --workers 2
  qwenvl-dist shards verify "$work/shards/$split"
done

say "2/5 train LoRA on two processes, DeepSpeed ZeRO-2"
accelerate launch --config_file launch/accelerate/cpu_zero2.yaml -m qwenvl_dist train launch/recipes/demo.yaml

say "3/5 merge the best checkpoint into the base, and prove it"
qwenvl-dist merge "$work/run" --base launch/demo_base --out "$work/merged" --adapter-out "$work/adapter" --verify

say "4/5 describe pictures that training never saw, before and after"
qwenvl-dist evaluate launch/demo_base --adapter "$work/adapter" --shards "$work/shards/validation" \
  --out "$work/evaluation" --max-new-tokens 24 --json | tail -n 1 >"$work/evaluation.json"

qwenvl-dist report "$work/run" --out "$work/report.html"

say "5/5 did it learn?"
python - "$work" <<'PY'
import json, sys
from pathlib import Path

work = Path(sys.argv[1])
numbers = json.loads((work / "evaluation.json").read_text())
before, after = numbers["exact_match_before"], numbers["exact_match"]
print(f"captions equal to the reference: {before:.0%} before, {after:.0%} after, of {numbers['n']} unseen pictures")
print(f"side by side, with pictures: {work}/evaluation/comparison.html   merged model: {work}/merged")
print(f"the run, with curves: {work}/report.html")
if after < before + 0.5:
    sys.exit("demo failed: the captions did not clearly improve")
PY
