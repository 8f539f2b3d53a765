"""Captions of single pictures: files, folders of them, URLs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from qwenvl_dist.data.formats import caption_messages
from qwenvl_dist.data.images import decode
from qwenvl_dist.data.prompts import Asked, PromptBatch
from qwenvl_dist.data.sizes import UnreadableImage
from qwenvl_dist.data.storage import is_remote, open_file
from qwenvl_dist.errors import UserError
from qwenvl_dist.evaluate.captioner import Captioner
from qwenvl_dist.evaluate.compare import Comparison
from qwenvl_dist.logs import progress

PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def find_pictures(places: Sequence[str | Path]) -> dict[str, bytes]:
    """Return the pictures' bytes by name, folders replaced by what is in them. Raises UserError for a fault in one.

    A place is a file, a folder, or a URL of a file in any storage that shards may lie in. All are read before a model
    is loaded: a fault should not come up after minutes.
    """
    return {name: _read(name) for place in places for name in _names(str(place))}


def _names(place: str) -> Iterator[str]:
    path = Path(place)
    if is_remote(place) or not path.is_dir():
        yield place
        return
    inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
    if not inside:
        raise UserError(
            f"{place}: holds no picture ({', '.join(PICTURE_SUFFIXES)}); name another folder or files"
        )
    yield from map(str, inside)


def _read(place: str) -> bytes:
    try:
        if is_remote(place):
            storage, name = open_file(place)
            data = storage.read_bytes(name)
        else:
            data = Path(place).read_bytes()
        decode(data)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{place}: cannot be read ({reason}); name a picture, a folder of them, or a URL"
        ) from error
    except UnreadableImage as error:
        raise UserError(
            f"{place}: {error}; name a whole JPEG, PNG, WebP, GIF, BMP or TIFF picture"
        ) from error
    return data


def predict(
    captioner: Captioner, pictures: dict[str, bytes], prompt: str, *, max_new_tokens: int, batch_size: int
) -> list[Comparison]:
    """Return a caption for each picture; with an adapter also what the base says."""
    encoder = captioner.prompt_encoder()
    messages = caption_messages(prompt, "")[:1]
    names = list(pictures)
    rows: list[Comparison] = []
    with progress(total=len(names), description="predict") as bar:
        for start in range(0, len(names), batch_size):
            prompts = []
            for name in names[start : start + batch_size]:
                try:
                    prompts.append(encoder.prompt(messages, [pictures[name]], Asked(name, name, "", prompt)))
                except (UnreadableImage, ValueError) as error:
                    raise UserError(f"{name}: {error}") from error
            batch = encoder.collate(prompts)
            after = captioner.answer(batch, max_new_tokens)
            before = _answer_before(captioner, batch, max_new_tokens)
            for asked, caption, earlier in zip(batch.asked, after, before, strict=True):
                assert asked is not None, "every prompt here has a picture"
                rows.append(Comparison(asked.key, caption, earlier))
            bar.advance(len(prompts))
    return rows


def _answer_before(captioner: Captioner, batch: PromptBatch, max_new_tokens: int) -> Sequence[str | None]:
    if captioner.adapter is None:
        return [None] * len(batch.asked)
    with captioner.without_adapter():
        return captioner.answer(batch, max_new_tokens)
