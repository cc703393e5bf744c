"""How a process ends: exit codes, and exit.json for scripts, since launchers may change the code."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megascale.errors import ExitCode, UsageError
from megascale.files import write_atomic
from megascale.launch.ranks import RankInfo, node_name
from megascale.rows import free_name

if TYPE_CHECKING:
    from megascale.config.schema import Config

# Errors of torch.distributed, by name since nothing here imports torch.
PEER_ERRORS = {"DistNetworkError", "DistStoreError", "DistBackendError"}
# Lower-case words of torch and communication libraries in plain RuntimeErrors about a lost or silent peer.
PEER_WORDS = (
    "connection closed by peer",
    "connection was likely closed",
    "connection reset",
    "connection refused",
    "failed to recv",
    "timed out",
    "timeout",
    "nccl",
    "broken pipe",
    "gloo",
)
MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
PORT_WORDS = ("eaddrinuse", "address already in use")
# What the user can do about a system error.
ADVICE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in the quota",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "choose a writable place",
    errno.ENOENT: "name an existing one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "it is a loop of links: name the real path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk or its network failed: check it, and run the same command again",
    errno.ESTALE: "the network file system lost it (stale handle): run the same command again",
}

# Endings that all ranks share, so that only rank 0 records them.
TOLD_BY_ALL = (ExitCode.DONE, ExitCode.USAGE, ExitCode.TRAINING, ExitCode.STOPPED)


@dataclass(frozen=True)
class Exit:
    code: int
    reason: str


def as_exit(error: BaseException) -> Exit | None:
    """The ending for an error without a message of ours: memory, lost peers and system errors, by type and message.

    None for anything else, which is a bug and keeps its traceback.
    """
    if error.__cause__ is not None and (known := as_exit(error.__cause__)) is not None:
        return known  # the pipeline's runtime wraps a stage's errors
    text = f"{type(error).__name__}: {error}".lower()
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, MemoryError) or any(w in text for w in MEMORY_WORDS):
        return Exit(ExitCode.OUT_OF_MEMORY, f"out of memory ({first})")
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & PEER_ERRORS and any(w in text for w in PORT_WORDS):
        return Exit(ExitCode.USAGE, f"the ranks' port is taken by another process ({first}): set MASTER_PORT to a free port")
    lost = isinstance(error, RuntimeError) and not isinstance(error, RecursionError) and any(w in text for w in PEER_WORDS)
    if lost or names & PEER_ERRORS or (isinstance(error, ConnectionError) and not isinstance(error, BrokenPipeError)):
        return Exit(ExitCode.PEER_LOST, f"a peer is gone or silent ({first}); run the same command again")
    if isinstance(error, RuntimeError) and "no available kernel" in text:
        return Exit(
            ExitCode.TRAINING,
            "no fused attention kernel of torch takes these heads on this GPU, and its way without one needs memory for the square of the "
            "sequence; use precision.compute bf16 and a model.head_dim that is a multiple of 8, up to 256",
        )
    if isinstance(error, RecursionError):
        return Exit(ExitCode.USAGE, f"something that was read is nested too deeply ({first}): flatten it")
    if isinstance(error, OSError):
        return Exit(ExitCode.USAGE, of_system(error))
    return None


def of_system(error: OSError) -> str:
    """A message with the file, the error and the fix."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "a file"
    shown = name if len(name) <= 200 else name[:200] + "…"
    what = error.strerror or str(error) or type(error).__name__
    return f"{shown}: {what}: {ADVICE.get(error.errno or 0, 'fix it and run the same command again')}"


def of_this_run(config: Config, run_dir: Path) -> bool:
    """Whether the exit.json there is from an earlier attempt of this run: its config.yaml has the same name and model.

    An unreadable config.yaml counts as the run's own: nobody can continue there, and scripts must learn of it.
    """
    from megascale.config.load import build_config, flatten, read_yaml

    try:
        if not (run_dir / "exit.json").is_file() or not (run_dir / "config.yaml").is_file():
            return False
        there = build_config(read_yaml(run_dir / "config.yaml"))
    except (OSError, ValueError):
        return False
    except UsageError:
        return True
    then, now = (flatten(c.plain()) for c in (there, config))
    known = {k: v for k, v in now.items() if k.startswith("model.") and v is not None}  # the vocabulary may come from the tokenizer
    return there.run.name == config.run.name and all(then.get(k) == v for k, v in known.items())


def write_exit(run_dir: Path | None, ending: Exit, ranks: RankInfo, step: int) -> None:
    """Writes the run's exit.json. Rank 0 does; another rank does if it knows of a failure that rank 0 may not survive.

    The first report of a lost peer is the right one: a rank that was frozen finds the others gone when it wakes, and did not see why. A
    stop on request does not replace the error of the rank that asked for it. An earlier attempt's file is gone by then, since the run
    removes it when it claims its directory.
    """
    if run_dir is None or not run_dir.is_dir() or (ranks.rank != 0 and ending.code in TOLD_BY_ALL):
        return
    path = run_dir / "exit.json"
    record = {"code": ending.code, "reason": ending.reason, "rank": ranks.rank, "node": node_name(), "step": step}
    with suppress(OSError):  # a full disk must not hide the reason, which is printed as well
        if path.is_file() and (ending.code == ExitCode.PEER_LOST or (ending.code == ExitCode.STOPPED and _code_in(path) == ExitCode.BUG)):
            return
        if os.path.lexists(path) and not path.is_file():
            path.rename(free_name(path, "set-aside"))
        write_atomic(path, json.dumps(record) + "\n")


def _code_in(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())["code"]
    except (OSError, ValueError, TypeError, LookupError):
        return None
