# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Pictures with captions from a data set on the Hub, row by row, into a folder where tools can measure them.

    FOLDER/0000000/00012.jpg …    the pictures, as they are there or as PNG
    FOLDER/metadata.jsonl         {"file_name": …, "text": …}, with the face's box and the words taken out, if any
    FOLDER/.hub                   what each part of the rows became, and where the stream goes on
"""

import importlib
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm.auto import tqdm

from face_data import store
from face_data.captions import CAPTION_COLUMNS, take_emotion_words
from face_data.pictures import FACE_BOX, box_columns
from face_data.report import Report, report_folders
from face_data.tabled import NO_FACE, SEVERAL_FACES
from program import check_options, option, write_atomically


WORK, STATE, METADATA = ".hub", "state.json", "metadata.jsonl"
FaceDetector = Callable[[Image.Image], list[tuple[float, float, float, float]]]


@dataclass(frozen=True)
class HubPictures:
    """
    What is read: `dataset` is the id of a data set on the Hub, or a folder that the datasets library reads, and
    `source` its name in the training data. Boxes are four numbers each, in pixels or as parts of the picture; that of
    the only face is kept.
    """

    dataset: str
    source: str
    config: str | None = option(None, "Configuration of the data set.")
    split: str = option("train", "Split of the data set.")
    revision: str | None = option(None, "Commit or branch.")
    picture_column: str | None = option(None, "By default the first column of pictures.")
    caption_column: str | None = option(None, "By default text, caption or prompt, if it is there.")
    face_count_column: str | None = option(None, "Column with the number of faces: only rows with 1 are kept.")
    boxes_column: str | None = option(None, "Column with boxes of faces: only rows with one are kept.")
    box_format: Literal["xyxy", "xywh"] = option(
        "xyxy", "Of --boxes_column: left, top, and right, bottom or width, height."
    )
    detector: str | None = option(
        None,
        "From a picture to the boxes of its faces, 0 to 1: only pictures with one are kept.",
        metavar="MODULE:FUNCTION",
    )
    keep_emotion_words: bool = option(False, "Leave the captions as they are.")
    max_pictures: int | None = option(None, "Stop when so many are kept.", low=1)
    min_side: int = option(1, "Pixels both sides of a picture have.", low=1)
    rows_per_part: int = option(1024, "Rows of the table that are done together.", low=1)

    def __post_init__(self):
        store.check_source(self.source)
        check_options(self)


def fetch_pictures(pictures: HubPictures, folder: Path, on_error: str) -> Report:
    """
    Fill `folder`, or go on with it. What is there is not fetched again.

    Raises:
        ValueError: if a column is missing, the folder was begun with other settings, or the Hub does not answer.
    """
    work = folder / WORK
    if not work.is_dir():
        store.check_folder(folder)
    find_faces = load_detector(pictures.detector) if pictures.detector else None
    store.claim_folder(work, {name: value for name, value in vars(pictures).items() if name != "max_pictures"})
    # How far the stream was read, and how many pictures were kept.
    path, state = work / STATE, {"part": 0, "kept": 0, "is_at_end": False, "stream": None}
    if path.is_file():
        state = json.loads(path.read_text(encoding="utf-8"))
    if not state["is_at_end"] and state["kept"] < (pictures.max_pictures or math.inf):
        _fetch(pictures, folder, work, state, find_faces, on_error)
        rows = (line for line in store.read_parts(work) if "file_name" in line)
        store.write_lines(folder / METADATA, map(_metadata, rows))
    return report_folders([work])


def _metadata(row: dict) -> dict:
    known = {name: row[name] for name in ("file_name", "text", *FACE_BOX) if name in row}
    # A list, because tables take the entries of an object for columns.
    words = list(Counter(row.get("removed_words")).elements())
    return known | ({"removed_words": words} if words else {})


def load_detector(name: str) -> FaceDetector:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"`--detector` is {name!r}, but has to be MODULE:FUNCTION: {error}.") from error


def _fetch(
    pictures: HubPictures, folder: Path, work: Path, state: dict, find_faces: FaceDetector | None, on_error: str
) -> None:
    import httpx
    from datasets.exceptions import DatasetsError

    most = pictures.max_pictures or math.inf
    try:
        stream, columns = _open_stream(pictures)
        if state["stream"] is not None:
            stream.load_state_dict(state["stream"])
        rows = iter(tqdm(stream, pictures.dataset, unit="row"))
        while not state["is_at_end"] and state["kept"] < most:
            part, name, num_rows = store.Part(on_error), f"{state['part']:07d}", 0
            for num_rows, row in enumerate(islice(rows, pictures.rows_per_part), 1):
                _keep(row, columns, f"{name}/{num_rows - 1:05d}", pictures, folder, find_faces, part)
                if state["kept"] + len(part.rows) >= most:
                    break
            if num_rows:
                part.write(store.part_path(work, name))
            state = {
                "part": state["part"] + bool(num_rows),
                "kept": state["kept"] + len(part.rows),
                "is_at_end": not num_rows,
                "stream": stream.state_dict(),
            }
            # After the part: what is killed between the two makes the part again, which gives the same files.
            write_atomically(work / STATE, json.dumps(state))
    except (httpx.HTTPError, ConnectionError, DatasetsError) as error:
        raise ValueError(
            f"{pictures.dataset}: {' '.join(str(error).split())}. When the Hub answers, the same command goes on from"
            " here."
        ) from error


def _open_stream(pictures: HubPictures):
    """The rows, and the columns of pictures and of captions."""
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    stream = load_dataset(
        pictures.dataset, pictures.config, split=pictures.split, revision=pictures.revision, streaming=True
    )
    if stream.features is None:
        stream = stream._resolve_features()
    names = list(stream.features)
    by_key = {name.lower(): name for name in names}
    images = [name for name, feature in stream.features.items() if isinstance(feature, ImageFeature)]
    image = pictures.picture_column or next(iter(images), None)
    caption = pictures.caption_column or next((by_key[name] for name in CAPTION_COLUMNS if name in by_key), None)
    wanted = {"picture_column": image, "caption_column": caption}
    wanted |= {name: getattr(pictures, name) for name in ("face_count_column", "boxes_column")}
    for option_name, name in wanted.items():
        if name not in names and (name is not None or option_name == "picture_column"):
            raise ValueError(
                f"{pictures.dataset}: there is no column {name!r} for `--{option_name}`. The columns are"
                f" {', '.join(names)}."
            )
    # The bytes as they are there: a JPEG stays that JPEG. Streams of remote files would come decoded by default.
    return stream.decode(False).cast_column(image, ImageFeature(decode=False)), (image, caption)


def _keep(
    row: dict,
    columns: tuple[str, str | None],
    stem: str,
    pictures: HubPictures,
    folder: Path,
    find_faces: FaceDetector | None,
    part: store.Part,
) -> None:
    """Put the picture of a row into the folder and its line into the part, or say why not."""
    label, image_column, caption_column = f"{pictures.dataset}, {stem}", *columns
    num_faces, boxes, text, removed = 1, None, "", {}
    if pictures.face_count_column is not None:
        num_faces = row[pictures.face_count_column] or 0
    if pictures.boxes_column is not None and num_faces == 1:
        boxes = _read_boxes(row[pictures.boxes_column])
        num_faces = len(boxes)
    if caption_column is not None:
        text = " ".join(str(row[caption_column] or "").split())
        text, removed = (text, {}) if pictures.keep_emotion_words else take_emotion_words(text)
    if num_faces != 1:
        part.drop(SEVERAL_FACES if num_faces > 1 else NO_FACE, label)
        return
    if caption_column is not None and not text:
        part.drop("no caption, or nothing left of it", label)
        return
    image = row[image_column] or {}
    if image.get("bytes") is None and image.get("path") is None:
        part.problem(store.UNREADABLE, label, "the row has none")
        return
    # In the path of a file of an archive, that of the archive follows behind "::".
    suffix = Path((image.get("path") or "").partition("::")[0]).suffix.lower() or ".png"
    fetched = folder / f".{stem.replace('/', '-')}{suffix}"
    try:
        content = _read_file(image["path"]) if image.get("bytes") is None else image["bytes"]
    except FileNotFoundError as error:
        part.problem(store.UNREADABLE, label, str(error))
        return
    try:
        fetched.write_bytes(content)
        placed = part.place(fetched, folder / f"{stem}{fetched.suffix}", pictures.min_side, label)
    finally:
        fetched.unlink(missing_ok=True)
    if placed is None:
        return
    if find_faces is not None:
        with Image.open(placed.path) as picture:
            boxes = [list(map(float, box)) for box in find_faces(picture.convert("RGB"))]
        if len(boxes) != 1:
            placed.path.unlink()
            part.drop(SEVERAL_FACES if boxes else NO_FACE, label)
            return
    line = {"file_name": placed.path.relative_to(folder).as_posix(), "text": text}
    note = placed.note
    if boxes:
        left, top, right, bottom = boxes[0]
        if pictures.box_format == "xywh" and find_faces is None:
            right, bottom = left + right, top + bottom
        corners, is_found_here = (left, top, right, bottom), find_faces is not None
        box, note = box_columns(corners, max(right, bottom) > 1, placed, is_found_here)
        line |= box
    part.keep(line, removed_words=removed or None, changed=note)


def _read_file(path: str) -> bytes:
    """A picture of which the data set has only a path, here or on the Hub, perhaps in an archive."""
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        return file.read()


def _read_boxes(value) -> list[list[float]]:
    value = json.loads(value) if isinstance(value, str) else value
    if not value:
        return []
    return [list(map(float, value))] if not isinstance(value[0], list) else value
