# SPDX-License-Identifier: Apache-2.0
"""
Blendshapes by MediaPipe's FaceLandmarker: `python mediapipe_table.py PICTURES.txt TABLE.jsonl MODEL`.

Runs in MediaPipe's environment, so it needs nothing of this repository. MODEL is `face_landmarker.task`, a download of
its own. PICTURES.txt names a picture a line; each line of the table has the blendshapes of all faces of a picture, in
the form of MediaPipe's own results, and the box of a face that is alone. Pictures that EXIF turns are measured
upright; MediaPipe's own reader would leave them lying on their side.
"""

import json
import os
import sys

import mediapipe
import numpy
from PIL import Image, ImageOps


MAX_FACES = 5


def box_of(landmarks):
    """Left, top, right and bottom of a face as parts of the picture, where all of its landmarks are."""
    xs, ys = [min(max(p.x, 0.0), 1.0) for p in landmarks], [min(max(p.y, 0.0), 1.0) for p in landmarks]
    return {"face_x0": min(xs), "face_y0": min(ys), "face_x1": max(xs), "face_y1": max(ys)}


def open_upright(path):
    with Image.open(path) as file:
        pixels = numpy.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    return mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=pixels)


def main(listing, table, model):
    with open(listing, encoding="utf-8") as file:
        paths = file.read().splitlines()
    options = mediapipe.tasks.vision.FaceLandmarkerOptions(
        base_options=mediapipe.tasks.BaseOptions(model_asset_path=model),
        output_face_blendshapes=True,
        num_faces=MAX_FACES,
    )
    landmarker = mediapipe.tasks.vision.FaceLandmarker.create_from_options(options)
    with landmarker, open(table + ".part", "w", encoding="utf-8") as file:
        for number, path in enumerate(paths):
            result = landmarker.detect(open_upright(path))
            faces = [
                {"categories": [{"categoryName": shape.category_name, "score": shape.score} for shape in face]}
                for face in result.face_blendshapes
            ]
            row = {"file_name": path, "faceBlendshapes": faces}
            if len(faces) == 1:
                row.update(box_of(result.face_landmarks[0]))
            file.write(json.dumps(row) + "\n")
            print(f"{number + 1} of {len(paths)}", file=sys.stderr)
    os.replace(table + ".part", table)


if __name__ == "__main__":
    main(*sys.argv[1:])
