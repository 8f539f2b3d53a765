"""The forms that captions and conversations come in, each read into the one form that shards hold.

To add a format: a module with a reader that turns one record into a `Draft`, one entry in `READERS`, a section in
docs/data.md, and an entry in tests/data/test_every_format.py, which wants the same samples as through COCO.

annotations  the files, as streams of records       sample  what comes out, and its form in a shard
pictures     names -> where the bytes are           turns   texts and roles of all formats -> messages
reader       looks at the whole input first, chooses keys
headers      sizes of pictures, upright             objects names and boxes beside a text -> their places in it
"""

from collections.abc import Callable

from qwenvl_dist.data.formats.coco import CocoReader, read_coco_captions
from qwenvl_dist.data.formats.conversations import ConversationsReader
from qwenvl_dist.data.formats.csv_file import CsvReader
from qwenvl_dist.data.formats.llava import LlavaReader
from qwenvl_dist.data.formats.messages import MessagesReader
from qwenvl_dist.data.formats.reader import PackInput, SampleReader
from qwenvl_dist.data.formats.sample import (
    DEFAULT_JOIN,
    DEFAULT_PROMPT,
    SAFE_KEY,
    ImageRef,
    InlineImage,
    Picture,
    Sample,
    caption_messages,
    crowds_of,
    is_learned,
    normalise_caption,
    parse_sample_json,
    texts_in,
)
from qwenvl_dist.data.formats.tables import TableReader
from qwenvl_dist.data.formats.turns import TextRules

READERS: dict[str, Callable[[PackInput], SampleReader]] = {
    "coco": CocoReader,
    "csv": CsvReader,
    "conversations": ConversationsReader,
    "messages": MessagesReader,
    "llava": LlavaReader,
    "huggingface": TableReader,
}

__all__ = [
    "DEFAULT_JOIN",
    "DEFAULT_PROMPT",
    "READERS",
    "SAFE_KEY",
    "ImageRef",
    "InlineImage",
    "PackInput",
    "Picture",
    "Sample",
    "SampleReader",
    "TextRules",
    "caption_messages",
    "crowds_of",
    "is_learned",
    "normalise_caption",
    "parse_sample_json",
    "read_coco_captions",
    "texts_in",
]
