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
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from action_units import ALL_AU_NAMES, AU_NAMES, au_columns, whole_au
from face_data.au_tables import AU_TABLE_TOOLS, NO, find_measured_aus, find_name_column, read_au_table, read_number
from program import replacing


FACE_BOX = ("face_x0", "face_y0", "face_x1", "face_y1")
CAPTION_COLUMNS = ("text", "caption", "prompt", "textdescription")
SUBJECT_COLUMNS = ("subject", "subject_id", "identity")
# As py-feat writes it, in pixels.
PIXEL_BOX = ("facerectx", "facerecty", "facerectwidth", "facerectheight")
_YES = ("1", "1.0", "true", "yes")


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
    for table in tables:
        if not table.path.is_file():
            raise FileNotFoundError(f"There is no table {str(table.path)!r}.")
    named = [name for table in tables for name in table.aus]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"`--aus` takes {twice} from two tables. An AU comes from one.")
    whole = [table.path for table in tables if not table.aus]
    if len(whole) > 1:
        raise ValueError(
            f"`--aus` takes all AUs from {whole[0]} and from {whole[1]}. Say behind all tables but one which AUs come"
            " from it: TOOL=FILE:AU5,AU9."
        )
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
        about (`dict`, *optional*):
            What the table about the pictures says of it, or None if that does not name it.
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
    about: dict | None


def build_index(
    path: Path,
    tables: tuple[AUTable, ...],
    about: Iterable[tuple[str, dict]] | None,
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
        about (`Iterable[tuple[str, dict]]`, *optional*):
            Where a row stands, and the row, of a table of captions and boxes without AUs, which fills what the first
            one does not say.
        find_key (`Callable`):
            What is the same for all names of a picture.
        on_error (`Callable`), say (`Callable`):
            Are told of rows that cannot be used, and of what was guessed.
    """

    def read_aus(number: int, table: AUTable) -> Iterator[tuple]:
        column = caption_column if number == 0 and about is None else None
        for row in read_au_table(table.path, table.tool, image_column, on_error, say, table.aus):
            measured = {"aus": row.aus.tolist() if row.face_found else None, "face": row.face, "line": row.line}
            yield f"{table.path}, line {row.line}", row.name, row.record, column, measured

    def read_others() -> Iterator[tuple]:
        for label, record in about or ():
            # `--image_column` may be meant for the AUs' tables alone.
            is_here = image_column is not None and image_column.strip().lower() in map(str.lower, record)
            column = find_name_column(record, image_column if is_here else None)
            yield label, "" if column is None else str(record[column]), record, caption_column, {}

    def read_rows(number: int, rows: Iterable[tuple]) -> Iterator[tuple]:
        for label, name, record, column, measured in rows:
            by_key = {column.lower(): value for column, value in record.items()}
            if column is not None and column.lower() not in by_key:
                raise ValueError(f"{label}: there is no column {column!r}. The columns are {', '.join(by_key)}.")
            try:
                if not name:
                    raise ValueError("there is no file name. Say which column has it with `--image_column`.")
                facts = {"name": _check_text(name)} | measured | _read_facts(by_key, column)
            except ValueError as error:
                on_error(ValueError(f"{label}: {error}"))
            else:
                yield find_key(name), number, json.dumps(facts)

    with replacing(path) as unfinished:
        unfinished.unlink(missing_ok=True)
        with closing(sqlite3.connect(unfinished)) as database:
            database.execute("CREATE TABLE rows (key TEXT, number INTEGER, facts TEXT)")
            sources = [*(read_aus(number, table) for number, table in enumerate(tables)), read_others()]
            for number, rows in enumerate(sources):
                database.executemany("INSERT INTO rows VALUES (?, ?, ?)", read_rows(number, rows))
            database.execute("CREATE INDEX by_key ON rows (key, number)")
            database.execute("CREATE TABLE pictures (id INTEGER PRIMARY KEY, key TEXT)")
            database.execute(
                "INSERT INTO pictures (key) SELECT key FROM rows WHERE number = 0 GROUP BY key ORDER BY min(rowid)"
            )
            database.commit()


def count_entries(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT count(*) FROM pictures").fetchone()[0]


def read_entries(path: Path, tables: tuple[AUTable, ...], first: int, count: int) -> Iterator[TableEntry]:
    """`count` entries from the number `first`, which counts from 0, in the order of the first table."""
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute(
            "SELECT id, number, facts FROM pictures JOIN rows USING (key) WHERE id BETWEEN ? AND ?"
            " ORDER BY id, number, rows.rowid",
            (first + 1, first + count),
        )
        for _, rows_of_picture in groupby(rows, itemgetter(0)):
            yield _join_rows(((number, json.loads(facts)) for _, number, facts in rows_of_picture), tables)


def _join_rows(rows: Iterable[tuple[int, dict]], tables: tuple[AUTable, ...]) -> TableEntry:
    """Make an entry of the rows of a picture, with the numbers of their tables; the last one is about the picture."""
    firsts, times, repeats, has_names, about = {}, Counter(), 0, False, None
    for number, facts in rows:
        if number == len(tables):
            about = facts
            continue
        first = firsts.setdefault(number, facts)
        has_names |= number == 0 and facts["name"] != first["name"]
        # A row that says the same as the first one of its picture is a repetition, and not another face.
        is_other = any(facts[name] != first[name] for name in ("aus", "face", "box"))
        times[number] += first is facts or is_other
        repeats += number == 0 and first is not facts and not is_other
    main, others = firsts[0], about or {}
    aus = None
    if len(firsts) == len(tables) and all(first["aus"] is not None for first in firsts.values()):
        values = {}
        for number, table in enumerate(tables):
            values |= zip(table.aus, firsts[number]["aus"], strict=True)
        aus = np.float32([values[name] for name in joined_aus(tables)])
    box = main["box"] or others.get("box")
    return TableEntry(
        main["name"],
        aus,
        main["text"] or others.get("text", ""),
        main["subject"],
        main["is_photo"],
        box and FaceBox(*box),
        main["line"],
        max(times.values()) if len(firsts) == len(tables) else 0,
        repeats,
        has_names,
        about,
    )


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _read_facts(by_key: dict, caption_column: str | None) -> dict:
    """What the columns of a row, in lower case, say besides the AUs."""
    words = by_key.get("removed_words")
    return {
        "text": _first_text(by_key, CAPTION_COLUMNS if caption_column is None else (caption_column.lower(),)),
        "subject": _first_text(by_key, SUBJECT_COLUMNS),
        "is_photo": _is_photo(by_key),
        "box": _read_box(by_key),
        "removed_words": Counter(map(str, words)) if isinstance(words, list) else None,
        "expression": by_key.get("expression"),
    }


def _check_text(text: str) -> str:
    # JSON can carry halves of characters, which no file can.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{text!r} is no Unicode text.")
    return text


def _first_text(by_key: dict, columns: tuple[str, ...]) -> str:
    value = next((by_key[column] for column in columns if column in by_key), None)
    return "" if value is None else _check_text(" ".join(str(value).split()))


def _is_photo(by_key: dict) -> bool | None:
    """What the published AffectNet table says of a picture."""
    answers = []
    for column in ("isphoto", "isreal"):
        text = "" if by_key.get(column) is None else str(by_key[column]).strip().lower()
        if text not in (*_YES, *NO):
            raise ValueError(f"{column} is {by_key[column]!r}, but has to be true or false.")
        answers.append(text in _YES)
    return all(answers) if {"isphoto", "isreal"} <= by_key.keys() else None


def _read_box(by_key: dict) -> list | None:
    """The arguments of a `FaceBox`."""
    for columns in (FACE_BOX, PIXEL_BOX):
        if not set(columns) <= by_key.keys():
            continue
        values = [read_number(by_key[column], column) for column in columns]
        if any(map(math.isnan, values)):
            return None
        if columns is PIXEL_BOX:
            left, top, width, height = values
            return [[left, top, left + width, top + height], True]
        left, top, right, bottom = values
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"the face's box is {values}, but has to be a part of the picture, 0 to 1.")
        return [values, False]
    return None
