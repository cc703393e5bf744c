#!/bin/bash
# start.sh DIR: a real SLURM with three virtual nodes on this host, for tests; its configuration is DIR/slurm.conf. Needs root.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
run=$1
mkdir -p "$run"/state "$run"/spool.n{1,2,3}
chmod 755 "$run"

# Four ports in a row, for slurmctld and the nodes.
first=$(python3 - <<'PY'
import socket
while True:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        first = probe.getsockname()[1]
    if first > 65000:
        continue
    held = []
    try:
        for port in range(first, first + 4):
            held.append(socket.socket())
            held[-1].bind(("", port))
        break
    except OSError:
        pass
    finally:
        for s in held:
            s.close()
print(first)
PY
)
sed -e "s#@RUN@#$run#g; s#@HOST@#$(hostname -s)#g; s#@CTLPORT@#$first#; s#@P1@#$((first + 1))#; s#@P3@#$((first + 3))#" \
  "$here/slurm.conf.in" > "$run/slurm.conf"

# munge with a key and a socket of its own: a munged of the system is neither needed nor disturbed.
(umask 077; head -c 1024 /dev/urandom > "$run/munge.key")
munged --force --key-file="$run/munge.key" --socket="$run/munge.socket" --pid-file="$run/munged.pid" \
  --log-file="$run/munged.log" --seed-file="$run/munged.seed" --num-threads=2
export SLURM_CONF=$run/slurm.conf
slurmctld -c
for node in n1 n2 n3; do slurmd -N "$node"; done
for _ in $(seq 60); do
  [ "$(sinfo -h -t idle -o %D 2>/dev/null | head -1)" = 3 ] && exit 0
  sleep 0.5
done
sinfo -R >&2 || true
tail -20 "$run"/*.log >&2
exit 1
