#!/usr/bin/env bash
# One node, or one of several: run this on every node with the same HEAD and NODES.
#   launchers/torchrun.sh CONFIG [section.key=value …]
# NPROC     ranks on this node (default: its GPUs, or 2 on a machine without)
# NODES     number of nodes (default 1)
# HEAD      host:port where the ranks meet, the same on all nodes (needed for several nodes)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$(test -x "$root/.venv/bin/python" && echo "$root/.venv/bin/python" || echo python3)}
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
nproc=${NPROC:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 2)}
nodes=${NODES:-1}
if [ "$nodes" -gt 1 ]; then
  : "${HEAD:?several nodes need HEAD=host:port, the same on all of them}"
  # torchrun would tell the others this host's own name, which they may not resolve, or resolve to themselves; and it would guess from that
  # name whether the ranks meet here.
  read -r here is_head < <(PYTHONPATH=$root "$python" -c 'import sys; from megascale.launch.rendezvous import towards; print(*towards(sys.argv[1]))' "${HEAD%:*}")
  if [ -z "${is_head:-}" ]; then
    echo "error: this node finds no way to ${HEAD%:*}: give HEAD the address of the first node under which the others reach it" >&2
    exit 2
  fi
  where=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id megascale --rdzv-conf "is_host=$is_head" --local-addr "$here")
else
  where=(--standalone)
fi
# torchrun would set one thread per rank itself, with a warning; pretrain.py shares out the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$nproc" "$root/pretrain.py" "$@"
