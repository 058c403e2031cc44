# SPDX-License-Identifier: Apache-2.0
"""
Meters read AU intensities from pictures. The toy world's meter runs here; LibreFace, py-feat 2 and OpenFace 2 run in
environments of their own and write tables.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from action_units import AU_NAMES, au_projection
from face_data.au_tables import AU_TABLE_TOOLS, read_au_table
from program import TOY_MODEL, file_digest, folder_digest


TOOL_SCRIPTS = Path(__file__).parent / "tool_scripts"
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
TOOLS = (*AU_TABLE_TOOLS, "table")
WAYS_TO_NAME_A_METER = (
    "Write toy, toy:FOLDER, libreface:PYTHON, pyfeat:PYTHON, openface:PROGRAM, or the table that a tool wrote:"
    " libreface:FILE, pyfeat:FILE, openface:FILE, mediapipe:FILE, …, or table:FILE, whose columns tell"
)


class ToolError(RuntimeError):
    """A program that was called to measure pictures has failed."""


@dataclass(frozen=True)
class Reading:
    """
    What a meter reads from a picture. `aus` are float32, one for each AU that was asked for; they are NaN if there is
    no face, and for AUs that the meter does not read. If there are several faces, the tool's surest one counts.
    """

    aus: np.ndarray
    num_faces: int


def make_meter(spec: str, device: torch.device, au_names: Sequence[str] = AU_NAMES) -> "Meter":
    """
    The meter that reads `au_names`. `spec` is `"toy"`, or a tool and where it is: see `WAYS_TO_NAME_A_METER`.

    Raises:
        FileNotFoundError: if there is no such table, folder or program.
        ValueError: if `spec` names no meter.
    """
    tool, _, where = spec.partition(":")
    if tool == "toy":
        return ToyMeter(Path(where) if where else TOY_MODEL / "second_meter", device, au_names)
    if tool not in TOOLS or not where:
        raise ValueError(f"`--meter` is {spec!r}. {WAYS_TO_NAME_A_METER}.")
    if tool == "table" or Path(where).suffix.lower() in TABLE_SUFFIXES:
        return TableMeter(tool, Path(where), au_names)
    if tool not in ("libreface", "pyfeat", "openface"):
        raise FileNotFoundError(f"`--meter` is {spec!r}, but {where!r} is no table ({', '.join(TABLE_SUFFIXES)}).")
    command = shlex.split(where)
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"`--meter` is {spec!r}, but there is no program {command[0]!r}.")
    return ToolMeter(tool, command, au_names)


class ToyMeter:
    """A network that reads the AUs of the toy world's portraits. It assumes that every picture shows a face."""

    name = "toy"

    def __init__(self, folder: Path, device: torch.device, au_names: Sequence[str]):
        from training.feedback import load_meter

        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"`--meter`: {str(folder)!r} holds no meter of the toy world.")
        self.network, self.device, self.au_names = load_meter(str(folder), device), device, au_names
        self.settings = {"folder": folder_digest(folder)}

    @torch.no_grad()
    def measure(self, paths: list[Path]) -> list[Reading]:
        pixel_values = torch.cat([toy_pixel_values(read_picture(path)) for path in paths])
        measured = torch.cat([self.network(part.to(self.device)).cpu() for part in pixel_values.split(64)])
        projection = au_projection(self.network.au_names, self.au_names)
        aus = torch.where(projection.any(dim=0), measured @ projection, torch.nan)
        return [Reading(row, 1) for row in aus.numpy()]


def read_picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def toy_pixel_values(image: Image.Image) -> torch.Tensor:
    """`(1, 3, 128, 128)` in [-1, 1], as the networks of the toy world take pictures."""
    from toy_faces.pictures import to_pixel_values
    from toy_faces.renderer import SIZE

    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return to_pixel_values(np.asarray(image)[None])


class TableMeter:
    """A table that a tool has written in its own environment, one row for each face."""

    def __init__(self, tool: str, path: Path, au_names: Sequence[str]):
        self.name, self.path = tool, path
        self.no_aus, self.rows = np.full(len(au_names), np.nan, np.float32), {}
        tool = None if tool == "table" else tool
        for row in read_au_table(path, tool, au_names=au_names, unmeasured=float("nan")):
            name = row.name.replace("\\", "/").rsplit("/", 1)[-1]
            # Some tools leave out the ending of a file name.
            self.rows.setdefault(name if name.lower().endswith(".png") else f"{name}.png", []).append(row)
        if not self.rows:
            raise ValueError(f"`--meter`: the table {str(path)!r} has no row.")
        self.settings = {"table": file_digest(path)}

    def measure(self, paths: list[Path]) -> list[Reading]:
        missing = [path.name for path in paths if path.name not in self.rows]
        if missing:
            raise ValueError(
                f"{self.path} has no row for {len(missing)} of {len(paths)} pictures, the first of them"
                f" {missing[0]!r}. Measure them too: a picture without a face needs a row that says so."
            )
        readings = []
        for path in paths:
            faces = [row for row in self.rows[path.name] if row.face_found]
            surest = max(faces, key=lambda row: row.confidence, default=None)
            readings.append(Reading(self.no_aus if surest is None else surest.aus, len(faces)))
        return readings


class ToolMeter:
    """
    LibreFace or py-feat, whose environment's Python runs our script that writes a table; or OpenFace 2's
    `FaceLandmarkImg`, which measures a folder of pictures, is not calibrated on a person, and writes many tables.
    """

    def __init__(self, tool: str, command: list[str], au_names: Sequence[str]):
        self.name, self.command, self.au_names = tool, command, au_names
        self.settings = {"command": shlex.join(command)}

    def measure(self, paths: list[Path]) -> list[Reading]:
        with tempfile.TemporaryDirectory() as folder:
            listing, table, written = (Path(folder) / name for name in ("pictures.txt", "table.csv", "tables"))
            script = TOOL_SCRIPTS / f"{self.name}_table.py"
            words = [*self.command, script, listing, table]
            if self.name == "openface":
                # OpenFace cuts a file name at its first dot.
                copies = Path(folder) / "pictures"
                copies.mkdir()
                paths = [Path(shutil.copy(path, copies / f"{n:05d}.png")) for n, path in enumerate(paths)]
                run_tool([*self.command, "-fdir", copies, "-out_dir", written, "-aus"])
                words = [sys.executable, script, listing, written, table]
            listing.write_text("".join(f"{path.resolve()}\n" for path in paths), encoding="utf-8")
            run_tool(words)
            if not table.is_file():
                raise ToolError(f"{self.settings['command']} has written no table.")
            return TableMeter(self.name, table, self.au_names).measure(paths)


Meter = ToyMeter | TableMeter | ToolMeter
"""Its `settings` are everything that its readings depend on. Readings made with other settings are not used again."""


def run_tool(command: list[str | Path]) -> None:
    # The tool's environment has other versions of our packages, so it must not get our module path.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    if finished.returncode:
        said = (finished.stderr.strip() or finished.stdout.strip() or "nothing").splitlines()[-1]
        words = shlex.join(map(str, command))
        raise ToolError(f"{words} ended with exit status {finished.returncode}, saying: {said}")
