"""Errors that end a run on purpose, with the exit codes that scripts rely on.

A message names the key or file, the two values that disagree, and the fix. The commands print it without a traceback;
everything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes that scripts rely on."""

    DONE = 0
    BUG = 1  # an unexpected error: it keeps its traceback
    USAGE = 2
    TRAINING = 3
    OUT_OF_MEMORY = 4
    PEER_LOST = 5
    STOPPED = 75


class MegascaleError(Exception):
    """A condition the user can act on. `code` is the exit code of the process."""

    code = ExitCode.BUG


class UsageError(MegascaleError):
    """Wrong use: a key, a file, a layout or an environment that cannot work. Nothing has been written."""

    code = ExitCode.USAGE


class TrainingError(MegascaleError):
    """Training cannot continue; the message names the last good checkpoint."""

    code = ExitCode.TRAINING


class OutOfMemoryError(MegascaleError):
    """The model does not fit; the message says what would."""

    code = ExitCode.OUT_OF_MEMORY


class PeerLostError(MegascaleError):
    """A peer or node is gone, or a collective timed out: run the same command again."""

    code = ExitCode.PEER_LOST


class StopRequested(MegascaleError):
    """Stopped on request after a complete checkpoint: run the same command again to continue."""

    code = ExitCode.STOPPED


class Halted(Exception):
    """All ranks leave the current work at this point, after a request to stop (train/faults/gate.py)."""
