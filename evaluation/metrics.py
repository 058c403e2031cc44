# SPDX-License-Identifier: Apache-2.0
"""Metrics as small functions of arrays: the paper's two (Eq. 3 and 4), and others that see what these two miss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from action_units import whole_au


HARD_AUS = ("AU15", "AU17", "AU20")
"""No detector reads these reliably from photographs."""


def is_hard(au_names: Sequence[str]) -> np.ndarray:
    """A boolean for each of `au_names`: whether it is one of `HARD_AUS`, or a side of one."""
    return np.array([whole_au(name) in HARD_AUS for name in au_names])


def au_mse(commanded: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """
    Eq. 3 for each picture, `(pictures,)`: the squared difference between commanded and measured FACS intensities of
    the same AUs, `(pictures, n)` each, averaged over the AUs.
    """
    return np.square(measured - commanded).mean(axis=1)


def clip_similarity(embeddings: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Eq. 4: cosine of the angle between embeddings, row by row; `(pictures, width)` each → `(pictures,)`."""
    norms = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(others, axis=1)
    return (embeddings * others).sum(axis=1) / norms


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; NaN if one of the two does not vary."""
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt(np.square(x).sum() * np.square(y).sum())
    return float((x * y).sum() / norm) if norm > 0 else float("nan")


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Slope of the regression of y on x: 1 if one more commanded grade is one more measured grade."""
    x_centred = x - x.mean()
    variance = np.square(x_centred).sum()
    return float((x_centred * (y - y.mean())).sum() / variance) if variance > 0 else float("nan")


def unrequested_movement(commanded: np.ndarray, measured: np.ndarray, neutral: np.ndarray) -> np.ndarray:
    """
    How far the AUs that were not asked for move from the neutral face of the same prompt and seed: the mean absolute
    change for each picture, in FACS intensities. All `(pictures, n)`. NaN if every AU was asked for.
    """
    unrequested = commanded == 0
    moved = np.where(unrequested, np.abs(measured - neutral), 0).sum(axis=1)
    count = unrequested.sum(axis=1)
    return np.where(count > 0, moved / np.maximum(count, 1), np.nan)


def outside_change(picture: np.ndarray, neutral: np.ndarray, face_box: tuple[float, float, float, float]) -> float:
    """
    Root mean squared difference of the pixels outside `face_box` (left, top, right and bottom of the face, in parts of
    width and height), where black and white differ by 1. Both pictures are `(height, width, 3)` uint8.
    """
    height, width = picture.shape[:2]
    left, top, right, bottom = face_box
    outside = np.ones((height, width), dtype=bool)
    outside[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = False
    difference = (picture[outside].astype(np.float32) - neutral[outside].astype(np.float32)) / 255
    return float(np.sqrt(np.square(difference).mean()))


@dataclass(frozen=True)
class Figure:
    """A value, its 95 % bootstrap interval, and the numbers of pictures and prompts from which it was computed."""

    value: float
    low: float
    high: float
    pictures: int
    prompts: int

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        return "–" if np.isnan(self.value) else f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


NO_FIGURE = Figure(float("nan"), float("nan"), float("nan"), 0, 0)


def bootstrap(
    statistic: Callable[..., float], *columns: np.ndarray, prompts: np.ndarray, draws: int = 1000, seed: int = 0
) -> Figure:
    """
    Compute `statistic(*columns)` and its bootstrap interval. Prompts are drawn with replacement, and then the pictures
    of each drawn prompt, because pictures of one prompt are alike and tell less than independent ones. `prompts`,
    `(pictures,)`, says which prompt a picture belongs to. Pictures of which any of the `columns`, `(pictures, …)`, has
    a NaN are left out.
    """
    whole = np.ones(len(prompts), dtype=bool)
    for column in columns:
        whole &= ~np.isnan(column).reshape(len(column), -1).any(axis=1)
    columns, prompts = tuple(column[whole] for column in columns), prompts[whole]
    if not len(prompts):
        return NO_FIGURE
    groups = [np.flatnonzero(prompts == prompt) for prompt in np.unique(prompts)]
    rng = np.random.default_rng(seed)
    drawn = np.empty(draws)
    for draw in range(draws):
        chosen = [groups[number] for number in rng.integers(len(groups), size=len(groups))]
        rows = np.concatenate([group[rng.integers(len(group), size=len(group))] for group in chosen])
        drawn[draw] = statistic(*(column[rows] for column in columns))
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.quantile(drawn, (0.025, 0.975)) if len(drawn) else (float("nan"), float("nan"))
    return Figure(float(statistic(*columns)), float(low), float(high), len(prompts), len(groups))
