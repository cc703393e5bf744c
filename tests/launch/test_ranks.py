"""Every launcher's environment, whole and half set, and the places where ranks meet."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megascale.errors import UsageError
from megascale.launch import ranks, rendezvous
from megascale.launch.ranks import UNKNOWN, RankInfo, find_ranks, read_ranks, tasks_per_node
from megascale.train.device import Seat, default_threads, share_of_cores

MEET = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "23456"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **MEET}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "5",
    "PMIX_NAMESPACE": "prterun-a-77@1",
}
MVAPICH = {n.replace("OMPI_", "MV2_"): v for n, v in OPENMPI.items() if n.startswith("OMPI_")}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SLURM_BATCH = {
    "SLURM_JOB_ID": "812",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SLURM = {
    **SLURM_BATCH,
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
# mpirun inside a batch job starts one daemon a node through srun; its processes inherit the daemon's variables of a SLURM task.
DAEMON = {**SLURM, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
WHOLE = {
    "torchrun": (TORCHRUN, "torchrun"),
    "torchrun in srun": ({**DAEMON, **TORCHRUN}, "torchrun"),
    "openmpi": ({**OPENMPI, **MEET}, "mpirun"),
    "openmpi in a batch job": ({**DAEMON, **OPENMPI, **MEET}, "mpirun"),
    "mvapich": ({**MVAPICH, **MEET}, "mpirun"),
    "mpich": ({**HYDRA, **MEET}, "mpirun"),
    "mpich in a batch job": ({**DAEMON, **HYDRA, **MEET}, "mpirun"),
    "srun": ({**SLURM, **MEET}, "srun"),
    "srun with pmi2": ({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "8", **MEET}, "srun"),
}


class World:
    """Stands for mpi4py's world of 8 ranks on 2 nodes."""

    def __init__(self, rank: int = 5, size: int = 8) -> None:
        self.rank, self.size = rank, size

    def meet(self, address: str | None, port: int | None) -> tuple[int, int, str, int]:
        return 1, 4, address or "10.0.0.9", port or 21000


@pytest.mark.parametrize("name", WHOLE)
def test_every_launcher_is_found(name: str) -> None:
    """Catches ranks read from the wrong launcher where one runs inside another."""
    env, launcher = WHOLE[name]
    assert find_ranks(env, lambda: None) == RankInfo(5, 8, 1, 4, "10.0.0.1", 23456, launcher)


HALF = [
    *((TORCHRUN, n) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")),
    *((OPENMPI, n) for n in OPENMPI if n.startswith("OMPI")),
    *((MVAPICH, n) for n in MVAPICH),
    *((HYDRA, n) for n in HYDRA),
    *((SLURM, n) for n in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")),
    *(({**e, **MEET}, n) for e in (OPENMPI, HYDRA, SLURM) for n in MEET),
]


@pytest.mark.parametrize(("env", "missing"), HALF)
def test_half_set_environments_name_what_is_missing(env: dict[str, str], missing: str) -> None:
    """Catches a process that believes to be alone, or to be rank 0, because one variable got lost."""
    with pytest.raises(UsageError, match=rf"{missing}\b.* missing"):
        find_ranks({n: v for n, v in env.items() if n != missing}, lambda: None)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({**TORCHRUN, "RANK": "8"}, "RANK is 8 and WORLD_SIZE is 8: a rank must be from 0 to 7"),
        ({**TORCHRUN, "RANK": "two"}, "RANK is 'two'"),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_RANK": "4"}, "OMPI_COMM_WORLD_LOCAL_RANK is 4 of 4 ranks on this node"),
        ({**SLURM, "SLURM_NODEID": "2"}, "SLURM_NODEID is 2 .* which has 2 nodes"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4*2"}, "SLURM_STEP_TASKS_PER_NODE is '4\\*2': a list"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT is 99999"),
        ({**TORCHRUN, "MASTER_ADDR": "127.0.1.1"}, "MASTER_ADDR is 127.0.1.1, which means every node itself"),
        ({**OPENMPI, **MEET, "MASTER_ADDR": "localhost"}, "MASTER_ADDR is localhost"),
        ({**SLURM, "SLURM_STEP_NODELIST": "no-such-node-7"}, "no-such-node-7, a name that does not resolve"),
        (SLURM_BATCH, "SLURM_NTASKS is 8 .* write srun in front"),
        (OPENMPI, "MASTER_ADDR and MASTER_PORT are missing"),
        ({"PMI_RANK": "5", "PMI_SIZE": "8"}, "MPI_LOCALRANKID and MPI_LOCALNRANKS are missing"),
    ],
)
def test_what_cannot_be_is_refused(env: dict[str, str], words: str) -> None:
    """Catches contradictions that would only show as a time-out, ten minutes later."""
    with pytest.raises(UsageError, match=words):
        find_ranks(env, lambda: None)


def test_alone() -> None:
    """Catches a laptop that is taken for a cluster: stray variables, a batch script with one task, an MPI without company."""
    assert find_ranks({}, lambda: pytest.fail("MPI was started for nothing")) == RankInfo()
    assert find_ranks(MEET, lambda: None) == RankInfo()
    assert find_ranks({**SLURM_BATCH, "SLURM_NTASKS": "1"}, lambda: None) == RankInfo()
    assert find_ranks({"OMPI_MCA_btl": "self"}, lambda: World(0, 1)) == RankInfo()  # type: ignore[arg-type,return-value]
    one = {**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_LOCALID": "0"}
    assert find_ranks(one, lambda: None) == RankInfo(launcher="srun")


def test_mpi_fills_in() -> None:
    """Catches a launcher that leaves out the meeting place, or all of it, where mpi4py could tell."""
    for env, launcher in ((OPENMPI, "mpirun"), ({"PMI_RANK": "5", "PMI_SIZE": "8"}, "mpirun"), ({"PMIX_RANK": "5"}, "mpi4py")):
        assert find_ranks(env, World) == RankInfo(5, 8, 1, 4, "10.0.0.9", 21000, launcher)  # type: ignore[arg-type]
    kept = find_ranks({"PMI_RANK": "5", "PMI_SIZE": "8", **MEET}, World)  # type: ignore[arg-type]
    assert (kept.local_rank, kept.address, kept.port) == (1, "10.0.0.1", 23456)
    with pytest.raises(UsageError, match="says rank 5 of 8 but mpi4py says 0 of 1"):
        find_ranks(OPENMPI, lambda: World(0, 1))  # type: ignore[arg-type,return-value]


def test_one_node_needs_no_mpi4py() -> None:
    """Catches ranks of one mpirun that compute different ports, and two mpiruns that compute the same."""
    places = set()
    for job in ("prterun-a-77@1", "prterun-a-78@1"):
        found = []
        for rank in ("1", "7"):
            env = {n: {"RANK": rank, "SIZE": "8"}[n.rsplit("_", 1)[-1]] for n in OPENMPI if n.startswith("OMPI")}
            found.append(find_ranks({**env, "PMIX_NAMESPACE": job}, lambda: None))
        assert found[0].address == found[1].address == "127.0.0.1" and found[0].port == found[1].port
        places.add(found[0].port)
    assert len(places) == 2


def test_a_slurm_step_agrees_without_talking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tasks that look for the head node under different names or ports, and steps of one job that collide."""
    monkeypatch.setattr(rendezvous, "node_address", lambda name: {"gpu07": "127.0.0.1"}.get(name))
    one, other = find_ranks({**SLURM, "SLURMD_NODENAME": "gpu07"}), find_ranks({**SLURM, "SLURM_PROCID": "4", "SLURMD_NODENAME": "gpu07"})
    assert one.address == other.address == "127.0.0.1" and one.port == other.port
    assert one.port is not None and 20000 <= one.port < 32000, "outside the ports of outgoing connections"
    assert find_ranks({**SLURM, "SLURM_STEP_ID": "1", "SLURMD_NODENAME": "gpu07"}).port != one.port
    assert find_ranks({**SLURM, "SLURM_JOB_ID": "813", "SLURMD_NODENAME": "gpu07"}).port != one.port


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank 0 that dies in a traceback, or waits, because another job listens on its port."""
    monkeypatch.setattr(rendezvous, "is_own", lambda port: False)  # a socket of this process stands for another one's
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        env = {**OPENMPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": port}
        with pytest.raises(UsageError, match=f"MASTER_PORT {port} is taken"):
            find_ranks(env)
    start = rendezvous.port_of("job")
    with socket.socket() as other:
        if not rendezvous.is_free(start):
            pytest.skip(f"port {start} is taken on this machine")
        other.bind(("", start))
        other.listen()
        assert rendezvous.free_port("job") != start
    assert rendezvous.free_port("job") == start


def test_addresses() -> None:
    """Catches an address that only its own machine understands."""
    for address in ("127.0.0.1", "127.0.1.1", "::1", "localhost", "0.0.0.0"):
        assert rendezvous.is_loopback(address)
    assert not rendezvous.is_loopback("10.0.0.1") and not rendezvous.is_loopback("node-1")
    assert rendezvous.interface_towards("127.0.0.1") == rendezvous.own_addresses()["127.0.0.1"]
    assert rendezvous.address_towards("no-such-name.invalid") is None
    assert RankInfo(0, 2, address="fd00::2", port=20000).url == "tcp://[fd00::2]:20000"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-3]", "n1"),
        ("gpu[07-09,11],login1", "gpu07"),
        ("a,b[1-2]", "a"),
        ("r[2,4]n[08-09]", "r2n08"),
        ("x[5]-ib", "x5-ib"),
    ],
)
def test_first_node(nodes: str, first: str) -> None:
    """Catches lost leading zeros and names cut at a comma inside brackets."""
    assert rendezvous.first_node(nodes) == first


def test_tasks_per_node() -> None:
    """Catches unequal nodes counted as equal."""
    assert tasks_per_node("4(x2),3,1(x2)") == [4, 4, 3, 1, 1]


def test_reading_is_pure() -> None:
    """Catches a read of the environment that asks the network, SLURM or MPI: those answer differently the second time."""
    assert read_ranks(SLURM) == RankInfo(5, 8, 1, 4, None, None, "srun")
    assert read_ranks({"PMI_RANK": "5", "PMI_SIZE": "8"}) == RankInfo(5, 8, UNKNOWN, UNKNOWN, None, None, "mpirun")
    assert read_ranks({}) is None


def test_launching_imports_no_torch() -> None:
    """Catches a second of start-up, and a login node without torch, for a script that only prints."""
    modules = f"{ranks.__name__}, {rendezvous.__name__}, megascale.launch.exits"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_threads_of_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a process alone that takes all cores where the user said fewer, and ranks left at the one thread of a launcher's default."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("megascale.limits.GROUPS", tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert default_threads(RankInfo()) == 8 and default_threads(RankInfo(launcher="srun")) == 6
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads(RankInfo()) == 3 and default_threads(RankInfo(launcher="torchrun")) == 8


def test_ranks_share_the_cores_that_they_have_in_common() -> None:
    """Catches one thread for a rank that is bound to eight cores of its own, and ranks that all take the cores they share."""
    whole, other = Seat("n1", 2**16 - 1), Seat("n2", 2**16 - 1)
    assert share_of_cores(whole, [whole] * 4 + [other] * 8, None, None) == 4
    bound = [Seat("n1", 0xFF << 8 * rank) for rank in range(8)]
    assert {share_of_cores(seat, bound, None, None) for seat in bound} == {8}
    assert share_of_cores(bound[0], bound, 4, None) == 4 and share_of_cores(bound[0], bound, 64, None) == 8
    assert share_of_cores(whole, [whole] * 4, 8, None) == 8  # SLURM gave each 8 and bound none
    assert share_of_cores(whole, [whole] * 4, None, 6) == 1 and share_of_cores(whole, [whole], None, 6) == 6
    assert share_of_cores(Seat("n1", 1), [Seat("n1", 1)] * 4, None, None) == 1
