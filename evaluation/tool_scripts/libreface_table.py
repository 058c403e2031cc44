# SPDX-License-Identifier: Apache-2.0
"""
AU intensities by LibreFace: `python libreface_table.py PICTURES.txt TABLE.csv`.

Runs in LibreFace's environment (Python 3.9), so it needs nothing of this repository. Each line of PICTURES.txt names a
picture, and each picture gets a row of the table with all AUs that LibreFace measures: intensities (`au_12_intensity`)
and presences (`au_7`). If LibreFace finds no face, the cells are empty.
"""

import csv
import os
import sys
import tempfile

import libreface


# Columns of a table without any face.
COLUMNS = [f"au_{number}_intensity" for number in (1, 2, 4, 5, 6, 9, 12, 15, 17, 20, 25, 26)]


def main(listing, table):
    with open(listing, encoding="utf-8") as file:
        paths = file.read().splitlines()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, path in enumerate(paths):
            attributes = libreface.get_facial_attributes(path, temp_dir=temporary) or {}
            measured = {"path": path}
            for kind in ("au_intensities", "detected_aus"):
                measured.update(attributes.get(kind) or {})
            rows.append(measured)
            print(f"{number + 1} of {len(paths)}", file=sys.stderr)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(table + ".part", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns if len(columns) > 1 else ["path"] + COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(table + ".part", table)


if __name__ == "__main__":
    main(*sys.argv[1:])
