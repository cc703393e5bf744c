"""torchrun's agent on one node, started by launchers/torchrun.sh: RANKS SCRIPT [ARGUMENT …].

torchrun's own rendezvous (--standalone, c10d) keeps the agents' state pickled in a store and unpickles whatever it finds: anyone who
reaches its port can run code on every node. Here nodes are numbered beforehand (torch's static rendezvous), and nothing is unpickled.
The store of a single node listens on loopback only.

NODES, HEAD, NODE_RANK   as launchers/torchrun.sh describes them
Exits with the code of the rank that failed first, where torchrun would exit with 1; after a signal, with 75 once the ranks have
saved.
"""

from __future__ import annotations

import re
import socket
import sys
import traceback
from datetime import timedelta
from typing import TYPE_CHECKING

from megascale.errors import ExitCode, UsageError
from megascale.launch.rendezvous import is_loopback, towards

if TYPE_CHECKING:
    import torch.distributed as dist

MEET_SECONDS = 600
DOCUMENTED = set(ExitCode) - {ExitCode.DONE, ExitCode.BUG}  # exit codes whose reason the rank itself has printed


def main(argv: list[str], env: dict[str, str]) -> int:
    try:
        ranks, nodes = number("NPROC", argv[0]), number("NODES", env.get("NODES") or "1")
        head = None if nodes == 1 else read_head(env.get("HEAD") or "")
        node = None if not env.get("NODE_RANK") else number("NODE_RANK", env["NODE_RANK"], 0)
        if node is not None and node >= nodes:
            raise UsageError(f"NODE_RANK is {node} but NODES is {nodes}: nodes are numbered from 0 to {nodes - 1}")
        return run(ranks, nodes, head, node, argv[1:])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USAGE


def number(name: str, text: str, least: int = 1) -> int:
    if not re.fullmatch("[0-9]{1,6}", text) or int(text) < least:
        raise UsageError(f"{name} is {text[:40]!r}: a whole number from {least} on is needed")
    return int(text)


def read_head(text: str) -> tuple[str, int]:
    """ "host:port", an IPv6 address in brackets → both."""
    match = re.fullmatch(r"\[?([A-Za-z0-9_.:%-]+?)\]?:([0-9]{1,5})", text)
    if match is None or not 0 < int(match[2]) < 65536:
        raise UsageError(f"HEAD is {text[:80]!r}: several nodes need HEAD=host:port, the same on all of them")
    return match[1], int(match[2])


def place_of(head: tuple[str, int]) -> bool:
    """Whether this node is the head. Raises UsageError if the other nodes could not reach it, or this one not the head."""
    found = towards(head[0])
    if not found:
        raise UsageError(f"this node finds no way to {head[0]}: set HEAD to the first node's address that the others can reach")
    if found[1] and is_loopback(found[0]):
        raise UsageError(f"HEAD is {head[0]}, which means every node itself ({found[0]}): give an address that the other nodes can reach")
    return bool(found[1])


def run(ranks: int, nodes: int, head: tuple[str, int] | None, node: int | None, command: list[str]) -> int:
    """Runs torch's agent until its ranks have ended. Raises UsageError if the nodes cannot connect."""
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    address, port = ("127.0.0.1", 0) if head is None else head
    try:
        if head is None:
            node, store = 0, open_loopback()  # keep a reference: torch opens another store on this port and gets this one
            port = store.port
        else:
            node = node_number(head, nodes, node)
        where = ["--nnodes", str(nodes), "--node-rank", str(node), "--master-addr", address, "--master-port", str(port)]
        torchrun([*where, "--nproc-per-node", str(ranks), *command])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code not in DOCUMENTED:
            print(error, file=sys.stderr)
        return code if code > 0 else 128 - code
    except SignalException as error:  # forwarded to the ranks, which have ended by now
        return asked_to_end(codes_of_ranks(error), int(error.sigval))
    except dist.DistError as error:
        raise UsageError(
            f"the nodes cannot meet at {address}:{port} ({str(error).splitlines()[0]}): check that HEAD is right and its port free"
        ) from None
    return 0


def codes_of_ranks(error: BaseException) -> list[int | None]:
    """Exit codes of this node's ranks; None for a running one. torch's agent has them only in a frame of the error's traceback. Empty if no
    rank was started.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        context = getattr(frame.f_locals.get("self"), "_pcontext", None)
        if context is not None:
            return [handler.proc.poll() for handler in getattr(context, "subprocess_handlers", {}).values()]
    return []


def asked_to_end(codes: list[int | None], sign: int) -> int:
    """The agent's exit code after it forwarded a signal and its ranks ended with `codes`: 75 if all have saved (0 if all were done), the
    code of a rank that failed for another reason, else the signal's.
    """
    failed = [code for code in codes if code in DOCUMENTED and code != ExitCode.STOPPED]
    if failed:
        return int(failed[0] or 0)
    if codes and all(code in (ExitCode.DONE, ExitCode.STOPPED) for code in codes):
        return max(code or 0 for code in codes)
    return 128 + sign


def open_loopback() -> dist.TCPStore:
    """A store on a free port that only this machine can reach; torch's own listens on every interface."""
    import torch.distributed as dist

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port, limit = listener.getsockname()[1], timedelta(seconds=MEET_SECONDS)
    return dist.TCPStore(
        "127.0.0.1", port, None, True, limit, wait_for_workers=False, multi_tenant=True, master_listen_fd=listener.detach()
    )


def node_number(head: tuple[str, int], nodes: int, given: int | None) -> int:
    """This node's number: 0 on the head, else as given, or in order of arrival."""
    import torch.distributed as dist

    is_head = place_of(head)
    if given is not None or is_head:
        if not is_head and given == 0:
            raise UsageError(f"NODE_RANK is 0 but HEAD is {head[0]}, which is another node: number this one from 1 on")
        return given or 0
    store = dist.TCPStore(*head, None, False, timedelta(seconds=MEET_SECONDS), wait_for_workers=False)
    number = store.add("megascale/nodes", 1)
    if number >= nodes:
        raise UsageError(f"NODES is {nodes}, but that many have already met at {head[0]}:{head[1]}: restart all of them")
    return number
