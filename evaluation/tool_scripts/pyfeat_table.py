# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
AU probabilities by py-feat 2: `python pyfeat_table.py PICTURES.txt TABLE.csv`.

Runs in py-feat's environment, so it needs nothing of this repository. PICTURES.txt names a picture a line; the table
gets a row for each face, and one with empty cells for a picture without.
"""

import csv
import math
import os
import sys

from feat import Detectorv2


COLUMNS = [f"AU{number:02d}" for number in (1, 2, 4, 5, 6, 9, 12, 15, 17, 20, 25, 26)]
NAME, SURENESS = "input", "FaceScore"
BOX = ["FaceRectX", "FaceRectY", "FaceRectWidth", "FaceRectHeight"]


def main(listing, table):
    with open(listing, encoding="utf-8") as file:
        paths = file.read().splitlines()
    detector = Detectorv2()
    rows = []
    for number, path in enumerate(paths):
        # One at a time: a batch has to be of one size, and the tool resizes it as one.
        faces = detector.detect([path], batch_size=1).to_dict("records")
        for face in faces or [{}]:
            values = [face.get(column, math.nan) for column in [SURENESS] + COLUMNS + BOX]
            rows.append([path] + ["" if value is None or math.isnan(value) else value for value in values])
        print(f"{number + 1} of {len(paths)}", file=sys.stderr)
    with open(table + ".part", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[NAME, SURENESS] + COLUMNS + BOX] + rows)
    os.replace(table + ".part", table)


if __name__ == "__main__":
    main(*sys.argv[1:])
