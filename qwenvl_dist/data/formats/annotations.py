"""Annotation files read as a stream: memory holds one record, whatever the size of the file."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import dropwhile
from operator import itemgetter
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO

from qwenvl_dist.data.storage import LocalStorage, open_file
from qwenvl_dist.errors import UserError

CHUNK_BYTES = 64 * 1024
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
# How files begin that are no text, and what to do with them.
OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive or an Excel sheet: unpack it, or save it as CSV",
    b"BZh": "compressed by bzip2: unpack it, or compress it by gzip",
    b"\xfd7zXZ": "compressed by xz: unpack it, or compress it by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it, or compress it by gzip",
    b"PAR1": "a parquet file: read it with --source huggingface",
    b"\xff\xfe": "UTF-16: convert the file to UTF-8",
    b"\xfe\xff": "UTF-16: convert the file to UTF-8",
}
PAIR_BYTES = 12  # of two escapes that are one character
_HIGH = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")
_PAIR_OR_LONE = re.compile(
    _HIGH.pattern + rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)


@dataclass(frozen=True)
class Record:
    """One entry of an annotation file, and where an error says that it stands."""

    where: str  # "file: line 7", "file: images[6]"
    value: Any


@dataclass
class AnnotationFile:
    """A file or URL that can be opened again and again; a remote one is copied to the temporary folder once."""

    location: str | Path
    option: str  # of the command line that names it
    kind: str  # what it must be, for errors
    _copy: Any = field(default=None, repr=False)

    def __str__(self) -> str:
        return str(self.location)

    def open(self) -> BinaryIO:
        """Return the file at its beginning, behind a byte order mark, unpacked where it is compressed by gzip.

        `UserError` when it cannot be read, there or later, or is no text.
        """
        try:
            file: Any = self._path().open("rb")
        except FileNotFoundError:
            raise UserError(f"{self}: no such file; {self.option} must name {self.kind}") from None
        except OSError as error:
            raise UserError(
                f"{self}: cannot be read ({error.strerror or error}); {self.option} must name a file"
            ) from None
        beginning = file.read(8)
        file.seek(0)
        other = next((what for mark, what in OTHER_KINDS.items() if beginning.startswith(mark)), None)
        if other is not None:
            file.close()
            raise UserError(f"{self}: is {other}; {self.option} must be {self.kind}")
        if beginning.startswith(GZIP):
            file = _Unpacked(file, f"{self}")
        if file.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
            file.seek(0)
        return file

    def _path(self) -> Path:
        storage, name = open_file(self.location)
        if isinstance(storage, LocalStorage):
            return storage.folder / name
        if self._copy is None:
            copy = NamedTemporaryFile(prefix="qwenvl-dist-")  # noqa: SIM115 (it lives as long as this object)
            with open(copy.name, "wb") as target:  # noqa: PTH123
                storage.download(name, target)
            self._copy = copy
        return Path(self._copy.name)

    def records(self) -> Iterator[Record]:
        """Yield the records of a JSON array, or of JSON lines. `UserError` names the line that is neither."""
        with self.open() as file:
            first = file.read(1)
            while first and first.isspace():
                first = file.read(1)
        if first == b"[":
            yield from self.items("item")
        else:
            yield from self._json_lines()

    def _json_lines(self) -> Iterator[Record]:
        for number, line in self.lines():
            if not line.strip():
                continue
            where = f"{self}: line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{where}: not JSON ({error}); {self.option} must be {self.kind}: "
                    "a JSON array, or one JSON object a line"
                ) from None
            yield Record(where, value)

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield number, from 1, and text of each line. `UserError` for one that is not UTF-8."""
        with self.open() as file:
            for number, line in enumerate(file, 1):
                try:
                    yield number, line.decode()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{self}: line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8"
                    ) from None

    def items(self, prefix: str, without: str | None = None) -> Iterator[Record]:
        """Yield the items of a list in a JSON file: `item` for the file itself, `images.item` for the list 'images'.

        Members called `without` are passed over, however large they are. Yields nothing where the list is not there.
        `UserError` with the line for what is not JSON.
        """
        name = prefix.removesuffix("item").removesuffix(".")
        try:
            for number, value in enumerate(self._items(prefix, without)):
                yield Record(f"{self}: {name}[{number}]", value)
        except _NotJsonError as error:
            raise UserError(
                f"{self}: line {error.line}: not JSON ({error.reason}); {self.option} must be {self.kind}"
            ) from None

    def _items(self, prefix: str, without: str | None) -> Iterator[Any]:
        """As `items`, the values alone.

        The C parser makes '?' of a lone surrogate and refuses integers of more than 64 bits: where one of them comes up
        the file is read again by the one in Python, and what was yielded already is passed over.
        """
        import ijson

        yielded = 0
        with self.open() as file:
            fed = _Fed(file)
            try:
                for value in _values(ijson, fed, prefix, without):
                    yield value
                    yielded += 1
                return
            except (ijson.JSONError, _LoneSurrogateError) as error:
                if isinstance(error, ijson.JSONError) and "integer overflow" not in str(error):
                    raise self._not_json(prefix, fed.last) from None
        slow = ijson.get_backend("python")
        with self.open() as file:
            try:
                for number, value in enumerate(_values(slow, file, prefix, without)):
                    if number >= yielded:
                        yield value
            except (ijson.JSONError, ValueError) as error:
                raise _NotJsonError(1 + _count_lines(self.open(), None), str(error).split("\n")[0]) from None

    def _not_json(self, prefix: str, start: int) -> _NotJsonError:
        """Return where and why the file ends to be JSON, known to lie in or behind the chunk at `start`."""
        import ijson

        with self.open() as file:
            fed = _Fed(file, slowly_from=start)
            try:
                for _ in ijson.items(fed, prefix, use_float=True):
                    pass
            except ijson.JSONError as error:
                text = error.args[0] if error.args else ""
                text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
                reason = text.strip().split("\n")[0]
                return _NotJsonError(1 + _count_lines(self.open(), fed.position), reason)
        raise AssertionError("a second look found it to be JSON")

    def shape(self, name: str) -> str | None:
        """Return what the member `name` of the file's object is: `list`, another word for something else, or None.

        Slow: for an error's text.
        """
        import ijson

        with self.open() as file:
            for prefix, event, _ in ijson.get_backend("python").parse(file):
                if prefix == "" and event not in ("start_map", "map_key", "end_map"):
                    return None
                if prefix == name:
                    return "list" if event == "start_array" else event
        return None


def _values(parser: Any, file: Any, prefix: str, without: str | None) -> Iterator[Any]:
    """Yield the values at `prefix`, without the members called so: none of their content is held."""
    if without is None:
        return parser.items(file, prefix, use_float=True)
    events = parser.basic_parse(file, use_float=True)
    return parser.items(parser.parse(_without(events, without)), prefix)


def _without(events: Iterator[tuple[str, Any]], member: str) -> Iterator[tuple[str, Any]]:
    """Yield a parser's events but those of the members called so."""
    names = map(itemgetter(0), events)
    for event in events:
        if event != ("map_key", member):
            yield event
            continue
        depth = _DEPTH.get(next(names), 0)
        while depth:  # long rows of numbers go by without a line of Python each
            depth += _DEPTH.get(next(dropwhile("number".__eq__, names)), 0)


_DEPTH = {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}


class _Unpacked(gzip.GzipFile):
    """What a gzip file holds; damage is a `UserError` where it comes up."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._file, self._name = file, name

    def read(self, size: int | None = -1) -> bytes:
        return self._guarded(lambda: super(_Unpacked, self).read(size))

    def readline(self, size: int | None = -1) -> bytes:
        return self._guarded(lambda: super(_Unpacked, self).readline(size))

    def _guarded(self, action: Callable[[], bytes]) -> bytes:
        try:
            return action()
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{self._name}: cannot be unpacked ({error}): fetch it again") from None

    def close(self) -> None:
        super().close()
        self._file.close()


class _NotJsonError(Exception):
    def __init__(self, line: int, reason: str) -> None:
        super().__init__(line, reason)
        self.line, self.reason = line, reason


class _LoneSurrogateError(Exception):
    """An escape of half a character came by."""


class _Fed:
    """A file as the parser reads it: watched for lone surrogates, or byte by byte from a place on.

    No escape is parted by the end of a piece, so that what is yielded from one holds no lone surrogate.
    """

    def __init__(self, file: BinaryIO, slowly_from: int | None = None) -> None:
        self.file, self.slowly_from = file, slowly_from
        self.last = self.position = file.tell()
        self._kept = b""

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        if size == 0:  # ijson asks whether it gets bytes or characters
            return b""
        if self.slowly_from is None:
            data = self._watched()
        else:
            data = self.file.read(max(1, min(CHUNK_BYTES, self.slowly_from - self.position)))
        self.last = self.position
        self.position += len(data)
        return data

    def _watched(self) -> bytes:
        new = self.file.read(CHUNK_BYTES)
        data = self._kept + new
        end = len(data)
        escape = data.find(b"\\", max(0, end - PAIR_BYTES + 1))
        if len(new) == CHUNK_BYTES and escape >= 0:
            begins_before = escape >= 6 and _HIGH.match(data, escape - 6) is not None
            end = escape - 6 if begins_before else escape
        data, self._kept = data[:end], data[end:]
        if b"\\ud" in data or b"\\uD" in data:
            for match in _PAIR_OR_LONE.finditer(data):
                if match.group(1):
                    raise _LoneSurrogateError
        return data


def _count_lines(file: BinaryIO, until: int | None) -> int:
    """Return the line ends before the byte `until`, None for all."""
    count = 0
    with file:
        left = until if until is not None else 1 << 62
        file.seek(0)
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count
