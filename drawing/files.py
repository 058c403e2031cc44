# SPDX-License-Identifier: Apache-2.0
"""Writes pictures as PNG files that record how they were made, and finds out which of them are finished."""

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
from program import TOY_MODEL, check_output, folder_digest, replacing


METADATA_KEY = "fineface"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
"""The last bytes of every whole PNG file."""
MAX_UNWRITTEN = 64


def write_picture(image: Image.Image, path: Path, metadata: Mapping) -> None:
    """Write a PNG that contains `metadata`. `path` appears when the file is complete."""
    chunks = PngInfo()
    chunks.add_text("Software", "FineFace")
    aus = f" [{metadata['aus']}]" if metadata.get("aus") else ""
    chunks.add_itxt("Description", metadata["prompt"] + aus)
    chunks.add_itxt(METADATA_KEY, json.dumps(metadata))
    write_png(image, path, pnginfo=chunks)


def write_png(image: Image.Image, path: Path, **options) -> None:
    """Write a PNG; `options` go to `Image.save`. `path` appears when the file is complete."""
    with replacing(path) as unfinished:
        # Level 3 takes half the time of Pillow's default, for a tenth more bytes. On a CPU, the model needs that time.
        image.save(unfinished, "PNG", **{"compress_level": 3, **options})


@contextmanager
def background_writer() -> Iterator[Callable[[Image.Image, Path, Mapping], None]]:
    """
    Yield a function that does `write_picture` in a thread, so that the model draws on meanwhile. When the block ends,
    with or without an error, all pictures are written. If writing fails, one of the next calls raises the error.
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
    Read how a picture of this program was made: the fields of its `Job` and of `Weights`, the `dtype`, and the
    `versions` of the libraries. A sheet has `rows`, the AUs of each of its pictures, instead of `aus`. A local model
    or adapter is recorded by the name of its folder and a digest of its files (`model_files`, `adapter_files`).

    Raises:
        ValueError: if the picture has no such metadata.
        OSError: if the file is no picture.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(METADATA_KEY)
        values = json.loads(text) if isinstance(text, str) else None
    except (Image.DecompressionBombError, RecursionError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{os.fspath(path)!r} carries no FineFace metadata: another program has written it.")
    return values


def describe(weights: Weights, dtype: str) -> dict:
    """The metadata that all pictures of a run share: `weights`, `dtype` and the versions of the libraries."""
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    return _names(weights) | {"dtype": dtype, "versions": versions}


def sheet_metadata(job: Job, rows: list[list[Job]]) -> dict:
    """The fields of `job`, but with the AUs of all pictures in `rows` instead of `aus`."""
    values = asdict(job) | {"rows": [[job.aus for job in row] for row in rows]}
    del values["aus"]
    return values


def _names(weights: Weights) -> dict[str, str | None]:
    """`weights` without paths of this disk, which are private and differ from clone to clone."""
    names = asdict(weights)
    for part in ("model", "adapter"):
        folder = Path(names[part] or "")
        if names[part] and folder.is_dir():
            is_toy_model = folder.resolve() == TOY_MODEL
            names[part] = "toy_faces/weights" if is_toy_model else folder.resolve().name
            names[f"{part}_files"] = folder_digest(folder.resolve())
    return names


def is_finished(path: Path, wanted: dict, overwrite: bool) -> bool:
    """
    Whether `path` is a complete picture whose metadata contain `wanted`. Versions, dtype and device may differ,
    because they change a picture only by rounding.

    Raises:
        ValueError: if `path` is another picture, unless `overwrite`.
    """
    if not path.exists():
        return False
    try:
        found = read_metadata(path)
        with path.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            # A picture that was cut off has its metadata nevertheless, at its beginning.
            if file.read() != PNG_END:
                return False
    except (OSError, ValueError):
        found = {}
    name = next((name for name, value in wanted.items() if found.get(name) != value), None)
    if name is not None and not overwrite:
        other = (
            f"with `{name}` = {found[name]!r} in place of {wanted[name]!r}" if name in found else "by another program"
        )
        raise ValueError(f"{str(path)!r} already exists, {other}. Use another `--output`, or `--overwrite` it.")
    return name is None


def find_unfinished(jobs: Mapping[str, Job], folder: Path, weights: Weights, overwrite: bool) -> dict[Job, list[Path]]:
    """Returns the paths of the pictures that are not finished, by their jobs."""
    paths_by_job, names = {}, _names(weights)
    for path, job in ((folder / name, job) for name, job in jobs.items()):
        check_output(path)
        if not is_finished(path, asdict(job) | names, overwrite):
            paths_by_job.setdefault(job, []).append(path)
    return paths_by_job
