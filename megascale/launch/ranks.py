"""Finds this process's rank from the environment of torchrun, srun or an MPI launcher, without importing torch."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from megascale.errors import UsageError
from megascale.launch import rendezvous


def node_name() -> str:
    """The scheduler's name of this node, which its exclude option needs; else the host name."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


@dataclass(frozen=True)
class RankInfo:
    """Global rank of `size`, local rank, and the rendezvous address and port (None for a single process)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str | None = None
    port: int | None = None
    launcher: str = "alone"  # torchrun | srun | mpirun | mpi4py | alone

    @property
    def one_node(self) -> bool:
        return self.local_size == self.size

    @property
    def url(self) -> str:
        """torch's rendezvous URL. IPv6 addresses get brackets."""
        return f"tcp://[{self.address}]:{self.port}" if ":" in (self.address or "") else f"tcp://{self.address}:{self.port}"


class Variables(NamedTuple):
    """A launcher's environment variables for a process's rank."""

    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: str


TORCHRUN = Variables("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM = Variables("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
_OMPI, _MV2 = "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_"
OPENMPI = Variables("mpirun", _OMPI + "RANK", _OMPI + "SIZE", _OMPI + "LOCAL_RANK", _OMPI + "LOCAL_SIZE")
MVAPICH = Variables("mpirun", _MV2 + "RANK", _MV2 + "SIZE", _MV2 + "LOCAL_RANK", _MV2 + "LOCAL_SIZE")
# MPICH, Intel MPI and others that start processes through Hydra or another PMI server.
PMI = Variables("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")

MEETING = ("MASTER_ADDR", "MASTER_PORT")
MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "PMI_KVS")  # the same in all processes of one mpirun only
# Prefixes of variables that show that an MPI started the process, but not its rank.
MPI_TRACES = ("OMPI_", "PMI_", "PMIX_", "PMI2_", "MPI_", "MPIR_", "MPIEXEC_", "MV2_", "I_MPI_", "HYDRA_", "PALS_", "JSM_", "ALPS_", "PRTE_")
UNKNOWN = -1  # a local rank that only MPI itself knows


def find_ranks(
    environment: Mapping[str, str] | None = None, communicator: Callable[[], rendezvous.Communicator | None] | None = None
) -> RankInfo:
    """This process's rank, and a rendezvous address and port that all ranks agree on.

    communicator  opens mpi4py's world if the environment is insufficient; returns None without mpi4py

    Raises UsageError for an incomplete environment, naming what is missing, and for an impossible address or port.
    """
    env = os.environ if environment is None else environment
    world = rendezvous.mpi_world if communicator is None else communicator
    found = read_ranks(env)
    if found is None:
        # An MPI without its own rank variables still leaves traces; without any, mpi4py is not used, since starting MPI takes a second.
        traces = rendezvous.mpi_running() or any(name.startswith(MPI_TRACES) for name in env)
        mpi = world() if traces else None
        if mpi is None or mpi.size == 1:
            return RankInfo()
        found = _meet_through_mpi(RankInfo(mpi.rank, mpi.size, UNKNOWN, UNKNOWN, launcher="mpi4py"), env, mpi)
    elif found.size > 1 and found.launcher == "srun" and found.address is None:
        found = replace(found, address=rendezvous.slurm_head(env), port=rendezvous.slurm_port(env))
    elif found.size > 1 and (found.address is None or found.local_rank == UNKNOWN):
        found = _meet_through_mpi(found, env, world())
    if found.size > 1:
        _check_meeting(found, env)
    return found


def read_ranks(env: Mapping[str, str]) -> RankInfo | None:
    """Ranks from the environment alone: None without a launcher's variables; address and port None, and the local rank UNKNOWN, if they
    must still be found.

    Of nested launchers the inner one counts: torchrun under srun, and mpirun, whose daemons srun starts.
    """
    if any(name in env for name in TORCHRUN[1:4]):
        _require(env, (*TORCHRUN[1:4], *MEETING), "torchrun")
        size = _number(env, "WORLD_SIZE")
        return _info(env, TORCHRUN, (_number(env, "LOCAL_RANK"), _number(env, "LOCAL_WORLD_SIZE", size)))
    for names in (OPENMPI, MVAPICH, PMI):
        # srun --mpi=pmi2 sets PMI's rank and size as well as its own variables, which say more.
        if (names.rank in env or names.size in env) and not (names is PMI and _srun_says_the_same(env)):
            return _mpi(env, names)
    if "SLURM_STEP_ID" in env or SLURM.size in env:
        return _srun(env)
    if SLURM.rank in env and env.get("SLURM_NTASKS", "1") != "1":
        raise UsageError(
            f"SLURM_NTASKS is {env['SLURM_NTASKS']} but SLURM_STEP_NUM_TASKS is missing: this is a batch script itself, not one of its "
            "tasks; write srun in front of the command (srun --ntasks=1 for one process)"
        )
    return None


def _srun(env: Mapping[str, str]) -> RankInfo:
    """A SLURM task. The tasks per node are in a list over all nodes of the step: "4(x2),3"."""
    _require(env, SLURM[1:], "srun")
    counts, node = tasks_per_node(env[SLURM.local_size]), 0
    if len(counts) > 1:
        _require(env, (*SLURM[1:], "SLURM_NODEID"), "srun")
        node = _number(env, "SLURM_NODEID")
    if node >= len(counts):
        raise UsageError(f"SLURM_NODEID is {node} and {SLURM.local_size} is {env[SLURM.local_size]}, which has {len(counts)} nodes")
    return _info(env, SLURM, (_number(env, SLURM.local_rank), counts[node]))


def _srun_says_the_same(env: Mapping[str, str]) -> bool:
    return SLURM.size in env and (env.get(PMI.rank), env.get(PMI.size)) == (env.get(SLURM.rank), env[SLURM.size])


def _mpi(env: Mapping[str, str], names: Variables) -> RankInfo:
    """A process of an MPI launcher. PMI itself does not give the local rank; Hydra does, others leave it to mpi4py."""
    unknown = names is PMI and names.local_rank not in env and names.local_size not in env
    _require(env, names[1:3] if unknown else names[1:], names.launcher)
    return _info(env, names, (UNKNOWN, UNKNOWN) if unknown else (_number(env, names.local_rank), _number(env, names.local_size)))


def _info(env: Mapping[str, str], names: Variables, local: tuple[int, int]) -> RankInfo:
    rank, size = _number(env, names.rank), _number(env, names.size)
    if not 0 <= rank < size:
        raise UsageError(f"{names.rank} is {rank} and {names.size} is {size}: a rank must be from 0 to {size - 1}")
    if UNKNOWN not in local and not 0 <= local[0] < local[1] <= size:
        raise UsageError(
            f"{names.local_rank} is {local[0]} of {local[1]} ranks on this node, but {names.size} is {size}: this cannot be one job"
        )
    if size == 1 and names is not TORCHRUN:
        return RankInfo(launcher=names.launcher)
    if not any(name in env for name in MEETING):
        return RankInfo(rank, size, *local, launcher=names.launcher)
    _require(env, MEETING, names.launcher)
    return RankInfo(rank, size, *local, env["MASTER_ADDR"], _number(env, "MASTER_PORT"), names.launcher)


def _meet_through_mpi(found: RankInfo, env: Mapping[str, str], mpi: rendezvous.Communicator | None) -> RankInfo:
    """Rank 0 picks a routable address and a free port and broadcasts them. Without mpi4py ranks on one node still find each other."""
    if mpi is not None:
        if (mpi.rank, mpi.size) != (found.rank, found.size):
            raise UsageError(
                f"the environment says rank {found.rank} of {found.size} but mpi4py says {mpi.rank} of {mpi.size}: mpi4py belongs to "
                "another MPI than the launcher; install the launcher's, or start with launchers/mpirun.sh"
            )
        local_rank, local_size, address, port = mpi.meet(found.address, found.port)
        return replace(found, local_rank=local_rank, local_size=local_size, address=address, port=port)
    if found.local_rank == UNKNOWN:
        raise UsageError(
            f"{PMI.rank} is {found.rank} of {found.size}, but {PMI.local_rank} and {PMI.local_size} are missing: set them, or install "
            "mpi4py, which knows them"
        )
    job = next((env[name] for name in MPI_JOBS if name in env), None)
    if job is None or not found.one_node:
        raise UsageError(
            f"{found.size} ranks from {found.launcher}, but MASTER_ADDR and MASTER_PORT are missing: start with launchers/mpirun.sh, "
            "which sets them, or install mpi4py, through which rank 0 sends them"
        )
    return replace(found, address="127.0.0.1", port=rendezvous.port_of(job))


def _check_meeting(found: RankInfo, env: Mapping[str, str]) -> None:
    """Refuses what would otherwise end in a time-out: an address that other nodes cannot reach, a port that is in use."""
    assert found.address is not None and found.port is not None
    if not 0 < found.port < 65536:
        raise UsageError(f"MASTER_PORT is {found.port}: a port from 1 to 65535 is needed")
    # SLURM may run several nodes on one machine; then its own variables say so.
    if not found.one_node and rendezvous.is_loopback(found.address) and not rendezvous.slurm_is_local(env):
        raise UsageError(
            f"MASTER_ADDR is {found.address}, which means every node itself, but {found.size} ranks run on several nodes: set it to an "
            "address of rank 0's node that the others can reach"
        )
    # torchrun's agent already listens there for its workers.
    taken = found.rank == 0 and found.launcher != "torchrun" and not rendezvous.is_free(found.port)
    if taken and not rendezvous.is_own(found.port):
        raise UsageError(f"MASTER_PORT {found.port} is taken on {found.address} by another process: set MASTER_PORT to a free port")


def tasks_per_node(text: str) -> list[int]:
    """SLURM's "4(x2),3" → [4, 4, 3]."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", item.strip())
        if match is None:
            raise UsageError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}: a list such as 4(x2),3 is needed")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def slurm_node_of(rank: int, env: Mapping[str, str]) -> str | None:
    """The node of any rank of this SLURM step, whose ranks are numbered in blocks; None outside SLURM."""
    if "SLURM_STEP_NODELIST" not in env or "SLURM_STEP_TASKS_PER_NODE" not in env:
        return None
    by_rank = [
        node
        for node, tasks in zip(rendezvous.expand_nodes(env["SLURM_STEP_NODELIST"]), tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"]))
        for _ in range(tasks)
    ]
    return by_rank[rank] if rank < len(by_rank) else None


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in env and default is not None:
        return default
    try:
        return int(env[name])
    except KeyError:
        raise UsageError(f"{name} is missing in the environment, although the launcher's other variables are set") from None
    except ValueError:
        raise UsageError(f"{name} is {env[name]!r} in the environment, but a whole number is needed") from None


def _require(env: Mapping[str, str], names: tuple[str, ...], start: str) -> None:
    missing = [name for name in names if name not in env]
    if missing:
        given = [name for name in names if name in env] or ["a part"]
        raise UsageError(
            f"the environment of ranks is incomplete: {', '.join(given)} given, {', '.join(missing)} missing; start with {start}, or unset "
            "them to run one process"
        )
