"""The forms that captions come in, each read into the one form that shards hold.

To add a format: a reader that yields `Sample`s, one entry in `READERS`, and a test that the same photos and
texts give the same messages as through COCO.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qwenvl_dist.data.storage import LocalStorage, Storage, open_file, open_storage
from qwenvl_dist.errors import UserError

DEFAULT_PROMPT = "COCO Yes:"
DEFAULT_JOIN = "&&"
ROLES = ("system", "user", "assistant")

# A key is a tar member's name up to its first dot: no dot, no slash, short enough for the oldest tar header.
SAFE_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


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
class Sample:
    """One training example before it is packed."""

    key: str
    messages: list[dict[str, Any]]
    images: list[ImageRef]
    image_id: int | str | None
    source: str

    def to_json(self) -> bytes:
        """Return the bytes of the shard's `KEY.json`; the same sample always gives the same bytes."""
        record = {"messages": self.messages, "image_id": self.image_id, "source": self.source}
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
    answers = 0
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
            elif not _is_unicode(part["text"]):
                raise ValueError(f"messages[{number}] holds half a character (a lone surrogate)")
        answers += message["role"] == "assistant"
    if not answers:
        raise ValueError("no message of the assistant, so nothing to learn")
    if num_images is not None and placeholders != num_images:
        raise ValueError(f"the messages name {placeholders} images, {num_images} lie beside them")
    return record


def read_coco_captions(
    captions: str | Path,
    images: str | Path,
    prompt: str = DEFAULT_PROMPT,
    join: str = DEFAULT_JOIN,
    allow_missing: bool = False,
) -> Iterator[Sample]:
    """Yield a sample a picture of a COCO captions file, by image id, its captions joined in the file's order.

    Keys are the stems of the file names when all are safe and differ, else the image ids, zero-padded. A
    missing picture is a `UserError` unless `allow_missing` leaves it to the packer, as for remote ones is the rule.
    """
    folder = open_storage(images)
    if not join:
        raise UserError("--join '' is empty: captions need a mark between them, for instance '&&'")
    if isinstance(folder, LocalStorage) and not folder.folder.is_dir():
        raise UserError(f"{images}: --images must be the folder that holds the pictures")
    pictures, texts = _load_coco(captions, join)

    stems = {image_id: PurePosixPath(name).stem for image_id, name in pictures.items()}
    if all(SAFE_KEY.fullmatch(stem) for stem in stems.values()) and len(set(stems.values())) == len(stems):
        keys = stems
    else:
        keys = {image_id: _key_of_id(captions, image_id) for image_id in pictures}
        twice = [key for key, count in Counter(keys.values()).items() if count > 1]
        if twice:
            raise UserError(
                f"{captions}: two images give the key {twice[0]!r}: give them ids or file names that differ"
            )

    for image_id in sorted(pictures, key=lambda image_id: (isinstance(image_id, str), image_id)):
        image = ImageRef(Path(pictures[image_id]), folder)
        if isinstance(folder, LocalStorage):
            image = ImageRef(folder.folder / pictures[image_id])
        if image.storage is None and not allow_missing and not image.path.is_file():
            raise UserError(
                f"{captions}: image {image_id} is {pictures[image_id]!r}, which is not in {images}: "
                "name the folder that holds it with --images, or pack without it (--skip-bad)"
            )
        yield Sample(
            key=keys[image_id],
            messages=caption_messages(prompt, join.join(texts[image_id])),
            images=[image],
            image_id=image_id,
            source="coco",
        )


READERS: dict[str, Callable[..., Iterator[Sample]]] = {"coco": read_coco_captions}


def _load_coco(captions: str | Path, join: str) -> tuple[dict[int | str, str], dict[int | str, list[str]]]:
    """Return the file name and the captions of each image id."""
    try:
        storage, name = open_file(captions)
        content = json.loads(storage.read_bytes(name))
    except FileNotFoundError:
        raise UserError(f"{captions}: no such file; --captions must name a COCO captions JSON file") from None
    except OSError as error:
        raise UserError(
            f"{captions}: cannot be read ({error.strerror or error}); --captions must name a file"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{captions}: not JSON ({error}); --captions must be a COCO captions JSON file"
        ) from None
    remedy = "a COCO captions file is {'images': [...], 'annotations': [...]}, like captions_train2017.json"
    for name in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(f"{captions}: '{name}' is not a list; {remedy}")

    pictures: dict[int | str, str] = {}
    for number, image in enumerate(content["images"]):
        where = f"{captions}: images[{number}]"
        if (
            not isinstance(image, dict)
            or not _is_id(image.get("id"))
            or not isinstance(image.get("file_name"), str)
        ):
            raise UserError(f"{where} is {_short(image)}: it needs an 'id' and a 'file_name'; {remedy}")
        name, image_id = image["file_name"], image["id"]
        if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(
                f"{where} has file_name {name!r}: it must lie below --images; make it relative to it"
            )
        if image_id in pictures:
            raise UserError(
                f"{where} has id {image_id!r} for the second time: ids must differ; drop one of the two"
            )
        pictures[image_id] = name
    if not pictures:
        raise UserError(f"{captions}: 'images' is empty, there is nothing to pack; {remedy}")

    texts: dict[int | str, list[str]] = {image_id: [] for image_id in pictures}
    for number, annotation in enumerate(content["annotations"]):
        where = f"{captions}: annotations[{number}]"
        if not isinstance(annotation, dict) or not isinstance(annotation.get("caption"), str):
            raise UserError(f"{where} is {_short(annotation)}: it needs a 'caption'; {remedy}")
        image_id = annotation.get("image_id")
        if not _is_id(image_id) or image_id not in texts:
            raise UserError(
                f"{where} has image_id {image_id!r}, which 'images' does not list: add it there or drop it"
            )
        text = normalise_caption(annotation["caption"], join)
        if not text:
            raise UserError(
                f"{where}, of image {image_id}, has an empty caption: fill it in or drop the annotation"
            )
        if not _is_unicode(text):
            raise UserError(
                f"{where}, of image {image_id}, holds half a character (a lone surrogate): write it as UTF-8"
            )
        texts[image_id].append(text)
    for image_id, captions_of_image in texts.items():
        if not captions_of_image:
            raise UserError(
                f"{captions}: image {image_id} ({pictures[image_id]!r}) has no caption: "
                "each image needs one in 'annotations'; add it, or drop the image from 'images'"
            )
    return pictures, texts


def _is_id(value: object) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _key_of_id(captions: str | Path, image_id: int | str) -> str:
    key = f"{image_id:012d}" if isinstance(image_id, int) else image_id
    if not SAFE_KEY.fullmatch(key):
        raise UserError(
            f"{captions}: the image id {image_id!r} cannot be a key: letters, digits, '_' and '-' only, "
            "at most 80; rename it"
        )
    return key


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:79] + "…"
