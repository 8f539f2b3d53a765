"""A dataset of Hugging Face's `datasets`, or parquet files: a column of pictures, one of texts.

Files are read by row group (parquet) or record batch (Arrow), texts first. Pictures stay where they are: a `TableImage`
knows its cell, and whoever reads it keeps the last row group's pictures, which come one after another.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from qwenvl_dist.data.formats.annotations import Record
from qwenvl_dist.data.formats.messages import ANSWERS, QUESTIONS, pairs_of, turns_of
from qwenvl_dist.data.formats.objects import MEMBERS
from qwenvl_dist.data.formats.pictures import Pictures
from qwenvl_dist.data.formats.reader import Draft, PackInput, RecordReader, id_of, id_of_stem, stem_of
from qwenvl_dist.data.formats.sample import Picture, caption_messages, short
from qwenvl_dist.data.formats.turns import FormatError, expand, place, texts_of, to_messages
from qwenvl_dist.data.storage import is_remote
from qwenvl_dist.errors import UserError

IMAGE_COLUMNS = ("image", "images", "img", "picture", "jpg", "image_path", "file_name")
TEXT_COLUMNS = ("messages", "conversations", "caption", "captions", "text", "texts", "sentences")
ID_COLUMNS = ("id", "image_id")
OBJECTS = "objects"
USUAL_SPLITS = (
    "train",
    "training",
    "validation",
    "valid",
    "val",
    "dev",
    "test",
    "testing",
    "eval",
    "evaluation",
)
ROWS_AT_ONCE = 256
GROUPS_KEPT = 2  # of pictures, in each process


class TableReader(RecordReader):
    """One row, one sample."""

    source = "huggingface"
    heads_at_a_time = 1  # they are read by row group, which threads would take from each other

    def __init__(self, given: PackInput) -> None:
        super().__init__(given)
        if is_remote(given.location):
            raise UserError(f"{given.location}: is a URL; fetch it to a folder first")
        _need_datasets()
        self.place = Path(given.location)
        self.files = find_files(self.place, given.split)
        schema = self.files[0].schema
        pair = [next((n for n in names if n in schema.names), None) for names in (QUESTIONS, ANSWERS)]
        self.asked = [name for name in pair if name is not None]
        if given.text_column is not None or len(self.asked) < 2 or {*TEXT_COLUMNS} & {*schema.names}:
            self.asked = []
            self.text = _column(schema.names, given.text_column, TEXT_COLUMNS, "--text-column", self.files[0])
        self.as_json = [field.name for field in schema if _is_json(field.type)]
        self.image = None
        if given.image_column is not None or any(name in schema.names for name in IMAGE_COLUMNS):
            self.image = _column(
                schema.names, given.image_column, IMAGE_COLUMNS, "--image-column", self.files[0]
            )
        for file in self.files:
            if not file.schema.equals(schema):
                raise UserError(
                    f"{file.path}: has other columns than {self.files[0].path}: name one data set"
                )
        self.pictures = Pictures(given.images, self.files[0].path, given.allow_missing)

    def _records(self) -> Iterator[Record]:
        schema = self.files[0].schema
        wanted = [name for name in (*(self.asked or [self.text]), *ID_COLUMNS) if name in schema.names]
        if OBJECTS in schema.names and _may_fill_in(schema.field(OBJECTS).type):
            wanted.append(OBJECTS)
        for file in self.files:
            row = 0
            for group in range(file.num_groups):
                texts = file.read(group, wanted)
                images = None if self.image is None else file.images(group, self.image)
                first = row
                for batch in texts.to_batches(ROWS_AT_ONCE):
                    for values in batch.to_pylist():
                        yield Record(f"{file.path}: row {row}", (values, images, row - first))
                        row += 1

    def _examine(self) -> int:
        try:
            return super()._examine()
        finally:
            _groups.clear()  # whose pictures were looked at: no worker shall begin with them

    def _draft(self, value: Any) -> Draft:
        row, group, place_in_group = value
        row = {name: _parsed(cell, name) if name in self.as_json else cell for name, cell in row.items()}
        images = [] if group is None else group.of_row(place_in_group, self.pictures)
        text = None if self.asked else row[self.text]
        if isinstance(
            text, dict
        ):  # older versions of datasets store a list of turns as one list for each member
            # A member that no turn has may be null instead of a list of nulls.
            given = {name: column for name, column in text.items() if column is not None}
            text = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=False)]
        own_id, image_id, objects = id_of(row, "id"), id_of(row, "image_id"), row.get(OBJECTS)
        if self.asked or (isinstance(text, list) and text and isinstance(text[0], dict)):
            if text is None:
                said = turns_of({name: row[name] for name in self.asked})
            elif "assistant" in text[0]:
                said = pairs_of(text, self.text)
            else:
                said = turns_of({"messages" if "role" in text[0] else "conversations": text})
            messages, placed = to_messages(place(said, images), self.rules)
            pictures = [
                self.pictures.find(found) if isinstance(found, str) else found
                for found in expand(placed, images)
            ]
            return Draft(messages, pictures, own_id, image_id, objects)
        if self.image is not None and not images:
            raise FormatError(f"has no picture in {self.image!r}: drop the row")
        captions = texts_of(text)
        if captions is None:
            raise FormatError(f"has {short(text)} in {self.text!r}: it must be a text, or a list of them")
        answer = self.rules.captions(captions)
        if image_id is None and images:
            stem = stem_of(images[0])
            image_id = None if stem is None else id_of_stem(stem)
        messages = caption_messages(self.rules.prompt, answer, len(images))
        return Draft(messages, images, own_id, image_id, objects)


def find_files(place: Path, split: str | None) -> list[TableFile]:
    """Return the files of a data set folder, of one of parquet files, or the file itself. `UserError` for others."""
    if place.is_file() and place.suffix in (".parquet", ".arrow"):
        return [TableFile(place)]
    if not place.is_dir():
        what = "no such file or folder" if not place.exists() else "is no .parquet or .arrow file"
        raise UserError(f"{place}: {what}; --input must name one, or a folder that save_to_disk wrote")
    if any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return [TableFile(path) for path in _saved_files(place, split)]
    paths = sorted((*place.rglob("*.parquet"), *place.rglob("*.arrow")))
    if split is not None:  # as the hub names them: train-00000-of-00002.parquet, or a folder
        paths = [p for p in paths if split in _split_names(p, place)]
    elif len(found := {name for p in paths for name in _split_names(p, place) if name in USUAL_SPLITS}) > 1:
        raise UserError(f"{place}: has the splits {', '.join(sorted(found))}: name one of them with --split")
    if not paths:
        of_split = f" of --split {split}" if split is not None else ""
        raise UserError(
            f"{place}: holds no .parquet or .arrow file{of_split}; --input must name a folder of them, or one that "
            "save_to_disk wrote"
        )
    return [TableFile(path) for path in paths]


def _split_names(path: Path, place: Path) -> tuple[str, ...]:
    return (path.stem.partition("-")[0], *path.relative_to(place).parts[:-1])


def _saved_files(place: Path, split: str | None) -> list[Path]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(place))
    except Exception as error:  # whatever a damaged folder leads it to
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{place}: cannot be opened by datasets ({reason}): save it again") from None
    if isinstance(saved, datasets.DatasetDict):
        parts = {str(name): part for name, part in saved.items()}
        if split is None and len(parts) == 1:
            split = next(iter(parts))
        if split is None or split not in parts:
            raise UserError(f"{place}: has the splits {', '.join(parts)}: name one of them with --split")
        saved = parts[split]
    elif split is not None:
        raise UserError(f"{place}: is a single data set without splits; drop --split {split}")
    return [Path(file["filename"]) for file in saved.cache_files]


@dataclass(frozen=True)
class TableFile:
    """A parquet file, or an Arrow file as `datasets` writes it. Errors of reading are `UserError`s."""

    path: Path

    @cached_property
    def _parquet(self) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self.path) if self.path.suffix == ".parquet" else None

    @cached_property
    def _batches(self) -> list[Any]:
        """The record batches, mapped into memory and not read."""
        import pyarrow as pa

        source = pa.memory_map(str(self.path))
        try:
            return list(pa.ipc.open_stream(source))
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_file(source)
            return [reader.get_batch(number) for number in range(reader.num_record_batches)]

    def _guarded(self, work: Any) -> Any:
        import pyarrow as pa

        try:
            return work()
        except (pa.ArrowException, OSError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"{self.path}: cannot be read ({reason}): fetch or save it again") from None

    @cached_property
    def schema(self) -> Any:
        """The columns."""
        return self._guarded(
            lambda: self._parquet.schema_arrow if self._parquet is not None else self._first_batch().schema
        )

    def _first_batch(self) -> Any:
        if not self._batches:
            raise UserError(f"{self.path}: holds no rows, there is nothing to pack")
        return self._batches[0]

    @property
    def num_groups(self) -> int:
        """The number of row groups or record batches."""
        return self._parquet.num_row_groups if self._parquet is not None else len(self._batches)

    def read(self, group: int, columns: list[str]) -> Any:
        """Return some columns of one group as a pyarrow Table; `image.path` is a part of the column `image`."""
        import pyarrow as pa

        def work() -> Any:
            if self._parquet is not None:
                return self._parquet.read_row_group(group, columns=columns, use_threads=False)
            return pa.Table.from_batches([self._batches[group]]).select(columns)

        return self._guarded(work)

    def images(self, group: int, column: str) -> _GroupImages:
        """Return the pictures of one group without their bytes, as far as that is possible."""
        kind = self.schema.field(column).type
        inner = kind.value_type if _is_list(kind) else kind
        names = [field.name for field in inner] if _is_struct(inner) else []
        light = column
        if (
            self._parquet is not None
            and "path" in names
            and not _is_list(kind)
            and self._has_all_bytes(group, column)
        ):
            light = f"{column}.path"
        elif _is_bytes(inner):
            return _GroupImages(self, group, column, None)
        return _GroupImages(self, group, column, self.read(group, [light]).column(0))

    def _has_all_bytes(self, group: int, column: str) -> bool:
        """Tell from the file's statistics whether every picture of a group is inside it."""
        row_group = self._parquet.metadata.row_group(group)
        for number in range(row_group.num_columns):
            chunk = row_group.column(number)
            if chunk.path_in_schema == f"{column}.bytes":
                return chunk.statistics is not None and chunk.statistics.null_count == 0
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}


@dataclass(frozen=True)
class _GroupImages:
    file: TableFile
    group: int
    column: str
    cells: Any  # pyarrow ChunkedArray: paths, or bytes and paths; None: bytes and nothing else

    def of_row(self, row: int, pictures: Pictures) -> list[Picture]:
        """Return the pictures of a row of the group. Raises FormatError for a cell that holds none."""
        if self.cells is None:
            return [TableImage(self.file.path, self.group, self.column, row)]
        cell = self.cells[row]
        value = cell if _is_list(cell.type) else [cell]
        if not cell.is_valid:
            return []
        return [
            self._picture(item, row, number if _is_list(cell.type) else None, pictures)
            for number, item in enumerate(value)
        ]

    def _picture(self, cell: Any, row: int, item: int | None, pictures: Pictures) -> Picture:
        path, has_bytes = None, False
        if cell.is_valid and _is_struct(cell.type):
            names = [field.name for field in cell.type]
            path = cell["path"].as_py() if "path" in names else None
            # Without `bytes` among them only paths were read, because all bytes are there.
            has_bytes = "bytes" not in names or cell["bytes"].is_valid
        elif cell.is_valid and _is_bytes(cell.type):
            has_bytes = True
        elif cell.is_valid:
            path = cell.as_py()
        if has_bytes:
            return TableImage(
                self.file.path, self.group, self.column, row, item, PurePosixPath(path) if path else None
            )
        return pictures.find(path)


@dataclass(frozen=True)
class TableImage:
    """A picture whose bytes are in a cell of a table."""

    file: Path
    group: int
    column: str
    row: int  # of the group
    item: int | None = None  # of a list of pictures
    path: PurePosixPath | None = None  # as the cell names it

    def __str__(self) -> str:
        return f"{self.file}: group {self.group}, row {self.row}, column {self.column!r}"

    def read(self) -> bytes:
        """Return the bytes. Raises OSError."""
        try:
            cell = _group_column(self.file, self.group, self.column)[self.row]
        except UserError as error:
            raise OSError(str(error)) from None
        if self.item is not None:
            cell = cell.values[self.item]
        if _is_struct(cell.type):
            cell = cell["bytes"]
        data = cell.as_py()
        if data is None:
            raise OSError("the cell is empty")
        return data

    def num_bytes(self) -> int:
        """Return how many bytes there are."""
        return len(self.read())

    def modified_ns(self) -> float:
        """Return when the file last changed."""
        return self.file.stat().st_mtime_ns


_groups: OrderedDict[tuple[Path, int, int, str], Any] = OrderedDict()
# Process id -> the file that is open: no place in a file is shared after a fork. With the time of its last change.
_open: dict[int, tuple[TableFile, int]] = {}


def _group_column(path: Path, group: int, column: str) -> Any:
    """Return the column of a group, kept for the pictures that follow. Raises OSError and UserError."""
    changed = path.stat().st_mtime_ns
    key = (path, changed, group, column)
    if key not in _groups:
        while len(_groups) >= GROUPS_KEPT:
            _groups.popitem(last=False)
        file, of = _open.get(os.getpid(), (None, 0))
        if file is None or file.path != path or of != changed:
            file = TableFile(path)
            _open.clear()
            _open[os.getpid()] = file, changed
        _groups[key] = file.read(group, [column]).column(0)
    return _groups[key]


def _need_datasets() -> None:
    try:
        import datasets  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--source huggingface needs the package datasets ({error}): pip install 'qwenvl-dist[datasets]'"
        ) from None


def _column(names: list[str], given: str | None, usual: tuple[str, ...], option: str, file: TableFile) -> str:
    found = next((name for name in ((given,) if given is not None else usual) if name in names), None)
    if found is None:
        wanted = repr(given) if given is not None else f"none of {', '.join(usual)}"
        raise UserError(
            f"{file.path}: has the columns {', '.join(names)[:80]}, {wanted}: name one with {option}"
        )
    return found


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_struct(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind)


def _is_json(kind: Any) -> bool:
    """Tell whether a column holds JSON, or lists of it, as `datasets` stores what has no type of its own."""
    return getattr(kind.value_type if _is_list(kind) else kind, "extension_name", None) == "arrow.json"


def _parsed(cell: Any, column: str) -> Any:
    if isinstance(cell, list):
        return [_parsed(each, column) for each in cell]
    try:
        return None if cell is None else json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"has {short(cell)} in {column!r}, which is not JSON ({error}): mend it") from None


def _may_fill_in(kind: Any) -> bool:
    """Tell whether a column is like ms-swift's `objects`, and not another program's, which may be large."""
    if _is_struct(kind):
        return any(field.name in MEMBERS for field in kind)
    return not _is_list(kind) and not _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
