#!/bin/bash
# Debian's SLURM, as root; its packages start no daemon by themselves.
set -e
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
