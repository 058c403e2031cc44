# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
From work folders to the data set that `train_fineface.py` reads: rows, captions and BLIP-2's answers are joined, what
is no photograph is left out, and measured AUs are corrected (paper, supplement "Dataset Construction").

    OUTPUT/train/metadata.jsonl and OUTPUT/train/images/…, or OUTPUT/train/*.parquet, which hold the pictures too
    OUTPUT/report.txt, OUTPUT/report.json and OUTPUT/histogram.png
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from action_units import AU_NAMES, au_columns, whole_au
from face_data.captions import take_emotion_words
from face_data.report import Histogram, Report, draw_histograms, report_folders, save_picture
from face_data.store import (
    CAPTIONS,
    PHOTOS,
    claim_folder,
    link_file,
    list_parts,
    read_lines,
    read_rows,
    read_settings,
    remove_unfinished,
    require_finished,
    run_parts,
    write_lines,
)
from face_data.table_index import FACE_BOX, sort_aus
from program import replacing, write_atomically


FORMATS = ("imagefolder", "parquet")
# Measured intensities of the first are too high, of the others too low.
GAMMAS = {"AU1": 1.8, "AU4": 1.8, "AU15": 0.8, "AU17": 0.8, "AU20": 0.8}
MAX_INTENSITY = 5.0
# Below, a still picture shows too little for a tool to measure.
MIN_INTENSITY = 1.0
NOT_A_PHOTO = "no photograph"
UNCLEAR = "no clear answer whether it is a photograph"
NO_CAPTION = "empty caption"
WHOLE_PICTURE = (0.0, 0.0, 1.0, 1.0)
ROW_GROUP = 64


@dataclass(frozen=True)
class Build:
    """
    What is built.

    Args:
        folders (`tuple[Path, ...]`):
            Work folders of sources with different names.
        output (`Path`):
            Folder of the data set.
        format (`str`):
            "imagefolder": pictures as files, hard links where possible. "parquet": a file for each part, which can
            be streamed from the Hub.
        default_caption (`str`, *optional*):
            For pictures without one; by default all have to have captions.
        photo_filter (`bool`):
            Leave out what is no photograph, of sources that may have drawings.
        correct_aus (`bool`):
            Correct measured AUs.
        drop_emotion_words (`bool`):
            Take words of emotion out of all captions, also BLIP-2's.
        au_names (`tuple[str, ...]`, *optional*):
            AUs of the data set. An AU without sides gives both sides, and two sides give their mean. By default those
            that all sources have.

    If the face's box is known of any picture, all get the columns `FACE_BOX`. The whole picture is the box of those of
    which it is not, so that a loss that is weighted by it stays unweighted there.
    """

    folders: tuple[Path, ...]
    output: Path
    format: str = "imagefolder"
    default_caption: str | None = None
    photo_filter: bool = True
    correct_aus: bool = True
    drop_emotion_words: bool = False
    au_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Correction:
    """
    The paper's correction of measured AUs: x^γ by `GAMMAS`, brought to [0, 5] by the smallest and the largest value of
    the source, and 0 instead of what stays below 1. Both sides of an AU share their range.

    Args:
        lowest, highest (`tuple[float, ...]` of length n):
            Of the measured intensities.
        au_names (`tuple[str, ...]` of length n):
            Which they are.
    """

    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    au_names: tuple[str, ...] = AU_NAMES

    def __call__(self, aus: np.ndarray) -> np.ndarray:
        """`(…, n)` → `(…, n)`, in [0, 5]."""
        corrected = np.array(aus, np.float64)
        for name, gamma in GAMMAS.items():
            columns = list(au_columns(self.au_names).get(name, ()))
            low = min((self.lowest[column] for column in columns), default=0) ** gamma
            high = max((self.highest[column] for column in columns), default=0) ** gamma
            # A source in which an AU never changes has no range to bring it to.
            if high > low:
                corrected[..., columns] = (corrected[..., columns] ** gamma - low) / (high - low) * MAX_INTENSITY
        corrected[corrected < MIN_INTENSITY] = 0
        return corrected.clip(0, MAX_INTENSITY).astype(np.float32)


def build_dataset(build: Build, num_workers: int) -> Report:
    """
    Make the data set, and its report.

    Raises:
        ValueError: if a step before has not been done, or not to its end, or if nothing is left for the data set.
    """
    sources = _check(build)
    build = replace(build, au_names=choose_aus(build))
    before, digest = Histogram(build.au_names), hashlib.blake2b(digest_size=16)
    measured = {folder: _measure(folder, build, before, digest) for folder in build.folders}
    corrections = {folder: correction for folder, (correction, _) in measured.items()}
    has_boxes = any(has_boxes for _, has_boxes in measured.values())
    settings = {"sources": list(sources.values()), "hash of rows": digest.hexdigest(), "format": build.format}
    names = ("default_caption", "photo_filter", "correct_aus", "drop_emotion_words")
    settings |= {name: getattr(build, name) for name in names} | {"au_names": list(build.au_names)}
    claim_folder(build.output, settings)
    parts = [f"{number}-{part}" for number, folder in enumerate(build.folders) for part in list_parts(folder)]
    work = functools.partial(make_part, build, sources, corrections, has_boxes)
    run_parts(work, parts, lambda part: part_path(build, part).is_file(), num_workers, "data set")
    return _finish(build, parts, sources, before)


def read_au_names(folder: Path) -> tuple[str, ...]:
    return tuple(read_settings(folder).get("au_names", AU_NAMES))


def choose_aus(build: Build) -> tuple[str, ...]:
    """
    The AUs of the data set. Where only some of the sources tell the sides of an AU, it has none.

    Raises:
        ValueError: if a source does not have one of `build.au_names`, or if no AU is in all sources.
    """
    columns = {folder: au_columns(read_au_names(folder)) for folder in build.folders}
    for folder, known in columns.items():
        missing = [name for name in build.au_names or () if whole_au(name) not in known]
        if missing:
            raise ValueError(f"`--au_names` has {', '.join(missing)}, but {folder} has {', '.join(known)}.")
    if build.au_names:
        au_columns(build.au_names)
        return build.au_names
    names = {name for folder in build.folders for name in read_au_names(folder)}
    common = sort_aus(name for name in names if all(name in known for known in columns.values()))
    if not common:
        lists = "; ".join(f"{folder}: {', '.join(read_au_names(folder))}" for folder in build.folders)
        raise ValueError(f"There is no AU that all sources have: {lists}.")
    return common


def select_aus(aus: np.ndarray, from_names: tuple[str, ...], to_names: tuple[str, ...]) -> np.ndarray:
    """`(…, n)` → `(…, m)`. An AU without sides gives both sides, and two sides give their mean."""
    columns = au_columns(from_names)
    found = [list(columns.get(name) or columns[whole_au(name)]) for name in to_names]
    return np.stack([aus[..., indices].mean(-1) for indices in found], -1)


def join_part(folder: Path, part: str, build: Build) -> Iterator[dict]:
    """The rows of a part with captions, and as `{"dropped": …}` those that are left out now."""
    rows = read_rows(folder / "rows" / f"{part}.jsonl")
    captions = _annotations(folder, CAPTIONS, part)
    photos = _annotations(folder, PHOTOS, part)
    needs_photo_filter = build.photo_filter and read_settings(folder)["needs_photo_filter"]
    for row in rows:
        caption, photo = next(captions, {}), next(photos, {})
        if {row["file_name"]} != {row["file_name"], *(line["file_name"] for line in (caption, photo) if line)}:
            raise ValueError(f"{folder}: part {part} of rows and of annotations differ. Delete captions and photos.")
        text, words = caption.get("text") or row["text"], {}
        if build.drop_emotion_words:
            text, words = take_emotion_words(text)
        text = text or build.default_caption or ""
        known = {name: row.pop(name) for name in ("changed", "removed_words") if name in row}
        is_photo = photo.get("is_photo", row.get("is_photo"))
        if needs_photo_filter and is_photo is not True:
            yield {"dropped": UNCLEAR if is_photo is None else NOT_A_PHOTO, "path": row["origin"], "count": 1} | known
        elif not text:
            yield {"dropped": NO_CAPTION, "path": row["origin"], "count": 1} | known
        else:
            row.pop("is_photo", None)
            yield row | {"text": text} | ({"removed_words": words} if words else {})


def make_part(
    build: Build, sources: dict[Path, str], corrections: dict[Path, Correction | None], has_boxes: bool, part: str
) -> None:
    """Write a part of the data set, and when all of it is there, its lines."""
    number, _, name = part.partition("-")
    folder = build.folders[int(number)]
    lines = list(join_part(folder, name, build))
    kept = [line for line in lines if "dropped" not in line]
    pictures = [folder / line["file_name"] for line in kept]
    correct, names = corrections[folder], read_au_names(folder)
    for index, (line, picture) in enumerate(zip(kept, pictures, strict=True)):
        aus = np.float32([line[au] for au in names])
        aus = select_aus(aus if correct is None else correct(aus), names, build.au_names)
        for au in set(names) - set(build.au_names):
            del line[au]
        line |= dict(zip(build.au_names, aus.tolist(), strict=True))
        if has_boxes:
            line |= dict(zip(FACE_BOX, WHOLE_PICTURE, strict=True)) | {n: line[n] for n in FACE_BOX if n in line}
        line["file_name"] = f"images/{sources[folder]}/{name}/{index:05d}{picture.suffix.lower()}"
        if build.format == "imagefolder":
            link_file(picture, build.output / "train" / line["file_name"])
    if build.format == "parquet" and kept:
        path = build.output / "train" / f"{sources[folder]}-{name}.parquet"
        with replacing(path) as unfinished:
            _write_parquet(kept, pictures, build.au_names, unfinished)
    write_lines(part_path(build, part), lines)


def part_path(build: Build, part: str) -> Path:
    return build.output / ".parts" / f"{part}.jsonl"


def _write_parquet(rows: list[dict], pictures: list[Path], au_names: tuple[str, ...], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, Value

    columns = {"image": Image(), "text": Value("string")} | {name: Value("float32") for name in au_names}
    columns |= {name: Value("string") for name in ("source", "subject", "origin")}
    features = Features(columns | {name: Value("float32") for name in FACE_BOX if name in rows[0]})
    with pq.ParquetWriter(path, features.arrow_schema) as writer:
        for start in range(0, len(rows), ROW_GROUP):
            group = [
                row | {"image": {"bytes": picture.read_bytes(), "path": Path(row["file_name"]).name}}
                for row, picture in zip(rows[start : start + ROW_GROUP], pictures[start:], strict=False)
            ]
            writer.write_table(pa.Table.from_pylist(group, features.arrow_schema), row_group_size=ROW_GROUP)


def _check(build: Build) -> dict[Path, str]:
    """The name of each folder's source, once all is there that is needed."""
    if build.format not in FORMATS:
        raise ValueError(f"`--format` has to be one of {', '.join(FORMATS)}, but is {build.format!r}.")
    sources = {}
    for folder in build.folders:
        require_finished(folder)
        settings = read_settings(folder)
        source = settings["source"]
        if source in sources.values():
            raise ValueError(f"Two folders have the source {source!r}. Give one another name with `--source`.")
        sources[folder] = source
        if build.photo_filter and settings["needs_photo_filter"]:
            way_out = f"Run `prepare photos {folder}`, or set `--keep_drawings`."
            _check_known(folder, PHOTOS, "is_photo", "whether it is a photograph", way_out)
        if build.default_caption is None:
            _check_known(folder, CAPTIONS, "text", "a caption", f"Run `prepare caption {folder}`.")
    return sources


def _check_known(folder: Path, kind: str, column: str, what: str, way_out: str) -> None:
    for part in list_parts(folder):
        if (folder / kind / f"{part}.jsonl").is_file():
            continue
        for row in read_rows(folder / "rows" / f"{part}.jsonl"):
            if row.get(column) in ("", None):
                raise ValueError(f"{folder}: of {row['file_name']}, {what} is not known yet. {way_out}")


def _measure(folder: Path, build: Build, before: Histogram, digest) -> tuple[Correction | None, bool]:
    """A first pass over a source: its range of intensities, whether it has boxes of faces, and what its rows are."""
    has_boxes, names = False, read_au_names(folder)
    lowest, highest = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    for part in list_parts(folder):
        rows = [line for line in join_part(folder, part, build) if "dropped" not in line]
        digest.update(json.dumps([part, rows]).encode())
        has_boxes = has_boxes or any(FACE_BOX[0] in row for row in rows)
        if rows:
            aus = np.float32([[row[name] for name in names] for row in rows])
            before.add(select_aus(aus, names, build.au_names))
            lowest, highest = np.minimum(lowest, aus.min(axis=0)), np.maximum(highest, aus.max(axis=0))
    if not build.correct_aus or not read_settings(folder)["correct_aus"]:
        return None, has_boxes
    return Correction(tuple(lowest.tolist()), tuple(highest.tolist()), names), has_boxes


def _annotations(folder: Path, kind: str, part: str) -> Iterator[dict]:
    path = folder / kind / f"{part}.jsonl"
    return read_lines(path) if path.is_file() else iter(())


def _finish(build: Build, parts: list[str], sources: dict[Path, str], before: Histogram) -> Report:
    report, after = report_folders(list(build.folders)), Histogram(build.au_names)
    _note_other_aus(build, sources, report)
    names = list(sources.values())
    for part in parts:
        aus = []
        for line in read_lines(part_path(build, part)):
            if "dropped" in line:
                source = names[int(part.partition("-")[0])]
                report.move(source, line)
            else:
                aus.append([line[au] for au in build.au_names])
                report.add_words(line["source"], line.get("removed_words"))
        if aus:
            after.add(np.float32(aus))
    if not after.counts.any():
        raise ValueError(f"Nothing is left for the data set:\n{report.to_text()}")
    remove_unfinished(build.output / "train")
    if build.format == "imagefolder":
        lines = chain.from_iterable(read_rows(part_path(build, part)) for part in parts)
        rows = ({name: value for name, value in line.items() if name != "removed_words"} for line in lines)
        write_lines(build.output / "train" / "metadata.jsonl", rows)
    text, counts = report.to_text() + "\n", json.dumps(report.to_json(), indent=2) + "\n"
    write_atomically(build.output / "report.txt", text)
    write_atomically(build.output / "report.json", counts)
    title = f"Faces by intensity of each AU, heights logarithmic ({', '.join(names)})"
    save_picture(draw_histograms(before, after, title), build.output / "histogram.png")
    return report


def _note_other_aus(build: Build, sources: dict[Path, str], report: Report) -> None:
    """Say which AUs of a source are not in the data set, or not as they were."""
    for folder, source in sources.items():
        names = read_au_names(folder)
        made = [name for name in build.au_names if name not in names]
        for what, found in {
            "Not in the data set": [name for name in names if whole_au(name) not in au_columns(build.au_names)],
            "The mean of both sides": [name for name in made if name == whole_au(name)],
            "The same on both sides": [name for name in made if name != whole_au(name)],
        }.items():
            if found:
                report.notes.setdefault(source, []).append(f"{what}: {', '.join(found)}.")
