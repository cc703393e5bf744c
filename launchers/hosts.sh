#!/usr/bin/env bash
# Several hosts without a scheduler: one torchrun on each, over ssh. The code, the environment and the data stand under the same paths on all.
#   HOSTS="a b c" launchers/hosts.sh CONFIG [section.key=value …]
# HOSTS     the hosts; the ranks meet on the first, so the others must reach it under this name
# NPROC     ranks on every host (default: its GPUs, or 2 on a machine without)
# PORT      where the ranks meet (default: taken from this process's number)
# SAVE_SECONDS  that the ranks have for a save when their torchrun is asked to end (default 600)
# RSH       how to reach a host, called as `$RSH HOST COMMAND` (default: ssh)
# Ctrl-C, SIGTERM and SIGUSR1 put a file STOP into the run's directory when RUN_DIR names it; otherwise they end the hosts' connections.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
: "${HOSTS:?the hosts are missing: HOSTS=\"a b c\" $0 CONFIG …}"
read -ra hosts <<<"$HOSTS"
read -ra rsh <<<"${RSH:-ssh}"
# Below the ports of outgoing connections; the same for all, since it is chosen once.
head=${hosts[0]}:${PORT:-$((20000 + $$ % 12000))}

pids=()
stop() { if [ -n "${RUN_DIR:-}" ]; then touch "$RUN_DIR/STOP"; else kill "${pids[@]}" 2>/dev/null || true; fi; }
trap stop INT TERM USR1
for i in "${!hosts[@]}"; do
  host=${hosts[i]}
  printf -v command '%q ' env HEAD="$head" NODES="${#hosts[@]}" NODE_RANK="$i" ${SAVE_SECONDS:+SAVE_SECONDS="$SAVE_SECONDS"} ${NPROC:+NPROC="$NPROC"} ${PYTHON:+PYTHON="$PYTHON"} "$root/launchers/torchrun.sh" "$@"
  "${rsh[@]}" "$host" "cd $(printf %q "$PWD") && $command" &
  pids+=($!)
done
# The first failure is everybody's: torchrun on the other hosts ends by itself when a peer is gone.
code=0
for pid in "${pids[@]}"; do
  one=0
  wait "$pid" || one=$?
  while kill -0 "$pid" 2>/dev/null; do one=0; wait "$pid" || one=$?; done
  [ "$code" -ne 0 ] || code=$one
done
exit "$code"
