"""Conversations and captions as JSON lines or a JSON array, in the forms of many programs.

OpenAI and Qwen: the content is a list of parts, pictures among them, by path, URL or data URL.
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "..."}]},
                  {"role": "assistant", "content": "..."}]}
ms-swift: the content is a text with <image>, the pictures are listed beside it.
    {"messages": [{"role": "user", "content": "<image>..."}, {"role": "assistant", "content": "..."}],
     "images": ["a.jpg"]}
    {"query": "<image>...", "response": "...", "history": [["...", "..."]], "images": ["a.jpg"]}
    {"conversation": [{"human": "<image>...", "assistant": "..."}], "images": ["a.jpg"]}
Each with names and boxes beside it, for its <ref-object> and <bbox> (qwenvl_dist/data/formats/objects.py).
    {"query": "<image>Find the <ref-object>.", "response": "<ref-object><bbox>", "images": ["a.jpg"],
     "objects": {"ref": ["dog", "dog"], "bbox": [[10, 20, 110, 80]]}}
LLaMA-Factory: sharegpt, and alpaca.
    {"conversations": [{"from": "human", "value": "<image>..."}, {"from": "gpt", "value": "..."}], "images": ["a.jpg"]}
    {"instruction": "<image>...", "input": "...", "output": "...", "history": [["...", "..."]], "images": ["a.jpg"]}
A picture and what is to be said of it.
    {"image": "a.jpg", "caption": "..."}

An answer with ms-swift's `"loss": false` or OpenAI's `"weight": 0` is read and not learned; its message in a shard has
`"loss": false`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwenvl_dist.data.formats.conversations import from_value, refuse_other_media, system_turn
from qwenvl_dist.data.formats.reader import Draft, FileReader, id_of, need_list, need_object
from qwenvl_dist.data.formats.sample import caption_messages, short
from qwenvl_dist.data.formats.turns import (
    FormatError,
    Named,
    Part,
    Turn,
    learned_by,
    role_of,
    split_marks,
    texts_of,
)

EXAMPLE = '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}'
IMAGE_FIELDS = ("images", "image", "image_path", "file_name")
CAPTION_FIELDS = ("caption", "captions", "text")
# Of records of one question and its answer: ms-swift's, alpaca's, and those of data sets to be asked about pictures.
QUESTIONS, ANSWERS = (
    ("query", "instruction", "question", "prompt"),
    ("response", "output", "answer", "completion"),
)
CONVERSATIONS = ("messages", "conversations", "conversation", *QUESTIONS, *ANSWERS)


class MessagesReader(FileReader):
    """One record, one conversation, or one caption."""

    source = "messages"
    kind = "a file of messages"

    def _draft(self, value: Any) -> Draft:
        record = need_object(value, EXAMPLE)
        names = listed_pictures(record)
        captions = captions_of(record)
        if captions is None or not names:
            return self._conversation(record, turns_of(record), names)
        images = [self.pictures.find(name) for name in names]
        messages = caption_messages(self.rules.prompt, self.rules.captions(captions), len(images))
        return Draft(messages, images, id_of(record, "id"), id_of(record, "image_id"), record.get("objects"))


def turns_of(record: dict[str, Any]) -> list[Turn]:
    """Return what was said. Raises FormatError."""
    refuse_other_media(record)
    if "messages" in record:
        messages = need_list(record["messages"], "messages", EXAMPLE)
        said = [_turn(message, number) for number, message in enumerate(messages)]
    elif "conversations" in record:
        turns = need_list(record["conversations"], "conversations", EXAMPLE)
        said = [from_value(turn, number) for number, turn in enumerate(turns)]
    elif "conversation" in record:
        turns = need_list(record["conversation"], "conversation", EXAMPLE)
        is_one_turn_each = isinstance(turns[0], dict) and ("role" in turns[0] or "from" in turns[0])
        said = turns_of({"messages": turns}) if is_one_turn_each else pairs_of(turns, "conversation")
    else:
        said = list(_question_and_answer(record))
    return [*system_turn(record), *said]


def pairs_of(pairs: list[Any], name: str) -> list[Turn]:
    """Return the turns of `{"human": ..., "assistant": ...}`, or `user` for `human`. Raises FormatError."""
    said: list[Turn] = []
    for number, pair in enumerate(pairs):
        question, answer = (
            next((pair[role] for role in roles if isinstance(pair, dict) and role in pair), None)
            for roles in (("human", "user"), ("assistant",))
        )
        if not isinstance(question, str) or not isinstance(answer, str):
            raise FormatError(
                f"has in {name}[{number}] {short(pair)}: it needs the texts 'human' (or 'user') and 'assistant'"
            )
        is_learned = learned_by(pair, f"{name}[{number}]")
        said += [Turn("user", split_marks(question)), Turn("assistant", split_marks(answer), is_learned)]
    return said


def _question_and_answer(record: dict[str, Any]) -> Iterator[Turn]:
    """Yield the turns of a record of one question, one answer, and what was said before."""
    asked = next((name for name in QUESTIONS if name in record), None)
    answered = next((name for name in ANSWERS if name in record), None)
    if asked is None or answered is None:
        raise FormatError(
            f"has no list 'messages': it must be like {EXAMPLE}, or have conversations, conversation, "
            "a query and a response, or a caption with a picture"
        )
    for number, pair in enumerate(record.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise FormatError(
                f'has in history[{number}] {short(pair)}: it must be ["a question", "its answer"]'
            )
        yield Turn("user", split_marks(pair[0]))
        yield Turn("assistant", split_marks(pair[1]))
    for name in (asked, answered):
        if not isinstance(record.get(name), str):
            raise FormatError(f"has {short(record.get(name))} for {name!r}: it must be a text")
    question, answer = record[asked], record[answered]
    more = record.get("input") if asked == "instruction" else None
    if more is not None and not isinstance(more, str):
        raise FormatError(f"has {short(more)} for 'input': it must be a text")
    yield Turn("user", split_marks(f"{question}\n{more}" if more else question))
    yield Turn("assistant", split_marks(answer))


def captions_of(record: dict[str, Any]) -> list[str] | None:
    """Return the captions of a record that is no conversation, None for another record. Raises FormatError."""
    if any(name in record for name in CONVERSATIONS):
        return None
    name = next((name for name in CAPTION_FIELDS if name in record), None)
    if name is None:
        return None
    captions = texts_of(record[name])
    if captions is None:
        raise FormatError(f"has {short(record[name])} for {name!r}: it must be a caption, or a list of them")
    return captions


def listed_pictures(record: dict[str, Any]) -> list[Any]:
    """Return the pictures named beside the text, paths or objects with `path` or `url`. Raises FormatError."""
    name = next((name for name in IMAGE_FIELDS if record.get(name) not in (None, "", [])), None)
    if name is None:
        return []
    images = record[name]
    if isinstance(images, (str, dict)):
        images = [images]
    if not isinstance(images, list):
        raise FormatError(f"has {short(images)} for {name!r}: it must be a path or URL, or a list of them")
    return [_name_of(image) for image in images]


def _name_of(image: Any) -> Any:
    if isinstance(image, dict):
        if isinstance(image.get("bytes"), str) and image["bytes"]:
            return f"data:application/octet-stream;base64,{image['bytes']}"
        image = next((image[name] for name in ("path", "url", "image") if image.get(name)), image)
    return image


def _turn(message: Any, number: int) -> Turn:
    if isinstance(message, dict) and "content" not in message and "value" in message:
        return from_value(message, number)
    if not isinstance(message, dict) or not isinstance(message.get("content"), (str, list)):
        raise FormatError(
            f"has in messages[{number}] {short(message)}: it needs 'role' and a 'content' of text or parts"
        )
    role, content = role_of(message.get("role")), message["content"]
    is_learned = learned_by(message, f"messages[{number}]")
    if isinstance(content, str):
        return Turn(role, split_marks(content), is_learned)
    parts: list[Part] = []
    for place, part in enumerate(content):
        parts += _parts(part, f"messages[{number}].content[{place}]")
    return Turn(role, parts, is_learned)


def _parts(part: Any, where: str) -> list[Part]:
    """Return what one part of a content is: OpenAI's forms, and Qwen's."""
    if isinstance(part, str):
        return split_marks(part)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind is None and isinstance(part, dict) and len(part) == 1:
        kind = next(iter(part))  # Qwen's short form: {"image": "a.jpg"}, {"text": "..."}
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return split_marks(part["text"])
    if kind in ("image", "image_url", "input_image") and not part.get("file_id"):
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
