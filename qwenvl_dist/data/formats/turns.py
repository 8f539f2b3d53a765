"""Turns of a conversation, as many programs write them, -> the messages that a shard holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwenvl_dist.data.formats.sample import (
    DEFAULT_JOIN,
    DEFAULT_PROMPT,
    TURN_WEIGHTS,
    is_learned,
    is_unicode,
    normalise_caption,
    short,
)
from qwenvl_dist.errors import UserError

ROLE_OF = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
# What the model's template writes around turns and pictures: inside a text it would end or begin one.
RESERVED = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<image>", "<video>", "<audio>",
)  # fmt: skip
# Where a picture stands in a text: its place alone, or with its name, as the article and older ms-swift write it.
IMAGE_MARK = re.compile(
    r"<image>|<\|vision_start\|>(?:<\|image_pad\|>|(.*?))<\|vision_end\|>|<img>(.*?)</img>", re.DOTALL
)


@dataclass(frozen=True)
class Named:
    """A picture inside a turn, by the name that its text gives; None: the next one of a list beside it."""

    name: str | None


Part = str | Named


@dataclass(frozen=True)
class Turn:
    """What one side said: texts and pictures in their order."""

    role: str
    parts: list[Part]
    is_learned: bool = True  # of the assistant's; the others' never are


class FormatError(ValueError):
    """What is wrong with a record, and how to mend it; whoever reads the file adds where it stands."""


@dataclass
class TextRules:
    """How the texts of all formats become those of the shards.

    An assistant's words are captions: stripped, each piece of white space one space, around every join mark. With
    `keep_white_space` only their ends are stripped. A user's turn without words gets the prompt.
    """

    prompt: str = DEFAULT_PROMPT
    join: str = DEFAULT_JOIN
    keep_white_space: bool = False
    line_breaks_lost: int = field(
        default=0, init=False, compare=False
    )  # answers that had some inside, so far

    def __post_init__(self) -> None:
        if not self.join:
            raise UserError("--join '' is empty: captions need a mark between them, for instance '&&'")

    def caption(self, text: str) -> str:
        """Return one caption. Raises FormatError when nothing is left of it, or when it is not for a model to learn."""
        text = text.strip()
        if not self.keep_white_space:
            self.line_breaks_lost += "\n" in text
            text = normalise_caption(text, self.join)
        if not text:
            raise FormatError("has an empty caption: fill it in, or drop it")
        check_text(text)
        return text

    def captions(self, texts: Sequence[str]) -> str:
        """Return several captions of one picture, joined."""
        if not texts:
            raise FormatError("has no caption: give it one, or drop it")
        return self.join.join(self.caption(text) for text in texts)


def check_text(text: str) -> None:
    """Raise FormatError for a text that the model's template cannot carry."""
    if not is_unicode(text):
        raise FormatError("holds half a character (a lone surrogate): write it as UTF-8")
    if "\0" in text:
        raise FormatError("holds a NUL character, which no text has: take it out")
    for token in RESERVED if "<" in text else ():
        if token in text:
            raise FormatError(
                f"has {token!r} inside a text, which has a meaning of its own there: take it out"
            )


def texts_of(value: Any) -> list[str] | None:
    """Return a text, or a list of them, as a list; None for anything else."""
    texts = value if isinstance(value, list) else [value]
    return texts if all(isinstance(text, str) for text in texts) else None


def split_marks(text: str) -> list[Part]:
    """Return the pieces of a text between the marks of pictures."""
    parts: list[Part] = []
    end = 0
    for match in IMAGE_MARK.finditer(text):
        name = next((group for group in match.groups() if group is not None), None)
        parts += [text[end : match.start()], Named(name)]
        end = match.end()
    return [*parts, text[end:]]


def role_of(name: object) -> str:
    """Return our role for another program's word. Raises FormatError for one that we have not."""
    role = ROLE_OF.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise FormatError(f"has the role {name!r}: it must be one of {', '.join(ROLE_OF)}; drop such turns")
    return role


def learned_by(turn: dict[str, Any], where: str) -> bool:
    """Return whether a turn, by its own members, is to be learned. Raises FormatError for something in between."""
    given = {name: turn[name] for name in TURN_WEIGHTS if turn.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise FormatError(
                f"has in {where} {name!r} {short(value)}: a turn is learned or not, so it must be true, false, 1 or 0; "
                f"choose one, or drop {name!r}"
            )
    return all(given.values())


def to_messages(turns: Iterable[Turn], rules: TextRules) -> tuple[list[dict[str, Any]], list[Named]]:
    """Return the messages and, in their order, the pictures that they speak of. Raises FormatError.

    Pictures that only follow a user's words come before them, as in the article and as Qwen's own examples have it;
    those between words stay where they are.
    """
    messages: list[dict[str, Any]] = []
    pictures: list[Named] = []
    for turn in turns:
        parts = _clean(turn, rules)
        if turn.role == "system" and messages:
            raise FormatError("has a system turn that is not the first: move it to the front")
        if turn.role != "user" and any(isinstance(part, Named) for part in parts):
            raise FormatError(f"has a picture in a turn of the {turn.role}: it must be in one of the user")
        if not parts:
            raise FormatError(f"has an empty turn of the {turn.role}: fill it in, or drop it")
        pictures += [part for part in parts if isinstance(part, Named)]
        content = [
            {"type": "image"} if isinstance(part, Named) else {"type": "text", "text": part} for part in parts
        ]
        unlearned = {"loss": False} if turn.role == "assistant" and not turn.is_learned else {}
        messages.append({"role": turn.role, "content": content, **unlearned})
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise FormatError("has no turn of the assistant, so there is nothing to learn: add one, or drop it")
    if not any(map(is_learned, messages)):
        raise FormatError(
            "has 'loss' false or 'weight' 0 on every turn of the assistant, so there is nothing to learn: let one be "
            "learned, or drop it"
        )
    if roles[-1] != "assistant":
        raise FormatError("ends with a turn that nobody answers: add the assistant's, or drop the last")
    return messages, pictures


def _clean(turn: Turn, rules: TextRules) -> list[Part]:
    """Return the parts, texts stripped and never two in a row, pictures in front of words that they only follow."""
    joined: list[Part] = []
    for part in turn.parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    parts: list[Part] = []
    for part in joined:
        if isinstance(part, str):
            if not part.strip():
                continue
            check_text(part)
            part = rules.caption(part) if turn.role == "assistant" else part.strip()
        parts.append(part)
    texts = [part for part in parts if isinstance(part, str)]
    if turn.role == "user" and parts and not texts:
        return [*parts, rules.prompt]
    if len(texts) == 1 and isinstance(parts[0], str):
        return [*parts[1:], parts[0]]
    return parts


def place(turns: Sequence[Turn], names: Sequence[Any]) -> Sequence[Turn]:
    """Return the turns with places for pictures that stand beside a text which speaks of none.

    They come before the first words of the user, as ms-swift has it.
    """
    if not names or any(isinstance(part, Named) for turn in turns for part in turn.parts):
        return turns
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return turns
    marked = Turn("user", [*(Named(None) for _ in names), *turns[first].parts])
    return [*turns[:first], marked, *turns[first + 1 :]]


def expand(pictures: Sequence[Named], names: Sequence[Any]) -> list[Any]:
    """Return what each picture is, those without a name in the order of `names`. Raises FormatError."""
    marks = sum(picture.name is None for picture in pictures)
    if marks != len(names):
        raise FormatError(
            f"names {len(names)} pictures beside the text, which has {marks} places for them: "
            "write <image> once for each, where it belongs"
        )
    rest = iter(names)
    return [next(rest) if picture.name is None else picture.name for picture in pictures]
