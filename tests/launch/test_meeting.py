"""The rendezvous and its exposure: loopback on one node, and no unpickling on several."""

from __future__ import annotations

import base64
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from megascale.comm import agent, group
from megascale.comm.group import interface_mistake, open_store, stays_inside
from megascale.errors import UsageError
from megascale.launch.ranks import RankInfo, find_ranks
from megascale.launch.rendezvous import free_port, is_loopback, own_addresses

ROOT = Path(__file__).resolve().parents[2]
OWN = next((a for a in own_addresses() if "." in a and not is_loopback(a)), None)


def listening(process: psutil.Process, port: int) -> set[str]:
    return {c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN and c.laddr.port == port}


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_a_second_run_does_not_hear_the_first(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a program that trains twice: the store still holds that the first run stops, and where, so that the ranks of the second one
    leave at different steps and hang, or its port is refused as another process's while the program still holds the first run.
    """
    port = free_port(f"twice {os.getpid()}")
    agents = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False) if launcher == "torchrun" else None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    ranks = [RankInfo(rank, 2, rank, 2, "127.0.0.1", port, launcher) for rank in range(2)]
    first = [open_store(r, 10.0) for r in ranks]
    first[0].set("stop", "0")
    assert first[1].get("stop") == b"0"  # waits: a store does not confirm what it was given
    for variable, value in (("SIZE", "2"), ("RANK", "0"), ("LOCAL_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{variable}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    assert find_ranks().port == port
    second = [open_store(r, 10.0) for r in ranks]
    assert not second[0].check(["stop"]) and not second[1].check(["stop"])
    second[1].set("stop", "1")
    assert second[0].get("stop") == b"1" and first[0].get("stop") == b"0"
    del agents


def test_the_store_of_one_node_is_not_shown_to_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a store on every interface, whose verdicts and lists any stranger may write, where all ranks stand on one machine."""
    port = free_port(f"test {os.getpid()}")
    # An address for documentation: who goes there finds nobody.
    ranks = [RankInfo(rank, 2, rank, 2, "192.0.2.99", port, "srun") for rank in range(2)]
    first = open_store(ranks[0], 10.0)
    assert listening(psutil.Process(), port) == {"127.0.0.1"}
    first.set("key", "value")
    assert open_store(ranks[1], 10.0).get("key") == b"value"
    monkeypatch.setattr(group, "is_own", lambda port: False)  # a socket of this process stands for another one's
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = RankInfo(0, 2, 0, 2, "127.0.0.1", other.getsockname()[1], "srun")
        with pytest.raises(UsageError, match=r"MASTER_PORT \d+ cannot be used"):
            open_store(taken, 10.0)


@pytest.mark.parametrize(
    ("value", "wrong"),
    [(None, False), ("", False), ("eth0", False), ("eth0,lo", False), ("ib0", True), ("^lo", True), ("eth", True), ("eth0,ib0", True)],
)
def test_interfaces_that_gloo_cannot_use(value: str | None, wrong: bool) -> None:
    """Catches a name for NCCL, or of another node, that is "a peer is gone" at each of endless starts."""
    found = interface_mistake({} if value is None else {"GLOO_SOCKET_IFNAME": value}, ["lo", "eth0", "lo"])
    assert (found is not None) == wrong and (found is None or (repr(value) in found and "eth0, lo" in found))


@pytest.mark.parametrize(
    ("ranks", "env", "expected"),
    [
        (RankInfo(0, 2, 0, 2, "10.0.0.1", 2000, "srun"), {}, True),
        (RankInfo(0, 2, 0, 1, "10.0.0.1", 2000, "srun"), {}, False),
        (RankInfo(0, 2, 0, 1, "127.0.0.1", 2000, "srun"), {}, True),  # SLURM's nodes on one machine
        (RankInfo(0, 2, 0, 2, "10.0.0.1", 2000, "torchrun"), {"LOCAL_WORLD_SIZE": "2"}, True),
        (RankInfo(0, 2, 0, 2, "10.0.0.1", 2000, "torchrun"), {}, False),
    ],
)
def test_who_stays_inside(ranks: RankInfo, env: dict[str, str], expected: bool) -> None:
    """Catches ranks of several nodes that look for each other on their own loopback, above all where nobody told how many a node has."""
    assert stays_inside(ranks, env) is expected


@pytest.mark.parametrize(
    ("ranks", "env", "words"),
    [
        ("x", {}, "NPROC is 'x'"),
        ("0", {}, "NPROC is '0'"),
        ("a[$(touch PWNED)]", {}, "NPROC is"),
        ("1", {"NODES": "two"}, "NODES is 'two'"),
        ("1", {"NODES": "2"}, "several nodes need HEAD=host:port"),
        ("1", {"NODES": "2", "HEAD": "host"}, "several nodes need HEAD=host:port"),
        ("1", {"NODES": "2", "HEAD": "host:99999"}, "several nodes need HEAD=host:port"),
        ("1", {"NODES": "2", "HEAD": "10.0.0.1:2000", "NODE_RANK": "2"}, "NODE_RANK is 2 but NODES is 2"),
        ("1", {"NODES": "2", "HEAD": "127.0.0.1:2000"}, "HEAD is 127.0.0.1, which means every node itself"),
        ("1", {"NODES": "2", "HEAD": "no-such-name.invalid:2000"}, "finds no way to no-such-name.invalid"),
    ],
)
def test_agents_that_cannot_meet(capsys: pytest.CaptureFixture[str], ranks: str, env: dict[str, str], words: str) -> None:
    """Catches ten minutes of waiting, or a traceback, for what is wrong from the beginning."""
    assert agent.main([ranks, "pretrain.py"], env) == 2
    assert words in capsys.readouterr().err


def test_heads() -> None:
    """Catches an IPv6 address cut at the wrong colon."""
    assert agent.read_head("node-1:29500") == ("node-1", 29500)
    assert agent.read_head("[fd00::2]:29500") == ("fd00::2", 29500)


def script(folder: Path, text: str) -> Path:
    (folder / "script.py").write_text(text)
    return folder / "script.py"


def environment(**more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("NODES", "HEAD", "NODE_RANK")}
    return {**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **more}


@pytest.mark.dist
def test_an_agent_of_one_node(tmp_path: Path) -> None:
    """Catches an agent whose store the network reaches, one that gives its ranks 30 s for a save, and a run's code that becomes 1."""
    seen = script(
        tmp_path,
        "import os, sys, psutil\n"
        "open = psutil.Process(os.getppid()).net_connections()\n"
        "print({c.laddr.ip for c in open if c.status == 'LISTEN'}, os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'], sys.argv[1:])\n"
        "sys.exit(75)\n",
    )
    # torchrun.sh as it is, with a script in the place of pretrain.py
    (tmp_path / "launchers").mkdir()
    for name in ("torchrun.sh", "agent.py"):
        (tmp_path / "launchers" / name).write_bytes((ROOT / "launchers" / name).read_bytes())
    (tmp_path / "pretrain.py").symlink_to(seen)
    command = ["bash", tmp_path / "launchers" / "torchrun.sh", "a b", "x=$(y)"]
    done = subprocess.run(
        command, env=environment(PYTHONPATH=str(ROOT), NPROC="1"), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 75, done.stderr
    assert done.stdout.strip() == "{'127.0.0.1'} 600 ['a b', 'x=$(y)']"


@pytest.mark.dist
@pytest.mark.parametrize(("asked", "handled", "code"), [("SIGTERM", True, 75), ("SIGHUP", True, 75), ("SIGTERM", False, 143)])
def test_an_agent_that_is_asked_to_end(tmp_path: Path, asked: str, handled: bool, code: int) -> None:
    """Catches 143 after a whole checkpoint, which scripts take for a run that was killed."""
    handle = f"signal.signal(signal.{asked}, lambda *_: sys.exit(75))" if handled else ""
    stays = script(tmp_path, f"import signal, sys, time\n{handle}\nprint('ready', flush=True)\ntime.sleep(100)\n")
    command = [sys.executable, str(ROOT / "launchers" / "agent.py"), "2", str(stays)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            assert sorted(process.stdout.read(len("ready\n") * 2)) == sorted("ready\n" * 2)
            time.sleep(1)  # the agent that has started them has yet to note who they are
            process.send_signal(getattr(signal, asked))
            assert process.wait(60) == code
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("codes", "code"),
    [([75, 75], 75), ([0, 0], 0), ([0, 75], 75), ([75, 5], 5), ([75, -9], 143), ([75, None], 143), ([1, 75], 143), ([], 143)],
)
def test_codes_of_ranks_that_were_asked_to_end(codes: list[int | None], code: int) -> None:
    """Catches 75, which promises a checkpoint, where a rank was killed as it saved."""
    assert agent.asked_to_end(codes, signal.SIGTERM) == code


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


@pytest.mark.dist
@pytest.mark.skipif(OWN is None, reason="this machine has loopback alone")
def test_a_stranger_at_the_meeting_place(tmp_path: Path) -> None:
    """Catches an agent that unpickles what somebody put into its store, and nodes that do not find each other without c10d."""
    assert OWN is not None
    port, done = free_port(f"stranger {os.getpid()}"), script(tmp_path, "import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'])")
    env = {"NODES": "2", "HEAD": f"{OWN}:{port}"}
    command = [sys.executable, str(ROOT / "launchers" / "agent.py"), "1", str(done)]
    agents = [subprocess.Popen(command, env=environment(**env), stdout=subprocess.PIPE, text=True)]
    try:
        stranger = dist.TCPStore(OWN, port, None, False, timedelta(seconds=60), wait_for_workers=False)
        packed = base64.b64encode(pickle.dumps(Payload(tmp_path / "PWNED")))
        for key in ("torch.rendezvous.megascale", "torch.rendezvous.none", "none", "megascale"):
            stranger.set(key, packed)
        agents.append(subprocess.Popen(command, env=environment(**env, NODE_RANK="1"), stdout=subprocess.PIPE, text=True))
        said = [process.communicate(timeout=90)[0].split() for process in agents]
    finally:
        for process in agents:
            process.kill()
            process.wait()
    assert said == [["0", "2"], ["1", "2"]] and [process.returncode for process in agents] == [0, 0]
    time.sleep(0.1)
    assert not (tmp_path / "PWNED").exists()
