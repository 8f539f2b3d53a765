"""What of an answer is scored, and against what: one caption a picture, as in COCO's results format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qwenvl_dist.data.boxes import NamedBox, holds_boxes

if TYPE_CHECKING:
    from qwenvl_dist.data.prompts import Asked

Scored = Literal["first", "whole"]


@dataclass(frozen=True)
class ImageCaption:
    """One picture: what was said about it, and by its annotators."""

    image_id: int | str
    key: str  # of the first sample with this picture
    prompt: str
    references: tuple[str, ...]
    caption: str  # what is scored
    answer: str  # all that the model said
    crowds: tuple[NamedBox, ...] = ()  # of a question about boxes

    def to_json(self) -> dict[str, object]:
        """Return the picture's entry in a file of generations."""
        entry = {**vars(self), "references": list(self.references)}
        crowds = [crowd.to_json() for crowd in entry.pop("crowds")]
        return {**entry, "crowds": crowds} if crowds else entry


def split_captions(text: str, mark: str) -> list[str]:
    """Return the captions that `mark` separates in a text, white space made single, empty ones left out."""
    captions = (" ".join(part.split()) for part in text.split(mark))
    return [caption for caption in captions if caption]


def scored_caption(answer: str, mark: str, scored: Scored) -> str:
    """Return the part of an answer that is scored: its first caption, or all of it with single white space."""
    if scored == "whole":
        return " ".join(answer.split())
    return next(iter(split_captions(answer, mark)), "")


def by_image(answers: Iterable[tuple[Asked, str]], mark: str, scored: Scored) -> list[ImageCaption]:
    """Gather answers by picture, in order of first appearance.

    A picture that several samples show keeps the answer of the first, and has the references of all. Questions about
    boxes differ even where the picture is the same: each stays alone.
    """
    found: dict[tuple[int | str, str], ImageCaption] = {}
    for asked, answer in answers:
        which = (asked.image_id, asked.key if holds_boxes(asked.reference) else "")
        earlier = found.get(which)
        references = tuple(split_captions(asked.reference, mark))
        if earlier is not None:
            known = earlier.references
            references = known + tuple(text for text in references if text not in known)
        found[which] = ImageCaption(
            asked.image_id,
            earlier.key if earlier else asked.key,
            earlier.prompt if earlier else asked.prompt,
            references,
            earlier.caption if earlier else scored_caption(answer, mark, scored),
            earlier.answer if earlier else answer,
            earlier.crowds if earlier else asked.crowds,
        )
    return list(found.values())
