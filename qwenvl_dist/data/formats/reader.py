"""What the readers of all formats have in common: options, the look at the whole file before the first sample, keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from qwenvl_dist.data.formats.annotations import AnnotationFile, Record
from qwenvl_dist.data.formats.headers import READS_AT_A_TIME, Header, HeaderLog
from qwenvl_dist.data.formats.objects import Objects, objects_of
from qwenvl_dist.data.formats.pictures import Pictures
from qwenvl_dist.data.formats.sample import SAFE_KEY, Picture, Sample, short, texts_in
from qwenvl_dist.data.formats.turns import FormatError, TextRules, Turn, expand, place, to_messages
from qwenvl_dist.data.keys import KeyLog
from qwenvl_dist.errors import UserError


@dataclass(frozen=True)
class PackInput:
    """What `shards pack` was told about its input."""

    location: str | Path
    images: str | Path | None = None
    rules: TextRules = field(default_factory=TextRules)
    allow_missing: bool = False  # leave out records that cannot be used, and missing pictures to the packer
    split: str | None = None  # of a dataset dictionary
    image_column: str | None = None
    text_column: str | None = None


class SampleReader(ABC):
    """The samples of one input: iterated again and again, each time read anew, so that no more than one is in memory.

    The first `len()` or iteration looks at everything: a fault anywhere is a `UserError` before there is a sample.
    Keys are unique and safe.
    """

    def __init__(self, given: PackInput) -> None:
        self.given, self.rules = given, given.rules
        # With --skip-bad: where a record stands that cannot be used, and why.
        self.unusable: list[tuple[str, str]] = []
        self._count: int | None = None

    @abstractmethod
    def _examine(self) -> int:
        """Check the whole input, choose keys, return the number of samples."""

    @abstractmethod
    def _samples(self) -> Iterator[Sample]:
        """Yield the samples of an input that was examined."""

    def __len__(self) -> int:
        if self._count is None:
            self._count = self._examine()
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        if len(self):
            yield from self._samples()


@dataclass(frozen=True)
class Draft:
    """A sample that has no key yet."""

    messages: list[dict[str, Any]]
    images: list[Picture]
    own_id: int | str | None = None  # what the record calls itself
    image_id: int | str | None = None  # what it calls its picture
    objects: Any = None  # as the record has them: what <ref-object> and <bbox> in the messages stand for


# Where a record stands, its sample or what is wrong with it, and what is still to be filled into its texts.
_Found = tuple[str, Draft | FormatError, Objects | None]
_Row = Iterator[tuple[_Found, Sequence[Picture]]]


class RecordReader(SampleReader):
    """A reader of a format in which each record is one sample.

    Its keys are the records' own ids when all have one that is safe and they differ; else the stems of their first
    pictures, under the same condition; else the records' numbers.
    """

    source: str  # name of the format
    heads_at_a_time = READS_AT_A_TIME  # of pictures that boxes in pixels lie in

    def __init__(self, given: PackInput) -> None:
        super().__init__(given)
        self._key_of = _number
        self._headers: HeaderLog | None = None

    @abstractmethod
    def _records(self) -> Iterable[Record]:
        """Yield the records, each time from the beginning."""

    @abstractmethod
    def _draft(self, value: Any) -> Draft:
        """Return the sample of one record. Raises FormatError."""

    def _read(self) -> _Row:
        """Yield what the records are, with the pictures whose headers must be known to fill in their objects."""
        for record in self._records():
            objects, pictures = None, []
            try:
                found = self._draft(record.value)
                objects = objects_of(found.objects, texts_in(found.messages), len(found.images))
                if objects is not None:
                    pictures = [found.images[number] for number in objects.measured]
            except FormatError as error:
                found = error
            yield (record.where, found, objects), pictures

    def _drafts(
        self, with_headers: Callable[[_Row], Iterator[tuple[_Found, list[Header | None]]]]
    ) -> Iterator[Draft]:
        unusable: list[tuple[str, str]] = []
        for (where, draft, objects), headers in with_headers(self._read()):
            try:
                if isinstance(draft, FormatError):
                    raise draft
                if objects is not None:
                    draft = replace(draft, messages=objects.fill(draft.messages, draft.images, headers))
            except FormatError as error:
                if not self.given.allow_missing:
                    raise UserError(f"{where} {error}") from None
                unusable.append((where, str(error)))
                continue
            yield draft
        self.unusable = unusable

    def _examine(self) -> int:
        count = 0
        headers = HeaderLog(self.heads_at_a_time)
        with KeyLog() as ids, KeyLog() as stems:
            for draft in self._drafts(headers.read):
                ids.add(_safe(_own_key(count, draft)))
                stems.add(_safe(_stem_key(count, draft)))
                count += 1
            if not count and self.unusable:
                where, reason = self.unusable[0]
                raise UserError(f"{where} {reason}; no other record can be used either")
            if not count:
                raise UserError(f"{self.given.location}: holds no record, there is nothing to pack")
            if ids.all_differ():
                self._key_of = _own_key
            elif stems.all_differ():
                self._key_of = _stem_key
        self._headers = headers
        return count

    def _samples(self) -> Iterator[Sample]:
        assert self._headers is not None
        for number, draft in enumerate(self._drafts(self._headers.recall)):
            key = self._key_of(number, draft)
            assert key is not None, "the input changed while it was packed"
            yield Sample(key, draft.messages, draft.images, _image_id(draft), self.source)


class FileReader(RecordReader):
    """A record reader of an annotation file."""

    kind: str  # what the file must be, for errors

    def __init__(self, given: PackInput) -> None:
        super().__init__(given)
        self.file = AnnotationFile(given.location, "--input", self.kind)
        self.pictures = Pictures(given.images, given.location, given.allow_missing)

    def _records(self) -> Iterable[Record]:
        return self.file.records()

    def _conversation(
        self, value: dict[str, Any], turns: Iterable[Turn], names: list[Any] | None = None
    ) -> Draft:
        """Return the draft of a record whose turns are known; `names` are its pictures that the text does not name."""
        messages, placed = to_messages(place([*turns], names or []), self.rules)
        images = [self.pictures.find(name) for name in expand(placed, names or [])]
        return Draft(messages, images, id_of(value, "id"), id_of(value, "image_id"), value.get("objects"))


def need_object(value: Any, example: str) -> dict[str, Any]:
    """Return a record that is an object, or raise FormatError."""
    if not isinstance(value, dict):
        raise FormatError(f"is {short(value)}: it must be an object like {example}")
    return value


def need_list(value: Any, name: str, example: str) -> list[Any]:
    """Return a record's member that is a list with something in it, or raise FormatError."""
    if not isinstance(value, list) or not value:
        raise FormatError(f"has no list {name!r}: it must be like {example}")
    return value


def id_of(value: dict[str, Any], name: str) -> int | str | None:
    """Return an id, None where there is none that can serve as one."""
    found = value.get(name)
    if isinstance(found, bool) or not isinstance(found, (int, str)):
        return None
    return found


def key_of_id(own_id: int | str) -> str:
    """Return the key that an id gives, which may not be a safe one."""
    return f"{own_id:012d}" if isinstance(own_id, int) else own_id


def id_of_stem(stem: str) -> int | str:
    """Return the id that a picture's name gives: a number where it is one, as in COCO."""
    return int(stem) if stem.isascii() and stem.isdecimal() else stem


def stem_of(picture: Picture) -> str | None:
    """Return a picture's file name without its ending, None where it has no name."""
    path = getattr(picture, "path", None)
    return None if path is None else PurePosixPath(path).stem


def _number(number: int, draft: Draft) -> str:
    return f"{number:09d}"


def _own_key(number: int, draft: Draft) -> str | None:
    return None if draft.own_id is None else key_of_id(draft.own_id)


def _stem_key(number: int, draft: Draft) -> str | None:
    return stem_of(draft.images[0]) if draft.images else None


def _safe(key: str | None) -> str | None:
    return key if key is not None and SAFE_KEY.fullmatch(key) else None


def _image_id(draft: Draft) -> int | str | None:
    stem = stem_of(draft.images[0]) if draft.images else None
    for found in (draft.image_id, draft.own_id, stem):
        if found is not None:
            return id_of_stem(found) if isinstance(found, str) else found
    return None
