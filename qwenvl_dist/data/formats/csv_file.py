"""A CSV of pictures and captions: ModelScope's coco_2014_caption as the article saves it.

image_path,caption
coco_2014_caption/391895.jpg,A man with a red helmet on a moped.&&Man riding a motor bike.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from qwenvl_dist.data.formats.annotations import Record
from qwenvl_dist.data.formats.reader import Draft, FileReader, id_of_stem, stem_of
from qwenvl_dist.data.formats.sample import caption_messages
from qwenvl_dist.data.formats.turns import FormatError
from qwenvl_dist.errors import UserError

IMAGE_COLUMN, TEXT_COLUMN = "image_path", "caption"
DELIMITERS = ",;\t|"
MAX_FIELD_CHARACTERS = 1 << 24  # a quote that nothing closes must not read the rest of the file into memory


def delimiter_of(header: str, wanted: Iterable[str]) -> str:
    """Return what parts the columns: the first usual mark with which the header has those that are wanted."""
    for delimiter in DELIMITERS:
        with suppress(csv.Error):
            names = next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])
            if {name.strip() for name in wanted} <= {name.strip() for name in names}:
                return delimiter
    return ","


class CsvReader(FileReader):
    """One row, one picture."""

    source = "csv"
    kind = "a CSV file with a header line"

    def _records(self) -> Iterator[Record]:
        before = csv.field_size_limit(MAX_FIELD_CHARACTERS)
        _, first = next(self.file.lines(), (1, ""))
        wanted = (self.given.image_column or IMAGE_COLUMN, self.given.text_column or TEXT_COLUMN)
        rows = csv.reader(
            (line for _, line in self.file.lines()),
            strict=True,
            skipinitialspace=True,
            delimiter=delimiter_of(first, wanted),
        )
        try:
            header = [name.strip() for name in next(rows, [])]
            image, text = (self._column(header, *names) for names in (
                ("--image-column", self.given.image_column, IMAGE_COLUMN),
                ("--text-column", self.given.text_column, TEXT_COLUMN),
            ))  # fmt: skip
            begins = rows.line_num + 1
            for row in rows:
                where = f"{self.file}: line {begins}"
                begins = rows.line_num + 1
                if not row:
                    continue
                yield Record(where, (row, len(header), image, text))
        except csv.Error as error:
            raise UserError(
                f"{self.file}: line {rows.line_num}: not CSV ({error}); --input must be {self.kind}"
            ) from None
        finally:
            csv.field_size_limit(before)

    def _column(self, header: list[str], option: str, given: str | None, usual: str) -> int:
        name = usual if given is None else given.strip()
        if header.count(name) != 1:
            raise UserError(
                f"{self.file}: line 1: the header {','.join(header)[:80]!r} has {header.count(name)} columns {name!r}, "
                f"it must have one; name another with {option}"
            )
        return header.index(name)

    def _draft(self, value: Any) -> Draft:
        row, num_columns, image, text = value
        if len(row) != num_columns:
            raise FormatError(
                f"has {len(row)} fields, the header has {num_columns}: put texts that hold commas in double quotes"
            )
        path, text = row[image], row[text]
        if not path.strip():
            raise FormatError("names no picture: fill in its path, or drop the line")
        images = [self.pictures.find(path)]
        stem = stem_of(images[0])
        image_id = None if stem is None else id_of_stem(stem)
        return Draft(caption_messages(self.rules.prompt, self.rules.caption(text)), images, image_id=image_id)
