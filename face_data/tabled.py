# SPDX-License-Identifier: Apache-2.0
"""
Pictures whose AUs are in tables: any folder of pictures, AffectNet, and what comes from the Hub. The first table says
what is read; a part is a stretch of its pictures. A small database on disk joins tables of any length, and finds the
pictures of a part for processes that know nothing of each other.
"""

import contextlib
import functools
import json
import math
import os
import re
import sqlite3
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath
from statistics import fmean

from action_units import ALL_AU_NAMES, AU_NAMES, action_units_of, au_columns, mirrored_columns, whole_au
from face_data.au_tables import AU_TABLE_TOOLS, NO, find_measured_aus, find_name_column, read_au_table, read_number
from face_data.captions import CAPTION_COLUMNS, take_emotion_words
from face_data.pictures import FACE_BOX, PICTURE_SUFFIXES, box_columns, size_and_end
from face_data.store import PARTS, SETTINGS, Part, check_source, part_path
from face_data.table_files import read_records
from program import check_options, file_digest, option, replacing


INDEX = "pictures.sqlite"
# The part beside those of the table's rows.
TABLE_PART = "table"
NO_FACE = "no face"
SEVERAL_FACES = "several faces"
REPEATED = "row that says the same again"
NOT_IN_ALL = "picture that is in the first table only"
NO_PICTURE = "picture that is not there"
AMBIGUOUS = "file name that several pictures have"
# MediaPipe's `create_from_file` reads pixels as they are stored, OpenFace as they are shown, LibreFace finds the face
# in one of the two and cuts it out of the other, and no table tells.
MIRRORED = "mirrored by EXIF, so the sides of its AUs are uncertain: save it as it is shown, and measure it again"
# Rows of a picture that agree in all of these say the same of one face.
SAID_OF_A_FACE = ("aus", "face", "box")
SUBJECT_COLUMNS = ("subject", "subject_id", "identity")
# The box of a face as py-feat writes it, in pixels.
PIXEL_BOX = ("facerectx", "facerecty", "facerectwidth", "facerectheight")
_YES = ("1", "1.0", "true", "yes")


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


def choose_aus(tables: tuple[AUTable, ...], au_names: tuple[str, ...] | None = None) -> tuple[AUTable, ...]:
    """
    Decide which AUs come from which table: those that are written behind it, and from the one table behind which there
    are none, all others that it measures. `au_names` are the AUs of the data, by default what the tables measure, each
    side by itself where they tell it. An AU without sides gives both sides, and two sides give their mean.

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
            flag = "--au_names" if au_names else "--aus"
            note += f" Left out, because `{flag}` does not name them: {', '.join(others)}."
        chosen.append(replace(table, aus=taken, note=note))
    au_columns([name for table in chosen for name in table.aus])
    return tuple(chosen)


def sort_aus(names: Iterable[str]) -> tuple[str, ...]:
    """AUs by their numbers, left before right."""
    return tuple(sorted(names, key=lambda name: (int(whole_au(name).removeprefix("AU")), name)))


def _is_among(name: str, others: Iterable[str]) -> bool:
    """AU12 is among AUs with AU12L, and AU12L among AUs with AU12."""
    return any(name in (other, whole_au(other)) or whole_au(name) == other for other in others)


@dataclass(frozen=True)
class Tabled:
    """
    Pictures and their tables. `source` is the name of the source in the training data. File names of the tables are
    relative to the folders `bases`; names that begin with folders of another machine are found by their ends. `tables`
    have the AUs as `choose_aus` gives them, and the first one decides which pictures there are. `about` is a table
    with captions and boxes of faces, for pictures of which the first table does not say them.
    """

    source: str
    bases: tuple[Path, ...]
    tables: tuple[AUTable, ...]
    about: Path | None = option(None, "Captions, if --aus has none.", flag="--captions", metavar="TABLE")
    image_column: str | None = option(None, "Column of the file names; by default the first usual one.")
    caption_column: str | None = option(None, "By default text, caption or prompt, if it is there.")
    min_side: int = option(1, "Pixels both sides of a picture have.", low=1)
    # Of an AU with sides, their mean counts.
    min_total_intensity: float = option(0.0, "Smallest sum of all AUs.", low=0)
    correct_aus: bool = option(False, "AUs are measured: correct them as the paper does.", flag="--measured")
    needs_photo_filter: bool = option(False, "There may be drawings: ask BLIP-2, as in `photos`.", flag="--drawings")
    drop_emotion_words: bool = option(False, "Take words of emotion out of captions.")
    rows_per_part: int = option(1024, "Rows of the table that are done together.", low=1)

    def __post_init__(self):
        check_source(self.source)
        check_options(self)
        if self.about is not None and not self.about.is_file():
            raise FileNotFoundError(f"There is no table {str(self.about)!r}.")

    @functools.cached_property
    def au_names(self) -> tuple[str, ...]:
        return sort_aus(name for table in self.tables for name in table.aus)

    def settings(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(Tabled)} | {
            "bases": [str(base.resolve()) for base in self.bases],
            "tables": [[file_digest(table.path), table.tool, table.aus] for table in self.tables],
            "au_names": self.au_names,
            "about": None if self.about is None else file_digest(self.about),
        }

    def read_about(self, say: Callable[[str], None]) -> Iterator[tuple[str, dict]]:
        """The rows of `about`, and where each stands."""
        for line, record in () if self.about is None else read_records(self.about, say):
            yield f"{self.about}, line {line}", record

    def refuses(self, facts: dict, picture: Path, part: Part) -> bool:
        """Whether the source itself says that a picture is of no use. The part is told."""
        return False

    def list_pictures(self) -> Iterator[Path]:
        """All pictures, but for those that an earlier step has put into a folder of its own."""
        for base in self.bases:
            for folder, folders, names in os.walk(base):
                folders[:] = [name for name in folders if not _is_own(Path(folder, name))]
                yield from (Path(folder, name) for name in names if name.lower().endswith(PICTURE_SUFFIXES))

    def begin(self, folder: Path, on_error: str) -> list[str]:
        """Read the tables, unless that is done, and name the parts."""
        if not (folder / INDEX).is_file() or not part_path(folder, TABLE_PART).is_file():
            part = Part(on_error)
            build_index(self, folder / INDEX, part)
            for table in self.tables:
                part.note(table.note)
            missing = [name for name in AU_NAMES if name not in au_columns(self.au_names)]
            if missing:
                part.note(f"Of the paper's AUs the data do not have {', '.join(missing)}.")
            part.write(folder, TABLE_PART)
        ((num_pictures,),) = query_index(folder, "SELECT count(*) FROM pictures")
        if num_pictures == 0:
            raise ValueError(f"{self.tables[0].path}: the table has no rows.")
        return [f"{number:07d}" for number in range(-(-num_pictures // self.rows_per_part))]

    def make_part(self, folder: Path, part: Part, name: str) -> None:
        """One stretch of the table."""
        first, columns = int(name) * self.rows_per_part, au_columns(self.au_names)
        columns_of_aus = [columns[unit.name] for unit in action_units_of(self.au_names)]
        rows = query_index(
            folder,
            "SELECT id, number, facts FROM pictures JOIN rows USING (key) WHERE id > ? AND id <= ?"
            " ORDER BY id, number, rows.rowid",
            (first, first + self.rows_per_part),
        )
        for _, rows_of_picture in groupby(rows, itemgetter(0)):
            by_table = {number: [] for number in range(len(self.tables) + 1)}
            for _, number, facts in rows_of_picture:
                by_table[number].append(json.loads(facts))
            facts, reason, repeats = self._join(*by_table.values())
            label, found = f"{self.tables[0].path}, line {facts['line']}", find_picture(facts["name"], self.bases)
            part.drop(REPEATED, found[0] if found else facts["name"], repeats)
            if len(found) != 1:
                part.problem(AMBIGUOUS if found else NO_PICTURE, facts["name"], ", ".join([label, *map(str, found)]))
            elif reason == NOT_IN_ALL:
                part.problem(reason, found[0], label)
            elif reason:
                part.drop(reason, found[0])
            elif sum(fmean(facts["aus"][c] for c in of_au) for of_au in columns_of_aus) < self.min_total_intensity:
                part.drop("sum of all intensities too small", found[0])
            elif not self.refuses(facts, found[0], part):
                self._keep(facts, found[0], folder, part)

    def _join(self, *tables: list[dict]) -> tuple[dict, str | None, int]:
        """
        From the rows of a picture, those of each table and then those about the pictures: facts, those of the first
        row but with all AUs; why the picture is of no use; and how many rows of the first table say the same again.
        """
        *measured, abouts = tables
        # A row that says the same as the first one of its picture is a repetition, and not another face.
        others = [[row for row in rows if any(row[n] != rows[0][n] for n in SAID_OF_A_FACE)] for rows in measured]
        facts, about, reason = measured[0][0], abouts[-1] if abouts else None, None
        if not all(measured):
            reason = NOT_IN_ALL
        elif any(others):
            is_one_name = len({row["name"] for row in measured[0]}) == 1
            reason = SEVERAL_FACES if is_one_name else "rows under several names that contradict each other"
        elif any(rows[0]["aus"] is None for rows in measured):
            reason = NO_FACE
        else:
            by_table = zip(self.tables, measured, strict=True)
            values = {name: au for table, rows in by_table for name, au in zip(table.aus, rows[0]["aus"], strict=True)}
            facts["aus"] = [values[name] for name in self.au_names]
        if about is not None:
            facts |= {name: facts[name] or about[name] for name in ("text", "box", "removed_words")}
        return facts | {"about": about}, reason, len(measured[0]) - 1 - len(others[0])

    def _keep(self, facts: dict, picture: Path, folder: Path, part: Part) -> None:
        # Below the outermost base, no other picture has its path.
        aus, paths = facts["aus"], (picture.relative_to(base) for base in self.bases if picture.is_relative_to(base))
        origin = max((path.as_posix() for path in paths), key=len)
        placed = part.place(picture, folder / "images" / origin, self.min_side)
        if placed is None:
            return
        if placed.is_mirrored and aus != [aus[column] for column in mirrored_columns(self.au_names)]:
            placed.path.unlink()
            part.drop(MIRRORED, picture)
            return
        text, words = facts["text"], facts["removed_words"]
        if self.drop_emotion_words:
            text, taken = take_emotion_words(text)
            words = [*words, *taken]
        box, note = box_columns(facts["box"], placed)
        row = {"text": text, **dict(zip(self.au_names, aus, strict=True)), "source": self.source}
        row |= {"subject": facts["subject"], "origin": origin, **box, "is_photo": facts["is_photo"]}
        part.keep(placed.path, folder, **row, changed=note, removed_words=words or None)


def build_index(tabled: Tabled, path: Path, part: Part) -> None:
    """
    Read the tables once, from front to back, into the database `path`. The first one decides which pictures there are.
    `part` is told of rows that cannot be used, and of what was guessed.
    """
    wanted, with_captions = tabled.image_column, 0 if tabled.about is None else len(tabled.tables)

    def on_error(error: ValueError) -> None:
        part.problem("row of the table that cannot be read", str(error).rstrip("."))

    def insert(number: int, label: str, name: str, record: dict, **measured) -> None:
        by_key = {column.lower(): value for column, value in record.items()}
        caption = tabled.caption_column if number == with_captions else None
        if caption is not None and caption.lower() not in by_key:
            raise ValueError(f"{label}: there is no column {caption!r}. The columns are {', '.join(by_key)}.")
        try:
            if not name:
                raise ValueError("there is no file name. Say which column has it with `--image_column`.")
            facts = {"name": _check_text(name)} | measured | _read_facts(by_key, caption)
        except ValueError as error:
            on_error(ValueError(f"{label}: {error}"))
        else:
            found = find_picture(name, tabled.bases)
            # The same for all names of one picture; of a picture that is not here, its name.
            key = str(found[0].resolve()) if len(found) == 1 else name
            database.execute("INSERT INTO rows VALUES (?, ?, ?)", (key, number, json.dumps(facts)))

    with replacing(path) as unfinished:
        unfinished.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(unfinished)) as database:
            database.execute("CREATE TABLE rows (key TEXT, number INTEGER, facts TEXT)")
            for number, table in enumerate(tabled.tables):
                for row in read_au_table(table.path, table.tool, wanted, on_error, part.note, table.aus):
                    aus, label = row.aus.tolist() if row.face_found else None, f"{table.path}, line {row.line}"
                    insert(number, label, row.name, row.record, aus=aus, face=row.face, line=row.line)
            for label, record in tabled.read_about(part.note):
                # `--image_column` may be meant for the AUs' tables alone.
                is_here = wanted is not None and wanted.strip().lower() in map(str.lower, record)
                column = find_name_column(record, wanted if is_here else None)
                insert(len(tabled.tables), label, "" if column is None else str(record[column]), record)
            database.execute("CREATE INDEX by_key ON rows (key, number)")
            database.execute("CREATE TABLE pictures (id INTEGER PRIMARY KEY, key TEXT)")
            database.execute(
                "INSERT INTO pictures (key) SELECT key FROM rows WHERE number = 0 GROUP BY key ORDER BY min(rowid)"
            )
            compare_pictures(tabled, database, part)
            database.commit()


def compare_pictures(tabled: Tabled, database: sqlite3.Connection, part: Part) -> None:
    """Count the pictures that the first table lacks, and those of it that are there under another name too."""

    def read_end(path: str) -> bytes | None:
        # What cannot be read is found when it is placed.
        with contextlib.suppress(OSError), open(path, "rb") as file:
            return size_and_end(file)

    # Names that are no Unicode are in no table, and no text of the database.
    names = (os.fsencode(path.resolve()).decode(errors="replace") for path in tabled.list_pictures())
    database.execute("CREATE TEMP TABLE files (key TEXT)")
    database.executemany("INSERT INTO files VALUES (?)", ((name,) for name in names))
    ((lacking,),) = database.execute("SELECT count(*) FROM files WHERE key NOT IN (SELECT key FROM pictures)")
    part.drop("picture that is not in the table", tabled.bases[0], lacking)
    # Only files of the same size and end are read whole.
    database.create_function("read_end", 1, read_end)
    database.create_function("digest", 1, lambda path: file_digest(Path(path)))
    database.execute("CREATE TEMP TABLE ends AS SELECT key, read_end(key) AS end FROM pictures WHERE key IN files")
    alike = "SELECT end FROM ends GROUP BY end HAVING count(*) > 1"
    groups = f"SELECT count(*) - 1 AS times, min(key), max(key) FROM ends WHERE end IN ({alike})"
    found = database.execute(f"{groups} GROUP BY digest(key) HAVING times > 0").fetchall()
    if found:
        count, (_, first, last) = sum(times for times, _, _ in found), found[0]
        part.note(f"{count:,} pictures have the bytes of another one, such as {last} and {first}.")


def query_index(folder: Path, question: str, values: tuple = ()) -> Iterator[tuple]:
    with contextlib.closing(sqlite3.connect(folder / INDEX)) as database:
        yield from database.execute(question, values)


def _read_facts(by_key: dict, caption_column: str | None) -> dict:
    """What the columns of a row, in lower case, say besides the AUs."""
    words = by_key.get("removed_words")
    return {
        "text": _first_text(by_key, CAPTION_COLUMNS if caption_column is None else (caption_column.lower(),)),
        "subject": _first_text(by_key, SUBJECT_COLUMNS),
        "is_photo": _is_photo(by_key),
        "box": _read_box(by_key),
        "removed_words": list(map(str, words)) if isinstance(words, list) else [],
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
    columns = ("isphoto", "isreal")
    values = {column: str(by_key[column] or "").strip().lower() for column in columns if column in by_key}
    for column, value in values.items():
        if value not in (*_YES, *NO):
            raise ValueError(f"{column} is {by_key[column]!r}, but has to be true or false.")
    return all(value in _YES for value in values.values()) if len(values) == len(columns) else None


def _read_box(by_key: dict) -> tuple[list[float], bool] | None:
    """The first argument of `box_columns`."""
    columns = next((columns for columns in (FACE_BOX, PIXEL_BOX) if set(columns) <= by_key.keys()), ())
    values = [read_number(by_key[column], column) for column in columns]
    if not values or any(map(math.isnan, values)):
        return None
    left, top, right, bottom = values
    if columns is PIXEL_BOX:
        return [left, top, left + right, top + bottom], True
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(f"the face's box is {values}, but has to be a part of the picture, 0 to 1.")
    return values, False


def find_picture(name: str, bases: tuple[Path, ...]) -> list[Path]:
    """
    The pictures that a file name of the table can mean. Leading folders that are not here are left away, because
    tables name those of the machine that they were made on. Letters with accents may be one character or two, as
    macOS and others write them.
    """
    pieces = [piece for piece in PurePosixPath(name.replace("\\", "/")).parts if piece not in ("/", "..", ".")]
    for first in range(len(pieces)):
        found = {}
        for base in bases:
            path = _below(base, pieces[first:])
            if os.path.isfile(path):
                found[path.resolve()] = path
        # Where the first folder is here, the rest of the name is meant in it, and nowhere else.
        if found or any(os.path.isdir(_below(base, pieces[first : first + 1])) for base in bases):
            return list(found.values())
    return []


def _below(base: Path, pieces: list[str]) -> Path:
    for piece in pieces:
        forms = (piece, *(unicodedata.normalize(form, piece) for form in ("NFC", "NFD")))
        base = next((base / form for form in forms if os.path.lexists(base / form)), base / piece)
    return base


def _is_own(folder: Path) -> bool:
    return (folder / SETTINGS).is_file() and any((folder / name).is_dir() for name in ("rows", PARTS))
