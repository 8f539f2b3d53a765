"""The article's conversation JSON: pictures stand in the text, by path.

[{"id": "identity_1", "conversations": [
  {"from": "user", "value": "COCO Yes: <|vision_start|>coco_2014_caption/391895.jpg<|vision_end|>"},
  {"from": "assistant", "value": "A man with a red helmet on a moped.&&Man riding a motor bike."}]}]
"""

from __future__ import annotations

from typing import Any

from qwenvl_dist.data.formats.reader import Draft, FileReader, need_list, need_object
from qwenvl_dist.data.formats.sample import short
from qwenvl_dist.data.formats.turns import FormatError, Turn, check_text, learned_by, role_of, split_marks

UNHEARD = ("videos", "video", "audios", "audio")
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
        refuse_other_media(record)
        said = [from_value(turn, number) for number, turn in enumerate(turns)]
        return self._conversation(record, [*system_turn(record), *said])


def from_value(turn: Any, number: int) -> Turn:
    """Return the turn that `from` and `value` say, or `role` and `content`. Raises FormatError."""
    who, what = ("role", "content") if isinstance(turn, dict) and "value" not in turn else ("from", "value")
    if not isinstance(turn, dict) or not isinstance(turn.get(what), str):
        raise FormatError(f"has in conversations[{number}] {short(turn)}: it needs 'from' and a text 'value'")
    is_learned = learned_by(turn, f"conversations[{number}]")
    return Turn(role_of(turn.get(who)), split_marks(turn[what]), is_learned)


def system_turn(record: dict[str, Any]) -> list[Turn]:
    """Return the turn that a record's own member `system` gives, none without it. Raises FormatError."""
    text = record.get("system")
    if text is None or text == "":
        return []
    if not isinstance(text, str):
        raise FormatError(f"has the system prompt {short(text)}: it must be a text")
    check_text(text)
    return [Turn("system", [text])]


def refuse_other_media(record: dict[str, Any]) -> None:
    """Raise FormatError for what would be lost, videos and sounds, or is not wanted."""
    for name in UNHEARD:
        if record.get(name):
            raise FormatError(
                f"has {name!r} {short(record[name])}: only pictures and texts are learned; drop the record"
            )
    if record.get("label") is False:  # of KTO
        raise FormatError("has 'label' false, so its answer is one that is not wanted: drop the record")
