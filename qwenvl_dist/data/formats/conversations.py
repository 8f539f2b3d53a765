"""The article's conversation JSON: pictures stand in the text, by path.

[{"id": "identity_1", "conversations": [
  {"from": "user", "value": "COCO Yes: <|vision_start|>coco_2014_caption/391895.jpg<|vision_end|>"},
  {"from": "assistant", "value": "A man with a red helmet on a moped.&&Man riding a motor bike."}]}]
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from qwenvl_dist.data.formats.reader import Draft, FileReader, need_list, need_object
from qwenvl_dist.data.formats.sample import short
from qwenvl_dist.data.formats.turns import FormatError, Part, Turn, check_text, role_of, split_marks

PATH_MARK = re.compile(r"<\|vision_start\|>(.*?)<\|vision_end\|>", re.DOTALL)
EXAMPLE = '{"conversations": [{"from": "user", "value": ...}, {"from": "assistant", "value": ...}]}'


class ConversationsReader(FileReader):
    """One record, one conversation."""

    source = "conversations"
    kind = "a JSON file of conversations"

    def _draft(self, value: Any) -> Draft:
        record = need_object(value, EXAMPLE)
        for name in ("image", "images"):
            if record.get(name):
                raise FormatError(
                    f"names pictures in {name!r}, here they stand in the text, between <|vision_start|> and "
                    f"<|vision_end|>: read it with --source {'llava' if name == 'image' else 'messages'}"
                )
        turns = need_list(record.get("conversations"), "conversations", EXAMPLE)
        return self._conversation(record, [from_value(turn, n, by_path) for n, turn in enumerate(turns)])


def by_path(text: str) -> list[Part]:
    """Return the parts of a text that names its pictures' paths."""
    return split_marks(text, PATH_MARK)


def from_value(turn: Any, number: int, split: Callable[[str], list[Part]]) -> Turn:
    """Return the turn that `from` and `value` say. Raises FormatError."""
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise FormatError(f"has in conversations[{number}] {short(turn)}: it needs 'from' and a text 'value'")
    return Turn(role_of(turn.get("from")), split(turn["value"]))


def system_turn(record: dict[str, Any]) -> list[Turn]:
    """Return the turn that a record's own member `system` gives, none without it. Raises FormatError."""
    text = record.get("system")
    if text is None or text == "":
        return []
    if not isinstance(text, str):
        raise FormatError(f"has the system prompt {short(text)}: it must be a text")
    check_text(text)
    return [Turn("system", [text])]
