"""How the several captions of a picture are learned: what the shards say of it, and what the recipe makes of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from qwenvl_dist.errors import UserError

if TYPE_CHECKING:
    from qwenvl_dist.config import Recipe
    from qwenvl_dist.data.index import Manifest

# join: all as one text; each: all behind one prefix, each as if it were alone; sample: one of them an epoch.
CaptionsMode = Literal["join", "each", "sample"]
CAPTIONS_MODES: tuple[CaptionsMode, ...] = get_args(CaptionsMode)
DEFAULT_JOIN = "&&"


@dataclass(frozen=True)
class PackedCaptions:
    """What a data set's manifest says of its captions; a recipe that says nothing itself goes by it."""

    mark: str | None = None  # between the captions of a text
    mode: CaptionsMode | None = None  # None leaves it to the recipe

    @classmethod
    def from_json(cls, content: Any) -> PackedCaptions:
        """Read the manifest's entry; None is that of older ones. Raises ValueError."""
        if content is None:
            return cls()
        mark, mode = content.get("mark"), content.get("mode")
        if (mode is not None and mode not in CAPTIONS_MODES) or not (mark is None or isinstance(mark, str)):
            raise ValueError(f"captions are {content}")
        return cls(mark or None, mode)

    def to_json(self) -> dict[str, str]:
        """Return what is said."""
        return {name: value for name, value in vars(self).items() if value is not None}


def as_packed(recipe: Recipe, manifests: Sequence[Manifest]) -> Recipe:
    """Return the recipe with `data.captions_mode` and `data.caption_mark` filled in where it leaves them open.

    `manifests` are those of its training sets. Sets that say nothing follow those that do. Raises UserError where two
    of them say different things, or where `model.attention` does not go with the mode.
    """
    data = recipe.data
    said = {str(each): one.captions for each, one in zip(data.training_sets, manifests, strict=True)}
    mode = data.captions_mode or _only("captions_mode", {at: one.mode for at, one in said.items()}) or "join"
    mark = data.caption_mark
    if mark is None:
        marks = {at: one.mark for at, one in said.items()}
        # Joined text is learned as it is, whatever its marks; then only scores look for one.
        mark = (
            next(filter(None, marks.values()), None) if mode == "join" else _only("caption_mark", marks)
        ) or DEFAULT_JOIN
    conflict = attention_conflict(recipe.model.attention, mode)
    if conflict:
        raise UserError(conflict)
    filled = data.model_copy(update={"captions_mode": mode, "caption_mark": mark})
    return recipe.model_copy(update={"data": filled})


def _only(key: str, said: dict[str, Any]) -> Any:
    """Return the one thing that is said, None where nothing is."""
    told = {at: value for at, value in said.items() if value is not None}
    if len(set(told.values())) > 1:
        (one, first), (other, second) = next(
            ((a, x), (b, y)) for a, x in told.items() for b, y in told.items() if x != y
        )
        raise UserError(
            f"{one} was packed with {key} {first} and {other} with {second}: say in data.{key} which one the run takes"
        )
    return next(iter(told.values()), None)


def attention_conflict(attention: str, mode: CaptionsMode) -> str | None:
    """Return why `model.attention` does not go with a way to learn captions, None where it does."""
    if mode == "each" and attention == "flash_attention_2":
        return (
            "data.captions_mode = each needs a mask, which flash_attention_2 does not take; "
            "set model.attention to auto or sdpa, or captions_mode to join"
        )
    if mode != "each" and attention == "flex_attention":
        return (
            "model.attention = flex_attention is for the mask of data.captions_mode = each; "
            "set model.attention to auto, or captions_mode to each"
        )
    return None
