# SPDX-License-Identifier: Apache-2.0
"""What became of the pictures: a table of counts with reasons, and a picture of the intensities before and after."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from face_data.store import read_parts, read_settings


KEPT = "kept"
WORDS_TAKEN = "words of emotion taken out of the caption"
MAX_EXAMPLES = 3
MAX_WORDS = 8
BINS, COLUMNS = 20, 4
BEFORE_COLOR, AFTER_COLOR, GREY = "#b9c2cc", "#d1495b", "#777"


@dataclass
class SourceReport:
    """
    Of a source, how many pictures were kept; how many were left out, by reason, with the first few paths for each
    problem; how many of the kept ones were changed, and in what way; which words were taken out of their captions; and
    notes on tables.
    """

    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    changed: Counter = field(default_factory=Counter)
    removed_words: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add(self, line: dict) -> None:
        """Count a line of a part."""
        if "note" in line:
            self.notes.append(line["note"])
        elif "dropped" in line:
            reason = line["dropped"]
            self.dropped[reason] += line.get("count", 1)
            if line.get("problem") and len(self.examples[reason]) < MAX_EXAMPLES:
                self.examples[reason].append(line["path"])
        else:
            words = line.get("removed_words") or {}
            self.kept += 1
            self.removed_words.update(words)
            self.changed.update(filter(None, (line.get("changed"), WORDS_TAKEN if words else None)))


def report_text(sources: dict[str, SourceReport]) -> str:
    rows = []
    for source, found in sources.items():
        for number, (reason, count) in enumerate([*found.dropped.most_common(), (KEPT, found.kept)]):
            rows.append(("" if number else source, reason, f"{count:,}"))
            rows += [("", f"  {path}", "") for path in found.examples[reason]]
        for change, count in found.changed.most_common():
            rows.append(("", f"  of them: {change}", f"{count:,}"))
            if change == WORDS_TAKEN:
                words = [f"{word} {count:,}" for word, count in found.removed_words.most_common(MAX_WORDS)]
                rows.append(("", f"    {', '.join(words)}", ""))
        rows += [("", f"note: {note}", "") for note in found.notes]
    if len(sources) > 1:
        rows.append(("all", KEPT, f"{sum(found.kept for found in sources.values()):,}"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 2)]
    # Paths may be long; counts stand before them.
    return "\n".join(f"{source:{widths[0]}}  {count:>{widths[1]}}  {reason}" for source, reason, count in rows)


def report_json(sources: dict[str, SourceReport]) -> dict:
    values = {}
    for source, found in sources.items():
        values[source] = {KEPT: found.kept, "dropped": dict(found.dropped.most_common())}
        more = {"changed": dict(found.changed.most_common()), "removed_words": found.removed_words}
        values[source] |= {name: value for name, value in (more | {"notes": found.notes}).items() if value}
    return values


def report_folders(folders: Iterable[Path]) -> str:
    """What the steps that read a source kept and left out."""
    sources = defaultdict(SourceReport)
    for folder in folders:
        found = sources[read_settings(folder)["source"]]
        for line in read_parts(folder):
            found.add(line)
    return report_text(sources)


def count_intensities(aus: ArrayLike, num_aus: int) -> np.ndarray:
    """From AUs, `(rows, n)`, how many have which intensity, `(n, 1 + BINS)`: exactly 0, then equal steps to 5."""
    steps = np.ceil(np.float32(aus).reshape(-1, num_aus) * (BINS / 5)).astype(int).clip(0, BINS)
    return np.stack([np.bincount(column, minlength=1 + BINS) for column in steps.T])


def draw_histograms(au_names: tuple[str, ...], before: np.ndarray, after: np.ndarray, title: str) -> Image.Image:
    """The AUs in a grid, intensity to the right, number of faces upwards on a logarithmic scale."""
    width, height, gap = 260, 150, 20
    step, tallest = width / (1 + BINS), np.log1p(max(before.max(), after.max(), 1))
    num_rows = -(-len(au_names) // COLUMNS)
    size = (gap + COLUMNS * (width + 2 * gap), 3 * gap + num_rows * (height + 3 * gap))
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(18)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), title, GREY, font)
    for number, name in enumerate(au_names):
        left, top = gap + number % COLUMNS * (width + 2 * gap), 3 * gap + number // COLUMNS * (height + 3 * gap)
        bottom = top + gap + height
        draw.text((left + (width + gap) / 2, top), name, "black", font, anchor="ma")
        # Those before are wide bars, those after are narrow ones.
        for counts, color, start, end in ((before, BEFORE_COLOR, 0.05, 0.95), (after, AFTER_COLOR, 0.3, 0.7)):
            heights = np.log1p(counts[number]) / tallest * height
            for place in heights.nonzero()[0]:
                box = (left + (place + start) * step, bottom - heights[place], left + (place + end) * step, bottom)
                draw.rectangle(box, color)
        draw.line((left, bottom, left + width, bottom), GREY)
        for intensity in range(6):
            x = left + (0.5 if intensity == 0 else 1 + intensity * BINS / 5) * step
            draw.text((x, bottom + 4), str(intensity), GREY, ImageFont.load_default(12), anchor="ma")
    return sheet
