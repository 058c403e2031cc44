# SPDX-License-Identifier: Apache-2.0
"""
Pictures with captions from a data set on the Hub, row by row, into a folder where tools can measure them:
FOLDER/0000000/00012.jpg and so on, FOLDER/metadata.jsonl, and in FOLDER/.hub what became of each part of the rows, and
where the stream goes on.
"""

import functools
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm.auto import tqdm

from face_data import store
from face_data.captions import CAPTION_COLUMNS, take_emotion_words
from face_data.pictures import FACE_BOX, box_columns
from face_data.report import report_folders
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

    @functools.cached_property
    def find_faces(self) -> FaceDetector | None:
        module, _, function = (self.detector or "").partition(":")
        try:
            return getattr(importlib.import_module(module), function) if self.detector else None
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"`--detector` is {self.detector!r}, but has to be MODULE:FUNCTION: {error}.") from error


def fetch_pictures(pictures: HubPictures, folder: Path, on_error: str) -> str:
    """
    Fill `folder`, or go on with it. What is there is not fetched again. Return a report.

    Raises:
        ValueError: if a column is missing, the folder was begun with other settings, or the Hub does not answer.
    """
    import httpx
    from datasets.exceptions import DatasetsError

    work, most = folder / WORK, pictures.max_pictures or math.inf
    if not work.is_dir():
        store.check_folder(folder)
    settings = {name: value for name, value in asdict(pictures).items() if name != "max_pictures"}
    # A detector that is not there is an error before anything is written.
    _ = pictures.find_faces
    store.claim_folder(work, settings)
    # How far the stream was read, and how many pictures were kept.
    path, state = work / STATE, {"part": 0, "kept": 0, "is_at_end": False, "stream": None}
    if path.is_file():
        state = json.loads(path.read_text(encoding="utf-8"))
    if state["is_at_end"] or state["kept"] >= most:
        return report_folders([work])
    try:
        stream, pictures = _open_stream(pictures)
        if state["stream"] is not None:
            stream.load_state_dict(state["stream"])
        rows = iter(tqdm(stream, pictures.dataset, unit="row"))
        while not state["is_at_end"] and state["kept"] < most:
            part, name, num_rows = store.Part(on_error), f"{state['part']:07d}", 0
            for num_rows, row in enumerate(islice(rows, pictures.rows_per_part), 1):
                _keep(row, f"{name}/{num_rows - 1:05d}", pictures, folder, part)
                if state["kept"] + len(part.rows) >= most:
                    break
            if num_rows:
                part.write(work, name)
            state = {
                "part": state["part"] + bool(num_rows),
                "kept": state["kept"] + len(part.rows),
                "is_at_end": not num_rows,
                "stream": stream.state_dict(),
            }
            # After the part: what is killed between the two makes the part again, which gives the same files.
            write_atomically(path, json.dumps(state))
    except (httpx.HTTPError, ConnectionError, DatasetsError) as error:
        raise ValueError(
            f"{pictures.dataset}: {' '.join(str(error).split())}. When the Hub answers, the same command goes on from"
            " here."
        ) from error
    names = ("file_name", "text", *FACE_BOX, "removed_words")
    rows = ({name: row[name] for name in names if name in row} for row in store.read_rows(work))
    store.write_lines(folder / METADATA, rows)
    return report_folders([work])


def _open_stream(pictures: HubPictures):
    """The rows, and `pictures` with the columns of pictures and of captions that there are."""
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
    pictures = replace(pictures, picture_column=image, caption_column=caption)
    for option_name in ("picture_column", "caption_column", "face_count_column", "boxes_column"):
        name = getattr(pictures, option_name)
        if name not in names and (name is not None or option_name == "picture_column"):
            raise ValueError(
                f"{pictures.dataset}: there is no column {name!r} for `--{option_name}`. The columns are"
                f" {', '.join(names)}."
            )
    # The bytes as they are there: a JPEG stays that JPEG. Streams of remote files would come decoded by default.
    return stream.decode(False).cast_column(image, ImageFeature(decode=False)), pictures


def _keep(row: dict, stem: str, pictures: HubPictures, folder: Path, part: store.Part) -> None:
    """Put the picture of a row into the folder and its line into the part, or say why not."""
    label, num_faces, boxes, text, removed = f"{pictures.dataset}, {stem}", 1, [], "", []
    if pictures.face_count_column is not None:
        num_faces = row[pictures.face_count_column] or 0
    if pictures.boxes_column is not None and num_faces == 1:
        boxes = _read_boxes(row[pictures.boxes_column], pictures.box_format)
        num_faces = len(boxes)
    if pictures.caption_column is not None:
        text = " ".join(str(row[pictures.caption_column] or "").split())
        text, removed = (text, []) if pictures.keep_emotion_words else take_emotion_words(text)
    if num_faces != 1:
        part.drop(SEVERAL_FACES if num_faces > 1 else NO_FACE, label)
        return
    if pictures.caption_column is not None and not text:
        part.drop("no caption, or nothing left of it", label)
        return
    image = row[pictures.picture_column] or {}
    # In the path of a file of an archive, that of the archive follows behind "::".
    suffix = Path((image.get("path") or "").partition("::")[0]).suffix.lower() or ".png"
    fetched, placed = folder / f".{stem.replace('/', '-')}{suffix}", None
    try:
        fetched.write_bytes(_read_picture(image))
        placed = part.place(fetched, folder / f"{stem}{suffix}", pictures.min_side, label)
    except FileNotFoundError as error:
        part.problem(store.UNREADABLE, label, str(error))
    finally:
        fetched.unlink(missing_ok=True)
    if placed is None:
        return
    if pictures.find_faces is not None:
        with Image.open(placed.path) as picture:
            boxes = [list(map(float, box)) for box in pictures.find_faces(picture.convert("RGB"))]
        if len(boxes) != 1:
            placed.path.unlink()
            part.drop(SEVERAL_FACES if boxes else NO_FACE, label)
            return
    box = (boxes[0], max(boxes[0][2:]) > 1) if boxes else None
    known, note = box_columns(box, placed, is_upright=pictures.find_faces is not None)
    part.keep(placed.path, folder, text=text, **known, removed_words=removed or None, changed=note)


def _read_picture(image: dict) -> bytes:
    """The bytes of a picture, which may be in a file here or on the Hub, perhaps in an archive, instead of the row."""
    from datasets.utils.file_utils import xopen

    if image.get("bytes") is not None:
        return image["bytes"]
    if image.get("path") is None:
        raise FileNotFoundError("the row has none")
    with xopen(image["path"], "rb") as file:
        return file.read()


def _read_boxes(value, box_format: str) -> list[list[float]]:
    """Left, top, right and bottom of each box."""
    value = json.loads(value) if isinstance(value, str) else value
    if not value:
        return []
    boxes = value if isinstance(value[0], list) else [value]
    boxes = [list(map(float, box)) for box in boxes]
    if box_format == "xywh":
        boxes = [[left, top, left + width, top + height] for left, top, width, height in boxes]
    return boxes
