"""COCO captions JSON.

{"images": [{"id": 391895, "file_name": "COCO_val2014_000000391895.jpg"}],
 "annotations": [{"image_id": 391895, "caption": "A man with a red helmet on a moped."}]}
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from qwenvl_dist.data.formats.annotations import AnnotationFile
from qwenvl_dist.data.formats.reader import PackInput, SampleReader, id_of, key_of_id
from qwenvl_dist.data.formats.sample import (
    DEFAULT_JOIN,
    DEFAULT_PROMPT,
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
REMEDY = "a COCO captions file is {'images': [...], 'annotations': [...]}, like captions_train2017.json"
Row = tuple[Any, ...]


class CocoReader(SampleReader):
    """One picture of the file, one sample: its captions joined in the file's order. By image id, numbers first.

    Keys are the stems of the file names when all are safe and differ, else the image ids, zero-padded. A missing
    picture is a `UserError` unless the packer is to find it, as for remote ones is the rule.
    """

    def __init__(self, given: PackInput) -> None:
        super().__init__(given)
        if given.images is None:
            raise UserError("--source coco needs --images, the folder that holds the pictures")
        self.folder = open_storage(given.images)
        if isinstance(self.folder, LocalStorage) and not self.folder.folder.is_dir():
            raise UserError(f"{given.images}: --images must be the folder that holds the pictures")
        self.file = AnnotationFile(given.location, "--captions", "a COCO captions JSON file")

    def _examine(self) -> int:
        # A picture's captions lie anywhere in a list of their own, before or behind the list of pictures. Looking them
        # up picture by picture takes as many passes, and holding them takes memory: they are spilled, sorted by image,
        # into a database without a name on disk, which ends with this object.
        self.spill = sqlite3.connect("")
        try:
            self.spill.executescript(
                f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{SPILL_CACHE_KIB};"
                "CREATE TABLE images (id NOT NULL PRIMARY KEY, name TEXT, stem TEXT, id_key TEXT, number INTEGER);"
                "CREATE TABLE captions (number INTEGER PRIMARY KEY, image_id NOT NULL, text TEXT);"
            )
            self._spill_images()
            self._spill_captions()
            self.key = self._choose_key()
        except sqlite3.OperationalError as error:
            raise CheckFailed(
                f"{self.file}: sorting its captions needs room for temporary files ({error}); set TMPDIR"
            ) from None
        self._check_files()
        return self._one("SELECT count(*) FROM images")[0]

    def _one(self, query: str) -> Row:
        return self.spill.execute(query).fetchone()

    def _spill_images(self) -> None:
        where, image_id = "", None

        def rows() -> Iterator[Row]:
            nonlocal where, image_id
            for number, record in enumerate(self.file.items("images.item")):
                where, image_id = record.where, None
                image_id, name = self._image(record.value, where)
                yield image_id, name, PurePosixPath(name).stem, key_of_id(image_id), number

        try:
            self.spill.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?)", rows())
        except sqlite3.IntegrityError:
            raise UserError(
                f"{where} has id {image_id!r} for the second time: ids must differ; drop one of the two"
            ) from None
        except OverflowError:
            raise UserError(f"{where} has id {image_id!r}: ids must fit into 64 bits; renumber") from None
        if not self._one("SELECT count(*) FROM images")[0]:
            self._need_list("images")
            raise UserError(f"{self.file}: 'images' is empty, there is nothing to pack; {REMEDY}")

    def _image(self, image: Any, where: str) -> tuple[int | str, str]:
        """Return id and file name of an entry of 'images'."""
        image_id = id_of(image, "id") if isinstance(image, dict) else None
        if image_id is None or not isinstance(image.get("file_name"), str):
            raise UserError(f"{where} is {short(image)}: it needs an 'id' and a 'file_name'; {REMEDY}")
        name = image["file_name"]
        if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(
                f"{where} has file_name {name!r}: it must lie below --images; make it relative to it"
            )
        if not is_unicode(name) or not is_unicode(str(image_id)):
            raise UserError(f"{where} holds half a character (a lone surrogate): write it as UTF-8")
        return image_id, name

    def _spill_captions(self) -> None:
        where = ""

        def rows() -> Iterator[Row]:
            nonlocal where
            for number, record in enumerate(self.file.items("annotations.item")):
                where, annotation = record.where, record.value
                if not isinstance(annotation, dict) or not isinstance(annotation.get("caption"), str):
                    raise UserError(f"{where} is {short(annotation)}: it needs a 'caption'; {REMEDY}")
                image_id = id_of(annotation, "image_id")
                if image_id is None or not is_unicode(str(image_id)):
                    raise self._unlisted(number, annotation.get("image_id"))
                try:
                    yield number, image_id, self.rules.caption(annotation["caption"])
                except FormatError as error:
                    raise UserError(f"{where}, of image {image_id}, {error}") from None

        try:
            self.spill.executemany("INSERT INTO captions VALUES (?, ?, ?)", rows())
        except OverflowError:
            raise UserError(
                f"{where} has an image_id of more than 64 bits, which 'images' does not list: drop it"
            ) from None
        if not self._one("SELECT count(*) FROM captions")[0]:
            self._need_list("annotations")
        # Rows of one image then lie together, in the file's order.
        self.spill.execute("CREATE INDEX by_image ON captions (image_id, number)")
        unlisted = self._one(
            "SELECT number, image_id FROM captions WHERE image_id NOT IN (SELECT id FROM images) "
            "ORDER BY number LIMIT 1"
        )
        if unlisted is not None:
            raise self._unlisted(*unlisted)
        silent = self._one(
            "SELECT id, name FROM images WHERE NOT EXISTS (SELECT 1 FROM captions WHERE image_id = images.id) "
            "ORDER BY number LIMIT 1"
        )
        if silent is not None:
            raise UserError(
                f"{self.file}: image {silent[0]} ({silent[1]!r}) has no caption: "
                "each image needs one in 'annotations'; add it, or drop the image from 'images'"
            )

    def _unlisted(self, number: int, image_id: object) -> UserError:
        return UserError(
            f"{self.file}: annotations[{number}] has image_id {image_id!r}, which 'images' does not list: "
            "add it there or drop it"
        )

    def _need_list(self, name: str) -> None:
        """Raise UserError unless `name` is a list."""
        if self.file.shape(name) != "list":
            raise UserError(f"{self.file}: '{name}' is not a list; {REMEDY}")

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
                "at most 80; rename it"
            )
        twice = self._one("SELECT id_key FROM images GROUP BY id_key HAVING count(*) > 1 LIMIT 1")
        if twice is not None:
            raise UserError(
                f"{self.file}: two images give the key {twice[0]!r}: give them ids or file names that differ"
            )
        return "id_key"

    def _first_unsafe(self, column: str) -> str | None:
        values = (value for (value,) in self.spill.execute(f"SELECT {column} FROM images"))
        return next((value for value in values if not SAFE_KEY.fullmatch(value)), None)

    def _check_files(self) -> None:
        if self.given.allow_missing or not isinstance(self.folder, LocalStorage):
            return
        for image_id, name in self.spill.execute("SELECT id, name FROM images ORDER BY id"):
            if not (self.folder.folder / name).is_file():
                raise UserError(
                    f"{self.file}: image {image_id} is {name!r}, which is not in {self.given.images}: "
                    "name the folder that holds it with --images, or pack without it (--skip-bad)"
                )

    def _samples(self) -> Iterator[Sample]:
        captions = self.spill.cursor()
        query = f"SELECT id, name, {self.key} FROM images ORDER BY id"
        for image_id, name, key in self.spill.execute(query):
            found = captions.execute(
                "SELECT text FROM captions WHERE image_id = ? ORDER BY number", (image_id,)
            )
            image = ImageRef(Path(name), self.folder)
            if isinstance(self.folder, LocalStorage):
                image = ImageRef(self.folder.folder / name)
            text = self.rules.join.join(text for (text,) in found)
            yield Sample(key, caption_messages(self.rules.prompt, text), [image], image_id, "coco")


def read_coco_captions(
    captions: str | Path,
    images: str | Path,
    prompt: str = DEFAULT_PROMPT,
    join: str = DEFAULT_JOIN,
    allow_missing: bool = False,
) -> CocoReader:
    """Return the samples of a COCO captions file and its folder of pictures, either a path or a URL."""
    return CocoReader(PackInput(captions, images, TextRules(prompt, join), allow_missing))
