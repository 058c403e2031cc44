# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Pictures whose AUs are in a table: any folder of pictures, and AffectNet. The table says what is read; a part is a
stretch of its rows.
"""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from face_data.store import (
    PICTURE_ERRORS,
    PICTURE_SUFFIXES,
    Part,
    check_source,
    claim_folder,
    mark_finished,
    place_picture,
    read_lines,
    run_parts,
)
from face_data.table_index import (
    FaceBox,
    TableEntry,
    au_columns,
    build_index,
    count_entries,
    file_digest,
    read_entries,
)


INDEX = "table.sqlite"
# Parts beside those of the table's rows.
TABLE_PART, UNTABLED_PART = "table", "untabled"
BAD_ROW = "row of the table that cannot be read"
NO_FACE = "no face"
SEVERAL_FACES = "several faces"
NO_PICTURE = "picture that is not there"
AMBIGUOUS = "file name that several pictures have"
UNREADABLE = "picture or video that cannot be read"
TOO_SMALL = "picture too small"
TOO_WEAK = "sum of all intensities too small"
NOT_IN_TABLE = "picture that is not in the table"


@dataclass(frozen=True)
class Tabled:
    """
    Pictures and their table.

    Args:
        source (`str`):
            Name of the source in the training data.
        bases (`tuple[Path, ...]`):
            Folders that file names of the table are relative to. Names that begin with folders of another machine
            are found by their ends.
        table (`Path`), tool, image_column (`str`, *optional*):
            As `au_tables.read_au_table` takes them.
        caption_column (`str`, *optional*):
            By default the first of `CAPTION_COLUMNS` that is there, if any.
        min_side (`int`):
            Pixels that both sides of a picture have at least.
        min_total_intensity (`float`):
            Faces with a smaller sum of all AUs are left out.
        correct_aus (`bool`):
            The AUs are measured by a tool: `face_data.build` corrects them as the paper does.
        needs_photo_filter (`bool`):
            Pictures may be drawings: `face_data.build` wants to know which.
        rows_per_part (`int`):
            Rows of the table in a part.
    """

    source: str
    bases: tuple[Path, ...]
    table: Path
    tool: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    min_side: int = 1
    min_total_intensity: float = 0.0
    correct_aus: bool = False
    needs_photo_filter: bool = False
    rows_per_part: int = 1024

    def __post_init__(self):
        check_source(self.source)
        if not self.table.is_file():
            raise FileNotFoundError(f"There is no table {str(self.table)!r}.")
        for name, lowest in (("min_side", 1), ("rows_per_part", 1), ("min_total_intensity", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"`--{name}` has to be at least {lowest}, but is {getattr(self, name)}.")

    def settings(self) -> dict:
        paths = {"bases": [str(base.resolve()) for base in self.bases], "table": file_digest(self.table)}
        names = ("source", "tool", "image_column", "caption_column", "min_side", "min_total_intensity")
        flags = ("correct_aus", "needs_photo_filter", "rows_per_part")
        return {name: getattr(self, name) for name in (*names, *flags)} | paths


def prepare_tabled(
    tabled: Tabled,
    folder: Path,
    num_workers: int,
    on_error: str,
    refuse: Callable[[Path, Part], bool] | None = None,
    list_pictures: Callable[[], Iterator[Path]] | None = None,
    find_box: Callable[[Path], FaceBox | None] | None = None,
) -> None:
    """
    Fill the work folder `folder`, which `face_data.store` describes.

    Args:
        refuse (`Callable`, *optional*):
            May look at a picture's path, and drop it from the part, which True says.
        list_pictures (`Callable`, *optional*):
            All pictures there are, to count those that the table does not have; by default those of `bases`.
        find_box (`Callable`, *optional*):
            Where the face of a picture is, if the table does not say it.
    """
    claim_folder(folder, tabled.settings())
    index = folder / INDEX
    if not index.is_file() or not part_path(folder, TABLE_PART).is_file():
        part = Part(on_error)
        note = functools.partial(_note_bad_row, part)
        build_index(index, tabled.table, tabled.tool, tabled.image_column, tabled.caption_column, note)
        part.write(part_path(folder, TABLE_PART))
    num_entries = count_entries(index)
    if num_entries == 0:
        raise ValueError(f"{tabled.table}: the table has no rows.")
    parts = [f"{number:07d}" for number in range(-(-num_entries // tabled.rows_per_part))]
    work = functools.partial(make_part, tabled, folder, on_error, refuse, find_box)
    run_parts(work, parts, lambda part: part_path(folder, part).is_file(), num_workers, tabled.source)
    if not part_path(folder, UNTABLED_PART).is_file():
        _count_untabled(tabled, folder, parts, list_pictures or functools.partial(_walk, tabled.bases))
    mark_finished(folder)


def make_part(
    tabled: Tabled,
    folder: Path,
    on_error: str,
    refuse: Callable[[Path, Part], bool] | None,
    find_box: Callable[[Path], FaceBox | None] | None,
    name: str,
) -> None:
    """Write the part of one stretch of the table."""
    part = Part(on_error)
    for entry in read_entries(folder / INDEX, int(name) * tabled.rows_per_part, tabled.rows_per_part):
        label = f"{tabled.table}, line {entry.line}"
        found = find_picture(entry.name, tabled.bases)
        if len(found) != 1:
            part.problem(AMBIGUOUS if found else NO_PICTURE, entry.name, ", ".join([label, *map(str, found)]))
        elif entry.times > 1:
            part.drop(SEVERAL_FACES, found[0])
        elif entry.aus is None:
            part.drop(NO_FACE, found[0])
        elif entry.aus.sum() < tabled.min_total_intensity:
            part.drop(TOO_WEAK, found[0])
        elif refuse is None or not refuse(found[0], part):
            box = entry.box or (find_box and find_box(found[0]))
            _add_row(entry, found[0], box, tabled, folder, part)
    part.write(part_path(folder, name))


def _add_row(entry: TableEntry, picture: Path, box: FaceBox | None, tabled: Tabled, folder: Path, part: Part) -> None:
    origin = origin_of(picture, tabled.bases)
    file_name = f"images/{origin}"
    try:
        size, is_turned = place_picture(picture, folder / file_name, tabled.min_side)
    except PICTURE_ERRORS as error:
        part.problem(UNREADABLE, picture, str(error))
        return
    if min(size) < tabled.min_side:
        part.drop(TOO_SMALL, picture)
        return
    row = {"file_name": file_name, "text": entry.text} | au_columns(entry.aus)
    row |= {"source": tabled.source, "subject": entry.subject, "origin": origin}
    # Pixels are counted before or after turning, which no tool tells.
    if box is not None and not (box.in_pixels and is_turned):
        row |= box.columns(size)
    part.rows.append(row if entry.is_photo is None else row | {"is_photo": entry.is_photo})


def find_picture(name: str, bases: tuple[Path, ...]) -> list[Path]:
    """
    The pictures that a file name of the table can mean. Leading folders that are not here are left away, because
    tables name those of the machine that they were made on.
    """
    pieces = [piece for piece in PurePosixPath(name.replace("\\", "/")).parts if piece not in ("/", "..", ".")]
    for first in range(len(pieces)):
        end = os.path.join(*pieces[first:])
        found = {path.resolve(): path for base in bases if (path := base / end).is_file()}
        # Where the first folder is here, the rest of the name is meant in it, and nowhere else.
        if found or any((base / pieces[first]).is_dir() for base in bases):
            return list(found.values())
    return []


def origin_of(picture: Path, bases: tuple[Path, ...]) -> str:
    """The path below the outermost base, which no other picture has."""
    origins = [picture.relative_to(base).as_posix() for base in bases if picture.is_relative_to(base)]
    return max(origins, key=len)


def part_path(folder: Path, part: str) -> Path:
    return folder / "rows" / f"{part}.jsonl"


def _note_bad_row(part: Part, error: ValueError) -> None:
    part.problem(BAD_ROW, str(error).rstrip("."))


def _walk(bases: tuple[Path, ...]) -> Iterator[Path]:
    for base in bases:
        for folder, _, names in os.walk(base):
            yield from (Path(folder, name) for name in names if name.lower().endswith(PICTURE_SUFFIXES))


def _count_untabled(
    tabled: Tabled, folder: Path, parts: list[str], list_pictures: Callable[[], Iterator[Path]]
) -> None:
    """Each row of the table is one line of a part, and names one picture or none: the difference is what it lacks."""
    num_found = 0
    for name in parts:
        lines = read_lines(part_path(folder, name))
        num_found += sum(line.get("dropped") not in (NO_PICTURE, AMBIGUOUS) for line in lines)
    part = Part("skip")
    num_pictures = sum(1 for _ in list_pictures())
    part.drop(NOT_IN_TABLE, tabled.bases[0], max(0, num_pictures - num_found))
    part.write(part_path(folder, UNTABLED_PART))
