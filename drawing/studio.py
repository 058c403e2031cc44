# SPDX-License-Identifier: Apache-2.0
"""
Draws for `app.py`: pictures, sweeps and tables of faces from a model that stays loaded, and the Python and the command
line that make the same pictures again. Nothing in here knows of a browser.
"""

import copy
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

from action_units import AU_NAMES, available_presets, format_aus
from drawing.contact_sheet import Table, draw_sheet, write_animation
from drawing.files import describe, sheet_metadata, write_picture
from drawing.jobs import (
    DEMO_PROMPT,
    JOB_FIELDS,
    Job,
    intensities_of,
    interpolate_jobs,
    read_model_defaults,
    read_table_jobs,
    sweep_table,
    with_au,
)
from drawing.model import SAMPLING, Weights, fuse_lora, generate_batch, load_pipeline, quiet
from drawing.photo import edit_photo
from program import TOY_MODEL, replacing, spell_option


MAX_ROWS = 200
MAX_COLUMNS = 2_000
MAX_TABLE_BYTES = 5_000_000
MAX_QUICK_WEIGHTS = 50_000_000
GIF_SIDE = 384
GIF_FPS = 7.0


@dataclass(frozen=True)
class Sweep:
    """Pictures of one person that lead from face to face: a row of jobs, and the command that draws them again."""

    job: Job
    title: str
    table: Table[Job]
    command: str


class Stopped(Exception):
    """The picture is no longer wanted."""


class Studio:
    """
    A model, loaded onto `device` in the precision `dtype`, that draws one job after another. Its methods may be called
    from several threads: they take turns.

    Raises:
        OSError: if the model or the adapter cannot be found.
        ValueError: if a file is broken, or there is no AU adapter.
    """

    def __init__(self, weights: Weights, device: torch.device, dtype: str):
        self.weights, self.device, self.dtype, self.about = weights, device, dtype, describe(weights, dtype)
        self.is_toy = Path(weights.model).resolve() == TOY_MODEL
        self.defaults = Job(prompt=DEMO_PROMPT, **read_model_defaults(weights.model))
        with quiet():
            self.pipeline = load_pipeline(weights, device, getattr(torch, dtype), needs_adapter=True)
        self.pipeline.set_progress_bar_config(disable=True)
        fuse_lora(self.pipeline)
        self.au_names = self.pipeline.au_names
        presets = available_presets(self.au_names)
        self.presets = {name: format_aus(preset, self.au_names) for name, preset in presets.items()}
        # A scheduler counts its steps, so two drawings at a time would spoil each other.
        self._turns = threading.Lock()
        # Remarks do not wait for pictures. A tokenizer pads as its last caller wanted, so one that a drawing shared
        # with another thread would spoil the drawing.
        self._tokenizer, self._tokenizer_turns = copy.deepcopy(self.pipeline.tokenizer), threading.Lock()

    @property
    def is_quick(self) -> bool:
        """Whether a picture at every touch is soon there, as on any GPU, or with a UNet like that of the toy model."""
        num_weights = sum(weight.numel() for weight in self.pipeline.unet.parameters())
        return self.device.type != "cpu" or num_weights <= MAX_QUICK_WEIGHTS

    def draw(self, job: Job, on_step: Callable[[int], None] = lambda step: None) -> Image.Image:
        """
        The picture of `job`, alone in its batch. `on_step` gets the number of finished denoising steps, beginning with
        0 when its turn comes. If it raises an error, such as `Stopped`, the drawing ends there.
        """

        def callback(pipeline, i, t, callback_kwargs):
            on_step(i + 1)
            return callback_kwargs

        with self._turns:
            on_step(0)
            return generate_batch(partial(self.pipeline, callback_on_step_end=callback), [job])[0]

    def draw_into(self, path: Path, job: Job, on_step: Callable[[int], None] = lambda step: None) -> str:
        """Draw `job` into a file, and return its path."""
        self.write(self.draw(job, on_step), path, asdict(job))
        return str(path)

    def edit(self, picture: Image.Image, mask: Image.Image, job: Job, strength: float, on_step=lambda step: None):
        """`picture` with the expression of `job` where `mask` is white; `on_step` as in `draw`."""
        options = {name: getattr(job, name) for name in (*SAMPLING, "negative_prompt", "seed")}
        options |= {"side": job.height, "strength": strength, "on_step": on_step}
        with self._turns:
            on_step(0)
            return edit_photo(self.pipeline, picture, mask, job.prompt, job.aus, **options)

    def remarks(self, job: Job) -> list[str]:
        """Remarks on words of `job` that the model does not know, or that are beyond its limit."""
        tokenizer, remarks = self._tokenizer, []
        with self._tokenizer_turns:
            if self.is_toy:
                # Its tokenizer was made from the captions of its pictures: each of their words is one token.
                words = dict.fromkeys(re.findall("[^\\W_]+", job.prompt.lower()))
                unknown = [word for word in words if len(tokenizer.tokenize(word)) > 1]
                if unknown:
                    remarks.append(f"This small model does not know: {', '.join(unknown)}.")
            texts = {"prompt": job.prompt, "text of what is not in the picture": job.negative_prompt or ""}
            for name, text in texts.items():
                tokens = tokenizer(text, add_special_tokens=False).input_ids
                # Two are the marks of beginning and end.
                limit = tokenizer.model_max_length - 2
                if len(tokens) > limit:
                    rest = tokenizer.decode(tokens[limit:]).strip()
                    remarks.append(f"The {name} is too long for the model, which does not see: {rest[:200]}")
        return remarks

    def sweep_au(self, job: Job, au: str, first: float, last: float, count: int) -> Sweep:
        """
        One AU of `job` going from `first` to `last` in `count` pictures; the other AUs stay. The command draws the
        strip again, to the last bit.
        """
        job, option = with_au(job, au, 0.0, self.au_names), f"{au}={first:g}:{last:g}:{count}"
        # One by one, as here, so that the pictures are the same to the last bit.
        command = self.command(job, "sweep.png", sweep=option, batch_size="1")
        return Sweep(job, f"{au} from {first:g} to {last:g}", sweep_table(job, option, self.au_names), command)

    def change(self, job: Job, last: str, count: int) -> Sweep:
        """
        The expression of `job` changing evenly into the expression `last`, in `count` pictures. The command makes the
        animation from a table that its first line writes.
        """
        jobs = list(interpolate_jobs([job, replace(job, aus=last)], count - 2, self.au_names).values())
        table = Table([jobs], [], [f"{100 * i / (count - 1):.0f} %" for i in range(count)])
        options = {"aus_from": "change.csv", "frames_between": str(count - 2), "fps": f"{GIF_FPS:g}"}
        command = self.command(replace(job, aus=None), "change.gif", **options)
        rows = shlex.quote(f"aus\n{job.aus}\n{jobs[-1].aus}\n")
        return Sweep(job, f"from {job.aus} to {last}", table, f"printf {rows} > change.csv\n{command}")

    def sweep(
        self, sweep: Sweep, on_picture: Callable[[int], None] = lambda count: None
    ) -> tuple[list[Image.Image], Image.Image, dict]:
        """
        The pictures, the labelled strip that `generate.py --sweep` makes of them, and the metadata of the strip.
        `on_picture` gets the number of finished pictures at every step. If it raises an error, the drawing ends there.
        """
        job, row, pictures = sweep.job, sweep.table.rows[0], []
        for one in row:
            pictures.append(self.draw(one, lambda step: on_picture(len(pictures))))
        on_picture(len(pictures))
        strip = draw_sheet([[replace(sweep.table, rows=[pictures])]], f"{job.prompt} · seed {job.seed}")
        return pictures, strip, sheet_metadata(job, [row])

    def write(self, image: Image.Image, path: Path, values: dict) -> None:
        """Write a PNG with `values`, and with the model and the libraries, as in the files of `generate.py`."""
        write_picture(image, path, values | self.about)

    def python(self, job: Job) -> str:
        """A program that draws `job` again."""
        weights, model = self.weights, "toy_faces/weights" if self.is_toy else self.weights.model
        module, name = type(self.pipeline).__module__, type(self.pipeline).__name__
        without, load_adapter = "", ""
        if weights.adapter is not None:
            variant = "" if weights.adapter_variant is None else f", variant={weights.adapter_variant!r}"
            without, load_adapter = ", au_adapter=None", f"pipe.load_au_adapter({weights.adapter!r}{variant})\n"
        values = {name: value for name, value in asdict(job).items() if name not in ("prompt", "seed")}
        arguments = "".join(f"    {name}={value!r},\n" for name, value in values.items() if value is not None)
        return f"""\
# Run this in the folder of the FineFace repository, where {module}.py is.
import torch
from {module} import {name}

pipe = {name}.from_pretrained({model!r}, dtype=torch.{self.dtype}{without})
{load_adapter}pipe = pipe.to({str(self.device)!r})
# The LoRA becomes part of the weights, which is faster.
pipe.fuse_lora(components=["unet"])
pipe.unload_lora_weights()
image = pipe(
    {job.prompt!r},
{arguments}    generator=torch.Generator().manual_seed({job.seed}),
).images[0]
image.save("face.png")
"""

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
    them; and remarks on the table.

    Raises:
        ValueError: for a table that cannot be read, or is larger than `MAX_TABLE_BYTES`, `MAX_COLUMNS` or
            `MAX_ROWS`; the message has the name of the file without its folder.
    """
    num_bytes, header = path.stat().st_size, b""
    if num_bytes <= MAX_TABLE_BYTES and path.suffix.lower() in (".csv", ".tsv"):
        header = path.read_bytes().partition(b"\n")[0]
    num_columns = max(header.count(mark) for mark in (b",", b"\t", b";")) + 1
    # Before it is read, as large tables would keep others waiting.
    for what, number, most in (("bytes", num_bytes, MAX_TABLE_BYTES), ("columns", num_columns, MAX_COLUMNS)):
        if number > most:
            way_out = f"{most:,} are allowed here. Use `generate.py --aus-from`."
            raise ValueError(f"{path.name} has {number:,} {what}, and {way_out}")
    remarks = []
    try:
        jobs, num_skipped = read_table_jobs(path, job, max_rows=MAX_ROWS, say=remarks.append, au_names=au_names)
    except ValueError as error:
        # The screen does not show where the server keeps uploads.
        raise ValueError(str(error).replace(str(path), path.name)) from error
    if num_skipped:
        remarks.append(f"Rows without a face, which are left out: {num_skipped}.")
    return jobs, [remark.replace(str(path), path.name) for remark in remarks]


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
