"""What a hub tells of a repository, and which of its files a model needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Protocol

from qwenvl_dist.errors import UserError

CONFIG = ("config.json", "generation_config.json", "configuration.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
PROCESSOR = (
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
TERMS = ("LICENSE", "LICENSE.*", "README.md")  # what the weights may be used for
MODEL_FILES = (*CONFIG, *TOKENIZER, *PROCESSOR, *WEIGHTS, *TERMS)  # no other formats of the weights, no code

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as its hub describes it. A hash is None where the hub does not tell it."""

    name: str  # a path inside the repository
    size: int  # bytes
    sha256: str | None = None
    git_sha1: str | None = None  # of the git blob, for small files

    def fault(self, path: Path) -> str | None:
        """Return what is wrong with a local copy, None when it is the file."""
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return "is missing"
        if size != self.size:
            return f"has {size} bytes, the hub has {self.size}"
        if self.sha256 is not None and _digest(path, hashlib.sha256()) != self.sha256:
            return "has another sha256 than on the hub"
        if self.sha256 is None and self.git_sha1 is not None:
            blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)  # what git hashes
            if _digest(path, blob) != self.git_sha1:
                return "has another content than on the hub"
        return None


class Repository(Protocol):
    """A repository on a hub. Methods raise UserError for what the user can mend and StorageError for the rest."""

    source: str  # hf or modelscope
    name: str
    commit: str | None  # the one that everything below speaks of; None where the hub names none

    def files(self) -> list[HubFile]:
        """Return all files."""
        ...

    def fetch(self, names: Sequence[str], folder: Path, connections: int) -> None:
        """Bring these files into a folder; started again it goes on where it stopped."""
        ...


def select(files: Iterable[HubFile], patterns: Sequence[str], repository: str) -> list[HubFile]:
    """Return the files that match any pattern. `UserError` when none does."""
    files = list(files)
    for file in files:
        if PurePosixPath(file.name).is_absolute() or ".." in PurePosixPath(file.name).parts:
            raise UserError(f"{repository}: names a file {file.name!r} outside of itself; do not trust it")
    chosen = [file for file in files if any(fnmatchcase(file.name, pattern) for pattern in patterns)]
    if not chosen:
        held = ", ".join(file.name for file in files[:5]) or "no file"
        raise UserError(
            f"{repository}: no file matches {', '.join(patterns)}; it holds {held}{' ...' * (len(files) > 5)}"
        )
    return chosen


def select_model(files: Iterable[HubFile], repository: str) -> list[HubFile]:
    """Return what loading a model takes: config, tokenizer, processor and safetensors weights of the top folder."""
    top = [file for file in files if "/" not in file.name]
    chosen = select(top, MODEL_FILES, repository)
    names = {file.name for file in chosen}
    if "config.json" not in names:
        raise UserError(
            f"{repository}: has no config.json, so it is no model that can be loaded; name another one"
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{repository}: has no safetensors weights; name one that has them")
    return chosen


def _digest(path: Path, digest: hashlib._Hash) -> str:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
