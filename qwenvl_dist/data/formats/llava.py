"""LLaVA's JSON: `image` beside the turns, `<image>` where it belongs.

[{"id": "000000391895", "image": "train2014/COCO_train2014_000000391895.jpg", "conversations": [
  {"from": "human", "value": "<image>\\nCOCO Yes:"},
  {"from": "gpt", "value": "A man with a red helmet on a moped."}]}]
"""

from __future__ import annotations

from typing import Any

from qwenvl_dist.data.formats.conversations import from_value, refuse_other_media, system_turn
from qwenvl_dist.data.formats.messages import listed_pictures
from qwenvl_dist.data.formats.reader import Draft, FileReader, need_list, need_object

EXAMPLE = (
    '{"image": "a.jpg", "conversations": '
    '[{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}]}'
)


class LlavaReader(FileReader):
    """One record, one conversation; without `image` it is text alone."""

    source = "llava"
    kind = "a LLaVA JSON file"

    def _draft(self, value: Any) -> Draft:
        record = need_object(value, EXAMPLE)
        refuse_other_media(record)
        turns = need_list(record.get("conversations"), "conversations", EXAMPLE)
        said = [from_value(turn, number) for number, turn in enumerate(turns)]
        return self._conversation(record, [*system_turn(record), *said], listed_pictures(record))
