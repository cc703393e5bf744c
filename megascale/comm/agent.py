"""torchrun's agent on one node, as launchers/torchrun.sh starts it: RANKS SCRIPT [ARGUMENT …].

torchrun's own ways to meet (--standalone, c10d) keep the state of the agents pickled in a store, and unpickle whatever stands there: who
reaches its port runs code on every node. Here the nodes are numbered beforehand (torch's static rendezvous), and nothing is unpickled. The
store of one node listens on loopback alone.

NODES, HEAD, NODE_RANK   as launchers/torchrun.sh describes them
Ends with the code of the rank that failed first, where torchrun would end with 1; asked to end by a signal, with 75 once the ranks
have saved.
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
DOCUMENTED = set(ExitCode) - {ExitCode.DONE, ExitCode.BUG}  # codes of which the rank itself has said why


def main(argv: list[str], env: dict[str, str]) -> int:
    try:
        ranks, nodes = number("NPROC", argv[0]), number("NODES", env.get("NODES") or "1")
        head = None if nodes == 1 else read_head(env.get("HEAD") or "")
        node = None if not env.get("NODE_RANK") else number("NODE_RANK", env["NODE_RANK"], 0)
        if node is not None and node >= nodes:
            raise UsageError(f"NODE_RANK is {node} and NODES is {nodes}: nodes are numbered from 0 to {nodes - 1}")
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
    """Whether this node is the head. Raises UsageError where the others could not reach it, or this one not the head."""
    found = towards(head[0])
    if not found:
        raise UsageError(f"this node finds no way to {head[0]}: give HEAD the address of the first node under which the others reach it")
    if found[1] and is_loopback(found[0]):
        raise UsageError(f"HEAD is {head[0]}, which means every node itself ({found[0]}): give the address under which the others reach it")
    return bool(found[1])


def run(ranks: int, nodes: int, head: tuple[str, int] | None, node: int | None, command: list[str]) -> int:
    """torch's agent until its ranks have ended. Raises UsageError where the nodes cannot meet."""
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    address, port = ("127.0.0.1", 0) if head is None else head
    try:
        if head is None:
            node, store = 0, open_loopback()  # kept to the end: torch opens one more on its port, and gets this one
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
    except SignalException as error:  # passed on to the ranks, which have ended since
        return asked_to_end(codes_of_ranks(error), int(error.sigval))
    except dist.DistError as error:
        raise UsageError(
            f"the nodes cannot meet at {address}:{port} ({str(error).splitlines()[0]}): see that HEAD is right and free"
        ) from None
    return 0


def codes_of_ranks(error: BaseException) -> list[int | None]:
    """With what the ranks of this node have ended; None for one that goes on. torch's agent knows, and does not tell: it stands in a frame
    through which its error came. Empty where no rank had been started.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        context = getattr(frame.f_locals.get("self"), "_pcontext", None)
        if context is not None:
            return [handler.proc.poll() for handler in getattr(context, "subprocess_handlers", {}).values()]
    return []


def asked_to_end(codes: list[int | None], sign: int) -> int:
    """The code of an agent whose ranks ended with `codes` after it passed a signal on to them: 75 where all have saved (0 where all were
    done), that of a rank which failed for a reason of its own, else the signal's.
    """
    failed = [code for code in codes if code in DOCUMENTED and code != ExitCode.STOPPED]
    if failed:
        return int(failed[0] or 0)
    if codes and all(code in (ExitCode.DONE, ExitCode.STOPPED) for code in codes):
        return max(code or 0 for code in codes)
    return 128 + sign


def open_loopback() -> dist.TCPStore:
    """A store on a free port that only this machine reaches; torch's own listens on every interface."""
    import torch.distributed as dist

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port, limit = listener.getsockname()[1], timedelta(seconds=MEET_SECONDS)
    return dist.TCPStore(
        "127.0.0.1", port, None, True, limit, wait_for_workers=False, multi_tenant=True, master_listen_fd=listener.detach()
    )


def node_number(head: tuple[str, int], nodes: int, given: int | None) -> int:
    """This node's: 0 on the head's, else as given, or in the order in which the nodes come."""
    import torch.distributed as dist

    is_head = place_of(head)
    if given is not None or is_head:
        if not is_head and given == 0:
            raise UsageError(f"NODE_RANK is 0 and HEAD is {head[0]}, which is another node: number this one from 1 on")
        return given or 0
    store = dist.TCPStore(*head, None, False, timedelta(seconds=MEET_SECONDS), wait_for_workers=False)
    number = store.add("megascale/nodes", 1)
    if number >= nodes:
        raise UsageError(f"NODES is {nodes}, and as many have met at {head[0]}:{head[1]} already: start all of them anew")
    return number
