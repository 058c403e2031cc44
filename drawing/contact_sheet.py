# SPDX-License-Identifier: Apache-2.0
"""Draws sheets of pictures, which are labelled tables side by side and one below the other, and writes animations."""

import itertools
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Generic, TypeVar

from PIL import Image, ImageDraw, ImageFont

from program import import_av, replacing


INK, GREY = "#222", "#777"
ANIMATION_SUFFIXES = (".gif", ".mp4")


Cell = TypeVar("Cell")


@dataclass(frozen=True)
class Table(Generic[Cell]):
    """
    Cells in rows of equal length: jobs to be drawn, or pictures of one size. A label stands at the left of each row,
    its text after a line break small and grey, unless there are no `row_labels`, and one above each column.
    """

    rows: list[list[Cell]]
    row_labels: list[str]
    column_labels: list[str]

    def map(self, function: Callable[[Cell], object]) -> "Table":
        """The table in which each cell is `function` of the cell here."""
        return replace(self, rows=[[function(cell) for cell in row] for row in self.rows])


def draw_sheet(bands: list[list[Table[Image.Image]]], title: str) -> Image.Image:
    """Draw `bands` one below the other under a title. The tables of a band are side by side."""
    unit = _unit(bands[0][0])
    rows = [[draw_table(table) for table in band] for band in bands]
    width = max(sum(image.width + unit for image in row) for row in rows) - unit
    band_heights = [max(image.height for image in row) + unit for row in rows]
    sheet = Image.new("RGB", (width + 2 * unit, sum(band_heights) + 5 * unit // 2), "white")
    font = ImageFont.load_default(unit)
    while len(title) > 1 and font.getlength(title) > width:
        title = title[:-2] + "…"
    ImageDraw.Draw(sheet).text((unit, unit), title, GREY, font, anchor="lt")
    y = 5 * unit // 2
    for row, band_height in zip(rows, band_heights, strict=True):
        x = unit
        for image in row:
            sheet.paste(image, (x, y))
            x += image.width + unit
        y += band_height
    return sheet


def draw_table(table: Table[Image.Image]) -> Image.Image:
    """Draw the pictures of a table with thin gaps and labels. All sizes follow from the height of a picture."""
    width, height = table.rows[0][0].size
    unit, gap = _unit(table), max(1, height // 32)
    font, small_font = ImageFont.load_default(unit), ImageFont.load_default(0.85 * unit)
    left = round(0.66 * height) if table.row_labels else 0
    # A letter is about half as wide as the font is high.
    captions = [textwrap.fill(label, max(1, round(1.8 * width / unit))) for label in table.column_labels]
    top = round(1.25 * unit) * max(caption.count("\n") + 1 for caption in captions)
    size = (left + len(captions) * (width + gap) - gap, top + len(table.rows) * (height + gap) - gap)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for column, caption in enumerate(captions):
        middle = left + column * (width + gap) + width / 2
        draw.multiline_text((middle, top - gap), caption, INK, font, anchor="md", align="center")
    for row, pictures in enumerate(table.rows):
        y = top + row * (height + gap)
        if table.row_labels:
            name, _, description = table.row_labels[row].partition("\n")
            description = textwrap.fill(description, max(1, 2 * left // unit))
            draw.text((0, y + height / 2), name, INK, font, anchor="ls")
            draw.multiline_text((0, y + height / 2 + gap), description, GREY, small_font)
        for column, picture in enumerate(pictures):
            image.paste(picture, (left + column * (width + gap), y))
    return image


def _unit(table: Table[Image.Image]) -> int:
    """The size of letters and margins, in pixels."""
    return max(8, table.rows[0][0].height // 9)


def write_animation(pictures: Iterable[Image.Image], path: Path, fps: float, comment: str = "") -> None:
    """
    Write an endless GIF, or an MP4 (H.264), from pictures of one size, which are taken one by one; an MP4 needs even
    sides. `path` has one of `ANIMATION_SUFFIXES`, and appears when the file is complete. `fps` is frames a second: a
    GIF counts the time of a frame in hundredths of a second, and viewers take at least 2. `comment` is text that is
    written into the file.
    """
    pictures = iter(pictures)
    first = next(pictures)
    with replacing(path) as unfinished:
        if path.suffix.lower() == ".mp4":
            _write_mp4(first, pictures, unfinished, fps, comment)
            return
        duration = 10 * max(2, round(100 / fps))  # milliseconds
        options = {"append_images": pictures, "duration": duration, "loop": 0, "comment": comment}
        first.save(unfinished, "GIF", save_all=True, **options)


def _write_mp4(first: Image.Image, others: Iterable[Image.Image], path: Path, fps: float, comment: str) -> None:
    av = import_av()
    with av.open(str(path), "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = *first.size, "yuv420p"
        for picture in itertools.chain([first], others):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
