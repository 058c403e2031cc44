# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Pictures whose AUs are in tables: any folder of pictures, AffectNet, and what comes from the Hub. The first table says
what is read; a part is a stretch of its pictures.
"""

import functools
import os
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath

import numpy as np

from action_units import AU_NAMES, action_units_of, au_columns, mirrored_columns
from face_data.captions import take_emotion_words
from face_data.pictures import PICTURE_ERRORS, PICTURE_SUFFIXES, place_picture
from face_data.store import (
    SETTINGS,
    Part,
    check_source,
    claim_folder,
    mark_finished,
    part_path,
    read_lines,
    read_rows,
    run_parts,
)
from face_data.table_files import read_records
from face_data.table_index import (
    AUTable,
    TableEntry,
    build_index,
    count_entries,
    file_digest,
    joined_aus,
    read_entries,
)
from program import check_options, option


INDEX = "pictures.sqlite"
# An index that older versions have left, in another form.
OLD_INDEX = "table.sqlite"
# Parts beside those of the table's rows.
TABLE_PART, UNTABLED_PART = "table", "untabled"
BAD_ROW = "row of the table that cannot be read"
NO_FACE = "no face"
SEVERAL_FACES = "several faces"
CONTRADICTION = "rows under several names that contradict each other"
REPEATED = "row that says the same again"
NOT_IN_ALL = "picture that is in the first table only"
NO_PICTURE = "picture that is not there"
AMBIGUOUS = "file name that several pictures have"
UNREADABLE = "picture or video that cannot be read"
TOO_SMALL = "picture too small"
TOO_WEAK = "sum of all intensities too small"
NOT_IN_TABLE = "picture that is not in the table"
# MediaPipe's `create_from_file` reads pixels as they are stored, OpenFace as they are shown, LibreFace finds the face
# in one of the two and cuts it out of the other, and no table tells.
MIRRORED = "mirrored by EXIF, so the sides of its AUs are uncertain: save it as it is shown, and measure it again"


@dataclass(frozen=True)
class Tabled:
    """
    Pictures and their tables.

    Args:
        source (`str`):
            Name of the source in the training data.
        bases (`tuple[Path, ...]`):
            Folders that file names of the table are relative to. Names that begin with folders of another machine
            are found by their ends.
        tables (`tuple[AUTable, ...]`):
            AUs of the pictures as `choose_aus` gives them; the first one decides which pictures there are.
        about (`Path`, *optional*):
            A table with captions and boxes of faces, for pictures of which the first table does not say them.
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
        return joined_aus(self.tables)

    def settings(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(Tabled)} | {
            "bases": [str(base.resolve()) for base in self.bases],
            "tables": [table.settings() for table in self.tables],
            "au_names": list(self.au_names),
            "about": None if self.about is None else file_digest(self.about),
        }

    def read_about(self, say: Callable[[str], None]) -> Iterator[tuple[str, dict]] | None:
        """The rows of `about`, and where each stands."""
        if self.about is None:
            return None
        return ((f"{self.about}, line {line}", record) for line, record in read_records(self.about, say))

    def refuses(self, entry: TableEntry, picture: Path, part: Part) -> bool:
        """Whether the source itself says that a picture is of no use. The part is told."""
        return False

    def list_pictures(self) -> Iterator[Path]:
        """All pictures, but for those that an earlier step has put into a folder of its own."""
        for base in self.bases:
            for folder, folders, names in os.walk(base):
                folders[:] = [name for name in folders if not _is_own(Path(folder, name))]
                yield from (Path(folder, name) for name in names if name.lower().endswith(PICTURE_SUFFIXES))


def prepare_tabled(tabled: Tabled, folder: Path, num_workers: int, on_error: str) -> None:
    """Fill the work folder `folder`, which `face_data.store` describes."""
    claim_folder(folder, tabled.settings())
    index = folder / INDEX
    if not index.is_file() or not part_path(folder, TABLE_PART).is_file():
        part, old_index = Part(on_error), folder / OLD_INDEX
        if old_index.is_file():
            part.note(f"An older version began {str(folder)!r}. The tables are indexed anew; finished parts stay.")
        build_index(
            index,
            tabled.tables,
            tabled.read_about(part.note),
            tabled.image_column,
            tabled.caption_column,
            functools.partial(find_key, bases=tabled.bases),
            lambda error: part.problem(BAD_ROW, str(error).rstrip(".")),
            part.note,
        )
        for table in tabled.tables:
            part.note(table.note)
        missing = [name for name in AU_NAMES if name not in au_columns(tabled.au_names)]
        if missing:
            part.note(f"Of the paper's AUs the data do not have {', '.join(missing)}.")
        part.write(part_path(folder, TABLE_PART))
        old_index.unlink(missing_ok=True)
    num_entries = count_entries(index)
    if num_entries == 0:
        raise ValueError(f"{tabled.tables[0].path}: the table has no rows.")
    parts = [f"{number:07d}" for number in range(-(-num_entries // tabled.rows_per_part))]
    work = functools.partial(make_part, tabled, folder, on_error)
    run_parts(work, parts, folder / "rows", num_workers, tabled.source)
    if not part_path(folder, UNTABLED_PART).is_file():
        _count_pictures(tabled, folder, parts)
    mark_finished(folder)


def make_part(tabled: Tabled, folder: Path, on_error: str, name: str) -> None:
    """Write the part of one stretch of the table."""
    part = Part(on_error)
    first_row = int(name) * tabled.rows_per_part
    for entry in read_entries(folder / INDEX, tabled.tables, first_row, tabled.rows_per_part):
        label = f"{tabled.tables[0].path}, line {entry.line}"
        found = find_picture(entry.name, tabled.bases)
        part.drop(REPEATED, found[0] if found else entry.name, entry.repeats)
        if len(found) != 1:
            part.problem(AMBIGUOUS if found else NO_PICTURE, entry.name, ", ".join([label, *map(str, found)]))
        elif entry.times == 0:
            part.problem(NOT_IN_ALL, found[0], label)
        elif entry.times > 1:
            part.drop(CONTRADICTION if entry.has_names else SEVERAL_FACES, found[0])
        elif entry.aus is None:
            part.drop(NO_FACE, found[0])
        elif _total(entry.aus, tabled.au_names) < tabled.min_total_intensity:
            part.drop(TOO_WEAK, found[0])
        elif not tabled.refuses(entry, found[0], part):
            _add_row(entry, found[0], tabled, folder, part)
    part.write(part_path(folder, name))


def _total(aus: np.ndarray, au_names: tuple[str, ...]) -> float:
    columns = au_columns(au_names)
    return sum(aus[list(columns[unit.name])].mean() for unit in action_units_of(au_names))


def _add_row(entry: TableEntry, picture: Path, tabled: Tabled, folder: Path, part: Part) -> None:
    origin = origin_of(picture, tabled.bases)
    try:
        placed = place_picture(picture, folder / "images" / origin, tabled.min_side)
    except PICTURE_ERRORS as error:
        part.problem(UNREADABLE, picture, str(error))
        return
    if min(placed.size) < tabled.min_side:
        part.drop(TOO_SMALL, picture)
        return
    if placed.is_mirrored and (entry.aus != entry.aus[mirrored_columns(tabled.au_names)]).any():
        placed.path.unlink()
        part.drop(MIRRORED, picture)
        return
    text, removed = take_emotion_words(entry.text) if tabled.drop_emotion_words else (entry.text, {})
    removed = dict(Counter(removed) + Counter((entry.about or {}).get("removed_words")))
    row = {"file_name": placed.path.relative_to(folder).as_posix(), "text": text}
    row |= dict(zip(tabled.au_names, entry.aus.tolist(), strict=True))
    row |= {"source": tabled.source, "subject": entry.subject, "origin": origin}
    # Boxes are those of the pixels as they are stored, or as they are shown, and no tool tells.
    if entry.box is not None and not placed.is_turned:
        row |= entry.box.columns(placed.size)
    known = {"is_photo": entry.is_photo, "changed": placed.note, "removed_words": removed or None}
    part.rows.append(row | {name: value for name, value in known.items() if value is not None})


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


def find_key(name: str, bases: tuple[Path, ...]) -> str:
    """The same for all names of one picture; of a picture that is not here, its name."""
    found = find_picture(name, bases)
    return str(found[0].resolve()) if len(found) == 1 else name


def _below(base: Path, pieces: list[str]) -> Path:
    path = base.joinpath(*pieces)
    if "".join(pieces).isascii() or os.path.exists(path):
        return path
    path = base
    for piece in pieces:
        entries = _list_composed(path)
        path = path / entries.get(unicodedata.normalize("NFC", piece), piece)
    return path


@functools.lru_cache(maxsize=16)
def _list_composed(folder: Path) -> dict[str, str]:
    """The names in a folder by their composed form."""
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    return {unicodedata.normalize("NFC", name): name for name in names}


def origin_of(picture: Path, bases: tuple[Path, ...]) -> str:
    """The path below the outermost base, which no other picture has."""
    origins = [picture.relative_to(base).as_posix() for base in bases if picture.is_relative_to(base)]
    return max(origins, key=len)


def _is_own(folder: Path) -> bool:
    return (folder / SETTINGS).is_file() and any((folder / name).is_dir() for name in ("rows", ".parts"))


def _count_pictures(tabled: Tabled, folder: Path, parts: list[str]) -> None:
    """Count the pictures that the table lacks, and those that are there under another name too."""
    num_found = 0
    # Each picture of the table is one line of a part: the difference to those that are there is what it lacks.
    for name in parts:
        lines = read_lines(part_path(folder, name))
        num_found += sum(line.get("dropped") not in (NO_PICTURE, AMBIGUOUS, REPEATED) for line in lines)
    part = Part("skip")
    num_pictures = sum(1 for _ in tabled.list_pictures())
    part.drop(NOT_IN_TABLE, tabled.bases[0], max(0, num_pictures - num_found))
    note = _note_same_pictures(folder, parts)
    if note:
        part.note(note)
    part.write(part_path(folder, UNTABLED_PART))


def _note_same_pictures(folder: Path, parts: list[str]) -> str:
    """Say how many pictures have the bytes of another one. Only files of the same size and end are read whole."""
    # Without a name the database is a temporary file, so memory does not grow with the pictures.
    with closing(sqlite3.connect("")) as database:
        database.execute("CREATE TABLE ends (name TEXT, end BLOB)")
        database.execute("CREATE TABLE files (name TEXT, digest TEXT)")
        for part in parts:
            names = [row["file_name"] for row in read_rows(part_path(folder, part))]
            database.executemany("INSERT INTO ends VALUES (?, ?)", [(name, _end(folder / name)) for name in names])
        alike = database.execute(
            "SELECT name FROM ends WHERE end IN (SELECT end FROM ends GROUP BY end HAVING count(*) > 1)"
        )
        insert = "INSERT INTO files VALUES (?, ?)"
        database.executemany(insert, ((name, file_digest(folder / name)) for (name,) in alike))
        groups = "FROM (SELECT count(*) AS times, min(name) AS first, max(name) AS last FROM files GROUP BY digest)"
        count, first, last = database.execute(
            f"SELECT coalesce(sum(times - 1), 0), first, last {groups} WHERE times > 1"
        ).fetchone()
    return f"{count:,} pictures have the bytes of another one, such as {last} and {first}." if count else ""


def _end(path: Path) -> bytes:
    """Size and last bytes of a file."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 64))
        return b"%d " % size + file.read()
