"""Texts of shards that another program wrote: how its members become messages, at the moment they are read.

The tars stay as they are. A shard's index says which member holds the text and what it means, so whoever reads a sample
through it gets `KEY.json` in our own form, made from those bytes once their checksum was right.

    txt   a caption, or several joined by `join`
    json  `caption_field` names a caption or a list of captions; without one it is a conversation, `messages` or
          `conversations` with the sample's own pictures in the places of <image>
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from qwenvl_dist.data.formats.messages import turns_of
from qwenvl_dist.data.formats.objects import objects_of
from qwenvl_dist.data.formats.reader import id_of, id_of_stem
from qwenvl_dist.data.formats.sample import (
    DEFAULT_JOIN,
    DEFAULT_PROMPT,
    Sample,
    caption_messages,
    short,
    texts_in,
)
from qwenvl_dist.data.formats.turns import FormatError, TextRules, place, texts_of, to_messages

SOURCE = "webdataset"


@dataclass(frozen=True)
class TextForm:
    """How the text of a shard's samples reads."""

    member: str  # the extension: "txt", "json"
    caption_field: str | None = None  # of a JSON member, for captions; None: a conversation, or a text member
    prompt: str = DEFAULT_PROMPT
    join: str = DEFAULT_JOIN
    keep_white_space: bool = False
    key_prefix: str = ""  # before each key, where shards use the same ones
    left_out: tuple[str, ...] = ()  # keys in the tar that are not indexed

    def to_json(self) -> dict[str, Any]:
        """Return what the index holds of it."""
        return {**asdict(self), "left_out": list(self.left_out)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TextForm:
        """Read what `to_json` returned. Raises TypeError for something else."""
        return cls(**{**content, "left_out": tuple(content["left_out"])})

    @cached_property
    def _rules(self) -> TextRules:
        return TextRules(self.prompt, self.join, self.keep_white_space)

    def to_sample_json(self, data: bytes, key: str, num_images: int) -> bytes:
        """Return the bytes of `KEY.json` for the text `data` beside so many pictures. Raises ValueError."""
        messages, record = self._read(data, num_images)
        messages = _filled(messages, record.get("objects"), num_images)
        image_id = id_of(record, "image_id")
        if image_id is None:
            image_id = id_of_stem(PurePosixPath(key).name)
        return Sample(key, messages, [], image_id, SOURCE).to_json()

    def _read(self, data: bytes, num_images: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the messages, and the record that they stand in: an empty one for a text."""
        if self.member != "json":
            return self._caption([data.decode("utf-8-sig")], num_images), {}
        try:
            record = json.loads(data)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(record, dict):
            raise FormatError(f"is {short(record)}: it must be an object")
        if self.caption_field is None:
            turns = place(turns_of(record), [None] * num_images)
            messages, pictures = to_messages(turns, self._rules)
            if len(pictures) != num_images:
                raise FormatError(f"names {len(pictures)} pictures, {num_images} lie beside it")
            return messages, record
        value = record.get(self.caption_field)
        captions = texts_of(value)
        if captions is None:
            raise FormatError(
                f"has {short(value)} for {self.caption_field!r}: it must be a caption, or a list of them"
            )
        return self._caption(captions, num_images), record

    def _caption(self, captions: list[str], num_images: int) -> list[dict[str, Any]]:
        if not num_images:
            raise FormatError(
                "is the caption of a picture, none lies beside it: a member jpg, png, webp, gif, bmp or tif"
            )
        return caption_messages(self.prompt, self._rules.captions(captions), num_images)


def _filled(messages: list[dict[str, Any]], given: Any, num_images: int) -> list[dict[str, Any]]:
    """Return the messages with names and boxes in their places. Raises FormatError."""
    objects = objects_of(given, texts_in(messages), num_images)
    if objects is None:
        return messages
    if objects.measured:  # an index has no EXIF, and a text is read without its pictures
        raise FormatError(
            "has boxes in pixels in 'objects', which cannot be filled in where shards are indexed in place: write "
            'shares of the sides and "bbox_type": "norm1", or pack the records with `shards pack --source messages`'
        )
    return objects.fill(messages, [f"picture {number}" for number in range(num_images)], [])


def texts_of_shard(texts: dict[str, Any] | None, shard: str) -> TextForm | None:
    """Return the form of one shard from what the manifest says of all, as far as that goes."""
    if texts is None:
        return None
    shared = {name: value for name, value in texts.items() if name != "prefix_keys"}
    form = TextForm(**shared)
    return replace(form, key_prefix=prefix_of(shard)) if texts.get("prefix_keys") else form


def prefix_of(shard: str) -> str:
    """Return what tells the keys of one shard from those of others."""
    return f"{shard.removesuffix('.tar')}/"
