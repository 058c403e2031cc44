# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
What `app.py` does when a button is pressed: pictures, sweeps and tables of faces from a model that stays loaded, and
the Python and the command line that make the same pictures again. Nothing in here knows of a browser.
"""

import csv
import io
import json
import re
import shlex
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from action_units import AU_NAMES, format_aus, parse_aus
from drawing.contact_sheet import Table, draw_sheet, write_animation
from drawing.files import describe, write_picture
from drawing.jobs import DEMO_PROMPT, JOB_FIELDS, Job, read_model_defaults, read_table_jobs, sweep_table
from drawing.model import Weights, fuse_lora, generate_batch, load_pipeline, quiet
from program import TOY_MODEL, replacing, spell_option


MAX_ROWS = 200
MAX_QUICK_WEIGHTS = 50_000_000
GIF_SIDE = 384
GIF_FPS = 7.0


@dataclass(frozen=True)
class Sweep:
    """One AU of `job` going from `first` to `last` in `count` pictures; the other AUs stay."""

    job: Job
    au: str
    first: float
    last: float
    count: int

    @property
    def base(self) -> Job:
        values = dict(zip(AU_NAMES, intensities(self.job), strict=True))
        return replace(self.job, aus=format_aus(values | {self.au: 0}))

    @property
    def option(self) -> str:
        return f"{self.au}={self.first:g}:{self.last:g}:{self.count}"

    def table(self) -> Table:
        """As `--sweep` of `generate.py` lays it out, with jobs in the place of pictures."""
        return sweep_table(self.base, self.option)


class Studio:
    """
    A loaded model that draws one job after another.

    Args:
        weights (`Weights`):
            Where the model comes from.
        device (`torch.device`), dtype (`str`):
            Where it runs, and in which precision.

    Raises:
        OSError: if the model or the adapter cannot be found.
        ValueError: if a file is broken, or there is no AU adapter.
    """

    def __init__(self, weights: Weights, device: torch.device, dtype: str):
        self.weights, self.device, self.dtype = weights, device, dtype
        self.is_embedded = Path(weights.model).resolve() == TOY_MODEL
        self.defaults = Job(prompt=DEMO_PROMPT, **read_model_defaults(weights.model))
        with quiet():
            self.pipeline = load_pipeline(weights, device, getattr(torch, dtype))
        self.pipeline.set_progress_bar_config(disable=True)
        if self.pipeline.au_adapter is None:
            raise ValueError(
                f"{weights.model!r} has no AU adapter, which the sliders need. Name one with `--adapter`."
            )
        fuse_lora(self.pipeline)

    @property
    def is_quick(self) -> bool:
        """Whether people will wait for a picture at every touch, as with any GPU, and a UNet like the embedded one."""
        num_weights = sum(weight.numel() for weight in self.pipeline.unet.parameters())
        return self.device.type != "cpu" or num_weights <= MAX_QUICK_WEIGHTS

    def draw(self, job: Job, on_step: Callable[[int], None] = lambda step: None) -> Image.Image:
        """The picture of `job`, alone in its batch; `on_step` hears how many denoising steps are done."""

        def callback(pipeline, i, t, callback_kwargs):
            on_step(i + 1)
            return callback_kwargs

        return generate_batch(partial(self.pipeline, callback_on_step_end=callback), [job])[0]

    def sweep(
        self, sweep: Sweep, on_picture: Callable[[int], None] = lambda count: None
    ) -> tuple[list[Image.Image], Image.Image, dict]:
        """The pictures, the labelled strip that `generate.py --sweep` makes of them, and what the strip shows."""
        table, base, pictures = sweep.table(), sweep.base, []
        for job in table.rows[0]:
            pictures.append(self.draw(job))
            on_picture(len(pictures))
        strip = draw_sheet([[replace(table, rows=[pictures])]], f"{base.prompt} · seed {base.seed}")
        values = asdict(base) | {"rows": [[job.aus for job in table.rows[0]]]}
        del values["aus"]
        return pictures, strip, values

    def metadata(self, values: dict) -> dict:
        """`values` with where they were drawn, as in the files of `generate.py`."""
        return values | describe(self.weights, self.dtype)

    def write(self, image: Image.Image, path: Path, values: dict) -> None:
        """Write a PNG that says how it was made."""
        write_picture(image, path, self.metadata(values))

    def python(self, job: Job) -> str:
        """A program that draws `job` again."""
        weights, model = self.weights, "toy_faces/weights" if self.is_embedded else self.weights.model
        own_adapter = [] if weights.adapter is None else ["au_adapter=None"]
        load = ", ".join([repr(model), f"dtype=torch.{self.dtype}", *own_adapter])
        lines = ["import torch", "from pipeline_fineface import FineFacePipeline", ""]
        lines.append(f"pipe = FineFacePipeline.from_pretrained({load})")
        if own_adapter:
            variant = "" if weights.adapter_variant is None else f", variant={weights.adapter_variant!r}"
            lines.append(f"pipe.load_au_adapter({weights.adapter!r}{variant})")
        values = {name: value for name, value in asdict(job).items() if name not in ("prompt", "seed")}
        lines += [f"pipe = pipe.to({str(self.device)!r})", "# The LoRA becomes part of the weights, which is faster."]
        lines += ['pipe.fuse_lora(components=["unet"])', "pipe.unload_lora_weights()"]
        lines += ["image = pipe(", f"    {job.prompt!r},"]
        lines += [f"    {name}={value!r}," for name, value in values.items() if value is not None]
        lines += [f"    generator=torch.Generator().manual_seed({job.seed}),", ").images[0]", 'image.save("face.png")']
        return "\n".join(lines) + "\n"

    def command(self, job: Job, output: str = "face.png", **options: str) -> str:
        """A `generate.py` command that draws `job` again, or with more `options` what they say."""
        given = {} if self.is_embedded else {"model": self.weights.model}
        given |= {"adapter": self.weights.adapter, "adapter_variant": self.weights.adapter_variant}
        given = {name: value for name, value in given.items() if value is not None}
        for name in JOB_FIELDS:
            value = getattr(job, name)
            if name == "prompt" or value != getattr(self.defaults, name):
                given[name] = "none" if value is None else str(value)
        given |= {"device": str(self.device), "dtype": self.dtype, **options, "output": output}
        # With "=", as a value may begin like an option.
        words = [f"{spell_option(name)}={shlex.quote(value)}" for name, value in given.items()]
        return " \\\n    ".join(["python generate.py", *words]) + "\n"

    def sweep_command(self, sweep: Sweep) -> str:
        """A `generate.py` command that draws the strip again, to the last bit: one by one, as here."""
        return self.command(sweep.base, "sweep.png", sweep=sweep.option, batch_size="1")

    def table_command(self, table_name: str, job: Job) -> str:
        """A `generate.py` command that draws the pictures of a table again, but for rounding."""
        return self.command(replace(job, aus=None), "faces", aus_from=table_name)


def intensities(job: Job) -> list[float]:
    """12 numbers for the sliders."""
    # As decimals: float32 turns 2.6 into 2.5999999.
    return [float(f"{value:.6g}") for value in parse_aus(job.aus or "")[0].tolist()]


def file_name(job: Job) -> str:
    """A name that says what is in the picture."""
    aus = re.sub("[^A-Za-z0-9.+-]+", "", (job.aus or "free").replace(" ", "+").replace("=", "-"))
    return f"face-{job.seed}-{aus[:80]}.png"


def read_expressions(path: Path, job: Job) -> tuple[dict[str, Job], int]:
    """
    `job` with the AUs of each row of a table, by the name of the picture it makes, and the number of rows without a
    face, which are left out; as `generate.py --aus-from` reads them.

    Raises:
        ValueError: for a table that cannot be read, is empty or has more than `MAX_ROWS` rows.
    """
    try:
        return read_table_jobs(path, job, max_rows=MAX_ROWS)
    except ValueError as error:
        # Where the server keeps uploads is nothing for the screen.
        raise ValueError(str(error).replace(str(path), path.name)) from error


def write_gif(pictures: list[Image.Image], path: Path, metadata: dict) -> None:
    """An endless animation there and back, in one palette for all frames so that nothing flickers."""
    scale = max(1, round(GIF_SIDE / pictures[0].width))
    size = (pictures[0].width * scale, pictures[0].height * scale)
    frames = [picture.resize(size, Image.Resampling.BICUBIC) for picture in pictures]
    montage = Image.new("RGB", (size[0] * len(frames), size[1]))
    for i, frame in enumerate(frames):
        montage.paste(frame, (i * size[0], 0))
    palette = montage.quantize(256)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    write_animation(frames + frames[-2:0:-1], path, GIF_FPS, json.dumps(metadata))


def write_zip(path: Path, folder: Path, jobs: dict[str, Job]) -> None:
    """The pictures of `folder`, with a `metadata.csv` of the form that `train_fineface.py` reads."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file_name", "text", "seed", *AU_NAMES])
    writer.writerows([name, job.prompt, job.seed, *intensities(job)] for name, job in jobs.items())
    # PNG files do not get any smaller.
    with replacing(path) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
        for name in jobs:
            archive.write(folder / name, name)
        archive.writestr("metadata.csv", table.getvalue())
