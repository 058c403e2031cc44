# SPDX-License-Identifier: Apache-2.0
"""
AffectNet in both forms that it is given out in (paper §4.4, docs/data.md), with AUs from a table. What is no face is
left out here; `face_data.build` leaves out drawings, and corrects the AUs.
"""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from face_data.pictures import PICTURE_SUFFIXES
from face_data.store import Part
from face_data.tabled import PIXEL_BOX, Tabled, find_picture


MIN_SIDE = 512
MIN_TOTAL_INTENSITY = 0.2
NON_FACE = 10
_LIST_COLUMNS = (
    *("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height", "facial_landmarks"),
    *("expression", "valence", "arousal"),
)


def find_files(root: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """
    Where a copy of AffectNet has its pictures, and its file lists if it is of the old form.

    Raises:
        ValueError: if there is no AffectNet, of either form, at `root`.
    """
    if not root.is_dir():
        raise ValueError(f"{str(root)!r} is no folder.")
    tables, names = _below(root, "*.csv", 2), ("training.csv", "validation.csv")
    lists = tuple(sorted(path for path in tables if "file_lists" in path.parent.name or path.name in names))
    if lists:
        return tuple(path for path in _below(root, "*_Annotated_Images", 1) if path.is_dir()) or (root,), lists
    folders = tuple(path for path in _below(root, "images", 2) if (path.parent / "annotations").is_dir())
    if folders:
        return folders, ()
    raise ValueError(
        f"{str(root)!r} holds no AffectNet. It has either Manually_Annotated_file_lists/training.csv and"
        " Manually_Annotated_Images, or images/12.jpg and annotations/12_exp.npy, or these within train_set and"
        " val_set."
    )


@dataclass(frozen=True)
class AffectNet(Tabled):
    """Pictures of AffectNet and a table of their AUs; `bases` are the root and the folders of pictures."""

    file_lists: tuple[Path, ...] = ()

    def read_about(self, say: Callable[[str], None]) -> Iterator[tuple[str, dict]]:
        return _read_lists(self.file_lists)

    def refuses(self, facts: dict, picture: Path, part: Part) -> bool:
        """Whether AffectNet marks a picture as no face, or does not know it."""
        path = picture.parent.parent / "annotations" / f"{picture.stem}_exp.npy"
        if self.file_lists and facts["about"] is None:
            part.problem("picture that is in no file list", picture)
            return True
        if self.file_lists:
            expression = facts["about"]["expression"]
        else:
            expression = part.read_label(lambda path: int(np.load(path).item()), path)
        if expression == NON_FACE:
            part.drop("marked as no face", picture)
        return expression in (NON_FACE, None)

    def list_pictures(self) -> Iterator[Path]:
        for _, record in _read_lists(self.file_lists):
            yield from find_picture(record["file_name"], self.bases)
        for folder in () if self.file_lists else self.bases[1:]:
            yield from (path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)


def _read_lists(paths: tuple[Path, ...]) -> Iterator[tuple[str, dict]]:
    """
    The expression of each listed picture, and the box of its face, as a table has them. Some lists have no header, and
    some have NULL where no face was found.
    """
    for path in paths:
        with path.open(newline="", encoding="utf-8-sig") as file:
            has_header = _LIST_COLUMNS[0] in file.readline()
            file.seek(0)
            reader = csv.DictReader(file, None if has_header else _LIST_COLUMNS, restval="")
            for record in reader:
                label = f"{path}, line {reader.line_num}"
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
