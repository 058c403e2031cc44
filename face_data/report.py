# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""What became of the pictures: a table of counts with reasons, and a picture of the intensities before and after."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from drawing.contact_sheet import GREY, INK
from face_data.store import list_parts, read_lines, read_settings
from program import replacing


KEPT = "kept"
WORDS_TAKEN = "words of emotion taken out of the caption"
MAX_EXAMPLES = 3
MAX_WORDS = 8
BINS = 20
BEFORE_COLOR, AFTER_COLOR = "#b9c2cc", "#d1495b"


@dataclass
class Report:
    """
    Counts by source and by reason, with `KEPT` for what stayed; for each problem the first few paths; for what stayed
    how many pictures were changed and how many words were taken out of captions; and notes on tables.
    """

    counts: dict[str, Counter] = field(default_factory=dict)
    examples: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    changes: dict[str, Counter] = field(default_factory=dict)
    words: dict[str, Counter] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def add(self, source: str, line: dict) -> None:
        """A line of a part."""
        if "note" in line:
            self.notes.setdefault(source, []).append(line["note"])
            return
        reason = line.get("dropped", KEPT)
        self.counts.setdefault(source, Counter())[reason] += line.get("count", 1)
        if line.get("problem"):
            paths = self.examples.setdefault((source, reason), [])
            if len(paths) < MAX_EXAMPLES:
                paths.append(line["path"])
        if reason == KEPT:
            self._count_changes(source, line, 1)

    def move(self, source: str, line: dict) -> None:
        """A line that takes back what was kept."""
        self.counts[source][KEPT] -= line.get("count", 1)
        self._count_changes(source, line, -1)
        self.add(source, line)

    def add_words(self, source: str, words: dict[str, int] | None) -> None:
        """Words of emotion that were taken out of a caption."""
        if words:
            self.changes.setdefault(source, Counter())[WORDS_TAKEN] += 1
            self.words.setdefault(source, Counter()).update(words)

    def _count_changes(self, source: str, line: dict, sign: int) -> None:
        if line.get("changed"):
            self.changes.setdefault(source, Counter())[line["changed"]] += sign
        if line.get("removed_words"):
            self.changes.setdefault(source, Counter())[WORDS_TAKEN] += sign
            words = self.words.setdefault(source, Counter())
            for word, count in line["removed_words"].items():
                words[word] += sign * count

    def to_text(self) -> str:
        rows = []
        for source, counts in self.counts.items():
            dropped = [(reason, count) for reason, count in counts.most_common() if reason != KEPT]
            for number, (reason, count) in enumerate([*dropped, (KEPT, counts[KEPT])]):
                rows.append(("" if number else source, reason, f"{count:,}"))
                rows += [("", f"  {path}", "") for path in self.examples.get((source, reason), ())]
            for reason, count in self._changes(source):
                rows.append(("", f"  of them: {reason}", f"{count:,}"))
                if reason == WORDS_TAKEN:
                    words = [f"{word} {count:,}" for word, count in self.words[source].most_common(MAX_WORDS)]
                    rows.append(("", f"    {', '.join(words)}", ""))
            rows += [("", f"note: {note}", "") for note in self.notes.get(source, ())]
        if len(self.counts) > 1:
            rows.append(("all", KEPT, f"{sum(counts[KEPT] for counts in self.counts.values()):,}"))
        widths = [max(len(row[column]) for row in rows) for column in (0, 2)]
        # Paths may be long; counts stand before them.
        return "\n".join(f"{source:{widths[0]}}  {count:>{widths[1]}}  {reason}" for source, reason, count in rows)

    def _changes(self, source: str) -> list[tuple[str, int]]:
        return [(reason, count) for reason, count in self.changes.get(source, Counter()).most_common() if count]

    def to_json(self) -> dict:
        return {
            source: {
                KEPT: counts[KEPT],
                "dropped": {reason: count for reason, count in counts.most_common() if reason != KEPT},
            }
            | ({"changed": dict(changes)} if (changes := self._changes(source)) else {})
            | ({"removed_words": dict(+self.words[source])} if +self.words.get(source, Counter()) else {})
            | ({"notes": self.notes[source]} if self.notes.get(source) else {})
            for source, counts in self.counts.items()
        }


def report_folders(folders: list[Path]) -> Report:
    """What the steps `disfa`, `affectnet` and `folder` kept and left out."""
    report = Report()
    for folder in folders:
        source = read_settings(folder)["source"]
        report.counts.setdefault(source, Counter({KEPT: 0}))
        for part in list_parts(folder):
            for line in read_lines(folder / "rows" / f"{part}.jsonl"):
                report.add(source, line)
    return report


class Histogram:
    """How often each AU has which intensity. `counts` is `(n, 1 + BINS)`: exactly 0, then equal steps to 5."""

    def __init__(self, au_names: tuple[str, ...]):
        self.au_names = au_names
        self.counts = np.zeros((len(au_names), 1 + BINS), np.int64)

    def add(self, aus: np.ndarray) -> None:
        """Count intensities of shape `(rows, n)`."""
        steps = np.ceil(np.asarray(aus) * (BINS / 5)).astype(int).clip(0, BINS)
        for column, counts in enumerate(self.counts):
            counts += np.bincount(steps[:, column], minlength=1 + BINS)


def draw_histograms(before: Histogram, after: Histogram, title: str) -> Image.Image:
    """The AUs in a grid, intensity to the right, number of faces upwards on a logarithmic scale."""
    width, height, margin, columns = 260, 150, 28, 4
    rows = -(-len(before.au_names) // columns)
    sheet = Image.new("RGB", (columns * (width + margin) + margin, rows * (height + 2 * margin) + 3 * margin), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, margin / 2), title, INK, ImageFont.load_default(18))
    x = sheet.width - margin
    for label, color in (("after", AFTER_COLOR), ("before", BEFORE_COLOR)):
        draw.text((x, margin / 2), label, INK, ImageFont.load_default(14), anchor="ra")
        x -= draw.textlength(label, ImageFont.load_default(14)) + 18
        draw.rectangle((x, margin / 2 + 3, x + 11, margin / 2 + 14), color)
        x -= 16
    tallest = np.log1p(max(before.counts.max(), after.counts.max(), 1))
    for index, name in enumerate(before.au_names):
        left = margin + index % columns * (width + margin)
        bottom = 3 * margin + index // columns * (height + 2 * margin) + height
        draw.text((left, bottom - height - 4), name, INK, ImageFont.load_default(15), anchor="ls")
        step = width / (1 + BINS)
        for counts, color, (start, end) in (
            (before.counts[index], BEFORE_COLOR, (0.05, 0.95)),
            (after.counts[index], AFTER_COLOR, (0.3, 0.7)),
        ):
            for place, value in enumerate(np.log1p(counts) / tallest):
                if value > 0:
                    x = left + place * step
                    draw.rectangle((x + start * step, bottom - value * height, x + end * step, bottom), color)
        draw.line((left, bottom, left + width, bottom), GREY)
        for intensity in range(6):
            x = left + (0.5 if intensity == 0 else 1 + intensity * BINS / 5) * step
            draw.text((x, bottom + 4), str(intensity), GREY, ImageFont.load_default(12), anchor="ma")
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    with replacing(path) as unfinished:
        picture.save(unfinished, "PNG")
