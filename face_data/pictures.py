# SPDX-License-Identifier: Apache-2.0
"""Pictures of any kind as 8-bit RGB with the colours that a viewer shows, or the reason why that cannot be."""

import contextlib
import io
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps

from program import replacing


# What Pillow and the datasets library both read, and what every viewer shows.
PLAIN_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
PICTURE_SUFFIXES = (
    *(*PLAIN_SUFFIXES, ".jpe", ".jfif", ".gif", ".avif", ".heic", ".heif", ".jp2", ".ppm", ".pgm", ".tga"),
)
# Pillow raises these for files that are damaged, cut off, of another type or absurdly large.
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# Columns of a face's box: left, top, right and bottom, as parts of the picture.
FACE_BOX = ("face_x0", "face_y0", "face_x1", "face_y1")
_ORIENTATION = 0x0112
# Values of it with which viewers show the mirror image of what is stored, upright or turned.
_MIRRORED = (2, 4, 5, 7)
BACKGROUND = "white"


@dataclass(frozen=True)
class Placed:
    """
    `path` is where the picture is now, `size` is `(width, height)` in pixels, `is_turned` says whether EXIF turns or
    mirrors it, `is_mirrored` whether it mirrors it, and `note` says what was changed.
    """

    path: Path
    size: tuple[int, int]
    is_turned: bool
    is_mirrored: bool
    note: str | None


def place_picture(source: Path, target: Path, min_side: int = 0) -> Placed:
    """
    Put a picture that can be decoded at `target`: as a hard link where that is possible, else as a copy. One that a
    camera has marked as turned is written upright. One that a plain conversion to RGB would get wrong, and one of a
    type that not everybody reads, is written as PNG at `target` with ".png" behind it. A picture with a side under
    `min_side` is put nowhere.

    Raises:
        PICTURE_ERRORS: if the picture cannot be decoded.
    """
    with Image.open(source) as picture:
        picture.load()
        rgb, note = to_rgb(picture)
        orientation = picture.getexif().get(_ORIENTATION, 1)
        is_turned = orientation in range(2, 9)
        is_plain = note is None and source.suffix.lower() in PLAIN_SUFFIXES
    target = target if is_plain else target.with_name(f"{target.name}.png")
    if min(rgb.size) >= min_side:
        if is_plain and not is_turned:
            link_file(source, target)
        else:
            with replacing(target) as unfinished:
                rgb.save(unfinished, Image.registered_extensions()[target.suffix.lower()], quality=95)
    note = "; ".join(filter(None, (note, "turned upright, as EXIF says" if is_turned else None))) or None
    return Placed(target, rgb.size, is_turned, orientation in _MIRRORED, note)


def size_and_end(file: BinaryIO) -> bytes:
    """The size and the last bytes of a file. Files with the same content have the same."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 64))
    return b"%d " % size + file.read()


def box_columns(
    box: tuple[Sequence[float], bool] | None, placed: Placed, is_upright: bool = False
) -> tuple[dict[str, float], str | None]:
    """
    The columns `FACE_BOX` as parts of the picture `placed`, cut to it; empty without a `box`, and for one that is not
    within it. `box` is left, top, right and bottom of a face, and whether they are in pixels, or else parts of the
    picture as viewers and most detectors show it, which is certain if it `is_upright`. Also returns the note of
    `placed` with what was made of the box.
    """
    if box is None:
        return {}, placed.note
    corners, in_pixels = box
    parts = np.float64(corners) / (np.float64([*placed.size, *placed.size]) if in_pixels else 1.0)
    left, top, right, bottom = cut = parts.clip(0, 1)
    columns, note = dict(zip(FACE_BOX, cut.round(6).tolist(), strict=True)), None
    is_guessed = placed.is_turned and not is_upright
    # A box of the pixels as they are stored may reach beyond the picture as it is shown.
    if not (left < right and top < bottom) or (is_guessed and (cut != parts).any()):
        columns, note = {}, "the face's box left out, because it is not within the picture"
    elif is_guessed:
        note = "the face's box taken for that of the picture as it is shown"
    return columns, "; ".join(filter(None, (placed.note, note))) or None


def link_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.samefile(source):
        return
    with replacing(target) as unfinished:
        try:
            os.link(source.resolve(), unfinished)
        except OSError:
            # Another file system, or one without hard links, or a file with as many links as it can have.
            shutil.copyfile(source, unfinished)


def to_rgb(picture: Image.Image) -> tuple[Image.Image, str | None]:
    """
    The picture as 8-bit RGB, upright if a camera has marked it as turned.

    Returns:
        `tuple[Image.Image, str | None]`: the picture, and what a plain `picture.convert("RGB")` would have got wrong,
        or None.

    Raises:
        ValueError: for values without a scale that everybody agrees on, such as 32 bits or floats.
    """
    notes = []
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        # 32-bit integers are how Pillow opens some files of 16 bits.
        if values.min() < 0 or values.max() > 65535 or (picture.mode == "I" and values.max() <= 255):
            raise ValueError(f"pixels of mode {picture.mode!r} go from {values.min()} to {values.max()}: save 8 bits")
        rgb = Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
        notes.append("brought from 16 bits to 8")
    elif picture.mode == "F":
        raise ValueError("pixels are floating point numbers, which have no agreed scale: save 8 bits")
    elif picture.has_transparency_data:
        layer = picture.convert("RGBA")
        if layer.getextrema()[3][0] < 255:
            notes.append(f"transparent pixels composed on {BACKGROUND}")
        rgb = Image.alpha_composite(Image.new("RGBA", layer.size, BACKGROUND), layer).convert("RGB")
    elif picture.mode == "CMYK":
        rgb = _from_cmyk(picture)
        notes.append("brought from CMYK to RGB")
    else:
        rgb = picture.convert("RGB")
    # The second picture of an MPO file is the other eye's, or a depth map.
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
        notes.append("of several frames, the first taken")
    rgb.getexif().update(picture.getexif())
    return ImageOps.exif_transpose(rgb), "; ".join(notes) or None


def _from_cmyk(picture: Image.Image) -> Image.Image:
    profile = picture.info.get("icc_profile")
    # A damaged profile, or one of another colour space, is as none.
    with contextlib.suppress(ImageCms.PyCMSError, OSError):
        if profile:
            inks, screen = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(picture, inks, screen, outputMode="RGB")
    return picture.convert("RGB")
