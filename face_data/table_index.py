# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
An AU table as a small database on disk, for tables of any length: rows by number, for parts that processes make
independently of each other, and names that come twice.
"""

import hashlib
import json
import math
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from action_units import AU_NAMES
from face_data.au_tables import AURow, read_au_table
from face_data.store import replace_file


FACE_BOX = ("face_x0", "face_y0", "face_x1", "face_y1")
CAPTION_COLUMNS = ("text", "caption", "prompt", "textdescription")
SUBJECT_COLUMNS = ("subject", "subject_id", "identity")
# As py-feat writes it, in pixels.
_PIXEL_BOX_COLUMNS = ("facerectx", "facerecty", "facerectwidth", "facerectheight")
_YES, _NO = ("1", "1.0", "true", "yes"), ("", "0", "0.0", "false", "no", "nan")


@dataclass(frozen=True)
class FaceBox:
    """Left, top, right and bottom of a face, in pixels or as parts of the picture, 0 to 1."""

    corners: tuple[float, float, float, float]
    in_pixels: bool

    def columns(self, size: tuple[int, int]) -> dict[str, float]:
        """`FACE_BOX` as parts of a picture of `size`, cut to it; empty for a box that is not within it."""
        scale = np.float64([*size, *size]) if self.in_pixels else 1.0
        left, top, right, bottom = (np.float64(self.corners) / scale).clip(0, 1).round(6).tolist()
        return dict(zip(FACE_BOX, (left, top, right, bottom), strict=True)) if left < right and top < bottom else {}


def pixel_box(left: float, top: float, width: float, height: float) -> FaceBox:
    return FaceBox((left, top, left + width, top + height), in_pixels=True)


@dataclass(frozen=True)
class TableEntry:
    """A picture's row: its AUs in [0, 5] or None without a face, and how many rows of the table name it."""

    name: str
    aus: np.ndarray | None
    text: str
    subject: str
    is_photo: bool | None
    box: FaceBox | None
    line: int
    times: int


def build_index(
    path: Path,
    table: Path,
    tool: str | None,
    image_column: str | None,
    caption_column: str | None,
    on_error: Callable[[ValueError], None],
) -> None:
    """Read `table` once, from front to back, into the database `path`. `on_error` is told of rows it cannot use."""

    def write(unfinished: Path) -> None:
        unfinished.unlink(missing_ok=True)
        with closing(sqlite3.connect(unfinished)) as database:
            database.execute(
                "CREATE TABLE entries (id INTEGER PRIMARY KEY, name TEXT UNIQUE, aus BLOB, text TEXT, subject TEXT,"
                " is_photo INTEGER, box TEXT, line INTEGER, times INTEGER)"
            )
            rows = read_au_table(table, tool, image_column, on_error)
            for batch in _batches(_read_values(rows, table, caption_column, on_error)):
                database.executemany(
                    "INSERT INTO entries (name, aus, text, subject, is_photo, box, line, times)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, 1) ON CONFLICT (name) DO UPDATE SET times = times + 1",
                    batch,
                )
            database.commit()

    replace_file(path, write)


def count_entries(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT count(*) FROM entries").fetchone()[0]


def read_entries(path: Path, first: int, count: int) -> list[TableEntry]:
    """`count` entries from the number `first`, which counts from 0, in the order of the table."""
    with closing(sqlite3.connect(path)) as database:
        found = database.execute(
            "SELECT name, aus, text, subject, is_photo, box, line, times FROM entries WHERE id BETWEEN ? AND ?"
            " ORDER BY id",
            (first + 1, first + count),
        ).fetchall()
    return [
        TableEntry(
            name,
            None if aus is None else np.frombuffer(aus, np.float32),
            text,
            subject,
            None if is_photo is None else bool(is_photo),
            None if box is None else FaceBox(*json.loads(box)),
            line,
            times,
        )
        for name, aus, text, subject, is_photo, box, line, times in found
    ]


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def au_columns(aus: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(AU_NAMES, aus, strict=True)}


def _batches(values: Iterator[tuple]) -> Iterator[list[tuple]]:
    while batch := list(islice(values, 4096)):
        yield batch


def _read_values(
    rows: Iterator[AURow], table: Path, caption_column: str | None, on_error: Callable[[ValueError], None]
) -> Iterator[tuple]:
    captions = CAPTION_COLUMNS if caption_column is None else (caption_column.lower(),)
    for row in rows:
        label = f"{table}, line {row.line}"
        by_key = {column.lower(): value for column, value in row.record.items()}
        if caption_column is not None and caption_column.lower() not in by_key:
            columns = ", ".join(row.record)
            raise ValueError(f"{label}: there is no column {caption_column!r}. The columns are {columns}.")
        try:
            yield _entry_values(row, by_key, captions, label)
        except ValueError as error:
            on_error(error)


def _entry_values(row: AURow, by_key: dict, captions: tuple[str, ...], label: str) -> tuple:
    if not row.name:
        raise ValueError(f"{label}: there is no file name. Say which column has it with `--image_column`.")
    return (
        row.name,
        row.aus.tobytes() if row.face_found else None,
        _first_text(by_key, captions),
        _first_text(by_key, SUBJECT_COLUMNS),
        _is_photo(by_key, label),
        _read_box(by_key, label),
        row.line,
    )


def _first_text(by_key: dict, columns: tuple[str, ...]) -> str:
    value = next((by_key[column] for column in columns if column in by_key), None)
    return "" if value is None else " ".join(str(value).split())


def _is_photo(by_key: dict, label: str) -> int | None:
    """What the published AffectNet table says of a picture."""
    answers = [_truth(by_key[column], column, label) for column in ("isphoto", "isreal") if column in by_key]
    return all(answers) if len(answers) == 2 else None


def _truth(value, column: str, label: str) -> bool:
    text = "" if value is None else str(value).strip().lower()
    if text not in _YES + _NO:
        raise ValueError(f"{label}: {column} is {value!r}, but has to be true or false.")
    return text in _YES


def _read_box(by_key: dict, label: str) -> str | None:
    """The arguments of a `FaceBox` as JSON."""
    if set(FACE_BOX) <= by_key.keys():
        corners = [_coordinate(by_key[column], column, label) for column in FACE_BOX]
        if any(map(math.isnan, corners)):
            return None
        left, top, right, bottom = corners
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"{label}: the face's box is {corners}, but has to be a part of the picture, 0 to 1.")
        return json.dumps([corners, False])
    if set(_PIXEL_BOX_COLUMNS) <= by_key.keys():
        sides = [_coordinate(by_key[column], column, label) for column in _PIXEL_BOX_COLUMNS]
        return None if any(map(math.isnan, sides)) else json.dumps([pixel_box(*sides).corners, True])
    return None


def _coordinate(value, column: str, label: str) -> float:
    try:
        number = math.nan if value in (None, "") else float(value)
    except (TypeError, ValueError):
        number = math.inf
    if math.isinf(number):
        raise ValueError(f"{label}: column {column!r} is {value!r}, but has to be a number.")
    return number
