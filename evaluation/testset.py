# SPDX-License-Identifier: Apache-2.0
"""The paper's test set (§5.1): the pictures to draw, and the names of their files."""

import logging
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from action_units import AU_NAMES
from drawing.jobs import canonical_aus
from face_data.table_files import read_records


DATA = Path(__file__).parent / "data"
PROMPTS, TOY_PROMPTS, COMBINATIONS = (DATA / f"{name}.csv" for name in ("prompts", "prompts_toy", "combinations"))
INTENSITIES = (1, 2, 3, 4, 5)
BEYOND = (-3, -2, -1, 6, 7, 8)
"""Intensities outside [0, 5], which the paper shows in Fig. 8."""
PARTS = ("neutral", "single", "combination", "extrapolation")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """`domain` says whether the model was trained on such pictures: "in", "out", or "" if nobody has said."""

    index: int
    text: str
    domain: str
    seed: int


@dataclass(frozen=True)
class Item:
    """One picture. All pictures of a prompt share its seed, so that they differ by the AUs alone (Eq. 4)."""

    part: str
    prompt: Prompt
    aus: str
    """The AUs in the form that `format_aus` writes."""
    number: int = 0
    """The index of the combination; 0 in other parts."""

    @property
    def name(self) -> str:
        number = f"{self.number:02d}" if self.part == "combination" else ""
        aus = f"_{self.aus.replace(' ', '+')}" if self.aus else ""
        return f"p{self.prompt.index:02d}_{self.part}{number}{aus}_seed{self.prompt.seed}.png"


def read_prompts(path: Path) -> list[Prompt]:
    """
    Read the prompts of a file: a `.csv` with the column `prompt` and optionally `domain` and `seed`, or any other text
    file with one prompt a line, where empty lines are skipped. A prompt without a seed gets one that follows from its
    words.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no prompt, or a row is broken. The message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`--prompts` is {str(path)!r}, which is no file.")
    if path.suffix.lower() == ".csv":
        rows = _read_csv(path, "prompt")
    else:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = [(number, {"prompt": line}) for number, line in enumerate(lines, 1) if line.strip()]
    prompts = []
    for line, row in rows:
        text = row["prompt"].strip()
        if not text:
            raise ValueError(f"{path}, line {line}: `prompt` is empty. Fill it in, or delete the line.")
        seed = row.get("seed") or str(zlib.crc32(text.encode()))
        if not re.fullmatch("[0-9]{1,18}", seed):
            raise ValueError(f"{path}, line {line}: `seed` has to be a whole number from 0 on, but is {seed!r}.")
        if row.get("domain", "") not in ("", "in", "out"):
            raise ValueError(f'{path}, line {line}: `domain` has to be "in" or "out", but is {row["domain"]!r}.')
        prompts.append(Prompt(len(prompts), text, row.get("domain", ""), int(seed)))
    if not prompts:
        raise ValueError(f"{path} holds no prompt. Write one a line.")
    return prompts


def read_combinations(path: Path, au_names: Sequence[str] = AU_NAMES) -> list[str]:
    """Read the AU combinations of a `.csv` with the column `aus`, as `format_aus` writes them."""
    combinations = []
    for line, row in _read_csv(path, "aus"):
        aus = canonical_aus(row["aus"], f"{path}, line {line}: aus", au_names)
        if not aus:
            raise ValueError(f"{path}, line {line}: `aus` is {row['aus']!r}, which is a neutral face.")
        combinations.append(aus)
    return combinations


def _read_csv(path: Path, column: str) -> list[tuple[int, dict[str, str]]]:
    """The rows of a table with their line numbers. All of them have this column."""
    rows = list(read_records(path, say=_logger.warning))
    if rows and column not in rows[0][1]:
        raise ValueError(f"{path} has no column {column!r}. It has {', '.join(rows[0][1])}.")
    return rows


def make_items(
    prompts: Iterable[Prompt], combinations: list[str], parts: Iterable[str], au_names: Sequence[str] = AU_NAMES
) -> list[Item]:
    """List the pictures of `parts`, and always the neutral ones, with which the others are compared."""
    aus_of = {
        "neutral": [""],
        "single": [f"{au}={value}" for au in au_names for value in INTENSITIES],
        "combination": combinations,
        "extrapolation": [f"{au}={value}" for au in au_names for value in BEYOND],
    }
    return [
        Item(part, prompt, aus, number if part == "combination" else 0)
        for prompt in prompts
        for part in PARTS
        if part in ("neutral", *parts)
        for number, aus in enumerate(aus_of[part])
    ]
