"""Which pictures to fetch: a text file with a URL a line, or a column of a CSV file; and what each is to be called."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from qwenvl_dist.data.formats.csv_file import MAX_FIELD_CHARACTERS, delimiter_of
from qwenvl_dist.errors import UserError

RECORD_NAME = "images.jsonl"
FAILED_NAME = "failed.jsonl"
CAPTIONS_NAME = "captions.csv"
OWN_NAMES = {RECORD_NAME, FAILED_NAME, CAPTIONS_NAME}  # no picture may take them
MAX_NAME_CHARACTERS = 120  # file systems take 255 bytes


@dataclass(frozen=True)
class UrlList:
    """A file that names pictures, read anew each time: it may be larger than memory."""

    path: Path
    column: str | None = None  # of a CSV file; None for a text file

    def __iter__(self) -> Iterator[str]:
        """Yield the URLs in the file's order, repeated ones too. `UserError` names the line that holds none."""
        if self.column is not None:
            for number, row in self.rows():
                yield _checked(row[self.column], f"{self.path}, line {number}")
            return
        with self.path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                text = line.strip()
                if text and not text.startswith("#"):
                    yield _checked(text, f"{self.path}, line {number}")

    def rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield the rows of a CSV file with the number of the line that each ends on."""
        assert self.column is not None
        before = csv.field_size_limit(MAX_FIELD_CHARACTERS)
        try:
            yield from self._rows(self.column)
        except csv.Error as error:
            raise UserError(f"{self.path}: is not CSV ({error}); mend it") from None
        finally:
            csv.field_size_limit(before)

    def _rows(self, column: str) -> Iterator[tuple[int, dict[str, str]]]:
        with self.path.open(newline="", encoding="utf-8-sig") as file:
            mark = delimiter_of(file.readline(), [column])
            file.seek(0)
            reader = csv.DictReader(file, strict=True, skipinitialspace=True, delimiter=mark)
            names = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            if column not in names:
                raise UserError(
                    f"{self.path}: has no column {column!r}, its columns are {', '.join(names) or 'none'}; "
                    "name the one of the addresses with --column"
                )
            for row in reader:
                if None in row or None in row.values():
                    where = f"{self.path}, line {reader.line_num}"
                    raise UserError(f"{where}: the row has not the header's {len(names)} fields; mend it")
                yield reader.line_num, row

    def clashes(self) -> set[str]:
        """Return the file names that several different URLs would get. Reads the list once."""
        owner: dict[str, bytes] = {}
        clashing = set()
        for url in self:
            name = _plain_name(url).lower()  # some file systems do not tell cases apart
            digest = hashlib.sha256(url.encode()).digest()[:8]
            if owner.setdefault(name, digest) != digest:
                clashing.add(name)
        if not owner:
            raise UserError(f"{self.path}: names no picture; a text file has one URL a line")
        return clashing


def file_name(url: str, clashes: set[str]) -> str:
    """Return what a picture is called here: the last part of its URL, with a hash where others end alike."""
    name = _plain_name(url)
    if name.lower() not in clashes | OWN_NAMES:
        return name
    stem, dot, extension = name.rpartition(".")
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return f"{stem}-{digest}.{extension}" if dot else f"{name}-{digest}"


def _plain_name(url: str) -> str:
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".")[-MAX_NAME_CHARACTERS:]
    return name or "picture"


def _checked(text: str, where: str) -> str:
    text = text.strip()
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and bool(parts.path.strip("/"))
    except ValueError:
        good = False
    if not good:
        raise UserError(f"{where}: {text[:100]!r} is no http(s) URL of a file; mend or drop the line")
    return text
