#!/usr/bin/env bash
# Several nodes without Slurm, from the repository's root, on storage that all share. By hand, the same line on each host:
#   bash launch/multi_node.sh --hosts node1,node2 train RECIPE [key.path=value ...]
# or one line on any host that reaches them by ssh without a password:
#   bash launch/multi_node.sh --hosts node1,node2 --ssh train RECIPE [key.path=value ...]
# The same with `preflight RECIPE --option=value` in place of `train RECIPE` looks at all hosts first.
# --port N (29500) on the first host; --this NAME where `hostname -s` is not the name in the list. slurm/site.env is read too.
set -euo pipefail
cd "$(dirname "$0")/.."
source "${QWENVL_SITE:-slurm/site.env}"
stop() { echo "error: $*" >&2; exit 2; }

hosts=() port=29500 this=$(hostname -s) by_ssh=""
while [[ ${1:-} == --* ]]; do
  case $1 in
    --hosts) IFS=, read -ra hosts <<<"${2:?--hosts needs a list}" && shift 2 ;;
    --port) port=${2:?--port needs a number} && shift 2 ;;
    --this) this=${2:?--this needs a name} && shift 2 ;;
    --ssh) by_ssh=yes && shift ;;
    *) stop "$1: no such option; the head of launch/multi_node.sh lists them" ;;
  esac
done
[ ${#hosts[@]} -gt 0 ] || stop "--hosts node1,node2 is missing: the first one is the host of rank 0"
[ $# -gt 1 ] || stop "say what to run: train RECIPE, or preflight RECIPE"

if [ -z "$by_ssh" ]; then
  for rank in "${!hosts[@]}"; do
    if [ "${hosts[rank]}" = "$this" ]; then exec bash launch/node.sh "$rank" ${#hosts[@]} "${hosts[0]}" "$port" "$@"; fi
  done
  stop "--hosts ${hosts[*]}: $this, this host, is not among them; add --this NAME if it has another name there"
fi

# Every far side lives as long as its input is open: it ends with this script, however that ends.
exec 3< <(exec sleep infinity)
open=$! timer=""
trap 'kill $open $timer 2>/dev/null' EXIT
trap 'exit 1' INT TERM
variables=()
for name in "${!QWENVL_@}"; do variables+=("$name=${!name}"); done
for host in "${hosts[@]}"; do
  command=$(printf '%q ' env "${variables[@]}" bash launch/multi_node.sh --hosts "$(IFS=,; echo "${hosts[*]}")" \
    --port "$port" --this "$host" "$@")
  far="exec 4<&0; cd $(printf %q "$PWD") && { $command </dev/null & ranks=\$!; } && "
  far+="{ { cat <&4; kill \$ranks; } >/dev/null 2>&1 & } && wait \$ranks"
  $QWENVL_SSH "$host" "bash -c $(printf %q "$far")" <&3 2>&1 | sed -u "s/^/$host: /" &
done
code=0
wait -n || code=1
{ sleep "$QWENVL_LEAVE_SECONDS" && kill "$open"; } 2>/dev/null &  # one host has ended, the others get so long
timer=$! && disown
for _ in "${hosts[@]:1}"; do wait -n || code=1; done
exit $code
