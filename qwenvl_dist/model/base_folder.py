"""A base model's folder: its config, where each tensor's bytes lie, and a fingerprint. Imports no torch.

The safetensors format: 8 bytes with the header's length (little endian), the header as JSON
({name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}), then the data that the
offsets count from. https://huggingface.co/docs/safetensors/index#format
"""

import hashlib
import json
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwenvl_dist.errors import UserError
from qwenvl_dist.model.names import LM_HEAD, runtime_name

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FINGERPRINT_BLOCK = 4096
_READ_AHEAD_STEP = 16 << 20  # the kernel may cut a larger wish
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies."""

    file: str  # name in the folder
    dtype: str  # as safetensors writes it: BF16, F32, ...
    shape: tuple[int, ...]
    begin: int  # byte offsets in the file
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return self.end - self.begin


@dataclass(frozen=True)
class SafetensorsFile:
    """One file: its tensors in the order of their data, and the header as it stands."""

    path: Path
    header: bytes  # with the 8 bytes of its length
    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]


class BaseFolder:
    """A Qwen2-VL folder in hub layout, of one safetensors file or of several with an index.

    Raises:
        UserError: a file missing, cut off, or not what the index says.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = _read_json(self.path / "config.json")
        self.index: dict[str, Any] | None = None
        if (self.path / INDEX_FILE).is_file():
            self.index = _read_json(self.path / INDEX_FILE)
            names = sorted(set(self.index["weight_map"].values()))
        elif (self.path / SINGLE_FILE).is_file():
            names = [SINGLE_FILE]
        else:
            raise UserError(
                f"{self.path} has neither {SINGLE_FILE} nor {INDEX_FILE}: a base needs safetensors weights"
            )
        self.files: dict[str, SafetensorsFile] = {name: read_header(self.path / name) for name in names}
        self.tensors: dict[str, TensorEntry] = {}
        for file in self.files.values():
            for name, entry in file.tensors.items():
                if name in self.tensors:
                    raise UserError(
                        f"{self.path}: {name} is in {self.tensors[name].file} and in {entry.file}"
                    )
                self.tensors[name] = entry
        if self.index is not None:
            for name, file in self.index["weight_map"].items():
                if name not in self.tensors or self.tensors[name].file != file:
                    raise UserError(f"{self.path / INDEX_FILE} puts {name} in {file}, where it is not")

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        text = self.config.get("text_config") or {}
        declared = self.config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
        return LM_HEAD not in self.tensors if declared is None else bool(declared)

    @property
    def nbytes(self) -> int:
        """Size of all tensors' data."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @cached_property
    def by_runtime_name(self) -> dict[str, str]:
        """Map run-time names to the names in the files."""
        names: dict[str, str] = {}
        for name in self.tensors:
            if runtime_name(name) in names:
                raise UserError(f"{self.path}: {name} and {names[runtime_name(name)]} are the same tensor")
            names[runtime_name(name)] = name
        return names

    def read_ahead(self, count: int) -> None:
        """Let the disk begin to fetch the first `count` bytes of the weights, an equal part of each file."""
        for file in self.files.values():
            with file.path.open("rb", buffering=0) as opened:
                for begin in range(0, count // len(self.files), _READ_AHEAD_STEP):
                    os.posix_fadvise(opened.fileno(), begin, _READ_AHEAD_STEP, os.POSIX_FADV_WILLNEED)

    def fingerprint(self) -> str:
        """Return a sha256 that another base, or another fine-tune of this one, does not share.

        Over config.json and each weight file's name, size, header and the middle 4 KiB of every tensor:
        milliseconds for 16 GB, and no single tensor can be exchanged unnoticed.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for name, file in sorted(self.files.items()):
            digest.update(f"\0{name}\0{file.path.stat().st_size}\0".encode())
            digest.update(file.header)
            with file.path.open("rb", buffering=0) as opened:
                for entry in file.tensors.values():
                    size = min(entry.nbytes, FINGERPRINT_BLOCK)
                    begin = entry.begin + (entry.nbytes - size) // 2
                    digest.update(os.pread(opened.fileno(), size, begin))
        return digest.hexdigest()


def read_header(path: Path) -> SafetensorsFile:
    """Read the header of a safetensors file and check it against the file's size.

    Raises:
        UserError: missing, cut off, or not safetensors.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; download the model again or name the right folder")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise UserError(f"{path} is not a safetensors file, or was cut off ({size} bytes)")
        header = file.read(length)
    try:
        described = json.loads(header)
        metadata = described.pop("__metadata__", {})
        entries = sorted(described.items(), key=lambda item: item[1]["data_offsets"])
        tensors = {}
        due = 0
        for name, entry in entries:
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if begin != due or end - begin != math.prod(shape) * DTYPE_BYTES[entry["dtype"]]:
                raise ValueError(f"{name} does not lie where it should")
            tensors[name] = TensorEntry(
                path.name, entry["dtype"], shape, 8 + length + begin, 8 + length + end
            )
            due = end
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has a damaged safetensors header: {error!r}") from error
    if 8 + length + due != size:
        raise UserError(f"{path} has {size} bytes, its header describes {8 + length + due}: it was cut off")
    return SafetensorsFile(path, length.to_bytes(8, "little") + header, metadata, tensors)


def write_header(entries: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """Return the header, length included, of a file with these tensors (dtype, shape) one after the other."""
    described: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape) in entries.items():
        end = offset + math.prod(shape) * DTYPE_BYTES[dtype]
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data begins at a multiple of 8
    return len(header).to_bytes(8, "little") + header


def refuse_keys(fault: str, names: Collection[str]) -> None:
    """Raise UserError when there are any."""
    if names:
        raise UserError(
            f"{len(names)} {fault} keys in its weights, first {min(names)}; "
            "complete the download or name a Qwen2-VL model"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; name a model folder in hub layout") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
