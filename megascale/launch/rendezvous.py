"""Rendezvous of ranks: addresses that other nodes can reach, and free ports that all agree on. Imports no torch."""

from __future__ import annotations

import ipaddress
import re
import shutil
import socket
import subprocess
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import psutil

from megascale.errors import UsageError

# Below the ports that kernels use for outgoing connections (32768–60999 on Linux), above those of services.
FIRST_PORT, PORTS = 20000, 12000


def port_of(job: str) -> int:
    """The same port for everybody who knows the job's name, usually another one for the next job."""
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS


def slurm_port(env: Mapping[str, str]) -> int:
    """A step's port, different for neighbouring jobs and for steps of one job."""
    return port_of(f"{env.get('SLURM_JOB_ID', env.get('SLURM_JOBID', ''))}.{env.get('SLURM_STEP_ID', '')}")


def is_own(port: int) -> bool:
    """Whether this process listens there itself: a program that trains twice may still hold the first run, and with it the ranks' store."""
    try:
        return any(c.laddr.port == port for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN)
    except (psutil.Error, OSError):
        return False


def is_free(port: int) -> bool:
    """Whether this node could listen on `port`."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def free_port(job: str) -> int:
    """A port that nobody on this node listens on, starting the search at the job's own."""
    start = port_of(job) - FIRST_PORT
    for i in range(PORTS):
        port = FIRST_PORT + (start + i) % PORTS
        if is_free(port):
            return port
    raise UsageError(f"all ports from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are taken on this node: set MASTER_PORT")


def is_loopback(address: str) -> bool:
    """Whether `address` means the local machine on every machine."""
    if address == "localhost":
        return True
    try:
        ip = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    return ip.is_loopback or ip.is_unspecified


def own_addresses() -> dict[str, str]:
    """{address: interface} of this node's interfaces that are up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        for a in addresses:
            if a.family in (socket.AF_INET, socket.AF_INET6) and name in up:
                found[a.address.split("%")[0]] = name
    return found


def address_towards(target: str) -> str | None:
    """This node's source address towards `target`, from the kernel's routes without sending anything. None without a route."""
    try:
        options = socket.getaddrinfo(target, 1, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, place in options:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(place)
                return str(probe.getsockname()[0])
            except OSError:
                continue
    return None


def towards(head: str) -> tuple[str, int] | tuple[()]:
    """This node's address towards the node `head`, and 1 if that is this node; empty without a route."""
    here = address_towards(head)
    if here is None:
        return ()
    return here, int(here in {str(place[0]) for *_, place in socket.getaddrinfo(head, 1, type=socket.SOCK_DGRAM)})


def interface_towards(target: str) -> str | None:
    """The interface through which messages to `target` leave. Libraries that resolve the host's own name instead get 127.0.1.1 on machines
    whose /etc/hosts says so, where no other node reaches them.
    """
    address = address_towards(target)
    return None if address is None else own_addresses().get(address)


def routable_address() -> str:
    """An address of this node that others can reach: that of the default route, else the first that is not loopback. Raises UsageError."""
    # 192.0.2.0/24 is reserved for documentation, so only the default route leads there.
    out = address_towards("192.0.2.1")
    if out is not None and not is_loopback(out):
        return out
    for address in own_addresses():
        ip = ipaddress.ip_address(address)
        if not (ip.is_loopback or ip.is_link_local):
            return address
    raise UsageError(
        "this node has no address that others could reach, but the ranks run on several nodes: set MASTER_ADDR and MASTER_PORT"
    )


def first_node(nodes: str) -> str:
    """The first name in SLURM's "gpu[07-09,11],login1"."""
    depth, end = 0, len(nodes)
    for i, letter in enumerate(nodes):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            end = i
            break
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes[:end])


def slurm_head(env: Mapping[str, str]) -> str:
    """The address of a step's first node, where rank 0 is. SLURM's node names may not resolve, so ask SLURM itself first."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    if not nodes:
        raise UsageError("srun started several tasks, but SLURM_STEP_NODELIST is missing: set MASTER_ADDR and MASTER_PORT")
    name = first_node(nodes)
    address = node_address(name) or name
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        raise UsageError(
            f"the first node of the step is {address}, a name that does not resolve here: set MASTER_ADDR and MASTER_PORT"
        ) from None
    return address


def expand_nodes(nodes: str) -> list[str]:
    """ "gpu[07-09],login1" → single names, by SLURM's own rules; empty if scontrol is missing or does not answer."""
    try:
        said = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return said.stdout.split()


def node_address(name: str) -> str | None:
    """NodeAddr of a SLURM node; None if scontrol does not know."""
    if shutil.which("scontrol") is None:
        return None
    try:
        said = subprocess.run(["scontrol", "show", "node", name], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"NodeAddr=(\S+)", said)
    return match[1] if match else None


def slurm_is_local(env: Mapping[str, str]) -> bool:
    """Whether SLURM lists this node under a loopback address: then all its nodes are this machine, and loopback reaches them."""
    address = node_address(env["SLURMD_NODENAME"]) if "SLURMD_NODENAME" in env else None
    return address is not None and is_loopback(address)


def mpi_running() -> bool:
    """Whether this process was started as an MPI program, as by `python -m mpi4py`."""
    return "mpi4py.MPI" in sys.modules


class Communicator:
    """mpi4py's world, used once to agree on a rendezvous."""

    def __init__(self, mpi: Any, ours: bool) -> None:
        self._mpi, self._world, self._ours = mpi, mpi.COMM_WORLD, ours
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()

    def meet(self, address: str | None, port: int | None) -> tuple[int, int, str, int]:
        """(local rank, ranks on this node, address, port), collective. Given values are kept.

        Finalizes MPI if it was initialized here: otherwise mpirun would take a process with its own exit code for crashed.
        """
        node = self._world.Split_type(self._mpi.COMM_TYPE_SHARED)
        local_rank, local_size = node.Get_rank(), node.Get_size()
        offer: Any = None
        if self.rank == 0:
            try:
                here = address or ("127.0.0.1" if local_size == self.size else routable_address())
                offer = here, port or free_port(f"{here} {id(self)}")
            except UsageError as error:
                offer = error
        offer = self._world.bcast(offer)
        node.Free()
        if self._ours:
            self._mpi.Finalize()
        if isinstance(offer, UsageError):
            raise offer
        return local_rank, local_size, offer[0], offer[1]


def mpi_world() -> Communicator | None:
    """MPI's world, initialized if necessary; None without mpi4py or a working MPI library."""
    try:
        import mpi4py

        mpi4py.rc(initialize=False, finalize=False)
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # no mpi4py, or no libmpi on this machine
        return None
    ours = not MPI.Is_initialized()
    if ours:
        MPI.Init()
    return Communicator(MPI, ours)
