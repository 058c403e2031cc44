# SPDX-License-Identifier: Apache-2.0
"""
One table of what OpenFace 2 has written for a folder: `python openface_table.py PICTURES.txt FOLDER TABLE.csv`.

`FaceLandmarkImg -fdir PICTURES -out_dir FOLDER -aus` writes a table for each picture, with a row for each face, and
none where it finds no face. PICTURES.txt names a picture a line; the table gets a row for each face, with the name of
its picture, and one with `success` 0 for a picture without.
"""

import csv
import os
import sys


def stem(path):
    """OpenFace cuts a name at its first dot."""
    return os.path.basename(path).split(".")[0]


def main(listing, folder, table):
    with open(listing, encoding="utf-8") as file:
        paths = file.read().splitlines()
    stems = set()
    for path in paths:
        if stem(path) in stems:
            sys.exit("OpenFace writes one table for all pictures called " + stem(path) + ". Give them other names.")
        stems.add(stem(path))
    header, rows = [], []
    for path in paths:
        written = os.path.join(folder, stem(path) + ".csv")
        faces = []
        if os.path.exists(written):
            with open(written, newline="", encoding="utf-8") as file:
                found, *faces = csv.reader(file, skipinitialspace=True)
            if header and found != header:
                sys.exit(written + " has other columns than the tables before it.")
            header = found
        rows += [[path, 1, *face] for face in faces] or [[path, 0]]
    if not header:
        sys.exit(folder + " has no table for any of the pictures.")
    with open(table + ".part", "w", newline="", encoding="utf-8") as file:
        width = 2 + len(header)
        writer = csv.writer(file)
        writer.writerow(["file_name", "success", *header])
        writer.writerows(row + [""] * (width - len(row)) for row in rows)
    os.replace(table + ".part", table)


if __name__ == "__main__":
    main(*sys.argv[1:])
