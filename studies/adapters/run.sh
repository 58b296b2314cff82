#!/bin/sh
# Usage: run.sh BIN STACKS, the programs of the development environment and the folder of the stacks' environments.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/../..:$here:$here/stubs" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 WANDB_MODE=disabled
work=$(cd "$2" && pwd)/work
rm -rf "$work"
"$1/python" "$here/made.py" "$work"
trap 'cat "$work/results.txt"' EXIT
"$1/python" "$here/install.py" "$2" >"$work/results.txt"
for stack in llamafactory axolotl swift; do
	for type in double single; do
		"$2/$stack/bin/python" "$here/${stack}_run.py" "$work" $type >"$work/$stack-$type.log" 2>&1
	done
	"$2/$stack/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 "$here/${stack}_run.py" "$work" double \
		>"$work/$stack-2.log" 2>&1
done
"$2/llamafactory/bin/python" "$here/llamafactory_run.py" "$work" single packed >"$work/llamafactory-packed.log" 2>&1
for type in double single; do
	"$2/unsloth/bin/python" "$here/unsloth_run.py" "$work" $type >"$work/unsloth-$type.log" 2>&1
done
"$2/verl/bin/python" "$here/verl_check.py" >>"$work/results.txt"
"$1/python" "$here/compare.py" "$work" >>"$work/results.txt"
cp "$work/results.txt" "$here/../../docs/guide/adapters/results.txt"
