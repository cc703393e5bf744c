"""Pickles of others, read without running anything in them.

A pickle names functions and classes to call. Here every name becomes a record that remembers what it was called with, except for the few
from torch that put a tensor together from numbers; those are what torch's own `weights_only` takes for safe.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megascale.errors import UsageError

DTYPES = {
    f"torch.{d}": getattr(torch, d)
    for d in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
STORAGES = {
    f"torch.{kind}Storage": getattr(torch, f"{kind}Storage")
    for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
REAL: dict[str, Any] = {
    **DTYPES,
    **STORAGES,
    "torch.Size": torch.Size,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "collections.OrderedDict": collections.OrderedDict,
}


class Record:
    """What a pickle would have made: the arguments it was to be called with, and the state it was to be given."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        made = super().__new__(cls)
        made.args, made.state = args, {}
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """`__new__` has it all: a pickle may call that alone."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """Items of a list's subclass: nobody asks for them."""

    def extend(self, items: Any) -> None:
        """As `append`."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Items of a dict's subclass: nobody asks for them."""


class SafeUnpickler(pickle.Unpickler):
    """Finds nothing but what is in REAL; all else is a `Record`, under a name of its own."""

    def find_class(self, module: str, name: str) -> Any:
        real = REAL.get(f"{module}.{name}")
        return type(name.rpartition(".")[2] or "Record", (Record,), {}) if real is None else real


def read_pickle(path: Path) -> Any:
    """What a bare pickle holds. Raises UsageError for a file that is none."""
    try:
        with path.open("rb") as file:
            return SafeUnpickler(file).load()
    except FileNotFoundError:
        raise UsageError(f"there is no {path}: the checkpoint is not whole") from None
    except Exception as error:  # a damaged pickle raises anything
        raise UsageError(f"{path} cannot be read ({type(error).__name__}: {error}): the checkpoint is damaged") from None


@lru_cache(maxsize=4)
def read_torch(path: Path) -> Any:
    """What torch.save wrote, its tensors mapped from the file. Raises UsageError for files that are damaged or older than torch 1.6."""
    if not path.is_file():
        raise UsageError(f"there is no {path}: the checkpoint is not whole")
    check_archive(path, str(path))
    try:
        # What unpickles is ours, whatever `weights_only` says: it would refuse the names that become records here.
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_module())
    except Exception as error:
        raise UsageError(f"{path} cannot be read ({type(error).__name__}: {error}): the checkpoint is damaged") from None


def read_torch_bytes(data: bytes, where: str) -> Any:
    """The same from memory."""
    check_archive(io.BytesIO(data), where)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False, pickle_module=_module())
    except Exception as error:
        raise UsageError(f"{where} cannot be read ({type(error).__name__}: {error}): the checkpoint is damaged") from None


def check_archive(file: Path | io.BytesIO, where: str) -> None:
    """Raises UsageError for what torch.load takes for something else than pickled tensors: the code of TorchScript archives would run."""
    if not zipfile.is_zipfile(file):
        raise UsageError(f"{where} is no zip file as torch.save writes it since 1.6: it is damaged, or must be saved again")
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise UsageError(f"{where} cannot be read ({error}): the checkpoint is damaged") from None
    if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
        raise UsageError(f"{where} is a TorchScript archive, which holds a program: give the checkpoint that torch.save wrote")


def _module() -> Any:
    """What torch.load takes for the module `pickle`."""

    def load(file: Any, **_: Any) -> Any:
        return SafeUnpickler(file).load()

    return SimpleNamespace(Unpickler=SafeUnpickler, load=load, __name__="safe")
