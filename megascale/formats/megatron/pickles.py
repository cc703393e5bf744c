"""Reads foreign pickles without executing anything in them, in memory bounded by their size.

A pickle names functions and classes to call. Here every name becomes a record of its call, except the few that build a tensor from numbers.
A few bytes may request gigabytes: opcodes are checked before any is executed, and archives of torch.save are read by our own code, since
torch.load would inflate and allocate whatever they say.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale.errors import UsageError

DTYPES = {
    f"torch.{d}": getattr(torch, d)
    for d in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
# Pickles refer to storages by class names, one per dtype.
STORAGES: dict[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
MOST = 1 << 30  # bytes of a pickle, without tensors
ARGUMENTS = 256  # of a call: no call in a checkpoint has more
NAMES = 4096  # most different classes and functions in a pickle
NESTED = 3  # most levels of dictionaries that are searched for tensors
DAMAGED = "the checkpoint is damaged"


class Record:
    """What a pickle would have created: the arguments of the call and the state to set."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        made = super().__new__(cls)
        made.args, made.state = _few(args), {}
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """`__new__` does everything, since a pickle may call only that."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """Ignores items of a list's subclass."""

    def extend(self, items: Any) -> None:
        """As `append`."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignores items of a dict's subclass."""


class Ordered(dict[Any, Any]):
    """An OrderedDict as pickles build it: empty first, then item by item. Refuses copies of another one, which a pickle could request by
    the million, and ignores attributes.
    """

    def __init__(self, *args: Any) -> None:
        if args:
            raise pickle.UnpicklingError("an OrderedDict is made from arguments")
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Ignores attributes."""


class Held(Record):
    """A tensor. It ignores state, which would replace its storage."""

    tensor: Tensor


def _few(values: Sequence[Any]) -> tuple[Any, ...]:
    if len(values) > ARGUMENTS:
        raise pickle.UnpicklingError(f"something is called with {len(values)} arguments")
    return tuple(values)


def _size(values: Any = ()) -> tuple[Any, ...]:
    return _few(values)


def _tensor(flat: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Held:
    """A view of a storage, given as a flat tensor."""
    numbers = (offset, *_few(size), *_few(stride))
    if not isinstance(flat, Tensor) or len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor is made of something other than numbers")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride))
    if 0 not in size and last >= flat.numel():
        raise pickle.UnpicklingError(f"a tensor reaches beyond the {flat.numel()} numbers stored for it")
    made = Held()
    made.tensor = flat.new_empty(size) if 0 in size else flat.as_strided(size, stride, flat.storage_offset() + offset)
    return made


def _parameter(data: Any, *_: Any) -> Any:
    return data


REAL: dict[str, Any] = {
    **DTYPES,
    **STORAGES,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": Ordered,
}


class SafeUnpickler(pickle.Unpickler):
    """Finds only what is in REAL; everything else becomes a `Record`. Storages come from `archive`."""

    def __init__(self, data: bytes, archive: Archive | None = None) -> None:
        super().__init__(io.BytesIO(data))
        self.archive = archive
        self.named: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in REAL:
            return REAL[full]
        if full not in self.named:
            if len(self.named) == NAMES:
                raise pickle.UnpicklingError(f"it names more than {NAMES} classes")
            self.named[full] = type(name.rpartition(".")[2][:100] or "Record", (Record,), {})
        return self.named[full]

    def persistent_load(self, pid: Any) -> Any:
        if self.archive is None:
            raise pickle.UnpicklingError("it refers to a storage and has none")
        return self.archive.storage(pid)


def _unpickle(data: bytes, archive: Archive | None = None) -> Any:
    """May raise any exception for a damaged pickle."""
    for opcode, argument, _ in pickletools.genops(data):
        # A memo allocates by its largest index, and no valid pickle has an index larger than its length.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > len(data):
            raise pickle.UnpicklingError(f"it keeps {argument} objects in {len(data)} bytes")
    return SafeUnpickler(data, archive).load()


@dataclass(frozen=True)
class Archive:
    """A torch.save archive: bytes `raw` [n], and the storages in them, key → (offset, bytes)."""

    raw: Tensor
    places: Mapping[str, tuple[int, int]]

    def storage(self, pid: Any) -> Tensor:
        """A storage as a flat tensor."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], torch.dtype):
            kind = getattr(pid[1], "__name__", pid[1]) if isinstance(pid, tuple) and len(pid) > 1 else pid
            raise pickle.UnpicklingError(f"storages of kind {str(kind)[:60]} are not read")
        _, dtype, key, _, count = pid
        offset, size = self.places[str(key)]
        if type(count) is not int or not 0 <= count * dtype.itemsize <= size:
            raise pickle.UnpicklingError(f"storage {str(key)[:60]} should have {count} numbers and has {size} bytes")
        part = self.raw[offset : offset + count * dtype.itemsize]
        return (part.clone() if offset % dtype.itemsize else part).view(dtype)


def read_pickle(path: Path) -> Any:
    """Reads a bare pickle. Raises UsageError for any other file."""
    try:
        size = path.stat().st_size
        if size > MOST or not path.is_file():
            raise UsageError(f"{path} is not a file of at most {MOST} bytes: {DAMAGED}")
        return _unpickle(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"there is no {path}: the checkpoint is not whole") from None
    except UsageError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise _damaged(str(path), error) from None


@lru_cache(maxsize=4)
def read_torch(path: Path) -> Any:
    """Reads a torch.save file, with tensors memory-mapped. Raises UsageError for files that are damaged or older than torch 1.6."""
    if not path.is_file():
        raise UsageError(f"there is no {path}: the checkpoint is not whole")
    check_archive(path, str(path))
    try:
        return _read_archive(path, torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8))
    except Exception as error:
        raise _damaged(str(path), error) from None


def read_torch_bytes(data: bytes, where: str) -> Any:
    """The same from memory."""
    check_archive(io.BytesIO(data), where)
    try:
        return _read_archive(io.BytesIO(data), torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except Exception as error:
        raise _damaged(where, error) from None


def _damaged(where: str, error: Exception) -> UsageError:
    return UsageError(f"{where} cannot be read ({type(error).__name__}: {str(error)[:200]}): {DAMAGED}")


def _read_archive(file: Path | io.BytesIO, raw: Tensor) -> Any:
    with zipfile.ZipFile(file) as archive:
        found = {}
        for info in archive.infolist():
            head = bytes(raw[info.header_offset + 26 : info.header_offset + 30].tolist())
            begin = info.header_offset + 30 + int.from_bytes(head[:2], "little") + int.from_bytes(head[2:], "little")
            if info.compress_type != zipfile.ZIP_STORED or begin + info.file_size > raw.numel():
                raise ValueError(f"{info.filename[:60]} is compressed, which torch.save does not do, or reaches beyond the file")
            found[info.filename.partition("/")[2]] = (begin, info.file_size)
    if "byteorder" in found and _bytes(raw, *found["byteorder"]) != b"little":
        raise ValueError("it was written with another byte order")
    if found["data.pkl"][1] > MOST:
        raise ValueError(f"its pickle has more than {MOST} bytes")
    places = {name.removeprefix("data/"): place for name, place in found.items() if name.startswith("data/")}
    return _plain(_unpickle(_bytes(raw, *found["data.pkl"]), Archive(raw, places)), NESTED)


def _bytes(raw: Tensor, offset: int, size: int) -> bytes:
    return raw[offset : offset + size].numpy().tobytes()


def _plain(value: Any, depth: int) -> Any:
    """Converts records of tensors in nested dictionaries to tensors."""
    if isinstance(value, Held):
        return value.tensor
    if depth and isinstance(value, dict):
        return {k: _plain(v, depth - 1) for k, v in value.items()}
    return value


def check_archive(file: Path | io.BytesIO, where: str) -> None:
    """Raises UsageError for anything but an archive of pickled tensors, such as a TorchScript program."""
    if not zipfile.is_zipfile(file):
        raise UsageError(f"{where} is not a zip file of torch.save since 1.6: it is damaged, or must be saved again")
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise UsageError(f"{where} cannot be read ({error}): {DAMAGED}") from None
    if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
        raise UsageError(f"{where} is a TorchScript archive, which holds a program: give the checkpoint that torch.save wrote")
