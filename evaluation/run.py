# SPDX-License-Identifier: Apache-2.0
"""
Draws the paper's test set (§5) with a model, and measures whether the faces show the AUs that were commanded:

  python -m evaluation.run --output out                                   # the toy model, its own meter
  python -m evaluation.run --output out --model BASE --adapter ADAPTER --only generate
  python -m evaluation.run --output out --model BASE --adapter ADAPTER --only measure \\
      --meter libreface:libreface.csv --meter pyfeat:/envs/pyfeat/bin/python \\
      --image-encoder openai/clip-vit-large-patch14
  accelerate launch --num_processes 4 -m evaluation.run …                 # split over processes

A run that was stopped goes on when the same command runs again. docs/evaluation.md says what OUTPUT then holds.
"""

import functools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, astuple, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

import program
from action_units import AU_NAMES, read_aus
from drawing.files import read_metadata, write_picture, write_png
from drawing.jobs import Job, make_job, read_model_defaults
from drawing.model import SAMPLING, Weights, check_weights, quiet, read_au_names
from evaluation import figures, report, testset
from evaluation.image_encoders import make_image_encoder
from evaluation.meters import Meter, ToolError, make_meter, read_picture
from evaluation.metrics import clip_similarity, outside_change
from evaluation.systems import SYSTEMS, System, check_system, is_toy_model
from evaluation.testset import Item


TOY_FACE_BOX = (26 / 128, 26 / 128, 102 / 128, 122 / 128)
"""The face in the toy world's portraits: left, top, right and bottom, in parts of the picture."""
PAPER_PARTS = ("single", "combination")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
EMBEDDED_AT_ONCE = 32
SETTABLE = (*SAMPLING, "height", "width")
"""The fields of `Job` that are the same in all pictures and can be set."""


evaluated, tested, measured = (
    functools.partial(program.option, group=heading) for heading in ("what is evaluated", "the test set", "measuring")
)
BY_DEFAULT = "(default: toy, for a model of the toy world)"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """
    What is evaluated, and how. Creating one checks values and touches no disk. `sampling` has fields `SETTABLE` of
    `Job`, which replace those in the model's `fineface.json`. `meters` and `image_encoder` are as `make_meter` and
    `make_image_encoder` take them; models of the toy world default to its own.
    """

    output: Path = program.option(MISSING, "folder for all that is made")
    only: Literal["generate", "measure"] | None = program.option(None, "one of the two steps (default: both)")
    batch_size: int = program.option(8, "pictures at once (default: 8)", low=1)
    device: Literal["cpu"] | None = program.option(None, "(default: the accelerator, if there is one)")
    dtype: Literal["float32", "float16", "bfloat16"] | None = program.option(
        None, "(default: float32 on cpu, else 16)"
    )

    model: str = evaluated(str(program.TOY_MODEL), "folder or Hub id (default: the toy model)")
    adapter: str | None = evaluated(None, "folder or Hub id (default: the AU adapter beside the model)")
    adapter_variant: str | None = evaluated(None, "sd15: of the published adapter, the files for Stable Diffusion 1.5")
    system: Literal[tuple(SYSTEMS)] = evaluated(
        "fineface", "; ".join(f"{name}: {what}" for name, what in SYSTEMS.items()) + " (default: fineface)"
    )
    ip_adapter: Path | None = evaluated(None, "IP-Adapter weights, for an image prompt", metavar="FILE")
    reference_images: Path | None = evaluated(None, "its pictures, one for each prompt in turn", metavar="DIR")

    prompts: Path | None = tested(None, "CSV, or text with a prompt a line (default: 15 that suit the model)")
    combinations: Path = tested(testset.COMBINATIONS, "CSV (default: the 50 of this repository)")
    parts: tuple[str, ...] = tested(PAPER_PARTS, "(default: the paper's two)", choices=testset.PARTS[1:])
    limit: int | None = tested(None, "only so many prompts, the first ones", low=1)
    limit_combinations: int | None = tested(None, "only so many combinations, the first ones", low=1)

    sampling: Mapping[str, object] = field(default_factory=dict)

    meters: tuple[str, ...] = measured(
        (),
        f"toy, or TOOL:WHERE with the tool libreface, pyfeat, openface or table; repeatable {BY_DEFAULT}",
        flag="--meter",
        metavar="METER",
        action="append",
        nargs=None,
    )
    image_encoder: str | None = measured(None, f"toy, or folder or Hub id of a CLIP {BY_DEFAULT}")
    face_box: tuple[float, float, float, float] | None = measured(
        None,
        "where the face is, in parts of the picture, to measure what changes around it",
        action="store",
        nargs=4,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
    )
    bootstrap_draws: int = measured(1000, "for the intervals (default: 1000)", low=1)

    def __post_init__(self):
        program.check_options(self, program.spell_option)
        if self.face_box is not None:
            left, top, right, bottom = self.face_box
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise ValueError(
                    f"`--face-box` is {list(self.face_box)}, but needs 0 ≤ left < right ≤ 1 and the same downwards."
                )
        if self.ip_adapter is not None and self.reference_images is None:
            raise ValueError("`--ip-adapter` needs `--reference-images`, the folder of its image prompts.")


def parse_args(argv: list[str] | None) -> EvaluationConfig:
    parser = program.Parser("evaluation.run", __doc__)
    program.add_options(parser, EvaluationConfig, spell=program.spell_option)
    defaults = "Default: what the fineface.json of the model says, or that of Stable Diffusion."
    program.add_options(parser.add_argument_group("sampling", defaults), Job, SETTABLE, spell=program.spell_option)
    args = parser.parse_args(argv)
    sampling = program.take_options(Job, args, SETTABLE)
    return EvaluationConfig(**program.take_options(EvaluationConfig, args), sampling=sampling)


# ---- The folder of a run --------------------------------------------------------------------------------------------


def make_template(config: EvaluationConfig) -> Job:
    """A checked job with the sampling of all pictures."""
    defaults = read_model_defaults(config.model)
    if config.system != "fineface":
        defaults.pop("au_guidance_scale", None)
        for name in ("au_guidance_scale", "au_scale"):
            if config.sampling.get(name) is not None:
                raise ValueError(f"`{program.spell_option(name)}` needs the AU adapter: it is for fineface only.")
    return make_job({"prompt": "any", **defaults, **config.sampling}, program.spell_option)


def find_references(config: EvaluationConfig) -> list[Path]:
    if config.ip_adapter is not None and not config.ip_adapter.is_file():
        raise FileNotFoundError(f"`--ip-adapter` is {str(config.ip_adapter)!r}, which is no file.")
    if config.reference_images is None:
        return []
    found = sorted(config.reference_images.glob("*"))
    references = [path for path in found if path.suffix.lower() in PICTURE_SUFFIXES]
    if not references:
        folder = str(config.reference_images)
        raise FileNotFoundError(f"`--reference-images` is {folder!r}, where there is no picture.")
    return references


def digest_if_folder(name: str | None) -> str | None:
    return program.folder_digest(Path(name)) if name and Path(name).is_dir() else None


def keep_settings(
    path: Path, settings: dict, what: str, state: PartialState, defaults: Mapping = MappingProxyType({})
) -> None:
    """Write `settings` to `path`, or, if they are there already, check that they are the same."""
    has_settings = program.check_settings(path, settings, what, defaults)
    # They are written after every process has looked for them.
    state.wait_for_everyone()
    if not has_settings and state.is_main_process:
        program.write_settings(path, settings)


def is_measured(path: Path, items: list[Item]) -> bool:
    return path.exists() and {item.name for item in items} <= set(pd.read_csv(path)["name"])


class Evaluation:
    """
    A checked request. Creating one writes nothing, and loads no more than the toy world's meter.

    `items` are the pictures, `au_names` the AUs that the system draws, and `settings` all that the pictures depend on.
    """

    def __init__(self, config: EvaluationConfig, state: PartialState):
        self.config, self.state = config, state
        self.weights = Weights(config.model, config.adapter, config.adapter_variant)
        check_weights(self.weights)
        check_system(config.system, self.weights)
        program.check_output(config.output, is_folder=True)
        self.template, self.is_toy = make_template(config), is_toy_model(config.model)
        default_prompts = testset.TOY_PROMPTS if self.is_toy else testset.PROMPTS
        prompts = testset.read_prompts(config.prompts or default_prompts)
        self.au_names = read_au_names(self.weights) if config.system == "fineface" else AU_NAMES
        combinations = []
        if "combination" in config.parts:
            combinations = testset.read_combinations(config.combinations, self.au_names)[: config.limit_combinations]
        self.items = testset.make_items(prompts[: config.limit], combinations, config.parts, self.au_names)
        # The pictures of one prompt and part are measured together, and have a table of their own.
        self.groups: dict[str, list[Item]] = {}
        for item in self.items:
            self.groups.setdefault(f"p{item.prompt.index:02d}_{item.part}.csv", []).append(item)
        self.references = find_references(config)
        self.dtype = config.dtype or ("float32" if state.device.type == "cpu" else "float16")
        self.settings = {
            "system": config.system,
            "model": "toy_faces/weights" if Path(config.model).resolve() == program.TOY_MODEL else config.model,
            "model_files": digest_if_folder(config.model),
            "adapter": config.adapter,
            "adapter_files": digest_if_folder(config.adapter),
            "adapter_variant": config.adapter_variant,
            "ip_adapter_file": program.file_digest(config.ip_adapter) if config.ip_adapter else None,
            "reference_images": {path.name: program.file_digest(path) for path in self.references},
            **{name: getattr(self.template, name) for name in SETTABLE},
            "dtype": self.dtype,
            "prompts": [[prompt.text, prompt.seed] for prompt in prompts],
        }
        self.missing = [item for item in self.items if not self.path(item).exists()]
        if config.only == "measure" and self.missing:
            folder = str(config.output / "pictures")
            raise FileNotFoundError(
                f"{len(self.missing)} of {len(self.items)} pictures are missing in {folder!r}, the first of them"
                f" {self.missing[0].name!r}. Run without `--only measure`, which makes them."
            )
        if config.only != "generate":
            self._make_instruments()

    def _make_instruments(self) -> None:
        """Models of the toy world default to their own."""
        config, device = self.config, self.state.device
        # The first meter has taught the adapter, so it must not judge.
        specs = config.meters or ([f"toy:{Path(config.model) / 'second_meter'}"] if self.is_toy else [])
        self.meters = [make_meter(spec, device, self.au_names) for spec in specs]
        names = [meter.name for meter in self.meters]
        if len(set(names)) < len(names):
            raise ValueError(f"`--meter` names {next(n for n in names if names.count(n) > 1)} twice.")
        encoder_spec = config.image_encoder or (f"toy:{config.model}" if self.is_toy else None)
        if not names and encoder_spec is None:
            raise ValueError("There is nothing to measure with: name a `--meter`, an `--image-encoder`, or both.")
        self.encoder = make_image_encoder(encoder_spec, device) if encoder_spec else None
        self.face_box = config.face_box or (TOY_FACE_BOX if self.is_toy else None)

    def path(self, item: Item) -> Path:
        return self.config.output / "pictures" / item.name

    def reference(self, item: Item) -> Image.Image:
        return read_picture(self.references[item.prompt.index % len(self.references)])

    # ---- generation ------------------------------------------------------------------------------------------------

    def generate(self) -> None:
        """Draw this process's share of the missing pictures."""
        missing, size, state = self.missing, self.config.batch_size, self.state
        batches = program.share_of(state, [missing[start : start + size] for start in range(0, len(missing), size)])
        if batches:
            with quiet():
                dtype = getattr(torch, self.dtype)
                system = System(self.config.system, self.weights, state.device, dtype)
                if self.config.ip_adapter is not None:
                    system.load_ip_adapter(self.config.ip_adapter)
                total, finished = len(self.items), len(self.items) - len(missing)
                silent = not state.is_main_process
                with tqdm(desc="generate", total=total, initial=finished, unit="picture", disable=silent) as bar:
                    for number, batch in enumerate(batches):
                        self._draw_batch(system, batch, is_first=number == 0)
                        # The other processes are about as fast.
                        bar.update(min(len(batch) * state.num_processes, bar.total - bar.n))
        state.wait_for_everyone()

    def _draw_batch(self, system: System, batch: list[Item], is_first: bool) -> None:
        references = [] if self.config.ip_adapter is None else list(map(self.reference, batch))
        jobs = [replace(self.template, prompt=i.prompt.text, aus=i.aus, seed=i.prompt.seed) for i in batch]
        started = time.perf_counter()
        images = system.draw(jobs, references)
        seconds = (time.perf_counter() - started) / len(batch)
        for item, job, image in zip(batch, jobs, images, strict=True):
            metadata = {
                "prompt": job.prompt,
                "aus": job.aus,
                "seed": job.seed,
                "part": item.part,
                "system": self.config.system,
                "batch_size": len(batch),
                # The first call of a process is slower, because it warms up the device, so its time does not count.
                "seconds": None if is_first else round(seconds, 4),
            }
            write_picture(image, self.path(item), metadata)

    # ---- measurement -----------------------------------------------------------------------------------------------

    def measure(self, name: str, settings: dict, measure_group: Callable[[list[Item]], pd.DataFrame]) -> None:
        """
        Measure this process's share of the groups of pictures that have no table yet, and write their tables into
        OUTPUT/measurements/`name`. A table appears when it is complete.
        """
        folder, state = self.config.output / "measurements" / name, self.state
        keep_settings(folder / "settings.json", settings, "measurements", state)
        groups = [(folder / file, items) for file, items in self.groups.items()]
        groups = [(path, items) for path, items in groups if not is_measured(path, items)]
        state.wait_for_everyone()
        share, silent = program.share_of(state, groups), not state.is_main_process
        with quiet():
            for path, items in tqdm(share, desc=f"measure: {name}", unit="group", disable=silent):
                program.write_atomically(path, measure_group(items).to_csv(index=False))
        state.wait_for_everyone()

    def measure_aus(self, meter: Meter, items: list[Item]) -> pd.DataFrame:
        readings = meter.measure([self.path(item) for item in items])
        table = pd.DataFrame({"name": [item.name for item in items], "num_faces": [r.num_faces for r in readings]})
        table[[f"measured_{name}" for name in self.au_names]] = np.stack([reading.aus for reading in readings])
        return table

    def compare_pictures(self, items: list[Item]) -> pd.DataFrame:
        """Measure what needs no meter: likeness to the neutral picture, agreement with the prompt, and time."""
        images = [read_picture(self.path(item)) for item in items]
        neutral = read_picture(self.path(Item("neutral", items[0].prompt, "")))
        table = pd.DataFrame({"name": [item.name for item in items]})
        table["seconds"] = [read_metadata(self.path(item)).get("seconds") for item in items]
        if self.face_box is not None:
            pixels = np.asarray(neutral)
            table["outside"] = [outside_change(np.asarray(image), pixels, self.face_box) for image in images]
        if self.encoder is not None:
            parts = [images[start : start + EMBEDDED_AT_ONCE] for start in range(0, len(images), EMBEDDED_AT_ONCE)]
            embeddings = np.concatenate([self.encoder.embed(part) for part in parts])
            others = {"clip_i": neutral}
            if self.references:
                others["reference_similarity"] = self.reference(items[0])
            for column, other in others.items():
                table[column] = clip_similarity(embeddings, self.encoder.embed([other]))
            prompt = items[0].prompt.text
            table["agreement"] = np.concatenate([self.encoder.agreement(part, [prompt] * len(part)) for part in parts])
        return table

    # ---- results ---------------------------------------------------------------------------------------------------

    def collect(self) -> pd.DataFrame:
        """Join all measurements to one table with a row for each picture and meter."""
        columns = ["name", "part", "prompt_index", "prompt", "domain", "seed", "number"]
        rows = [(item.name, item.part, *astuple(item.prompt), item.number) for item in self.items]
        commands = pd.DataFrame(rows, columns=columns)
        commands[list(self.au_names)] = read_aus([item.aus for item in self.items], au_names=self.au_names)

        def read(name: str) -> pd.DataFrame:
            folder = self.config.output / "measurements" / name
            return pd.concat([pd.read_csv(folder / file) for file in self.groups])

        pictures, tables = commands.merge(read("pictures"), on="name", how="left", validate="one_to_one"), []
        for meter in self.meters:
            table = pictures.merge(read(meter.name), on="name", validate="one_to_one")
            tables.append(table.assign(meter=meter.name))
        return pd.concat(tables, ignore_index=True) if tables else pictures.assign(meter="")

    def write_results(self) -> Path:
        """Write the results and the figures that follow from them, and return the path of the report."""
        output, results = self.config.output, self.collect()
        program.write_atomically(output / "results.csv", results.to_csv(index=False))
        with program.replacing(output / "results.parquet") as unfinished:
            results.to_parquet(unfinished, index=False)
        summary = report.summarize(results, self.config.bootstrap_draws)
        program.write_atomically(output / "summary.csv", summary.to_csv(index=False))
        drawings = figures.draw_all(self.items, results, output / "pictures")
        drawings = {f"figures/{name}.png": image for name, image in drawings.items()}
        for name, image in drawings.items():
            write_png(image, output / name)
        unmeasured = {meter: report.unmeasured_aus(table) for meter, table in report.by_meter(results)}
        agreement_name = self.encoder.agreement_name if self.encoder else ""
        text = report.format_report(summary, self.settings, agreement_name, list(drawings), unmeasured)
        program.write_atomically(output / "report.md", text)
        return output / "report.md"


def run(config: EvaluationConfig) -> Path | None:
    """Check the request, carry it out, and return the path of the report; None where no report is written."""
    state = PartialState(cpu=config.device == "cpu")
    evaluation = Evaluation(config, state)
    # No process draws before all have looked for the pictures and the settings, so that all divide the same list.
    keep_settings(config.output / "settings.json", evaluation.settings, "pictures", state)
    if config.only != "measure":
        evaluation.generate()
    if config.only == "generate":
        return None
    for meter in evaluation.meters:
        evaluation.measure(meter.name, meter.settings, functools.partial(evaluation.measure_aus, meter))
    settings = {
        "image_encoder": evaluation.encoder.settings if evaluation.encoder else None,
        "face_box": evaluation.face_box,
        "reference_images": evaluation.settings["reference_images"],
    }
    evaluation.measure("pictures", settings, evaluation.compare_pictures)
    return evaluation.write_results() if state.is_main_process else None


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status of `run_program`; 1 also if a tool has failed."""
    return program.run_program(
        lambda: run(parse_args(argv)),
        interrupted="the same command goes on from here",
        out_of_memory="Try a smaller `--batch-size`, or `--dtype float16`.",
        failures=(ToolError,),
    )


if __name__ == "__main__":
    sys.exit(main())
