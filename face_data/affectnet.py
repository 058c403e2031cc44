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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from face_data.pictures import PICTURE_SUFFIXES
from face_data.store import Part
from face_data.table_index import PIXEL_BOX, TableEntry
from face_data.tabled import Tabled


MIN_SIDE = 512
MIN_TOTAL_INTENSITY = 0.2
NON_FACE = 10
NON_FACE_REASON = "marked as no face"
NOT_LISTED = "picture that is in no file list"
NO_LABEL_FILE = "missing label file"
BAD_LABEL_FILE = "label file that cannot be read"
_LIST_COLUMNS = (
    *("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height", "facial_landmarks"),
    *("expression", "valence", "arousal"),
)


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
    tables, names = _below(root, "*.csv", 2), ("training.csv", "validation.csv")
    lists = tuple(sorted(path for path in tables if "file_lists" in path.parent.name or path.name in names))
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


@dataclass(frozen=True)
class AffectNet(Tabled):
    """Pictures of AffectNet and a table of their AUs; `bases` are the root and the folders of its `layout`."""

    layout: Layout | None = None

    def read_about(self, say: Callable[[str], None]) -> Iterator[tuple[str, dict]] | None:
        return _read_lists(self.layout.file_lists) if self.layout.file_lists else None

    def refuses(self, entry: TableEntry, picture: Path, part: Part) -> bool:
        """Whether AffectNet marks a picture as no face, or does not know it."""
        if self.layout.file_lists:
            if entry.about is None:
                part.problem(NOT_LISTED, picture)
                return True
            expression = entry.about["expression"]
        else:
            path = picture.parent.parent / "annotations" / f"{picture.stem}_exp.npy"
            try:
                expression = int(np.load(path, allow_pickle=False).item())
            except FileNotFoundError:
                part.problem(NO_LABEL_FILE, path)
                return True
            except (OSError, ValueError, EOFError) as error:
                part.problem(BAD_LABEL_FILE, path, str(error))
                return True
        if expression == NON_FACE:
            part.drop(NON_FACE_REASON, picture)
        return expression == NON_FACE

    def list_pictures(self) -> Iterator[Path]:
        if self.layout.file_lists:
            yield from (Path(record["file_name"]) for _, record in _read_lists(self.layout.file_lists))
        for folder in () if self.layout.file_lists else self.layout.picture_dirs:
            yield from (path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)


def _read_lists(paths: tuple[Path, ...]) -> Iterator[tuple[str, dict]]:
    """
    The expression of each listed picture, and the box of its face, as a table has them. Some lists have no header, and
    some have NULL where no face was found.
    """
    for path in paths:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            columns = _LIST_COLUMNS
            for cells in reader:
                if reader.line_num == 1 and _LIST_COLUMNS[0] in cells:
                    columns = cells
                    continue
                record, label = dict(zip(columns, cells, strict=False)), f"{path}, line {reader.line_num}"
                try:
                    found = {"file_name": record[_LIST_COLUMNS[0]], "expression": int(record["expression"])}
                except (KeyError, ValueError) as error:
                    raise ValueError(
                        f"{label}: there is no file name and expression in it. The columns of an AffectNet file list"
                        f" are {', '.join(_LIST_COLUMNS)}."
                    ) from error
                box = zip(PIXEL_BOX, map(record.get, _LIST_COLUMNS[1:5]), strict=True)
                yield label, found | dict(box)


def _below(root: Path, pattern: str, depth: int) -> Iterator[Path]:
    for level in range(depth + 1):
        yield from sorted(root.glob("*/" * level + pattern))
