# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
AU tables as a small database on disk, for tables of any length: rows by number, for parts that processes make
independently of each other, pictures that come twice, and the AUs of several tools joined.
"""

import hashlib
import json
import math
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from action_units import ALL_AU_NAMES, AU_NAMES, au_columns, whole_au
from face_data.au_tables import (
    AU_TABLE_TOOLS,
    AURow,
    find_measured_aus,
    find_name_column,
    read_au_table,
    read_number,
)
from face_data.table_files import read_records
from program import replacing


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
class AUTable:
    """
    A table, the tool that wrote it (by default its columns tell), and the AUs taken from it. `choose_aus` fills in
    AUs that are left open, and a `note` on which AUs are taken and which are left out.
    """

    path: Path
    tool: str | None = None
    aus: tuple[str, ...] = ()
    note: str = ""

    @classmethod
    def parse(cls, text: str) -> "AUTable":
        """`"FILE"`, `"TOOL=FILE"`, `"FILE:AU5,AU9"` or `"TOOL=FILE:AU5,AU9"`."""
        tool, _, rest = text.partition("=")
        tool, rest = (tool, rest) if tool in AU_TABLE_TOOLS else (None, text)
        match = re.fullmatch(r"(.+?)(?::(AU\w+(?:,\s*AU\w+)*))?", rest, flags=re.IGNORECASE | re.DOTALL)
        if match is None:
            raise ValueError(f"`--aus` is {text!r}. Write FILE, TOOL=FILE, or TOOL=FILE:AU5,AU9.")
        aus = tuple(name.strip().upper() for name in match[2].split(",")) if match[2] else ()
        unknown = [name for name in aus if name not in {*ALL_AU_NAMES, *map(whole_au, ALL_AU_NAMES)}]
        if unknown:
            raise ValueError(
                f"`--aus` names {unknown[0]!r} in {text!r}, which is no AU of FACS. Write AU5, or AU12L and AU12R."
            )
        return cls(Path(match[1]), tool, aus)

    def settings(self) -> list:
        return [file_digest(self.path), self.tool, list(self.aus)]


def check_tables(tables: tuple[AUTable, ...]) -> None:
    """
    Raises:
        FileNotFoundError: if a table is not there.
        ValueError: if an AU comes from two tables, or two tables give all AUs.
    """
    for table in tables:
        if not table.path.is_file():
            raise FileNotFoundError(f"There is no table {str(table.path)!r}.")
    taken = [name for table in tables for name in table.aus]
    twice = next((name for name in taken if taken.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"`--aus` takes {twice} from two tables. An AU comes from one.")
    whole = [table.path for table in tables if not table.aus]
    if len(whole) > 1:
        raise ValueError(
            f"`--aus` takes all AUs from {whole[0]} and from {whole[1]}. Say behind all tables but one which AUs come"
            " from it: TOOL=FILE:AU5,AU9."
        )


def choose_aus(tables: tuple[AUTable, ...], au_names: tuple[str, ...] | None = None) -> tuple[AUTable, ...]:
    """
    Decide which AUs come from which table: those that are written behind it, and from the one table behind which there
    are none, all others that it measures.

    Args:
        au_names (`tuple[str, ...]`, *optional*):
            The AUs of the data. An AU without sides gives both sides, and two sides give their mean. By default what
            the tables measure, each side by itself where they tell it.

    Raises:
        FileNotFoundError: if a table is not there.
        ValueError: if an AU comes from no table or from two, if a table gives none, or if `au_names` is no list that
            an adapter can have.
    """
    check_tables(tables)
    named = [name for table in tables for name in table.aus]
    chosen = []
    for table in tables:
        tool, measured = find_measured_aus(table.path, table.tool)
        offered = au_names or table.aus or measured or AU_NAMES
        taken = tuple(name for name in offered if _is_among(name, table.aus or named) == bool(table.aus))
        # Closed eyes look the same for long and briefly.
        missing = [n for n in taken if measured and whole_au(n).replace("AU45", "AU43") not in au_columns(measured)]
        if missing or not taken:
            raise ValueError(
                f"`--aus` takes {', '.join(missing) or 'no AU'} from {table.path}, where {tool} measures"
                f" {', '.join(measured)}. Choose others by `--au_names`, or behind the file's name."
            )
        left = [name for name in measured if not _is_among(name, taken)]
        elsewhere = [name for name in left if _is_among(name, named) and not _is_among(name, table.aus)]
        others = [name for name in left if name not in elsewhere]
        note = f"{table.path}: {tool} gives {', '.join(taken)}."
        if elsewhere:
            note += f" Left out, because another table gives them: {', '.join(elsewhere)}."
        if others:
            option = "--au_names" if au_names else "--aus"
            note += f" Left out, because `{option}` does not name them: {', '.join(others)}."
        chosen.append(replace(table, aus=taken, note=note))
    au_columns(joined_aus(tuple(chosen)))
    return tuple(chosen)


def joined_aus(tables: tuple[AUTable, ...]) -> tuple[str, ...]:
    """The AUs of the data: those of all tables by their numbers, left before right."""
    return sort_aus(name for table in tables for name in table.aus)


def sort_aus(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: (int(whole_au(name).removeprefix("AU")), name)))


def _is_among(name: str, others: Iterable[str]) -> bool:
    """AU12 is among AUs with AU12L, and AU12L among AUs with AU12."""
    return any(name in (other, whole_au(other)) or whole_au(name) == other for other in others)


@dataclass(frozen=True)
class TableEntry:
    """
    A picture of the first table.

    Args:
        aus (`numpy.ndarray`, *optional*):
            In [0, 5], in the order of `joined_aus`. None if a table has no face in the picture.
        times (`int`):
            The largest number of different rows that a table has for the picture; 0 if one has none.
        repeats (`int`):
            Rows of the first table that say the same once more.
        has_names (`bool`):
            The first table names the picture in several ways.
        removed (`dict[str, int]`, *optional*):
            Emotion words that were taken out of the text, and how often.
    """

    name: str
    aus: np.ndarray | None
    text: str
    subject: str
    is_photo: bool | None
    box: FaceBox | None
    line: int
    times: int
    repeats: int
    has_names: bool
    removed: dict[str, int] | None


def build_index(
    path: Path,
    tables: tuple[AUTable, ...],
    about: Path | None,
    image_column: str | None,
    caption_column: str | None,
    find_key: Callable[[str], str],
    on_error: Callable[[ValueError], None],
    say: Callable[[str], None],
) -> None:
    """
    Read `tables` once, from front to back, into the database `path`.

    Args:
        tables (`tuple[AUTable, ...]`):
            As `choose_aus` gives them. The first one decides which pictures there are.
        about (`Path`, *optional*):
            A table of captions and boxes without AUs, which fills what the first one does not say.
        find_key (`Callable`):
            What is the same for all names of a picture.
        on_error (`Callable`), say (`Callable`):
            Are told of rows that cannot be used, and of what was guessed.
    """

    with replacing(path) as unfinished:
        unfinished.unlink(missing_ok=True)
        with closing(sqlite3.connect(unfinished)) as database:
            database.execute(
                "CREATE TABLE entries (id INTEGER PRIMARY KEY, key TEXT UNIQUE, name TEXT, aus BLOB, text TEXT,"
                " subject TEXT, is_photo INTEGER, box TEXT, line INTEGER, times INTEGER, repeats INTEGER,"
                " has_names INTEGER, face INTEGER)"
            )
            database.execute(
                "CREATE TABLE others (number INTEGER, key TEXT, aus BLOB, face INTEGER, times INTEGER,"
                " PRIMARY KEY (number, key)) WITHOUT ROWID"
            )
            database.execute(
                "CREATE TABLE about (key TEXT PRIMARY KEY, text TEXT, box TEXT, removed TEXT) WITHOUT ROWID"
            )
            captions = None if about is not None else caption_column
            for number, table in enumerate(tables):
                rows = read_au_table(table.path, table.tool, image_column, on_error, say, table.aus)
                values = _read_values(rows, table.path, None if number else captions, find_key, on_error)
                for batch in _batches(values):
                    if number:
                        others = [(number, key, aus, face) for key, _, aus, *_, face in batch]
                        database.executemany(_INSERT_OTHER, others)
                    else:
                        database.executemany(_INSERT_ENTRY, batch)
            if about is not None:
                for batch in _batches(_read_about(about, image_column, caption_column, find_key, on_error, say)):
                    database.executemany("INSERT OR REPLACE INTO about VALUES (?, ?, ?, ?)", batch)
            database.commit()


# A row that says the same as the first one of its picture is a repetition, and not another face.
_IS_OTHER_FACE = "(aus IS NOT excluded.aus OR face IS NOT excluded.face)"
_INSERT_ENTRY = (
    "INSERT INTO entries (key, name, aus, text, subject, is_photo, box, line, face, times, repeats, has_names)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 1, 0, 0) ON CONFLICT (key) DO UPDATE SET"
    f" times = times + ({_IS_OTHER_FACE} OR box IS NOT excluded.box),"
    f" repeats = repeats + (NOT {_IS_OTHER_FACE} AND box IS excluded.box),"
    " has_names = has_names OR name IS NOT excluded.name"
)
_INSERT_OTHER = (
    "INSERT INTO others VALUES (?, ?, ?, ?, 1) ON CONFLICT (number, key) DO UPDATE SET"
    f" times = times + {_IS_OTHER_FACE}"
)


def count_entries(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT count(*) FROM entries").fetchone()[0]


def read_entries(path: Path, tables: tuple[AUTable, ...], first: int, count: int) -> list[TableEntry]:
    """`count` entries from the number `first`, which counts from 0, in the order of the first table."""
    where = " WHERE entries.id BETWEEN ? AND ? ORDER BY entries.id"
    limits = (first + 1, first + count)
    with closing(sqlite3.connect(path)) as database:
        found = database.execute(
            "SELECT name, aus, coalesce(nullif(entries.text, ''), about.text, ''), subject, is_photo,"
            " coalesce(entries.box, about.box), line, times, repeats, has_names, removed"
            " FROM entries LEFT JOIN about ON about.key = entries.key" + where,
            limits,
        ).fetchall()
        others = [
            database.execute(
                "SELECT others.aus, coalesce(others.times, 0) FROM entries"
                " LEFT JOIN others ON others.key = entries.key AND others.number = ?" + where,
                (number, *limits),
            ).fetchall()
            for number in range(1, len(tables))
        ]
    entries = []
    for index, (name, aus, text, subject, is_photo, box, line, times, repeats, has_names, removed) in enumerate(found):
        rows = [(aus, times), *(rows[index] for rows in others)]
        all_times = [times for _, times in rows]
        entries.append(
            TableEntry(
                name,
                _join_aus([aus for aus, _ in rows], tables),
                text,
                subject,
                None if is_photo is None else bool(is_photo),
                None if box is None else FaceBox(*json.loads(box)),
                line,
                max(all_times) if all(all_times) else 0,
                repeats,
                bool(has_names),
                None if removed is None else json.loads(removed),
            )
        )
    return entries


def _join_aus(rows: list[bytes | None], tables: tuple[AUTable, ...]) -> np.ndarray | None:
    if any(row is None for row in rows):
        return None
    values = {}
    for row, table in zip(rows, tables, strict=True):
        values |= zip(table.aus, np.frombuffer(row, np.float32), strict=True)
    return np.float32([values[name] for name in joined_aus(tables)])


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _batches(values: Iterator[tuple]) -> Iterator[list[tuple]]:
    while batch := list(islice(values, 4096)):
        yield batch


def _read_values(
    rows: Iterator[AURow],
    table: Path,
    caption_column: str | None,
    find_key: Callable[[str], str],
    on_error: Callable[[ValueError], None],
) -> Iterator[tuple]:
    captions = CAPTION_COLUMNS if caption_column is None else (caption_column.lower(),)
    for row in rows:
        label = f"{table}, line {row.line}"
        by_key = {column.lower(): value for column, value in row.record.items()}
        _check_caption_column(caption_column, by_key, label)
        try:
            yield (
                find_key(_check_name(row.name, label)),
                row.name,
                row.aus.tobytes() if row.face_found else None,
                _first_text(by_key, captions, label),
                _first_text(by_key, SUBJECT_COLUMNS, label),
                _is_photo(by_key, label),
                _read_box(by_key, label),
                row.line,
                row.face,
            )
        except ValueError as error:
            on_error(error)


def _read_about(
    table: Path,
    image_column: str | None,
    caption_column: str | None,
    find_key: Callable[[str], str],
    on_error: Callable[[ValueError], None],
    say: Callable[[str], None],
) -> Iterator[tuple]:
    captions = CAPTION_COLUMNS if caption_column is None else (caption_column.lower(),)
    for line, record in read_records(table, say):
        label = f"{table}, line {line}"
        by_key = {column.lower(): value for column, value in record.items()}
        _check_caption_column(caption_column, by_key, label)
        try:
            # `--image_column` may be meant for the AUs' tables alone.
            is_here = image_column is not None and image_column.strip().lower() in by_key
            column = find_name_column(list(record), image_column if is_here else None)
            name = _check_name("" if column is None else str(record[column]), label)
            removed = by_key.get("removed_words")
            removed = json.dumps(Counter(map(str, removed))) if isinstance(removed, list) else None
            yield find_key(name), _first_text(by_key, captions, label), _read_box(by_key, label), removed
        except ValueError as error:
            on_error(error)


def _check_caption_column(name: str | None, by_key: dict, label: str) -> None:
    if name is not None and name.lower() not in by_key:
        raise ValueError(f"{label}: there is no column {name!r}. The columns are {', '.join(by_key)}.")


def _check_name(name: str, label: str) -> str:
    if not name:
        raise ValueError(f"{label}: there is no file name. Say which column has it with `--image_column`.")
    return _check_text(name, label)


def _check_text(text: str, label: str) -> str:
    # JSON can carry halves of characters, which no file can.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{label}: {text!r} is no Unicode text.")
    return text


def _first_text(by_key: dict, columns: tuple[str, ...], label: str) -> str:
    value = next((by_key[column] for column in columns if column in by_key), None)
    return "" if value is None else _check_text(" ".join(str(value).split()), label)


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
        return read_number(value, column)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
