#!/bin/bash
# stop.sh DIR: ends the cluster that start.sh started in DIR, and its jobs.
run=$1
export SLURM_CONF=$run/slurm.conf
scancel --user="$(id -un)" 2>/dev/null
sleep 1
for file in "$run"/slurmd.*.pid "$run"/slurmctld.pid "$run"/munged.pid; do
  [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null
done
exit 0
