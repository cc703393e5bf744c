"""What can end a run on purpose, each with the exit code that scripts rely on.

A message names the key or file, the two values that disagree, and the fix. `pretrain.py` and the tools print it without a traceback;
everything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations


class MegascaleError(Exception):
    """A condition the user can act on. `code` is the exit code of the process."""

    code = 1


class UsageError(MegascaleError):
    """Wrong use: a key, a file, a layout or an environment that cannot work. Nothing has been written."""

    code = 2


class TrainingError(MegascaleError):
    """Training cannot go on; the message names the last good checkpoint."""

    code = 3


class OutOfMemoryError(MegascaleError):
    """The model does not fit; the message says what would."""

    code = 4


class PeerLostError(MegascaleError):
    """A peer or node is gone, or a collective timed out: run the same command again."""

    code = 5


class StopRequested(MegascaleError):
    """Stopped on request after a whole checkpoint: run the same command again to continue."""

    code = 75


class Halted(Exception):
    """All ranks leave the work under way at this point, since somebody asked to stop (train/faults/gate.py)."""
