"""Messages as JSON lines or a JSON array, in the forms of three families of programs.

OpenAI and Qwen: the content is a list of parts, pictures among them, by path, URL or data URL.
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "..."}]},
                  {"role": "assistant", "content": "..."}]}
ms-swift: the content is a text with <image>, the pictures are listed beside it.
    {"messages": [{"role": "user", "content": "<image>..."}, {"role": "assistant", "content": "..."}],
     "images": ["a.jpg"]}
LLaMA-Factory, sharegpt: the same with other words.
    {"conversations": [{"from": "human", "value": "<image>..."}, {"from": "gpt", "value": "..."}], "images": ["a.jpg"]}
"""

from __future__ import annotations

from typing import Any

from qwenvl_dist.data.formats.conversations import from_value, system_turn
from qwenvl_dist.data.formats.reader import Draft, FileReader, need_list, need_object
from qwenvl_dist.data.formats.sample import short
from qwenvl_dist.data.formats.turns import FormatError, Named, Part, Turn, role_of, split_marks

EXAMPLE = '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}'


class MessagesReader(FileReader):
    """One record, one conversation."""

    source = "messages"
    kind = "a file of messages"

    def _draft(self, value: Any) -> Draft:
        record = need_object(value, EXAMPLE)
        return self._conversation(record, turns_of(record), listed_pictures(record))


def turns_of(record: dict[str, Any]) -> list[Turn]:
    """Return what was said, in `messages` or `conversations`. Raises FormatError."""
    if "messages" not in record and "conversations" in record:
        turns = need_list(record["conversations"], "conversations", EXAMPLE)
        said = [from_value(turn, number, split_marks) for number, turn in enumerate(turns)]
    else:
        messages = need_list(record.get("messages"), "messages", EXAMPLE)
        said = [_turn(message, number) for number, message in enumerate(messages)]
    return [*system_turn(record), *said]


def listed_pictures(record: dict[str, Any]) -> list[Any]:
    """Return the pictures named beside the text, paths or objects with `path` or `url`. Raises FormatError."""
    images = record.get("images")
    if images is None:
        return []
    if isinstance(images, str):
        return [images]
    if not isinstance(images, list):
        raise FormatError(f"has {short(images)} for 'images': it must be a list of paths or URLs")
    return [_name_of(image) for image in images]


def _name_of(image: Any) -> Any:
    if isinstance(image, dict):
        image = next((image[name] for name in ("path", "url", "image") if image.get(name)), image)
    return image


def _turn(message: Any, number: int) -> Turn:
    if not isinstance(message, dict) or not isinstance(message.get("content"), (str, list)):
        raise FormatError(
            f"has in messages[{number}] {short(message)}: it needs 'role' and a 'content' of text or parts"
        )
    role, content = role_of(message.get("role")), message["content"]
    if isinstance(content, str):
        return Turn(role, split_marks(content))
    parts: list[Part] = []
    for place, part in enumerate(content):
        parts += _parts(part, f"messages[{number}].content[{place}]")
    return Turn(role, parts)


def _parts(part: Any, where: str) -> list[Part]:
    """Return what one part of a content is: OpenAI's forms, and Qwen's."""
    if isinstance(part, str):
        return split_marks(part)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return split_marks(part["text"])
    if kind in ("image", "image_url", "input_image"):
        found = next((part[name] for name in ("image", "image_url", "path", "url") if part.get(name)), None)
        name = _name_of(found)
        if name is None:
            return [Named(None)]  # in its place comes the next one of `images`
        if isinstance(name, str):
            return [Named(name)]
    raise FormatError(
        f"has in {where} {short(part)}: a part is a text or a picture, like "
        '{"type": "text", "text": ...} or {"type": "image", "image": "a.jpg"}'
    )
