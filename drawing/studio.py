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
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from action_units import AU_NAMES, au_columns, format_aus
from drawing.contact_sheet import Table, draw_sheet, write_animation
from drawing.files import describe, write_picture
from drawing.jobs import (
    DEMO_PROMPT,
    JOB_FIELDS,
    Job,
    intensities_of,
    interpolate_jobs,
    read_model_defaults,
    read_table_jobs,
    sweep_table,
)
from drawing.model import Weights, fuse_lora, generate_batch, load_pipeline, pipeline_class_of, quiet
from drawing.photo import SAMPLING, Box, edit_photo, face_mask
from program import TOY_MODEL, replacing, spell_option


MAX_ROWS = 200
MAX_COLUMNS = 2_000
MAX_TABLE_BYTES = 5_000_000
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
    au_names: tuple[str, ...] = AU_NAMES

    @property
    def base(self) -> Job:
        given = intensities_of(self.job, self.au_names)
        moved = {self.au_names[column]: 0.0 for column in au_columns(self.au_names)[self.au]}
        return replace(self.job, aus=format_aus(given | moved, self.au_names))

    @property
    def option(self) -> str:
        return f"{self.au}={self.first:g}:{self.last:g}:{self.count}"

    @property
    def title(self) -> str:
        return f"{self.au} from {self.first:g} to {self.last:g}"

    def table(self) -> Table:
        """As `--sweep` of `generate.py` lays it out, with jobs in the place of pictures."""
        return sweep_table(self.base, self.option, self.au_names)


@dataclass(frozen=True)
class Change:
    """The expression of `job` going over evenly into the expression `last`, in `count` pictures."""

    job: Job
    last: str
    count: int
    au_names: tuple[str, ...] = AU_NAMES

    @property
    def base(self) -> Job:
        return self.job

    @property
    def title(self) -> str:
        return f"from {self.job.aus} to {self.last}"

    def table(self) -> Table:
        ends = [self.job, replace(self.job, aus=self.last)]
        jobs = list(interpolate_jobs(ends, self.count - 2, self.au_names).values())
        return Table([jobs], [], [f"{100 * i / (self.count - 1):.0f} %" for i in range(self.count)])


class Stopped(Exception):
    """Whoever asked for a picture no longer wants it."""


class Studio:
    """
    A loaded model that draws one job after another. Its methods may be called from several threads: they take turns.

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
        self.is_toy = Path(weights.model).resolve() == TOY_MODEL
        self.defaults = Job(prompt=DEMO_PROMPT, **read_model_defaults(weights.model))
        with quiet():
            self.pipeline = load_pipeline(weights, device, getattr(torch, dtype))
        self.pipeline.set_progress_bar_config(disable=True)
        if self.pipeline.au_adapter is None:
            raise ValueError(
                f"{weights.model!r} has no AU adapter, which the sliders need. Name one with `--adapter`."
            )
        fuse_lora(self.pipeline)
        # A scheduler counts its steps, so two drawings at a time would spoil each other.
        self._turns = threading.Lock()

    @property
    def au_names(self) -> tuple[str, ...]:
        """The AUs that the adapter knows."""
        return tuple(getattr(self.pipeline, "au_names", AU_NAMES))

    @property
    def is_quick(self) -> bool:
        """Whether people will wait for a picture at every touch, as with any GPU, and a UNet like the toy one."""
        num_weights = sum(weight.numel() for weight in self.pipeline.unet.parameters())
        return self.device.type != "cpu" or num_weights <= MAX_QUICK_WEIGHTS

    def draw(self, job: Job, on_step: Callable[[int], None] = lambda step: None) -> Image.Image:
        """
        The picture of `job`, alone in its batch. `on_step` hears how many denoising steps are done, 0 when its turn
        comes. If it raises an error, such as `Stopped`, the drawing ends there.
        """

        def callback(pipeline, i, t, callback_kwargs):
            on_step(i + 1)
            return callback_kwargs

        with self._turns:
            on_step(0)
            return generate_batch(partial(self.pipeline, callback_on_step_end=callback), [job])[0]

    def edit(
        self,
        picture: Image.Image,
        box: Box,
        job: Job,
        strength: float,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Image.Image:
        """`picture` with the expression of `job` on the face in `box`."""
        kwargs = {name: getattr(job, name) for name in SAMPLING}
        kwargs |= {"negative_prompt": job.negative_prompt, "strength": strength, "seed": job.seed, "on_step": on_step}
        with self._turns:
            on_step(0)
            return edit_photo(
                self.pipeline, picture, face_mask(picture.size, box), job.prompt, job.aus, job.height, **kwargs
            )

    def remarks(self, job: Job) -> list[str]:
        """What of the prompt of `job` the model does not see."""
        tokenizer, remarks = self.pipeline.tokenizer, []
        if self.is_toy:
            # It learned its letters from the captions of its pictures: a word of theirs is one token.
            words = dict.fromkeys(re.findall("[^\\W_]+", job.prompt.lower()))
            unknown = [word for word in words if len(tokenizer.tokenize(word)) > 1]
            if unknown:
                remarks.append(f"This small model does not know: {', '.join(unknown)}.")
        for name, text in (("prompt", job.prompt), ("text of what is not in the picture", job.negative_prompt or "")):
            tokens = tokenizer(text, add_special_tokens=False).input_ids
            # Two are the marks of beginning and end.
            limit = tokenizer.model_max_length - 2
            if len(tokens) > limit:
                rest = tokenizer.decode(tokens[limit:]).strip()
                remarks.append(f"The {name} is too long for the model, which does not see: {rest[:200]}")
        return remarks

    def sweep(
        self, sweep: Sweep | Change, on_picture: Callable[[int], None] = lambda count: None
    ) -> tuple[list[Image.Image], Image.Image, dict]:
        """
        The pictures, the labelled strip that `generate.py --sweep` makes of them, and what the strip shows.
        `on_picture` hears how many pictures are done, at every step. If it raises an error, the drawing ends there.
        """
        table, base, pictures = sweep.table(), sweep.base, []
        for job in table.rows[0]:
            pictures.append(self.draw(job, lambda step: on_picture(len(pictures))))
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
        weights, model = self.weights, "toy_faces/weights" if self.is_toy else self.weights.model
        own_adapter = [] if weights.adapter is None else ["au_adapter=None"]
        load = ", ".join([repr(model), f"dtype=torch.{self.dtype}", *own_adapter])
        pipeline_class = pipeline_class_of(self.weights.model)
        module, name = pipeline_class.__module__, pipeline_class.__name__
        lines = [f"# Run this in the folder of the FineFace repository, where {module}.py is."]
        lines += ["import torch", f"from {module} import {name}", ""]
        lines.append(f"pipe = {name}.from_pretrained({load})")
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
        given = {} if self.is_toy else {"model": self.weights.model}
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

    def sweep_command(self, sweep: Sweep | Change) -> str:
        """
        A `generate.py` command that draws the strip again, to the last bit: one by one, as here; or the animation of a
        `Change`, from a table that the first line writes.
        """
        if isinstance(sweep, Change):
            options = {"aus_from": "change.csv", "frames_between": str(sweep.count - 2), "fps": f"{GIF_FPS:g}"}
            rows = shlex.quote(f"aus\n{sweep.job.aus}\n{sweep.last}\n")
            return f"printf {rows} > change.csv\n" + self.command(
                replace(sweep.job, aus=None), "change.gif", **options
            )
        return self.command(sweep.base, "sweep.png", sweep=sweep.option, batch_size="1")

    def table_command(self, table_name: str, job: Job) -> str:
        """A `generate.py` command that draws the pictures of a table again, but for rounding."""
        return self.command(replace(job, aus=None), "faces", aus_from=table_name)


def file_name(job: Job) -> str:
    """A name that says what is in the picture."""
    aus = re.sub("[^A-Za-z0-9.+-]+", "", (job.aus or "free").replace(" ", "+").replace("=", "-"))
    return f"face-{job.seed}-{aus[:80]}.png"


def read_expressions(path: Path, job: Job, au_names: Sequence[str] = AU_NAMES) -> tuple[dict[str, Job], list[str]]:
    """
    `job` with the AUs of each row of a table, by the name of the picture it makes, as `generate.py --aus-from` reads
    them; and what is to be said of the table.

    Raises:
        ValueError: for a table that cannot be read, or is larger than `MAX_TABLE_BYTES`, `MAX_COLUMNS` or
            `MAX_ROWS`; the message has the name of the file without its folder.
    """
    remarks = []
    try:
        check_table_size(path)
        jobs, num_skipped = read_table_jobs(path, job, max_rows=MAX_ROWS, say=remarks.append, au_names=au_names)
    except ValueError as error:
        # Where the server keeps uploads is nothing for the screen.
        raise ValueError(str(error).replace(str(path), path.name)) from error
    if num_skipped:
        remarks.append(f"Rows without a face, which are left out: {num_skipped}.")
    return jobs, [remark.replace(str(path), path.name) for remark in remarks]


def check_table_size(path: Path) -> None:
    """Raise a ValueError for a table so large that reading it would keep others waiting."""
    way_out = "are allowed here. Use `generate.py --aus-from`."
    num_bytes = path.stat().st_size
    if num_bytes > MAX_TABLE_BYTES:
        raise ValueError(f"{path} has {num_bytes:,} bytes, and {MAX_TABLE_BYTES:,} {way_out}")
    header = path.read_bytes().partition(b"\n")[0]
    num_columns = max(header.count(mark) for mark in (b",", b"\t", b";")) + 1
    if num_columns > MAX_COLUMNS and path.suffix.lower() in (".csv", ".tsv"):
        raise ValueError(f"{path} has {num_columns:,} columns, and {MAX_COLUMNS:,} {way_out}")


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


def write_zip(path: Path, folder: Path, jobs: dict[str, Job], au_names: Sequence[str] = AU_NAMES) -> None:
    """The pictures of `folder`, with a `metadata.csv` of the form that `train_fineface.py` reads."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file_name", "text", "seed", *au_names])
    for name, job in jobs.items():
        writer.writerow([name, job.prompt, job.seed, *intensities_of(job, au_names).values()])
    # PNG files do not get any smaller.
    with replacing(path) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
        for name in jobs:
            archive.write(folder / name, name)
        archive.writestr("metadata.csv", table.getvalue())
