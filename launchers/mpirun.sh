#!/usr/bin/env bash
# Ranks started by MPI's own launcher, Open MPI's or MPICH's, whichever mpirun is.
#   launchers/mpirun.sh CONFIG [section.key=value …]
# NPROC     ranks on every host (default: this one's GPUs, or 2 on a machine without)
# HOSTS     the hosts, "a b c"; rank 0 is on the first (default: this one)
# MPIRUN    the launcher (default: mpirun)
# Needs no mpi4py: the address and the port where the ranks meet are settled here.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$(test -x "$root/.venv/bin/python" && echo "$root/.venv/bin/python" || echo python3)}
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
nproc=${NPROC:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 2)}
[[ $nproc =~ ^[0-9]{1,6}$ && $nproc -gt 0 ]] || { echo "error: NPROC is $nproc: a whole number from 1 on is needed" >&2; exit 2; }
read -ra hosts <<<"${HOSTS:-}"
mpirun=${MPIRUN:-mpirun}
command -v "$mpirun" >/dev/null || { echo "error: there is no $mpirun on the PATH: load an MPI module, or set MPIRUN" >&2; exit 2; }

count=$((nproc * (${#hosts[@]} > 0 ? ${#hosts[@]} : 1)))
MASTER_ADDR=${MASTER_ADDR:-${hosts[0]:-127.0.0.1}}
MASTER_PORT=${MASTER_PORT:-$(PYTHONPATH=$root "$python" -c 'from megascale.launch.rendezvous import free_port; print(free_port("'$$'"))')}
export MASTER_ADDR MASTER_PORT
if "$mpirun" --version 2>&1 | grep -qi 'open *mpi\|openrte\|prte'; then
  where=()
  for host in ${hosts[@]+"${hosts[@]}"}; do where+=("$host:$nproc"); done
  list=$(IFS=,; echo "${where[*]:-}")
  # Not bound to one core each: pretrain.py shares out the cores itself.
  command=("$mpirun" -n "$count" ${list:+--host "$list"} --bind-to none --oversubscribe -x MASTER_ADDR -x MASTER_PORT)
else
  list=$(IFS=,; echo "${hosts[*]:-}")
  command=("$mpirun" -n "$count" -ppn "$nproc" ${list:+-hosts "$list"} -genv MASTER_ADDR "$MASTER_ADDR" -genv MASTER_PORT "$MASTER_PORT")
fi

# MPI kills its ranks a moment after a SIGTERM or an interrupt, and passes USR1 on, which asks them to save. A second one is MPI's.
asked=""
ask() { if [ -z "$asked" ]; then asked=yes; kill -USR1 "$pid"; else kill -TERM "$pid"; fi 2>/dev/null || true; }
trap ask INT TERM USR1
"${command[@]}" "$python" "$root/pretrain.py" "$@" &
pid=$!
code=0
wait "$pid" || code=$?
while kill -0 "$pid" 2>/dev/null; do code=0; wait "$pid" || code=$?; done
exit "$code"
