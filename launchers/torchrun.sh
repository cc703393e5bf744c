#!/usr/bin/env bash
# One node, or one of several: run this on every node with the same HEAD and NODES.
#   launchers/torchrun.sh CONFIG [section.key=value …]
# NPROC         ranks on this node (default: its GPUs, or 2 on a machine without)
# NODES         number of nodes (default 1)
# HEAD          host:port where the ranks meet, the same on all nodes (needed for several nodes)
# NODE_RANK     this node's number, 0 on HEAD's (default: in the order in which the nodes come)
# SAVE_SECONDS  that the ranks have for a save when torchrun is asked to end with SIGTERM (default 600; torchrun's own are 30)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$(test -x "$root/.venv/bin/python" && echo "$root/.venv/bin/python" || echo python3)}
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
nproc=${NPROC:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 2)}
# torchrun would set one thread per rank itself, with a warning; pretrain.py shares out the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-${SAVE_SECONDS:-600}}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$root/launchers/agent.py" "$nproc" "$root/pretrain.py" "$@"
