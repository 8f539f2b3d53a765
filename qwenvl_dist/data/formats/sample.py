"""A sample before it is packed, and the form of its text in a shard."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qwenvl_dist.data.boxes import NamedBox
from qwenvl_dist.data.captions import DEFAULT_JOIN
from qwenvl_dist.data.storage import LocalStorage, Storage

DEFAULT_PROMPT = "COCO Yes:"
ROLES = ("system", "user", "assistant")
# Of a turn, whether it is learned: ms-swift's, OpenAI's, and ms-swift's share. Shards have the first, false, alone.
TURN_WEIGHTS = ("loss", "weight", "loss_scale")

# A key is a tar member's name up to its first dot: no dot, no slash, short enough for the oldest tar header.
MAX_KEY_CHARACTERS = 80
SAFE_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_CHARACTERS}}}")


class Picture(Protocol):
    """A picture's bytes, wherever they are; `str()` is what an error calls it. Errors of all methods are OSErrors."""

    def read(self) -> bytes:
        """Return the file's bytes as they are."""
        ...

    def num_bytes(self) -> int:
        """Return their number, without reading them where that is possible."""
        ...

    def modified_ns(self) -> float:
        """Return when they last changed, in nanoseconds; infinity where that cannot be told."""
        ...


@dataclass(frozen=True)
class ImageRef:
    """A picture that is not read yet, on disk or in `storage`."""

    path: Path  # in `storage`: relative to it
    storage: Storage | None = None

    def __str__(self) -> str:
        return str(self.path) if self.storage is None else f"{self.storage.location}/{self.path}"

    def read(self) -> bytes:
        """Return the file's bytes as they are."""
        return self._place.read_bytes(str(self.path))

    def num_bytes(self) -> int:
        """Return the file's size without reading it."""
        return self._place.stat(str(self.path)).size

    def modified_ns(self) -> float:
        """Return when the file last changed, in nanoseconds; infinity where that cannot be told."""
        modified = self._place.stat(str(self.path)).modified_ns
        return math.inf if modified is None else modified

    @property
    def _place(self) -> Storage:
        return self.storage or LocalStorage(Path())


@dataclass(frozen=True)
class InlineImage:
    """A picture whose bytes stand in the annotations themselves."""

    data: bytes
    where: str

    def __str__(self) -> str:
        return self.where

    def read(self) -> bytes:
        """Return the bytes."""
        return self.data

    def num_bytes(self) -> int:
        """Return their number."""
        return len(self.data)

    def modified_ns(self) -> float:
        """Nobody knows: whoever compares must look at the bytes."""
        return math.inf


@dataclass(frozen=True)
class Sample:
    """One training example before it is packed."""

    key: str
    messages: list[dict[str, Any]]
    images: list[Picture]
    image_id: int | str | None
    source: str
    crowds: tuple[NamedBox, ...] = ()  # regions in which nobody counted the objects

    def to_json(self) -> bytes:
        """Return the bytes of the shard's `KEY.json`; the same sample always gives the same bytes."""
        record: dict[str, Any] = {
            "messages": self.messages,
            "image_id": self.image_id,
            "source": self.source,
        }
        if self.crowds:
            record["crowds"] = [crowd.to_json() for crowd in self.crowds]
        return json.dumps(record, ensure_ascii=False).encode()


def caption_messages(prompt: str, answer: str, num_images: int = 1) -> list[dict[str, Any]]:
    """Return the conversation of a caption sample: the pictures, the prompt, the answer to learn."""
    pictures = [{"type": "image"} for _ in range(num_images)]
    return [
        {"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def normalise_caption(text: str, join: str = DEFAULT_JOIN) -> str:
    """Strip a caption, or each of several that are already joined, and make inner white space one space."""
    pieces = text.split(join) if join.strip() else [text]
    return join.join(" ".join(piece.split()) for piece in pieces)


def is_learned(message: dict[str, Any]) -> bool:
    """Tell whether a message of a shard is to be learned: an assistant's is, but one with `"loss": false`."""
    return message["role"] == "assistant" and message.get("loss") is not False


def texts_in(messages: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the texts of messages, whose content is a list of parts or one text."""
    for message in messages:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        yield from (part["text"] for part in parts if "text" in part)


def parse_sample_json(data: bytes, num_images: int | None = None) -> dict[str, Any]:
    """Return the content of a shard's `KEY.json`; ValueError says what is wrong with its form.

    With `num_images`, the number of pictures that lie beside it, the messages must speak of as many.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("no list of 'messages'")
    placeholders = 0
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"messages[{number}] has no role of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), list):
            raise ValueError(f"messages[{number}] has no list of 'content'")
        for part in message["content"]:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image":
                placeholders += 1
            elif kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"messages[{number}] has a part that is neither an image nor a text")
            elif not is_unicode(part["text"]):
                raise ValueError(f"messages[{number}] holds half a character (a lone surrogate)")
        _check_weights(message, f"messages[{number}]")
    if not any(map(is_learned, messages)):
        if any(message["role"] == "assistant" for message in messages):
            raise ValueError("every message of the assistant has 'loss' false, so nothing to learn")
        raise ValueError("no message of the assistant, so nothing to learn")
    if num_images is not None and placeholders != num_images:
        raise ValueError(f"the messages name {placeholders} images, {num_images} lie beside them")
    crowds_of(record)
    return record


def _check_weights(message: dict[str, Any], where: str) -> None:
    """Raise ValueError for a message that says otherwise than a shard does whether it is to be learned."""
    for name in TURN_WEIGHTS:
        value = message.get(name)
        if name == "loss" and not (value is None or isinstance(value, bool)):
            raise ValueError(f"{where} has 'loss' {short(value)}: it must be true or false")
        if name != "loss" and message["role"] == "assistant" and value not in (None, 1):
            raise ValueError(
                f"{where} has {name!r} {short(value)}: in a shard 'loss' false says that an answer is not learned"
            )


def crowds_of(record: dict[str, Any]) -> tuple[NamedBox, ...]:
    """Return the crowd regions that a record has, few have any. Raises ValueError for something else."""
    crowds = record.get("crowds", [])
    if not isinstance(crowds, list):
        raise ValueError("'crowds' is not a list")
    try:
        return tuple(map(NamedBox.from_json, crowds))
    except ValueError as error:
        raise ValueError(f"crowds: {error}") from None


def is_unicode(text: str) -> bool:
    """Tell whether a text can be written as UTF-8; JSON escapes can make halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def short(value: object) -> str:
    """Return a value as an error message shows it."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:79] + "…"
