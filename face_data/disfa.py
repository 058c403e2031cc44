# SPDX-License-Identifier: Apache-2.0
"""DISFA: 27 people filmed while they watch videos (paper §4.4, docs/data.md). Each subject is a part of its folder."""

import functools
import random
import re
from collections.abc import Iterable, Iterator
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
SUBJECT = "SN[0-9][0-9][0-9]"


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
        """The folder with the labels of each subject."""
        for candidate in (self.root, self.root / "ActionUnit_Labels", *sorted(self.root.glob("*/ActionUnit_Labels"))):
            found = {path.name: path for path in candidate.glob(SUBJECT) if any(path.glob(f"{path.name}_au*.txt"))}
            if found:
                return found
        raise ValueError(
            f"There are no labels below {str(self.root)!r}. DISFA has them as ActionUnit_Labels/SN001/SN001_au1.txt."
        )

    @functools.cached_property
    def media(self) -> dict[str, Path]:
        """The video of each subject, or the folder of its pictures."""
        if self.images is not None:
            return {path.name: path for path in sorted(self.images.glob(SUBJECT))}
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
        source, chosen, seen = self.media[subject], self._choose_frames(intensities, subject, part), set()
        try:
            for frame, picture in read_video(source) if self.images is None else self._read_pictures(source):
                seen.add(frame)
                target = folder / "images" / subject / f"{frame:05d}"
                path = place_frame(picture, target, self.jpeg_quality, part) if frame in chosen else None
                if path is not None:
                    aus = dict(zip(AU_NAMES, intensities[frame].tolist(), strict=True))
                    known = {"source": self.source, "subject": subject, "origin": f"{subject}/{frame}"}
                    part.keep(path, folder, text="", **aus, **known)
        except VideoError as error:
            part.problem(UNREADABLE, source, str(error), len(chosen - seen))
        else:
            part.drop("labels without a frame", source, len(chosen - seen))
        part.drop("frames without a label", source, len(seen - intensities.keys()))

    def _choose_frames(self, intensities: dict[int, np.ndarray], subject: str, part: Part) -> set[int]:
        """Choose all frames with an AU, and the same share of those without from each subject."""
        neutral = [frame for frame, aus in intensities.items() if not aus.any()]
        kept = random.Random(f"{self.seed} {subject}").sample(neutral, round(self.neutral_share * len(neutral)))
        part.drop("no AU, and not in the share that is kept", subject, len(neutral) - len(kept))
        return (intensities.keys() - set(neutral)) | set(kept)

    def _read_pictures(self, folder: Path) -> Iterator[tuple[int, Path]]:
        for number, path in sorted(number_pictures(folder).items()):
            yield number - self.first_number + 1, path


def find_videos(root: Path, camera: str) -> dict[str, Path]:
    """Map each subject to its video. The file names of the two cameras differ in their letter case."""
    videos = (path for path in sorted(root.rglob("*")) if path.suffix.lower() in VIDEO_SUFFIXES)
    found = ((re.match(rf"{camera}video(sn\d{{3}})", path.name, re.IGNORECASE), path) for path in videos)
    return _only_one_each((match[1].upper(), path) for match, path in found if match)


def number_pictures(folder: Path) -> dict[int, Path]:
    """Map the number at the end of a picture's name to the picture."""
    numbered = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES):
        match = re.search(r"\d+$", path.stem)
        if match is None:
            raise ValueError(f"{path}: the name of a frame ends with its number, such as 00001.jpg.")
        numbered.append((int(match[0]), path))
    return _only_one_each(numbered)


def _only_one_each(found: Iterable[tuple]) -> dict:
    paths = {}
    for key, path in found:
        if paths.setdefault(key, path) != path:
            raise ValueError(f"Both {paths[key]} and {path} are {key}. Keep one of them.")
    return paths


def read_labels(folder: Path, subject: str, part: Part) -> dict[int, np.ndarray]:
    """Map the number of a frame, from 1, to its `(12,)` intensities. Frames that lack some of them are dropped."""
    by_au = []
    for name in AU_NAMES:
        labels = part.read_label(read_label_file, folder / f"{subject}_{name.lower()}.txt")
        if labels is None:
            return {}
        by_au.append(labels)
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
