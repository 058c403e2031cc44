# SPDX-License-Identifier: Apache-2.0
"""
Shows a run of `train_fineface.py` in one picture: the curve of its loss, with validation sheets below.

  python -m evaluation.training_picture fineface-adapter training.png

It reads what the run wrote into its output folder: `logs` (TensorBoard) and `validation`.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from drawing.contact_sheet import GREY, INK
from drawing.files import write_png
from evaluation.figures import CURVE, OTHER_CURVE
from program import Parser, check_output, run_program


LOSS = "train_loss"
CHART_HEIGHT, MARGIN = 220, 56
SMOOTHING = 0.04
"""Share of the steps over which the dark curve averages: single steps differ more than the weights do."""


def read_losses(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """
    Read steps and losses from all event files of a run: a run that was resumed has several.

    Raises:
        FileNotFoundError: if the run has kept no losses.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = {}
    for path in sorted((folder / "logs").rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        if LOSS in events.Tags()["scalars"]:
            losses |= {event.step: event.value for event in events.Scalars(LOSS)}
    if not losses:
        raise FileNotFoundError(
            f"{str(folder)!r} has no losses in logs/. Name the --output_dir of a run that reported to TensorBoard."
        )
    steps = sorted(losses)
    return np.array(steps), np.array([losses[step] for step in steps])


def smooth(losses: np.ndarray, window: int) -> np.ndarray:
    """Means of the `window` values around each, fewer at the ends."""
    return pd.Series(losses).rolling(window, center=True, min_periods=1).mean().to_numpy()


def draw_losses(steps: np.ndarray, losses: np.ndarray, width: int) -> Image.Image:
    """Draw the loss of each step in pale and its mean in blue. The chart may cut off a twentieth at either end."""
    image = Image.new("RGB", (width, CHART_HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    mean = smooth(losses, max(1, round(SMOOTHING * len(losses))))
    low, high = min(mean.min(), np.quantile(losses, 0.05)), max(mean.max(), np.quantile(losses, 0.95))
    span = max(high - low, 1e-9)
    right, bottom, top = width - 16, CHART_HEIGHT - 30, 30

    def points(values: np.ndarray) -> list[tuple[float, float]]:
        x = MARGIN + (steps - steps[0]) / max(steps[-1] - steps[0], 1) * (right - MARGIN)
        y = bottom - np.clip((values - low) / span, 0, 1) * (bottom - top)
        return list(zip(x.tolist(), y.tolist(), strict=True))

    draw.line(points(losses), OTHER_CURVE)
    draw.line(points(mean), CURVE, 3)
    draw.line([(MARGIN, top), (MARGIN, bottom), (right, bottom)], GREY)
    for value, y in ((low, bottom), (high, top)):
        draw.text((MARGIN - 6, y), f"{value:.3g}", GREY, font, anchor="rm")
    for step, x, anchor in ((steps[0], MARGIN, "lt"), (steps[-1], right, "rt")):
        draw.text((x, bottom + 8), f"step {step}", GREY, font, anchor=anchor)
    draw.text((MARGIN, 8), "training loss: each step, and the mean", INK, font)
    return image


def draw_training(folder: Path, num_sheets: int = 3) -> Image.Image:
    """Draw the curve, and at most `num_sheets` validation sheets, spread evenly from the first to the last."""
    steps, losses = read_losses(folder)
    paths = sorted((folder / "validation").glob("step-*.png"))
    chosen = sorted({round(index) for index in np.linspace(0, len(paths) - 1, min(num_sheets, len(paths)))})
    sheets = [Image.open(paths[index]).convert("RGB") for index in chosen]
    width = max([640, *[sheet.width for sheet in sheets]])
    parts = [draw_losses(steps, losses, width), *sheets]
    image = Image.new("RGB", (width, sum(part.height for part in parts)), "white")
    y = 0
    for part in parts:
        image.paste(part, (0, y))
        y += part.height
    return image


def main(argv: list[str] | None = None) -> int:
    parser = Parser("evaluation.training_picture", __doc__)
    parser.add_argument("folder", type=Path, help="the --output_dir of the run")
    parser.add_argument("picture", type=Path, help="PNG file")

    def work() -> None:
        args = parser.parse_args(argv)
        check_output(args.picture)
        write_png(draw_training(args.folder), args.picture, optimize=True)

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
