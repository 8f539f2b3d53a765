"""Read a file written by `torch.save` without running anything that it holds.

A `.pt` file is a zip archive: `data.pkl` describes a tree of Python objects in which every tensor refers to
a stored, uncompressed member `data/<key>`. Here `data.pkl` goes through an unpickler that knows an exact
list of names, nearly all mapped to functions and inert classes of this module: no code that the file could
choose is ever run. Tensors come back as `StoredTensor`, an address in the file; their bytes are read when
they are wanted, and only those.
"""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenvl_dist.errors import UserError

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class UnreadableCheckpoint(UserError):  # noqa: N818 - says what is wrong, like the exceptions of errors.py
    """A checkpoint file that is damaged, incomplete, unsafe or of a kind not understood; says which."""


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor in a file, not read yet."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # byte offset of the first element in the file
    contiguous: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    def read(self, start: int = 0, count: int | None = None) -> torch.Tensor:
        """Read `count` elements from element `start` on, flattened."""
        count = self.numel - start if count is None else count
        assert start >= 0 and count >= 0 and start + count <= self.numel, (start, count, self.numel)
        if not self.contiguous:
            raise UnreadableCheckpoint(
                f"{self.path} holds a strided tensor of shape {self.shape}: not supported"
            )
        elements = torch.empty(count, dtype=self.dtype)
        if count:
            view = elements.view(torch.uint8).numpy().data
            with self.path.open("rb", buffering=0) as file:
                read_exactly(file.fileno(), view, self.begin + start * self.dtype.itemsize, self.path)
        return elements

    def item(self) -> float:
        """Read the only element of a scalar."""
        return self.read().item()


def read_exactly(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` from `offset` on, or raise."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise UnreadableCheckpoint(
                f"{path} ends at byte {offset + done}, {len(view) - done} bytes too early"
            )
        done += count


class Inert:
    """Stands for an instance of a DeepSpeed class: keeps what the file says about it, does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True)
class _Storage:
    begin: int
    numel: int
    dtype: torch.dtype


def load_torch_file(path: Path) -> Any:
    """Return the object tree of a `torch.save` file, with `StoredTensor` for every tensor.

    Raises:
        UnreadableCheckpoint: the file is damaged, not a zip archive, or names something off the white list.
    """
    try:
        members = _members(path)
        pickled = _read_member(path, *members["data.pkl"])
        if members.get("byteorder") and _read_member(path, *members["byteorder"]) != b"little":
            raise UnreadableCheckpoint(f"{path} was written on a big-endian machine, which is not supported")
        return _Unpickler(path, members, pickled).load()
    except (UnreadableCheckpoint, OSError):
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise UnreadableCheckpoint(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _members(path: Path) -> dict[str, tuple[int, int]]:
    """Map each member's name, without the archive's own top folder, to its data's byte offset and size."""
    if path.stat().st_size == 0:
        raise UnreadableCheckpoint(f"{path} is empty: the save was cut off; use an older checkpoint")
    members = {}
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UnreadableCheckpoint(
            f"{path} is not a complete zip archive ({error}): it was cut off, or is in torch's old format "
            '(DeepSpeed\'s "checkpoint": {"use_zipfile_serialization": false}), which is not supported'
        ) from error
    with archive, path.open("rb") as file:
        size = path.stat().st_size
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise UnreadableCheckpoint(
                    f"{path}: member {info.filename} is compressed, torch never does that"
                )
            file.seek(info.header_offset)
            header = file.read(
                30
            )  # the local header's own name and extra lengths differ from the directory's
            if header[:4] != b"PK\x03\x04":
                raise UnreadableCheckpoint(f"{path}: no local header for {info.filename}")
            begin = (
                info.header_offset
                + 30
                + int.from_bytes(header[26:28], "little")
                + int.from_bytes(header[28:30], "little")
            )
            if begin + info.file_size > size:
                raise UnreadableCheckpoint(f"{path}: member {info.filename} reaches past the end of the file")
            members[info.filename.split("/", 1)[-1]] = (begin, info.file_size)
    if "data.pkl" not in members or "constants.pkl" in members:
        raise UnreadableCheckpoint(f"{path} is a zip archive but not one of torch.save")
    return members


def _read_member(path: Path, begin: int, size: int) -> bytes:
    buffer = bytearray(size)
    with path.open("rb", buffering=0) as file:
        read_exactly(file.fileno(), memoryview(buffer), begin, path)
    return bytes(buffer)


class _Unpickler(pickle.Unpickler):
    """Knows the names in `_ALLOWED`, storages and dtypes; refuses every other name before it is looked up."""

    def __init__(self, path: Path, members: dict[str, tuple[int, int]], pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        self._path = path
        self._members = members

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild_tensor
        allowed = _ALLOWED.get((module, name))
        if allowed is None:
            raise UnreadableCheckpoint(
                f"{self._path} refers to {module}.{name}, which no checkpoint needs: refused, nothing was run"
            )
        return allowed

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise UnreadableCheckpoint(f"{self._path} holds a reference of unknown kind {kind!r}")
        begin, size = self._members[f"data/{key}"]
        if numel * dtype.itemsize > size:
            raise UnreadableCheckpoint(
                f"{self._path}: storage {key} has {size} bytes, {numel} x {dtype} are due"
            )
        return _Storage(begin, numel, dtype)

    def _rebuild_tensor(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_rest: Any
    ) -> StoredTensor:
        contiguous = torch.empty(shape, device="meta").stride()
        numel = torch.Size(shape).numel()
        is_contiguous = all(a == b for a, b, n in zip(stride, contiguous, shape, strict=True) if n != 1)
        if offset < 0 or (is_contiguous and offset + numel > storage.numel):
            raise UnreadableCheckpoint(f"{self._path}: a tensor of shape {tuple(shape)} leaves its storage")
        begin = storage.begin + offset * storage.dtype.itemsize
        return StoredTensor(self._path, storage.dtype, tuple(shape), begin, is_contiguous)


def _rebuild_parameter(data: StoredTensor, *_rest: Any) -> StoredTensor:
    return data


def _rebuild_from_type(
    rebuild: Callable[..., Any], _type: Any, arguments: tuple[Any, ...], _state: Any
) -> Any:
    """Stand for torch's rebuilding of tensors with attributes of their own, which are dropped."""
    return rebuild(*arguments)  # reaches nothing that the pickle could not call by itself


def _zero_stage(value: int) -> int:
    return int(value)


_STAGE_NAMES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}


def _getattr(owner: Any, name: str) -> int:
    """Stand for `getattr`, with which Python 3.11 pickles `ZeroStageEnum.gradients`."""
    if owner is not _zero_stage:
        raise UnreadableCheckpoint(f"getattr(..., {name!r}) is refused")
    return _STAGE_NAMES[name]


def _set(values: list[Any]) -> set[Any]:
    return set(values)


def _latin1(text: str, encoding: str) -> bytes:
    """Stand for `_codecs.encode`, with which pickle protocol 2 writes bytes."""
    if encoding != "latin1":
        raise UnreadableCheckpoint(f"bytes in encoding {encoding!r} are refused")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): Inert,
    ("torch", "Tensor"): Inert,
    ("torch.nn.parameter", "Parameter"): Inert,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("__builtin__", "set"): _set,
    ("builtins", "set"): _set,
    ("_codecs", "encode"): _latin1,
    ("__builtin__", "getattr"): _getattr,
    ("builtins", "getattr"): _getattr,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): _zero_stage,
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"): Inert,
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"): Inert,
    ("deepspeed.utils.tensor_fragment", "fragment_address"): Inert,
}
