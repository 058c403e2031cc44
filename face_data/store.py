# SPDX-License-Identifier: Apache-2.0
"""
What all steps share: a folder that is filled part by part, and what becomes of a picture that cannot be used.

    settings.json       what the folder was made from; another run has to say the same
    images/…            the pictures
    rows/PART.jsonl     a line for each picture, {"file_name": …, "text": …, "AU1": …, …}, for what was left out,
                        {"dropped": reason, "path": …, "count": …}, and for what there is to know, {"note": sentence}
    finished            an empty file, once all parts are there
    captions/PART.jsonl, photos/PART.jsonl    what BLIP-2 says, line by line

A part is written under another name and renamed, and a part that is there is not made again. So a step that was
killed goes on where it was, with the same result, and memory holds parts and never all rows.
"""

import functools
import json
import logging
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from tqdm.auto import tqdm

from face_data.pictures import PICTURE_ERRORS, Placed, place_picture
from program import check_settings, replacing, write_atomically, write_settings


_logger = logging.getLogger(__name__)
SETTINGS, FINISHED = "settings.json", "finished"
# In a data set, the folder of its work folders, and that of the parts of its rows.
WORK, PARTS = ".work", ".parts"
# Folders in a work folder.
CAPTIONS, PHOTOS = "captions", "photos"
# Why pictures of any source are left out.
UNREADABLE = "picture or video that cannot be read"
# Names of folders that the datasets library takes for splits.
_SPLIT = re.compile(r"(train|training|test|testing|eval|evaluation|validation|valid|dev|val)\d*", re.IGNORECASE)


@dataclass
class Part:
    """
    The lines of a part while it is made. With `on_error="stop"`, something that should not be, such as a corrupt
    picture, raises a `ValueError` with its path; with "skip", it is written down and left out.
    """

    on_error: str
    rows: list[dict] = field(default_factory=list)
    dropped: list[dict] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        """Say what was guessed or taken as given, now and in the report."""
        _logger.warning(sentence)
        self.dropped.append({"note": sentence})

    def drop(self, reason: str, path: str | os.PathLike, count: int = 1) -> None:
        """Leave out what the recipe leaves out."""
        if count:
            self.dropped.append({"dropped": reason, "path": str(path), "count": count})

    def problem(self, reason: str, path: str | os.PathLike, detail: str = "", count: int = 1) -> None:
        """Leave out, or refuse, what should not be as it is."""
        detail = f" ({detail})" if detail else ""
        if self.on_error == "stop":
            raise ValueError(f"{path}: {reason}{detail}. `--on_error skip` leaves it out and goes on.")
        self.dropped.append({"dropped": reason, "path": f"{path}{detail}", "count": count, "problem": True})

    def keep(self, picture: Path, folder: Path, **facts) -> None:
        """Add the row of a picture in `folder`, with those of the `facts` that are not None."""
        row = {"file_name": picture.relative_to(folder).as_posix()}
        self.rows.append(row | {name: fact for name, fact in facts.items() if fact is not None})

    def place(self, source: Path, target: Path, min_side: int = 0, label: str | None = None) -> Placed | None:
        """`place_picture`, or None for a picture that is left out, whose name is `label` or its path."""
        try:
            placed = place_picture(source, target, min_side)
        except PICTURE_ERRORS as error:
            self.problem(UNREADABLE, label or source, str(error))
            return None
        if min(placed.size) < min_side:
            self.drop("picture too small", label or source)
            return None
        return placed

    def read_label(self, read: Callable[[Path], object], path: Path):
        """`read(path)`, or None for a label file that is left out."""
        try:
            return read(path)
        except FileNotFoundError:
            self.problem("missing label file", path)
        except (OSError, ValueError, EOFError) as error:
            self.problem("label file that cannot be read", path, str(error))
        return None

    def write(self, folder: Path, name: str) -> None:
        write_lines(part_path(folder, name), [*self.rows, *self.dropped])


def remove_unfinished(folder: Path) -> None:
    """What processes that were killed have left, under the names that `program.replacing` gives."""
    for path in folder.rglob(".*.part"):
        path.unlink()


def write_lines(path: Path, lines: Iterable[dict]) -> None:
    with replacing(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def read_lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def part_path(folder: Path, part: str) -> Path:
    return folder / "rows" / f"{part}.jsonl"


def list_parts(folder: Path) -> list[str]:
    """The finished parts of the work folder `folder`, in order."""
    return sorted(path.stem for path in (folder / "rows").glob("*.jsonl") if not path.name.startswith("."))


def read_parts(folder: Path, parts: Iterable[str] | None = None) -> Iterator[dict]:
    """The lines of `parts` of the work folder `folder`, by default of all that are finished."""
    parts = list_parts(folder) if parts is None else parts
    return chain.from_iterable(read_lines(part_path(folder, part)) for part in parts)


def read_rows(folder: Path, parts: Iterable[str] | None = None) -> Iterator[dict]:
    """Those lines of `read_parts` that are pictures."""
    return (line for line in read_parts(folder, parts) if "file_name" in line)


def read_settings(folder: Path, is_finished: bool = False) -> dict:
    """Raise a ValueError if `folder` is no work folder, or if `is_finished` and the step that fills it is not."""
    settings = json.loads(path.read_text(encoding="utf-8")) if (path := folder / SETTINGS).is_file() else {}
    if "source" not in settings:
        raise ValueError(
            f"{str(folder)!r} is no work folder, which `prepare disfa`, `prepare affectnet` or `prepare folder` makes."
        )
    if is_finished and not (folder / FINISHED).is_file():
        raise ValueError(
            f"{str(folder)!r}: the step that reads {settings['source']} was interrupted. Run it again: it goes on."
        )
    return settings


def claim_folder(folder: Path, settings: dict) -> None:
    """Make `folder`, or go on with it. Raise a ValueError if it has other settings, or holds other things."""
    if not check_settings(folder / SETTINGS, settings, "rows"):
        check_folder(folder)
        write_settings(folder / SETTINGS, settings)


def check_folder(folder: Path) -> None:
    """Raise a ValueError if `folder` is there, and neither empty nor an earlier run's."""
    if (folder / SETTINGS).is_file() or not folder.exists():
        return
    # Hidden are the work folders of the data set, and what another process is writing.
    if not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is no empty folder, and no earlier run's. Name another one.")


def check_source(source: str) -> None:
    """Raise a ValueError if a source may not be called so: its name becomes that of a folder in the data set."""
    if not source.isalnum() or _SPLIT.fullmatch(source):
        raise ValueError(
            f"The source is {source!r}, but has to be letters and digits, and no name of a split. Name it with"
            " `--source`."
        )


def run_parts(work: Callable[[str], None], parts: Iterable[str], folder: Path, num_workers: int, label: str) -> None:
    """`work(part)` for each part that `folder` does not have, in `num_workers` processes. The first error ends it."""
    missing = [part for part in parts if not part_path(folder, part).is_file()]
    num_workers = min(num_workers, len(missing))
    progress = functools.partial(tqdm, desc=label, unit="part", total=len(missing), disable=not missing)
    if num_workers <= 1:
        for part in progress(missing):
            work(part)
        return
    # Ctrl-C reaches all processes. The workers finish their parts, and get no others.
    ignore_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(num_workers, initializer=ignore_interrupts) as executor:
        try:
            for _ in progress(executor.map(work, missing)):
                pass
        except BrokenProcessPool as error:
            raise OSError(
                "A worker process was killed, perhaps for lack of memory. The same command goes on from here; fewer"
                " `--num_workers` need less memory."
            ) from error


def fill_folder(source, folder: Path, num_workers: int, on_error: str) -> None:
    """
    Fill the work folder `folder` from a `Tabled` or `Disfa`, or go on with it. The `settings()` of the source become
    those of the folder, `begin(folder, on_error)` names the parts, and `make_part(folder, part, name)` fills one.
    """
    claim_folder(folder, source.settings())
    names = source.begin(folder, on_error)
    work = functools.partial(_make_part, source, folder, on_error)
    run_parts(work, names, folder, num_workers, source.source)
    remove_unfinished(folder)
    write_atomically(folder / FINISHED, "")


def _make_part(source, folder: Path, on_error: str, name: str) -> None:
    part = Part(on_error)
    source.make_part(folder, part, name)
    part.write(folder, name)
