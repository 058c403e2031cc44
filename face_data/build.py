# SPDX-License-Identifier: Apache-2.0
"""
From work folders to the data set that `train_fineface.py` reads: rows, captions and BLIP-2's answers are joined, what
is no photograph is left out, and measured AUs are corrected (paper, supplement "Dataset Construction").
"""

import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from action_units import AU_NAMES, au_columns, whole_au
from face_data import store
from face_data.captions import take_emotion_words
from face_data.pictures import FACE_BOX, link_file
from face_data.report import SourceReport, count_intensities, draw_histograms, report_json, report_text
from face_data.tabled import sort_aus
from program import option, replacing, write_atomically


# Measured intensities of the first are too high, of the others too low.
GAMMAS = {"AU1": 1.8, "AU4": 1.8, "AU15": 0.8, "AU17": 0.8, "AU20": 0.8}
MAX_INTENSITY = 5.0
# Below, a still picture shows too little for a tool to measure.
MIN_INTENSITY = 1.0
WHOLE_PICTURE = (0.0, 0.0, 1.0, 1.0)
WITHOUT_BOX = "no box of the face is known, so the whole picture is taken for it"
ROW_GROUP = 64


@dataclass(frozen=True)
class Build:
    """
    What is built from the work `folders`, whose sources have different names, into the folder `output`. "imagefolder"
    has pictures as files, hard links where possible; "parquet" a file for each part, which can be streamed.

    An AU without sides gives both sides, and two sides give their mean. If the face's box is known of any picture, all
    get the columns `FACE_BOX`. The whole picture is the box of those of which it is not, so that a loss that is
    weighted by it stays unweighted there.
    """

    folders: tuple[Path, ...]
    output: Path
    format: Literal["imagefolder", "parquet"] = option("imagefolder", "Files, or shards to stream.")
    default_caption: str | None = option(None, "For pictures that have none.")
    photo_filter: bool = option(True, "Do not ask whether pictures are photographs.", flag="--keep_drawings")
    correct_aus: bool = option(True, "Do not correct measured AUs.", flag="--keep_aus")
    drop_emotion_words: bool = option(False, "Take words of emotion out of captions.")
    au_names: tuple[str, ...] | None = option(
        None, "AUs of the data set; by default those that all sources have.", metavar="AU12"
    )


def correct_aus(
    aus: np.ndarray, lowest: np.ndarray, highest: np.ndarray, au_names: tuple[str, ...] = AU_NAMES
) -> np.ndarray:
    """
    The paper's correction of measured AUs, `(…, n)` → `(…, n)`: x^γ by `GAMMAS`, brought to [0, 5] by the smallest and
    the largest values of the source, both `(n,)`, and 0 instead of what stays below 1. Both sides of an AU share their
    range.
    """
    corrected = np.array(aus, np.float64)
    for name, gamma in GAMMAS.items():
        columns = list(au_columns(au_names).get(name, ()))
        low, high = lowest[columns].min(initial=MAX_INTENSITY) ** gamma, highest[columns].max(initial=0) ** gamma
        # A source in which an AU never changes has no range to bring it to.
        if high > low:
            corrected[..., columns] = (corrected[..., columns] ** gamma - low) / (high - low) * MAX_INTENSITY
    corrected[corrected < MIN_INTENSITY] = 0
    return corrected.clip(0, MAX_INTENSITY).astype(np.float32)


@dataclass(frozen=True)
class Source:
    """
    A work folder, and what its settings say: name, AUs, and whether drawings are left out and AUs corrected. Its rows
    say what the smallest and largest intensities are, and whether there are boxes of faces.
    """

    folder: Path
    name: str
    au_names: tuple[str, ...]
    needs_photo_filter: bool
    correct_aus: bool
    extremes: tuple[np.ndarray, np.ndarray] | None = None
    has_boxes: bool = False


def build_dataset(build: Build, num_workers: int) -> str:
    """
    Make the data set. Return its report.

    Raises:
        ValueError: if a step before has not been done, or not to its end, or if nothing is left for the data set.
    """
    sources = read_sources(build)
    build = replace(build, au_names=choose_aus(build, sources))
    before, digest = count_intensities([], len(build.au_names)), hashlib.blake2b(digest_size=16)
    sources = [_measure(source, build, before, digest) for source in sources]
    settings = {name: value for name, value in vars(build).items() if name not in ("folders", "output")}
    settings |= {"sources": [source.name for source in sources], "hash of rows": digest.hexdigest()}
    store.claim_folder(build.output, settings)
    parts = [f"{number}-{part}" for number, source in enumerate(sources) for part in store.list_parts(source.folder)]
    work = functools.partial(make_part, build, sources)
    store.run_parts(work, parts, build.output / store.PARTS, num_workers, "data set")
    return _finish(build, parts, sources, before)


def read_sources(build: Build) -> list[Source]:
    sources = []
    for folder in build.folders:
        settings = store.read_settings(folder, is_finished=True)
        names = tuple(settings.get("au_names", AU_NAMES))
        photo_filter = build.photo_filter and settings["needs_photo_filter"]
        source = Source(folder, settings["source"], names, photo_filter, build.correct_aus and settings["correct_aus"])
        if source.name in [other.name for other in sources]:
            raise ValueError(f"Two folders have the source {source.name!r}. Give one another name with `--source`.")
        sources.append(source)
    return sources


def choose_aus(build: Build, sources: list[Source]) -> tuple[str, ...]:
    """
    The AUs of the data set. Where only some of the sources tell the sides of an AU, it has none.

    Raises:
        ValueError: if a source does not have one of `build.au_names`, or if no AU is in all sources.
    """
    known = {source.folder: au_columns(source.au_names) for source in sources}
    for folder, columns in known.items():
        missing = [name for name in build.au_names or () if whole_au(name) not in columns]
        if missing:
            raise ValueError(f"`--au_names` has {', '.join(missing)}, but {folder} has {', '.join(columns)}.")
    if build.au_names:
        au_columns(build.au_names)
        return build.au_names
    names = {name for source in sources for name in source.au_names}
    common = sort_aus(name for name in names if all(name in columns for columns in known.values()))
    if not common:
        lists = "; ".join(f"{source.folder}: {', '.join(source.au_names)}" for source in sources)
        raise ValueError(f"There is no AU that all sources have: {lists}.")
    return common


def select_aus(aus: np.ndarray, from_names: tuple[str, ...], to_names: tuple[str, ...]) -> np.ndarray:
    """`(…, n)` → `(…, m)`. An AU without sides gives both sides, and two sides give their mean."""
    columns = au_columns(from_names)
    found = [list(columns.get(name) or columns[whole_au(name)]) for name in to_names]
    return np.stack([aus[..., indices].mean(-1) for indices in found], -1)


def join_part(source: Source, part: str, build: Build) -> Iterator[dict]:
    """
    The rows of a part with captions, and as `{"dropped": …}` those that are left out now.

    Raises:
        ValueError: if BLIP-2 has not been asked what is needed, or was asked about other rows.
    """
    answers = {}
    for kind in (store.CAPTIONS, store.PHOTOS):
        path = source.folder / kind / f"{part}.jsonl"
        if path.is_file():
            answers[kind] = {line["file_name"]: line for line in store.read_lines(path)}
    for row in store.read_rows(source.folder, [part]):
        name, facts = row["file_name"], dict(row)
        for found in answers.values():
            if name not in found:
                raise ValueError(
                    f"{source.folder}: part {part} of rows and of annotations differ. Delete captions and photos."
                )
            facts |= found[name]
        if source.needs_photo_filter and "is_photo" not in facts:
            raise ValueError(
                f"{source.folder}: of {name}, whether it is a photograph is not known yet. Run"
                f" `prepare photos {source.folder}`, or set `--keep_drawings`."
            )
        if not facts["text"] and build.default_caption is None and store.CAPTIONS not in answers:
            raise ValueError(
                f"{source.folder}: of {name}, a caption is not known yet. Run `prepare caption {source.folder}`."
            )
        text, words = facts["text"], row.pop("removed_words", [])
        if build.drop_emotion_words:
            text, found = take_emotion_words(text)
            words = [*words, *found]
        text = text or build.default_caption or ""
        row.pop("is_photo", None)
        reason = None if text else "empty caption"
        if source.needs_photo_filter and facts["is_photo"] is not True:
            is_unclear = facts["is_photo"] is None
            reason = "no clear answer whether it is a photograph" if is_unclear else "no photograph"
        if reason:
            yield {"dropped": reason, "path": row["origin"], "source": source.name}
        else:
            yield row | {"text": text} | ({"removed_words": words} if words else {})


def _measure(source: Source, build: Build, before: np.ndarray, digest) -> Source:
    """A first pass over a source: the range of its AUs, and whether it has boxes. `digest` gets its rows."""
    has_boxes, names = False, source.au_names
    lowest, highest = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    for part in store.list_parts(source.folder):
        rows = [line for line in join_part(source, part, build) if "dropped" not in line]
        digest.update(json.dumps([part, rows]).encode())
        has_boxes = has_boxes or any(FACE_BOX[0] in row for row in rows)
        if rows:
            aus = np.float32([[row[name] for name in names] for row in rows])
            before += count_intensities(select_aus(aus, names, build.au_names), len(build.au_names))
            lowest, highest = np.minimum(lowest, aus.min(axis=0)), np.maximum(highest, aus.max(axis=0))
    return replace(source, extremes=(lowest, highest), has_boxes=has_boxes)


def make_part(build: Build, sources: list[Source], part: str) -> None:
    """Write a part of the data set, and when all of it is there, its lines."""
    number, _, name = part.partition("-")
    source, has_boxes = sources[int(number)], any(source.has_boxes for source in sources)
    lines = list(join_part(source, name, build))
    kept = [line for line in lines if "dropped" not in line]
    pictures = [source.folder / line["file_name"] for line in kept]
    for index, (line, picture) in enumerate(zip(kept, pictures, strict=True)):
        aus = np.float32([line[au] for au in source.au_names])
        aus = correct_aus(aus, *source.extremes, source.au_names) if source.correct_aus else aus
        for au in set(source.au_names) - set(build.au_names):
            del line[au]
        aus = select_aus(aus, source.au_names, build.au_names)
        line |= dict(zip(build.au_names, aus.tolist(), strict=True))
        if has_boxes and FACE_BOX[0] not in line:
            line |= zip(FACE_BOX, WHOLE_PICTURE, strict=True)
            line["changed"] = "; ".join(filter(None, (line.get("changed"), WITHOUT_BOX)))
        line["file_name"] = f"images/{source.name}/{name}/{index:05d}{picture.suffix.lower()}"
        if build.format == "imagefolder":
            link_file(picture, build.output / "train" / line["file_name"])
    if build.format == "parquet" and kept:
        with replacing(build.output / "train" / f"{source.name}-{name}.parquet") as unfinished:
            _write_parquet(kept, pictures, build.au_names, unfinished)
    store.write_lines(store.part_path(build.output / store.PARTS, part), lines)


def _write_parquet(rows: list[dict], pictures: list[Path], au_names: tuple[str, ...], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, Value

    columns = {"image": Image(), "text": Value("string")} | {name: Value("float32") for name in au_names}
    columns |= {name: Value("string") for name in ("source", "subject", "origin")}
    features = Features(columns | {name: Value("float32") for name in FACE_BOX if name in rows[0]})
    with pq.ParquetWriter(path, features.arrow_schema) as writer:
        for start in range(0, len(rows), ROW_GROUP):
            part = slice(start, start + ROW_GROUP)
            group = [
                row | {"image": {"bytes": picture.read_bytes(), "path": Path(row["file_name"]).name}}
                for row, picture in zip(rows[part], pictures[part], strict=True)
            ]
            writer.write_table(pa.Table.from_pylist(group, features.arrow_schema), row_group_size=ROW_GROUP)


def _finish(build: Build, parts: list[str], sources: list[Source], before: np.ndarray) -> str:
    report, after = defaultdict(SourceReport), np.zeros_like(before)
    for source in sources:
        found = report[source.name]
        for line in store.read_parts(source.folder):
            # The lines of pictures stand in the parts of the data set.
            if "file_name" not in line:
                found.add(line)
        found.notes.extend(_other_aus(source.au_names, build.au_names))
    for part in parts:
        lines = list(store.read_parts(build.output / store.PARTS, [part]))
        for line in lines:
            report[line["source"]].add(line)
        aus = [[line[au] for au in build.au_names] for line in lines if "dropped" not in line]
        after += count_intensities(aus, len(build.au_names))
    text = report_text(report)
    if not after.any():
        raise ValueError(f"Nothing is left for the data set:\n{text}")
    store.remove_unfinished(build.output / "train")
    if build.format == "imagefolder":
        rows = store.read_rows(build.output / store.PARTS, parts)
        rows = ({name: row[name] for name in row if name not in ("changed", "removed_words")} for row in rows)
        store.write_lines(build.output / "train" / "metadata.jsonl", rows)
    write_atomically(build.output / "report.txt", text + "\n")
    write_atomically(build.output / "report.json", json.dumps(report_json(report), indent=2) + "\n")
    names = ", ".join(source.name for source in sources)
    title = f"Faces by intensity of each AU, before (grey) and after (red), heights logarithmic ({names})"
    with replacing(build.output / "histogram.png") as unfinished:
        draw_histograms(build.au_names, before, after, title).save(unfinished, "PNG")
    return text


def _other_aus(names: tuple[str, ...], built_names: tuple[str, ...]) -> list[str]:
    """Sentences on the AUs of a source that are not in the data set, or not as they were."""
    made = [name for name in built_names if name not in names]
    sentences = {
        "Not in the data set": [name for name in names if whole_au(name) not in au_columns(built_names)],
        "The mean of both sides": [name for name in made if name == whole_au(name)],
        "The same on both sides": [name for name in made if name != whole_au(name)],
    }
    return [f"{what}: {', '.join(found)}." for what, found in sentences.items() if found]
