"""Names of pictures in annotations -> where their bytes are."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from qwenvl_dist.data.formats.sample import ImageRef, InlineImage, Picture, is_unicode, short
from qwenvl_dist.data.formats.turns import FormatError
from qwenvl_dist.data.storage import LocalStorage, Storage, is_remote, open_file, open_storage, scheme_of
from qwenvl_dist.errors import UserError

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
LONGEST_NAME = 1000  # characters; what is longer is no path, but may be a picture in base64
_DATA = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,")
LONGEST_SHOWN = 200  # characters of a name in an error
STORAGES_KEPT = 64  # of pictures that are named by URL


class Pictures:
    """Finds pictures by path, URL or data URL.

    A relative path is looked for below `images`, a folder or URL; without one beside the annotation file, then in the
    working directory. Below `images` a file that is not there under its whole path is taken by its name alone, so that
    paths of the machine that wrote the annotations do no harm.
    """

    def __init__(
        self, images: str | Path | None, annotations: str | Path, allow_missing: bool = False
    ) -> None:
        self.allow_missing = allow_missing
        self.folder = None if images is None else open_storage(images)
        if isinstance(self.folder, LocalStorage) and not self.folder.folder.is_dir():
            raise UserError(f"{images}: --images must be the folder that holds the pictures")
        self.beside = open_file(annotations)[0]
        self._remote: dict[str, Storage] = {}

    def find(self, name: object) -> Picture:
        """Return the picture. Raises FormatError when it is not there, unless missing ones are the packer's to find."""
        if not isinstance(name, str) or not name.strip() or not is_unicode(name) or "\0" in name:
            raise FormatError(f"names the picture {short(name)}: it must be a path or a URL")
        name = name.strip()
        if name.startswith("data:"):
            return _from_data_url(name)
        if len(name) > LONGEST_NAME and _BASE64.fullmatch(name):
            return _from_base64(name, name)
        if is_remote(name):
            return self._by_url(name)
        if scheme_of(name) == "file":
            name = unquote(urlsplit(name).path)
        return self._by_path(name)

    def _by_url(self, url: str) -> ImageRef:
        folder = url.partition("?")[0].rpartition("/")[0] + "?" + url.partition("?")[2]
        storage, name = open_file(url)
        if not name:
            raise FormatError(f"names the picture {url!r}: the URL must end with a file's name")
        if len(self._remote) >= STORAGES_KEPT:
            self._remote.clear()
        return ImageRef(Path(name), self._remote.setdefault(folder, storage))

    def _by_path(self, name: str) -> ImageRef:
        path = PurePosixPath(name.replace("\\", "/"))
        if self.folder is not None and not isinstance(self.folder, LocalStorage):
            if ".." in path.parts:
                raise FormatError(f"names the picture {name!r}: it must lie below --images")
            return ImageRef(Path(path.name if path.is_absolute() else path), self.folder)
        candidates = list(self._candidates(name))
        for candidate in candidates:
            if os.path.isfile(candidate):  # noqa: PTH113 (once a sample: a Path takes three times as long)
                return ImageRef(Path(candidate))
        if self.folder is None and not isinstance(self.beside, LocalStorage) and not path.is_absolute():
            return ImageRef(Path(path), self.beside)
        if not self.allow_missing:
            raise FormatError(
                f"names the picture {name[:LONGEST_SHOWN]!r}, there is no file "
                f"{' or '.join(one[:LONGEST_SHOWN] for one in dict.fromkeys(candidates))}: "
                "name the folder that holds it with --images, or pack without it (--skip-bad)"
            )
        return ImageRef(Path(candidates[0]))

    def _candidates(self, name: str) -> Iterable[str]:
        names = [name, name.replace("\\", "/")] if "\\" in name else [name]  # as Windows writes it
        is_absolute = name.startswith("/")
        for one in names:
            if is_absolute:
                yield one
            elif isinstance(self.folder, LocalStorage):
                yield f"{self.folder.folder}/{one}"
            else:
                if isinstance(self.beside, LocalStorage):
                    yield f"{self.beside.folder}/{one}"
                yield one
        if isinstance(self.folder, LocalStorage):
            yield f"{self.folder.folder}/{names[-1].rpartition('/')[2]}"


def _from_data_url(url: str) -> InlineImage:
    head = _DATA.match(url)
    if head is None:
        raise FormatError(f"has the data URL {short(url)}: it must begin like 'data:image/jpeg;base64,'")
    return _from_base64(url[head.end() :], url)


def _from_base64(text: str, name: str) -> InlineImage:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"has a data URL that is not base64 ({error}): write it anew") from None
    return InlineImage(data, f"{name[:24]}…")
