# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
AU intensities by LibreFace: `python libreface_table.py PICTURES.txt TABLE.csv`.

Runs in LibreFace's environment (Python 3.9), so it needs nothing of this repository. PICTURES.txt names a picture a
line; the table gets a row for each, with empty cells where LibreFace finds no face.
"""

import csv
import os
import sys
import tempfile

import libreface


COLUMNS = [f"au_{number}_intensity" for number in (1, 2, 4, 5, 6, 9, 12, 15, 17, 20, 25, 26)]


def main(listing, table):
    with open(listing, encoding="utf-8") as file:
        paths = file.read().splitlines()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, path in enumerate(paths):
            attributes = libreface.get_facial_attributes(path, temp_dir=temporary)
            intensities = (attributes or {}).get("au_intensities") or {}
            rows.append([path] + [intensities.get(column, "") for column in COLUMNS])
            print(f"{number + 1} of {len(paths)}", file=sys.stderr)
    with open(table + ".part", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path"] + COLUMNS] + rows)
    os.replace(table + ".part", table)


if __name__ == "__main__":
    main(*sys.argv[1:])
