# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
AffectNet: photographs from the web with an emotion each, in both forms that it is given out in (paper §4.4).

    old    Manually_Annotated_file_lists/{training,validation}.csv, pictures in Manually_Annotated_Images/103/29a3….jpg
    new    {train_set,val_set}/images/12.jpg, and for each annotations/12_exp.npy and others

AffectNet has no AUs: they come from a table of a tool that measured the pictures, or from the published
`affectnet_metadata.csv`. Pictures that are small or have no face, and faces that hardly move, are left out here;
`face_data.build` leaves out drawings, and corrects the AUs.
"""

import csv
import functools
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from face_data.pictures import PICTURE_SUFFIXES
from face_data.store import Part, claim_folder
from face_data.table_index import AUTable, FaceBox, pixel_box
from face_data.tabled import Tabled, prepare_tabled
from program import replacing


LISTS = "lists.sqlite"
MIN_SIDE = 512
MIN_TOTAL_INTENSITY = 0.2
NON_FACE = 10
NON_FACE_REASON = "marked as no face"
NOT_LISTED = "picture that is in no file list"
NO_LABEL_FILE = "missing label file"
BAD_LABEL_FILE = "label file that cannot be read"
_LIST_COLUMNS = ("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height", "facial_landmarks")
_FILE_LIST = (*_LIST_COLUMNS, "expression", "valence", "arousal")


@dataclass(frozen=True)
class Layout:
    """Where a copy of AffectNet has its pictures, and its file lists if it is of the old form."""

    picture_dirs: tuple[Path, ...]
    file_lists: tuple[Path, ...]


def find_layout(root: Path) -> Layout:
    """
    Raises:
        ValueError: if there is no AffectNet, of either form, at `root`.
    """
    if not root.is_dir():
        raise ValueError(f"{str(root)!r} is no folder.")
    lists = tuple(sorted(path for path in _below(root, "*.csv", 2) if _is_file_list(path)))
    if lists:
        picture_dirs = tuple(path for path in _below(root, "*_Annotated_Images", 1) if path.is_dir())
        return Layout(picture_dirs or (root,), lists)
    picture_dirs = tuple(
        path for path in _below(root, "images", 2) if path.is_dir() and (path.parent / "annotations").is_dir()
    )
    if picture_dirs:
        return Layout(picture_dirs, ())
    raise ValueError(
        f"{str(root)!r} holds no AffectNet. It has either Manually_Annotated_file_lists/training.csv and"
        " Manually_Annotated_Images, or images/12.jpg and annotations/12_exp.npy, or these within train_set and"
        " val_set."
    )


def prepare_affectnet(
    root: Path,
    tables: tuple[AUTable, ...],
    folder: Path,
    num_workers: int,
    on_error: str,
    image_column: str | None = None,
    min_side: int = MIN_SIDE,
    min_total_intensity: float = MIN_TOTAL_INTENSITY,
    rows_per_part: int = 1024,
) -> None:
    """Fill the work folder `folder`, which `face_data.store` describes; see `Tabled` for what is set."""
    layout = find_layout(root)
    # The folder of a split comes before its pictures, so that `train_set/images/1.jpg` is not `val_set/images/1.jpg`.
    tabled = Tabled(
        "affectnet",
        (root, *layout.picture_dirs),
        tables,
        image_column=image_column,
        min_side=min_side,
        min_total_intensity=min_total_intensity,
        correct_aus=True,
        needs_photo_filter=True,
        rows_per_part=rows_per_part,
    )
    if layout.file_lists:
        claim_folder(folder, tabled.settings())
        lists = folder / LISTS
        if not lists.is_file():
            _index_lists(lists, layout.file_lists)
        refuse, find_box = functools.partial(refuse_by_lists, lists), functools.partial(find_listed_box, lists)
        list_pictures = functools.partial(_listed, lists)
    else:
        refuse, find_box = refuse_by_label_file, None
        list_pictures = functools.partial(_labelled, layout.picture_dirs)
    prepare_tabled(tabled, folder, num_workers, on_error, refuse, list_pictures, find_box)


def refuse_by_lists(lists: Path, picture: Path, part: Part) -> bool:
    """Drop a picture that the file lists mark as no face or do not name, and return True; else return False."""
    found = _look_up("expression", lists, picture)
    if found is None:
        part.problem(NOT_LISTED, picture)
        return True
    return _is_refused(found[0], picture, part)


def find_listed_box(lists: Path, picture: Path) -> FaceBox | None:
    found = _look_up("x, y, width, height", lists, picture)
    return None if found is None or None in found else pixel_box(*found)


def refuse_by_label_file(picture: Path, part: Part) -> bool:
    """Drop a picture whose label file is missing or marks it as no face, and return True; else return False."""
    path = picture.parent.parent / "annotations" / f"{picture.stem}_exp.npy"
    try:
        expression = int(np.load(path, allow_pickle=False).item())
    except FileNotFoundError:
        part.problem(NO_LABEL_FILE, path)
        return True
    except (OSError, ValueError, EOFError) as error:
        part.problem(BAD_LABEL_FILE, path, str(error))
        return True
    return _is_refused(expression, picture, part)


def _is_refused(expression: int, picture: Path, part: Part) -> bool:
    if expression == NON_FACE:
        part.drop(NON_FACE_REASON, picture)
    return expression == NON_FACE


def _below(root: Path, pattern: str, depth: int) -> Iterator[Path]:
    for level in range(depth + 1):
        yield from sorted(root.glob("*/" * level + pattern))


def _is_file_list(path: Path) -> bool:
    return "file_lists" in path.parent.name or path.name in ("training.csv", "validation.csv")


def _look_up(columns: str, lists: Path, picture: Path) -> tuple | None:
    name = f"{picture.parent.name}/{picture.name}"
    with closing(sqlite3.connect(lists)) as database:
        return database.execute(f"SELECT {columns} FROM listed WHERE name = ?", (name,)).fetchone()


def _index_lists(path: Path, file_lists: tuple[Path, ...]) -> None:
    """Write expression and face of each listed picture into a database, because the lists have a million lines."""
    with replacing(path) as unfinished:
        unfinished.unlink(missing_ok=True)
        with closing(sqlite3.connect(unfinished)) as database:
            database.execute(
                "CREATE TABLE listed (name TEXT PRIMARY KEY, expression INTEGER, x REAL, y REAL, width REAL,"
                " height REAL) WITHOUT ROWID"
            )
            for file_list in file_lists:
                rows = _read_list(file_list)
                while batch := list(islice(rows, 4096)):
                    database.executemany("INSERT OR IGNORE INTO listed VALUES (?, ?, ?, ?, ?, ?)", batch)
            database.commit()


def _read_list(path: Path) -> Iterator[tuple]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        columns = _FILE_LIST
        for cells in reader:
            if reader.line_num == 1 and _LIST_COLUMNS[0] in cells:
                columns = cells
                continue
            record = dict(zip(columns, cells, strict=False))
            try:
                box = [_pixels(record.get(column, "")) for column in _LIST_COLUMNS[1:5]]
                yield record[_LIST_COLUMNS[0]], int(record["expression"]), *box
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {reader.line_num}: there is no file name and expression in it. The columns of an"
                    f" AffectNet file list are {', '.join(_FILE_LIST)}."
                ) from error


def _pixels(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        # Some lists have NULL where no face was found.
        return None


def _listed(lists: Path) -> Iterator[Path]:
    with closing(sqlite3.connect(lists)) as database:
        for (name,) in database.execute("SELECT name FROM listed"):
            yield Path(name)


def _labelled(picture_dirs: tuple[Path, ...]) -> Iterator[Path]:
    for folder in picture_dirs:
        yield from (path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
