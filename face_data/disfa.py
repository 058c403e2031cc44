# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
DISFA: 27 people filmed while they watch videos, 12 AUs of each frame graded 0 to 5 by hand (paper §4.4).

    DISFA/ActionUnit_Labels/SN001/SN001_au1.txt      "frame,intensity", frames counted from 1
    DISFA/Videos_LeftCamera/LeftVideoSN001_comp.avi  or the frames as pictures, FOLDER/SN001/00001.jpg

All frames with any AU are kept, and a share of those with none. Labels and film differ in length by some frames;
frames that only one of them has are left out. Each subject is one part of the work folder.
"""

import functools
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from action_units import AU_NAMES
from face_data.pictures import PICTURE_SUFFIXES
from face_data.store import UNREADABLE, Part
from program import check_options, import_av, option, replacing


VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".mov")
NO_READER = "Videos need PyAV: pip install av. Or give pictures of the frames, `--images`."
_SUBJECT = re.compile(r"SN\d{3}")


@dataclass(frozen=True)
class Disfa:
    """
    Which files of DISFA are read, and how. `root`, or a folder below it, holds `SN001/SN001_au1.txt` and so on. The
    number at the end of the name of one of the `images` is the frame's. The first frame's is 1; it is 0 if any picture
    has the number 0.
    """

    root: Path
    images: Path | None = option(None, "Frames of DISFA as pictures, SN001/00001.jpg; no videos then.")
    camera: Literal["left", "right"] = option("left", "Which videos of DISFA.")
    neutral_share: float = option(0.1, "Kept share of DISFA's frames without AUs.", low=0, high=1)
    seed: int = option(0, "Decides which.")
    jpeg_quality: int = option(95, "Of frames taken from videos.", low=1, high=95)
    subjects: tuple[str, ...] = option((), "Only these; by default all.", metavar="SN001")
    source = "disfa"

    def __post_init__(self):
        check_options(self)
        for folder in (self.root, self.images):
            if folder is not None and not folder.is_dir():
                raise ValueError(f"{str(folder)!r} is no folder.")
        present = sorted(self.labels.keys() | self.media.keys())
        missing = sorted(set(self.subjects) - set(present))
        if missing:
            raise ValueError(f"`--subjects` names {', '.join(missing)}, but there are {', '.join(present)}.")

    @functools.cached_property
    def labels(self) -> dict[str, Path]:
        return find_label_folders(self.root)

    @functools.cached_property
    def media(self) -> dict[str, Path]:
        """The video of each subject, or the folder of its pictures."""
        if self.images is not None:
            return {path.name: path for path in sorted(self.images.glob("SN*")) if _SUBJECT.fullmatch(path.name)}
        videos = find_videos(self.root, self.camera)
        if videos:
            import_av(NO_READER)
        return videos

    @functools.cached_property
    def first_number(self) -> int:
        is_zero = self.images and any(0 in number_pictures(path) for path in self.media.values())
        return 0 if is_zero else 1

    def settings(self) -> dict:
        folders = {"root": self.root, "images": self.images}
        values = asdict(self) | {name: path and str(path.resolve()) for name, path in folders.items()}
        return values | {"source": "disfa", "au_names": AU_NAMES, "correct_aus": False, "needs_photo_filter": False}

    def begin(self, folder: Path, on_error: str) -> list[str]:
        """The subjects. One number for the first frame of all of them is found before they are shared out."""
        _ = self.first_number
        return list(self.subjects) or sorted(self.labels.keys() | self.media.keys())

    def make_part(self, folder: Path, part: Part, subject: str) -> None:
        """One subject. If its video is damaged, the frames before the damage are kept."""
        if subject not in self.labels:
            part.problem("no labels", self.media[subject])
            return
        intensities = read_labels(self.labels[subject], subject, part)
        if intensities and subject not in self.media:
            part.problem("subject without video or pictures", self.images or self.root, subject, len(intensities))
        if not intensities or subject not in self.media:
            return
        source, chosen, seen = self.media[subject], choose_frames(intensities, subject, self, part), set()
        frames = read_video(source) if self.images is None else read_pictures(source, self.first_number)
        try:
            for frame, picture in frames:
                seen.add(frame)
                target = folder / "images" / subject / f"{frame:05d}"
                path = place_frame(picture, target, self.jpeg_quality, part) if frame in chosen else None
                if path is not None:
                    row = {"file_name": path.relative_to(folder).as_posix(), "text": ""}
                    row |= dict(zip(AU_NAMES, intensities[frame].tolist(), strict=True))
                    part.keep(row | {"source": self.source, "subject": subject, "origin": f"{subject}/{frame}"})
        except VideoError as error:
            part.problem(UNREADABLE, source, str(error), len(chosen - seen))
        else:
            part.drop("labels without a frame", source, len(chosen - seen))
        part.drop("frames without a label", source, len(seen - intensities.keys()))

    def end(self, folder: Path, subjects: list[str]) -> None:
        pass


def find_label_folders(root: Path) -> dict[str, Path]:
    """Map each subject to the folder of its labels."""
    for candidate in (root, root / "ActionUnit_Labels", *sorted(root.glob("*/ActionUnit_Labels"))):
        folders = [path for path in candidate.glob("SN*") if _SUBJECT.fullmatch(path.name)]
        found = {path.name: path for path in folders if any(path.glob(f"{path.name}_au*.txt"))}
        if found:
            return found
    raise ValueError(
        f"There are no labels below {str(root)!r}. DISFA has them as ActionUnit_Labels/SN001/SN001_au1.txt."
    )


def find_videos(root: Path, camera: str) -> dict[str, Path]:
    """Map each subject to its video. The file names of the two cameras differ in their letter case."""
    found = {}
    for path in sorted(path for path in root.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES):
        match = re.match(rf"{camera}video(sn\d{{3}})", path.name, flags=re.IGNORECASE)
        if match:
            _add_once(found, match[1].upper(), path)
    return found


def number_pictures(folder: Path) -> dict[int, Path]:
    """Map the number at the end of a picture's name to the picture."""
    numbered = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES):
        match = re.search(r"\d+$", path.stem)
        if match is None:
            raise ValueError(f"{path}: the name of a frame ends with its number, such as 00001.jpg.")
        _add_once(numbered, int(match[0]), path)
    return numbered


def _add_once(found: dict, key: str | int, path: Path) -> None:
    if key in found:
        raise ValueError(f"Both {found[key]} and {path} are {key}. Keep one of them.")
    found[key] = path


def read_labels(folder: Path, subject: str, part: Part) -> dict[int, np.ndarray]:
    """Map the number of a frame, from 1, to its `(12,)` intensities. Frames that lack some of them are dropped."""
    by_au = []
    for name in AU_NAMES:
        path = folder / f"{subject}_{name.lower()}.txt"
        try:
            by_au.append(read_label_file(path))
        except FileNotFoundError:
            part.problem("missing label file", path)
            return {}
        except ValueError as error:
            part.problem("label file that cannot be read", path, str(error))
            return {}
    complete = set.intersection(*map(set, by_au))
    part.drop("labels of some AUs only", folder, len(set.union(*map(set, by_au)) - complete))
    return {frame: np.float32([au[frame] for au in by_au]) for frame in sorted(complete)}


def read_label_file(path: Path) -> dict[int, int]:
    """Map the number of a frame to its intensity."""
    values = {}
    for line, text in enumerate(path.read_text().splitlines(), 1):
        match = re.fullmatch(r"\s*0*([1-9]\d*)\s*[,\s]\s*([0-5])(?:\.0*)?\s*", text)
        if text.strip() and (match is None or int(match[1]) in values):
            raise ValueError(
                f"line {line} is {text[:40]!r}, but has to be a frame, from 1 on and none twice, and an intensity from"
                " 0 to 5"
            )
        if match:
            values[int(match[1])] = int(match[2])
    return values


def choose_frames(intensities: dict[int, np.ndarray], subject: str, disfa: Disfa, part: Part) -> set[int]:
    """Choose all frames with an AU, and the same share of those without from each subject."""
    neutral = [frame for frame, aus in intensities.items() if not aus.any()]
    kept = random.Random(f"{disfa.seed} {subject}").sample(neutral, round(disfa.neutral_share * len(neutral)))
    part.drop("no AU, and not in the share that is kept", subject, len(neutral) - len(kept))
    return (intensities.keys() - set(neutral)) | set(kept)


def read_pictures(folder: Path, first_number: int) -> Iterator[tuple[int, Path]]:
    """Yield the numbers of frames, from 1, with their pictures."""
    for number, path in sorted(number_pictures(folder).items()):
        yield number - first_number + 1, path


def place_frame(picture, target: Path, quality: int, part: Part) -> Path | None:
    """Put a picture, or a frame of PyAV, at `target` with the suffix of its type. Return where it is, if it can be."""
    if isinstance(picture, Path):
        placed = part.place(picture, target.with_suffix(picture.suffix.lower()))
        return placed and placed.path
    target = target.with_suffix(".jpg")
    with replacing(target) as unfinished:
        picture.to_image().save(unfinished, "JPEG", quality=quality, subsampling=0)
    return target


class VideoError(ValueError):
    """Raised where a damaged video cannot be read further."""


def read_video(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the numbers of frames, from 1, with frames of PyAV. Raises `VideoError` at a damage."""
    av, frame = import_av(NO_READER), 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError("there is no video in it")
            for frame, picture in enumerate(container.decode(video=0), 1):
                yield frame, picture
    except av.error.FFmpegError as error:
        raise VideoError(f"after frame {frame}: {error}") from error
