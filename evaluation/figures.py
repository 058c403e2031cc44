# SPDX-License-Identifier: Apache-2.0
"""Draws a run: the paper's Figs. 4, 5, 6 and 8 as grids of pictures, dose–response curves, and a heat map."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from drawing.contact_sheet import GREY, INK, Table, draw_sheet
from evaluation.meters import read_picture
from evaluation.report import by_meter, commanded_aus, intensities, with_neutral
from evaluation.testset import Item


PICTURE_SIDE = 128
MAX_COLUMNS = 10
MAX_COMBINATIONS = 19
CURVE, OTHER_CURVE = "#1f6fb2", "#c9d6e2"


def draw_all(items: Sequence[Item], results: pd.DataFrame, folder: Path) -> dict[str, Image.Image]:
    """
    Draw the figures of a run by name: grids with the pictures of the first prompt, which are in `folder`, and charts
    of each meter. Figures that show parts which the run does not have are left out.
    """
    prompt, au_names = items[0].prompt, commanded_aus(results)
    shown = [item for item in items if item.prompt == prompt]
    alone = {item.aus: item.name for item in shown if item.part != "combination"}
    combinations = [item for item in shown if item.part == "combination"][:MAX_COMBINATIONS]
    grids = {}
    for figure, names in (
        ("figure4_single_aus", {au: alone.get(f"{au}=5") for au in au_names}),
        ("figure5_combinations", {item.aus.replace("AU", ""): item.name for item in combinations}),
    ):
        columns = [("neutral", alone[""]), *names.items()]
        bands = [columns[start : start + MAX_COLUMNS] for start in range(0, len(columns), MAX_COLUMNS)]
        if names:
            grids[figure] = [Table([[name for _, name in band]], [], [label for label, _ in band]) for band in bands]
    for figure, values in (
        ("figure6_intensity", (0, 1, 2, 3, 4, 5)),
        ("figure8_extrapolation", (-3, -2, -1, 0, 2, 4, 5, 6, 7, 8)),
    ):
        rows = [[alone.get(f"{au}={value}" if value else "") for value in values] for au in au_names]
        grids[figure] = [Table(rows, au_names, list(map(str, values)))]
    drawings = {
        figure: draw_bands([table.map(folder.joinpath) for table in bands], f"{prompt.text} · seed {prompt.seed}")
        for figure, bands in grids.items()
        if not any(None in row for table in bands for row in table.rows)
    }
    for meter, table in by_meter(results):
        measured = with_neutral(table)
        if (measured["part"] == "single").any():
            drawings[f"dose_response_{meter}"] = draw_dose_response(measured, meter)
            drawings[f"heat_map_{meter}"] = draw_heat_map(measured, meter)
    return drawings


def draw_bands(tables: Sequence[Table[Path]], title: str) -> Image.Image:
    """Draw tables of picture files one below the other."""

    def open_small(path: Path) -> Image.Image:
        image = read_picture(path)
        return image if image.height <= PICTURE_SIDE else image.resize((PICTURE_SIDE, PICTURE_SIDE))

    return draw_sheet([[table.map(open_small)] for table in tables], title)


def draw_comparison(folders: dict[str, Path], names: dict[str, str], title: str) -> Image.Image:
    """Draw the same pictures of several runs: a row for each of `folders`, a column for each of `names`."""
    rows = [[folder / name for name in names.values()] for folder in folders.values()]
    return draw_bands([Table(rows, list(folders), list(names))], title)


def draw_dose_response(measured: pd.DataFrame, meter: str, side: int = 220) -> Image.Image:
    """Draw measured against commanded intensity, a panel for each AU: prompts in pale, their mean in blue."""
    columns, gap, top = 4, 34, 54
    au_names = commanded_aus(measured)
    height = top + -(-len(au_names) // columns) * (side + gap)
    image = Image.new("RGB", (columns * (side + gap) + gap, height), "white")
    draw = ImageDraw.Draw(image)
    title = f"Measured by {meter} against commanded; dashed: as commanded"
    draw.text((gap, 14), title, INK, ImageFont.load_default(18))
    alone = measured[measured["part"].isin(("neutral", "single", "extrapolation"))]
    values = alone[au_names].to_numpy()
    low, high = min(0.0, values.min()), max(5.0, values.max())
    for number, au in enumerate(au_names):
        left, y = gap + number % columns * (side + gap), top + number // columns * (side + gap)
        _draw_panel(draw, (left, y, side, low, high), au, alone[(alone[au] != 0) | (alone["part"] == "neutral")])
    return image


def _draw_panel(draw: ImageDraw.ImageDraw, panel: tuple, au: str, rows: pd.DataFrame) -> None:
    left, top, side, low, high = panel
    font = ImageFont.load_default(12)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = ((value - low) / (high - low) for value in (x, min(max(y, low), high)))
        return left + across * side, top + side - up * side

    draw.rectangle((left, top, left + side, top + side), outline="#999")
    for tick in range(int(np.ceil(low)), int(high) + 1):
        x, y = place(tick, tick)
        draw.line((x, top + side, x, top + side + 3), "#999")
        draw.line((left - 3, y, left, y), "#999")
        draw.text((x, top + side + 5), str(tick), GREY, font, anchor="mt")
        draw.text((left - 5, y), str(tick), GREY, font, anchor="rm")
    steps = np.linspace(low, high, 41)
    for start, end in zip(steps[:-1:2], steps[1::2], strict=True):
        draw.line((*place(start, start), *place(end, end)), "#999")
    for _, group in rows.groupby("prompt_index"):
        points = [place(x, y) for x, y in group.sort_values(au)[[au, f"measured_{au}"]].to_numpy()]
        draw.line(points, OTHER_CURVE, 1)
    points = [place(x, y) for x, y in rows.groupby(au)[f"measured_{au}"].mean().items()]
    draw.line(points, CURVE, 3)
    for x, y in points:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), CURVE)
    draw.text((left + 8, top + 6), au, INK, ImageFont.load_default(15))


def draw_heat_map(measured: pd.DataFrame, meter: str, cell: int = 46) -> Image.Image:
    """
    Draw `movement_matrix`: a row for each commanded AU, a column for each measured AU. A perfect model gives ones on
    the diagonal and zeros elsewhere.
    """
    left, top = 84, 96
    side = len(commanded_aus(measured)) * cell + 20
    size = (left + side, top + side)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.text((14, 14), f"Movement by {meter}, per commanded grade", INK, ImageFont.load_default(18))
    draw.text((14, 42), "rows: commanded alone · columns: measured", GREY, ImageFont.load_default(13))
    font, small = ImageFont.load_default(13), ImageFont.load_default(12)
    for row, (au, values) in enumerate(movement_matrix(measured).iterrows()):
        y = top + row * cell
        draw.text((left - 8, y + cell / 2), au, INK, font, anchor="rm")
        draw.text((left + (row + 0.5) * cell, top - 8), au, INK, font, anchor="mb")
        for column, value in enumerate(values):
            x = left + column * cell
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), _heat_color(value))
            # Rounding can give −0. Adding 0 makes it 0, so that no "-0.00" is printed.
            text = "–" if np.isnan(value) else f"{round(value, 2) + 0:.2f}"
            ink = "white" if abs(value) > 0.6 else INK
            draw.text((x + cell / 2 - 1, y + cell / 2 - 1), text, ink, small, anchor="mm")
    return image


def movement_matrix(measured: pd.DataFrame) -> pd.DataFrame:
    """
    How far each AU (column) moved from the neutral face when another or the same AU (row) was commanded alone: the
    mean over the intensities 1–5, divided by the mean command. `measured` is what `with_neutral` returns.
    """
    single = measured[measured["part"] == "single"]
    au_names = commanded_aus(measured)
    matrix = pd.DataFrame(np.nan, index=au_names, columns=au_names)
    for au in au_names:
        rows = single[single[au] != 0]
        if len(rows):
            _, moved, neutral = intensities(rows)
            matrix.loc[au] = np.nanmean(moved - neutral, axis=0) / rows[au].mean()
    return matrix


def _heat_color(value: float) -> tuple[int, int, int]:
    """White at 0, blue towards 1, red towards −1."""
    if np.isnan(value):
        return 240, 240, 240
    end = (31, 111, 178) if value > 0 else (190, 60, 50)
    amount = min(abs(value), 1.0)
    return tuple(round(255 + amount * (channel - 255)) for channel in end)
