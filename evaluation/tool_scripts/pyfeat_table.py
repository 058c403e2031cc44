# SPDX-License-Identifier: Apache-2.0
"""
AU probabilities by py-feat 2: `python pyfeat_table.py PICTURES.txt TABLE.csv`.

Runs in py-feat's environment, so it needs nothing of this repository. PICTURES.txt names a picture a line; the table
gets a row for each face, with all AUs that py-feat measures, and one with empty cells for a picture without.
"""

import csv
import math
import os
import re
import sys

from feat import Detectorv2


# Columns of a table without any face.
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
            # Of hundreds of columns, among them all points of the face.
            kept = {name: face[name] for name in face if re.fullmatch(r"AU\d\d", name) or name in [SURENESS] + BOX}
            rows.append({NAME: path} | kept)
        print(f"{number + 1} of {len(paths)}", file=sys.stderr)
    found = sorted({name for row in rows for name in row if name.startswith("AU")})
    header = [NAME, SURENESS] + (found or COLUMNS) + BOX
    for row in rows:
        row.update((name, "") for name in header[1:] if row.get(name) is None or math.isnan(row[name]))
    with open(table + ".part", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(table + ".part", table)


if __name__ == "__main__":
    main(*sys.argv[1:])
