# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures on the disk: PNG files that say how they were made, written beside the drawing."""

import functools
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from drawing.jobs import Job
from drawing.model import Weights
from program import EMBEDDED_MODEL, check_output


METADATA_KEY = "fineface"


MAX_UNWRITTEN = 64


def write_picture(image: Image.Image, path: Path, metadata: Mapping) -> None:
    """Write a PNG with `metadata` in it. At `path` there is never less than a whole file."""
    chunks = PngInfo()
    chunks.add_text("Software", "FineFace")
    aus = f" [{metadata['aus']}]" if metadata.get("aus") else ""
    chunks.add_itxt("Description", metadata["prompt"] + aus)
    chunks.add_itxt(METADATA_KEY, json.dumps(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    with open(unfinished, "wb") as file:
        # Half the time of Pillow's own level, for a tenth more bytes: the model draws on a CPU meanwhile.
        image.save(file, "PNG", pnginfo=chunks, compress_level=3)
    os.replace(unfinished, path)


@contextmanager
def background_writer() -> Iterator[Callable[[Image.Image, Path, Mapping], None]]:
    """
    `write_picture` in a thread, so that the model draws on meanwhile. When the block is left, also by an error, all is
    written. An error in writing comes up at one of the next pictures.
    """
    unwritten = deque()
    with ThreadPoolExecutor(1) as pool:

        def write(*args) -> None:
            unwritten.append(pool.submit(write_picture, *args))
            while unwritten and (unwritten[0].done() or len(unwritten) > MAX_UNWRITTEN):
                unwritten.popleft().result()

        yield write
    for future in unwritten:
        future.result()


def read_metadata(path: str | os.PathLike) -> dict:
    """
    What a picture of this program says about itself: the fields of its `Job` and of `Weights`, the `dtype`, and the
    `versions` of the libraries. A sheet has `rows`, the AUs of each of its pictures, in place of `aus`.

    Raises:
        ValueError: if the file carries nothing of the kind.
        OSError: if it is no picture.
    """
    with Image.open(path) as image:
        text = image.info.get(METADATA_KEY)
    if not isinstance(text, str):
        raise ValueError(f"{os.fspath(path)!r} carries no FineFace metadata: another program has written it.")
    return json.loads(text)


def describe(weights: Weights, dtype: str) -> dict:
    """What pictures say about how they were made."""
    return _names(weights) | {"dtype": dtype, "versions": _library_versions()}


@functools.cache
def _library_versions() -> dict[str, str]:
    # Looked up anew for every picture, they would cost a twentieth of drawing one with the embedded model.
    return {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}


def _names(weights: Weights) -> dict:
    # The same in every clone.
    is_embedded = Path(weights.model).resolve() == EMBEDDED_MODEL
    return asdict(weights) | ({"model": "toy_faces/weights"} if is_embedded else {})


def is_finished(path: Path, job: Job, weights: Weights, overwrite: bool = False) -> bool:
    """
    Whether `path` already shows `job`. Versions, dtype and device, which change a picture by rounding, may differ.

    Raises:
        ValueError: if it shows something else, unless `overwrite`.
    """
    if not path.exists():
        return False
    try:
        found = read_metadata(path)
    except (OSError, ValueError):
        found = {}
    wanted = asdict(job) | _names(weights)
    differences = [name for name, value in wanted.items() if found.get(name) != value]
    if differences and not overwrite:
        name = differences[0]
        what = (
            f"with `{name}` = {found[name]!r} in place of {wanted[name]!r}" if name in found else "by another program"
        )
        raise ValueError(f"{str(path)!r} is there already, {what}. Use another `--output`, or `--overwrite` it.")
    return not differences


def find_unfinished(
    jobs: Mapping[str, Job], folder: Path, weights: Weights, overwrite: bool
) -> tuple[dict[Job, list[Path]], int]:
    """Where the pictures go that are not there yet, by their jobs, and the number of those that are."""
    paths_by_job, num_finished = {}, 0
    for name, job in jobs.items():
        path = folder / name
        check_output(path)
        if is_finished(path, job, weights, overwrite):
            num_finished += 1
        else:
            paths_by_job.setdefault(job, []).append(path)
    return paths_by_job, num_finished
