#!/usr/bin/env bash
# Pretrain on the GPUs of this machine.
#
#   bash examples/single_node.sh GPUS CONFIG [--set key=value]...
#   bash examples/single_node.sh 8 configs/6B.json --set data.paths=data/web_text_document
#
# GPUS must be a multiple of parallel.tensor x parallel.pipeline x parallel.context of the config; the quotient is the
# data-parallel size. `--print-config` after CONFIG prints what would run. On a machine without GPUs, the ranks run on the
# CPU cores. CONFIG and the paths in it are relative to the folder that you call the script from.
#
# The ranks connect to each other at a free port; to choose it, set the environment variable MASTER_PORT.
set -euo pipefail

if (($# < 2)); then
  echo "usage: bash examples/single_node.sh GPUS CONFIG [--set key=value]..." >&2
  exit 2
fi
gpus=$1 config=$2
shift 2

# If `make setup` has created .venv, its commands are used.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$root/.venv/bin:$PATH"
# Each rank has its own thread pool; without a limit, each one would use all cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
free_port='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
port=${MASTER_PORT:-$(python3 -c "$free_port")}

exec deepspeed --num_gpus "$gpus" --master_port "$port" --log_level error \
  "$root/pretrain_gpt.py" --config "$config" "$@"
