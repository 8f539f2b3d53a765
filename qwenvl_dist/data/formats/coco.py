"""COCO's JSON files: pictures in one list, annotations in another, sorted by picture on disk.

{"images": [{"id": 391895, "file_name": "COCO_val2014_000000391895.jpg"}],
 "annotations": [{"image_id": 391895, "caption": "A man with a red helmet on a moped."}]}
"""

from __future__ import annotations

import sqlite3
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from qwenvl_dist.data.formats.annotations import AnnotationFile
from qwenvl_dist.data.formats.objects import objects_of
from qwenvl_dist.data.formats.reader import PackInput, SampleReader, id_of, key_of_id
from qwenvl_dist.data.formats.sample import (
    DEFAULT_JOIN,
    DEFAULT_PROMPT,
    MAX_KEY_CHARACTERS,
    SAFE_KEY,
    ImageRef,
    Sample,
    caption_messages,
    is_unicode,
    short,
)
from qwenvl_dist.data.formats.turns import FormatError, TextRules
from qwenvl_dist.data.storage import LocalStorage, open_storage
from qwenvl_dist.errors import CheckFailed, UserError

SPILL_CACHE_KIB = 8 * 1024
Row = tuple[Any, ...]
IS_ANNOTATED = "EXISTS (SELECT 1 FROM annotations WHERE image_id = images.id)"


class CocoFileReader(SampleReader):
    """The samples of a COCO file and its folder of pictures, by image id, numbers first.

    Keys are made of the stems of the file names when all are safe and differ, else of the image ids, zero-padded. A
    missing picture is a `UserError` unless the packer is to find it, as for remote ones is the rule.
    """

    source: str  # of the command line and of the samples
    option: str  # of the command line that names the file
    kind: str  # what the file must be, for errors
    form: str  # what that looks like
    image_columns: tuple[str, ...] = ()  # that pictures have besides id and name
    annotation_columns: tuple[str, ...]
    without: str | None = None  # a member of annotations that nobody reads
    max_key_characters = MAX_KEY_CHARACTERS

    def __init__(self, given: PackInput) -> None:
        super().__init__(given)
        if given.images is None:
            raise UserError(f"--source {self.source} needs --images, the folder that holds the pictures")
        self.folder = open_storage(given.images)
        if isinstance(self.folder, LocalStorage) and not self.folder.folder.is_dir():
            raise UserError(f"{given.images}: --images must be the folder that holds the pictures")
        self.file = AnnotationFile(given.location, self.option, self.kind)

    def _image_values(self, image: dict[str, Any], where: str) -> Row:
        """Return the values of `image_columns`. `UserError` for wrong ones."""
        return ()

    @abstractmethod
    def _annotation_values(self, annotation: dict[str, Any], where: str, image_id: int | str) -> Row | None:
        """Return the values of `annotation_columns`, None to leave it out. `UserError` for wrong ones."""

    @abstractmethod
    def _finish(self) -> int:
        """Look at what was sorted, and return the number of samples."""

    def _examine(self) -> int:
        # A picture's annotations lie anywhere in a list of their own, before or behind the list of pictures. Looking
        # them up picture by picture takes as many passes, and holding them takes memory: they are spilled, sorted by
        # image, into a database without a name on disk, which ends with this object.
        self.spill = sqlite3.connect("")
        image_columns, columns = (
            "".join(f", {c}" for c in cs) for cs in (self.image_columns, self.annotation_columns)
        )
        try:
            self.spill.executescript(
                f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{SPILL_CACHE_KIB};"
                "CREATE TABLE images (id NOT NULL PRIMARY KEY, name TEXT, stem TEXT, id_key TEXT, number INTEGER"
                f"{image_columns});"
                f"CREATE TABLE annotations (number INTEGER PRIMARY KEY, image_id NOT NULL{columns});"
            )
            self._spill_images()
            self._spill_annotations()
            self.key = self._choose_key()
            self._check_files()
            return self._finish()
        except sqlite3.OperationalError as error:
            raise CheckFailed(
                f"{self.file}: sorting its annotations needs room for temporary files ({error}); set TMPDIR"
            ) from None

    def _one(self, query: str) -> Row:
        return self.spill.execute(query).fetchone()

    def _insert(self, table: str, rows: Iterator[Row], num_columns: int) -> None:
        self.spill.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * num_columns)})", rows)

    def _spill_images(self) -> None:
        where, image_id = "", None

        def rows() -> Iterator[Row]:
            nonlocal where, image_id
            for number, record in enumerate(self.file.items("images.item")):
                where, image_id = record.where, None
                image_id, name = self._image(record.value, where)
                values = self._image_values(record.value, where)
                yield image_id, name, PurePosixPath(name).stem, key_of_id(image_id), number, *values

        try:
            self._insert("images", rows(), 5 + len(self.image_columns))
        except sqlite3.IntegrityError:
            raise UserError(
                f"{where} has id {image_id!r} for the second time: ids must differ; drop one of the two"
            ) from None
        except OverflowError:
            raise UserError(f"{where} has id {image_id!r}: ids must fit into 64 bits; renumber") from None
        if not self._one("SELECT count(*) FROM images")[0]:
            self._need_list("images")
            raise UserError(f"{self.file}: 'images' is empty, there is nothing to pack; {self.form}")

    def _image(self, image: Any, where: str) -> tuple[int | str, str]:
        """Return id and file name of an entry of 'images'."""
        image_id = id_of(image, "id") if isinstance(image, dict) else None
        if image_id is None or not isinstance(image.get("file_name"), str):
            raise UserError(f"{where} is {short(image)}: it needs an 'id' and a 'file_name'; {self.form}")
        name = image["file_name"]
        path = PurePosixPath(name)
        if not path.name or path.is_absolute() or ".." in path.parts:
            raise UserError(
                f"{where} has file_name {name!r}: it must lie below --images; make it relative to it"
            )
        if not is_unicode(name) or not is_unicode(str(image_id)):
            raise UserError(f"{where} holds half a character (a lone surrogate): write it as UTF-8")
        return image_id, str(path)

    def _spill_annotations(self) -> None:
        where = ""

        def rows() -> Iterator[Row]:
            nonlocal where
            for number, record in enumerate(self.file.items("annotations.item", self.without)):
                where, annotation = record.where, record.value
                if not isinstance(annotation, dict):
                    raise UserError(f"{where} is {short(annotation)}: it must be an object; {self.form}")
                image_id = id_of(annotation, "image_id")
                if image_id is None or not is_unicode(str(image_id)):
                    raise self._unlisted(number, annotation.get("image_id"))
                values = self._annotation_values(annotation, where, image_id)
                if values is not None:
                    yield number, image_id, *values

        try:
            self._insert("annotations", rows(), 2 + len(self.annotation_columns))
        except OverflowError:
            raise UserError(
                f"{where} has an image_id of more than 64 bits, which 'images' does not list: drop it"
            ) from None
        if not self._one("SELECT count(*) FROM annotations")[0]:
            self._need_list("annotations")
        # Rows of one image then lie together, in the file's order.
        self.spill.execute("CREATE INDEX by_image ON annotations (image_id, number)")
        unlisted = self._one(
            "SELECT number, image_id FROM annotations WHERE image_id NOT IN (SELECT id FROM images) "
            "ORDER BY number LIMIT 1"
        )
        if unlisted is not None:
            raise self._unlisted(*unlisted)

    def _unlisted(self, number: int, image_id: object) -> UserError:
        return UserError(
            f"{self.file}: annotations[{number}] has image_id {image_id!r}, which 'images' does not list: "
            "add it there or drop it"
        )

    def _need_list(self, name: str) -> None:
        """Raise UserError unless `name` is a list."""
        if self.file.shape(name) != "list":
            raise UserError(f"{self.file}: '{name}' is not a list; {self.form}")

    def _choose_key(self) -> str:
        """Return the column that keys are taken from."""
        if self._first_unsafe("stem") is None:
            try:
                self.spill.execute("CREATE UNIQUE INDEX by_stem ON images (stem)")
                return "stem"
            except sqlite3.IntegrityError:
                pass  # two folders hold pictures of one name
        unsafe = self._first_unsafe("id_key")
        if unsafe is not None:
            raise UserError(
                f"{self.file}: the image id {unsafe!r} cannot be a key: letters, digits, '_' and '-' only, "
                f"at most {self.max_key_characters}; rename it"
            )
        twice = self._one("SELECT id_key FROM images GROUP BY id_key HAVING count(*) > 1 LIMIT 1")
        if twice is not None:
            raise UserError(
                f"{self.file}: two images give the key {twice[0]!r}: give them ids or file names that differ"
            )
        return "id_key"

    def _first_unsafe(self, column: str) -> str | None:
        for (value,) in self.spill.execute(f"SELECT {column} FROM images"):
            if not SAFE_KEY.fullmatch(value) or len(value) > self.max_key_characters:
                return value
        return None

    def _check_files(self) -> None:
        """Raise UserError for a local picture that is annotated and missing."""
        if self.given.allow_missing or not isinstance(self.folder, LocalStorage):
            return
        for image_id, name in self._annotated("id, name"):
            if not (self.folder.folder / name).is_file():
                raise UserError(
                    f"{self.file}: image {image_id} is {name!r}, which is not in {self.given.images}: "
                    "name the folder that holds it with --images, or pack without it (--skip-bad)"
                )

    def _annotated(self, columns: str) -> Iterator[Row]:
        """Yield columns of the pictures that have annotations, in the order of their ids."""
        return self.spill.execute(f"SELECT {columns} FROM images WHERE {IS_ANNOTATED} ORDER BY id")

    def _annotations_of(self, image_id: int | str) -> Iterator[Row]:
        """Yield the values of `annotation_columns` of a picture's annotations, in the file's order."""
        query = (
            f"SELECT {', '.join(self.annotation_columns)} FROM annotations WHERE image_id = ? ORDER BY number"
        )
        return self.spill.execute(query, (image_id,))

    def _picture(self, name: str) -> ImageRef:
        if isinstance(self.folder, LocalStorage):
            return ImageRef(self.folder.folder / name)
        return ImageRef(Path(name), self.folder)


class CocoReader(CocoFileReader):
    """One picture of a captions file, one sample: its captions joined in the file's order."""

    source, option, kind = "coco", "--captions", "a COCO captions JSON file"
    form = "a COCO captions file is {'images': [...], 'annotations': [...]}, like captions_train2017.json"
    annotation_columns = ("text",)

    def _annotation_values(self, annotation: dict[str, Any], where: str, image_id: int | str) -> Row | None:
        where, caption = f"{where}, of image {image_id}", annotation.get("caption")
        try:
            if not isinstance(caption, str):
                raise FormatError(f"is {short(annotation)}: it needs a 'caption'; {self.form}")
            text = self.rules.caption(caption)
            objects_of(None, [text], 1)  # no placeholder may be in it
            return (text,)
        except FormatError as error:
            if not self.given.allow_missing:
                raise UserError(f"{where}, {error}") from None
            self.unusable.append((where, str(error)))
            return None

    def _finish(self) -> int:
        silent = self.spill.execute(f"SELECT id, name FROM images WHERE NOT {IS_ANNOTATED} ORDER BY number")
        for image_id, name in silent:
            where = f"{self.file}: image {image_id} ({name!r})"
            if not self.given.allow_missing:
                raise UserError(
                    f"{where} has no caption: each image needs one in 'annotations'; add it, drop the image from "
                    "'images', or leave such images out with --skip-bad"
                )
            self.unusable.append((where, "has no caption"))
        (count,) = self._one(f"SELECT count(*) FROM images WHERE {IS_ANNOTATED}")
        if not count:
            raise UserError(f"{self.file}: no image has a caption that can be used; {self.form}")
        return count

    def _samples(self) -> Iterator[Sample]:
        for image_id, name, key in self._annotated(f"id, name, {self.key}"):
            text = self.rules.join.join(text for (text,) in self._annotations_of(image_id))
            messages = caption_messages(self.rules.prompt, text)
            yield Sample(key, messages, [self._picture(name)], image_id, self.source)


def read_coco_captions(
    captions: str | Path,
    images: str | Path,
    prompt: str = DEFAULT_PROMPT,
    join: str = DEFAULT_JOIN,
    allow_missing: bool = False,
) -> CocoReader:
    """Return the samples of a COCO captions file and its folder of pictures, either a path or a URL."""
    return CocoReader(PackInput(captions, images, TextRules(prompt, join), allow_missing))
