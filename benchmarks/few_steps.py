"""
The fastest good setting of the embedded model: `python -m benchmarks.few_steps --choose`.

Pictures of commanded expressions are drawn one by one with each sampler, number of steps and guidance. The AU meter
reads the expressions back, the attribute reader what else the prompt asks for, and sharpness shows what too few steps
leave blurred. Four rounds: samplers × steps at the guidance of the model's fineface.json, guidance × AU guidance at
the best of them, steps again at the best of those, and the settings near the best of all once more with more pictures.
Samplers take over what the model's scheduler has set: noise, kind of prediction, spacing of the steps. Each result is
a line of a CSV file, appended as soon as it is there: a sweep that was stopped goes on when the same command runs
again, and other weights or another number of pictures or threads are measured anew.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from tqdm import tqdm

from action_units import format_aus
from benchmarks.tables import add_clock_argument, count, describe_machine, markdown_table, pick_clock
from drawing.contact_sheet import Table, draw_sheet
from drawing.jobs import read_model_defaults
from drawing.model import fuse_lora
from program import TOY_MODEL, number_or_none, pick_device
from toy_faces.pictures import UNSEEN, render_seed, to_pixel_values
from toy_faces.report import PROMPTS, Bench, attribute_agreement, combination_commands, mean_squared_error


SAMPLERS = {
    "ddim": (DDIMScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    # These add new noise at each step.
    "sde-dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {}),
    "lcm": (LCMScheduler, {}),
}
DEFAULT_SAMPLERS = ("ddim", "dpmsolver++", "unipc", "euler", "sde-dpm++")
# How far a setting may be from the best and still count as good.
MSE_TOLERANCE = 0.05
ATTRIBUTES_TOLERANCE = 0.04
SHARPNESS_TOLERANCE = 0.05
REFERENCE_PICTURES = 32
# With few pictures, settings that are as good can come out as much worse.
FINALIST_TOLERANCE = 3
MAX_FINALISTS = 5
SHEET_COLUMNS = 8


@dataclass(frozen=True)
class Setting:
    sampler: str
    steps: int
    guidance_scale: float
    au_guidance_scale: float | None
    """None: AUs follow `guidance_scale`, at two predictions a step instead of three."""


@dataclass(frozen=True)
class Result:
    setting: Setting
    au_mse: float
    au_r: float
    """Pearson's r of commanded and measured intensities, all AUs together."""
    attributes: float
    """Share of the attributes in the prompt that the picture shows."""
    sharpness: float
    """Mean difference of neighbouring pixels, as a share of that of renders and at most 1."""
    seconds: float
    """Median of single calls."""


# --------------------------------------------------------------------------------------------------------------------
# The file of results
# --------------------------------------------------------------------------------------------------------------------

SETTING_COLUMNS = tuple(field.name for field in fields(Setting))
RESULT_COLUMNS = tuple(field.name for field in fields(Result) if field.name != "setting")


class ResultFile:
    """A CSV file of results. Only those of the same `conditions` are read."""

    def __init__(self, path: Path, conditions: dict[str, str]):
        self.path, self.conditions = path, conditions
        self.columns = (*conditions, *SETTING_COLUMNS, *RESULT_COLUMNS)
        self.results: dict[Setting, Result] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # What was cut off in the middle of a line is measured again.
        complete = text[: text.rfind("\n") + 1]
        rows = csv.DictReader(io.StringIO(complete))
        if complete and tuple(rows.fieldnames or ()) != self.columns:
            raise ValueError(f"`--output` is {str(path)!r}, which has other columns than {', '.join(self.columns)}.")
        for row in rows:
            if all(row[name] == value for name, value in conditions.items()):
                setting = Setting(
                    row["sampler"],
                    int(row["steps"]),
                    float(row["guidance_scale"]),
                    number_or_none(row["au_guidance_scale"]),
                )
                self.results[setting] = Result(setting, *(float(row[name]) for name in RESULT_COLUMNS))
        if complete != text or not complete:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(complete or ",".join(self.columns) + "\n", encoding="utf-8")

    def add(self, result: Result) -> None:
        setting = asdict(result.setting)
        if setting["au_guidance_scale"] is None:
            setting["au_guidance_scale"] = "none"
        row = {**self.conditions, **setting, **{name: f"{getattr(result, name):.5g}" for name in RESULT_COLUMNS}}
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        # As it will be read back: a sweep that goes on has to choose as one that was never stopped.
        self.results[result.setting] = Result(result.setting, *(float(row[name]) for name in RESULT_COLUMNS))


def fingerprint(model: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(model.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# --------------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------------


class Sweep:
    """Draws the same people with the same commands in each setting."""

    def __init__(self, bench: Bench, pictures: int, size: dict[str, int], clock: Callable[[], float]):
        self.bench, self.size, self.clock = bench, size, clock
        self.scheduler_config = bench.pipeline.scheduler.config
        prompts, commands = combination_commands(range(len(PROMPTS)), pictures)
        self.prompts, self.commands = prompts[:pictures], commands[:pictures]
        renders = [render_seed(seed) for seed in range(UNSEEN, UNSEEN + REFERENCE_PICTURES)]
        self.reference = mean_difference(to_pixel_values(np.stack(renders)))

    def draw(self, setting: Setting, pictures: int | None = None) -> tuple[torch.Tensor, list[float]]:
        """All or the first pictures in [-1, 1], of shape `(pictures, 3, height, width)`, and the seconds of each."""
        scheduler_class, options = SAMPLERS[setting.sampler]
        pipeline = self.bench.pipeline
        pipeline.scheduler = scheduler_class.from_config(self.scheduler_config, **options)
        drawn, times = [], []
        for prompt, aus in zip(self.prompts[:pictures], self.commands[:pictures], strict=True):
            started = self.clock()
            output = pipeline(
                PROMPTS[prompt],
                aus=aus,
                generator=torch.Generator().manual_seed(UNSEEN + prompt),
                num_inference_steps=setting.steps,
                guidance_scale=setting.guidance_scale,
                au_guidance_scale=setting.au_guidance_scale,
                output_type="pt",
                **self.size,
            )
            drawn.append(output.images.cpu() * 2 - 1)
            times.append(self.clock() - started)
        return torch.cat(drawn), times

    def measure(self, setting: Setting) -> Result:
        pictures, times = self.draw(setting)
        measured = self.bench.read(self.bench.meter, pictures)
        agreement = attribute_agreement(self.bench, self.prompts, pictures)
        return Result(
            setting,
            au_mse=mean_squared_error(measured, self.commands),
            au_r=torch.corrcoef(torch.stack([measured.flatten(), self.commands.flatten()]))[0, 1].item(),
            # An attribute that no prompt names has no share.
            attributes=statistics.fmean(share for share in agreement.values() if share == share),
            sharpness=min(1.0, mean_difference(pictures) / self.reference),
            seconds=statistics.median(times),
        )

    def sheet(self, results: Iterable[Result]) -> Image.Image:
        """The first pictures of each of `results` in a row: the meter does not see whether a picture is pretty."""
        rows, labels = [], []
        for result in results:
            pictures, _ = self.draw(result.setting, SHEET_COLUMNS)
            arrays = ((pictures + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
            rows.append([Image.fromarray(array) for array in arrays])
            setting = result.setting
            scales = f"{setting.guidance_scale:g}, {setting.au_guidance_scale}"
            labels.append(f"{setting.sampler}\n{setting.steps} steps, {scales}; {result.seconds:.2f} s")
        columns = [format_aus(aus.round(decimals=1)) for aus in self.commands[:SHEET_COLUMNS]]
        return draw_sheet([[Table(rows, labels, columns)]], "sampler, steps, guidance and AU guidance, seconds")

    def run(self, settings: Iterable[Setting], file: ResultFile, desc: str) -> list[Result]:
        settings = list(dict.fromkeys(settings))
        for setting in tqdm([s for s in settings if s not in file.results], desc=desc, mininterval=1):
            file.add(self.measure(setting))
        return [file.results[setting] for setting in settings]


def mean_difference(pictures: torch.Tensor) -> float:
    """Of neighbouring pixels, in rows and in columns."""
    return sum(pictures.diff(dim=dim).abs().mean().item() for dim in (-1, -2)) / 2


# --------------------------------------------------------------------------------------------------------------------
# Choosing
# --------------------------------------------------------------------------------------------------------------------


def pareto(results: Iterable[Result]) -> list[Result]:
    """Those that no other beats in AU error without being slower, fastest first."""
    front: list[Result] = []
    for result in sorted(results, key=lambda result: (result.seconds, result.au_mse)):
        if not front or result.au_mse < front[-1].au_mse:
            front.append(result)
    return front


def near_best(results: Iterable[Result], max_seconds: float, tolerance: float = 1) -> list[Result]:
    """
    The settings whose AU error, attributes and sharpness are near the best that `max_seconds` allow, fastest first;
    `tolerance` is a multiple of what counts as near. If nothing is so fast, the fastest of all.
    """
    results = sorted(results, key=lambda result: result.seconds)
    near = [result for result in results if result.seconds <= max_seconds] or results[:1]
    for name, allowance in (("attributes", ATTRIBUTES_TOLERANCE), ("sharpness", SHARPNESS_TOLERANCE)):
        lowest = max(getattr(result, name) for result in near) - tolerance * allowance
        near = [result for result in near if getattr(result, name) >= lowest]
    mse = min(result.au_mse for result in near) * (1 + tolerance * MSE_TOLERANCE)
    return [result for result in near if result.au_mse <= mse]


def choose(results: Iterable[Result], max_seconds: float) -> Result:
    return near_best(results, max_seconds)[0]


def finalists(results: Iterable[Result], max_seconds: float, own_sampler: str) -> list[Setting]:
    """Some of the settings near the best: the one chosen, the one of the model's own sampler, and the most exact."""
    results = list(results)
    own = [result for result in results if result.setting.sampler == own_sampler]
    first = [choose(rows, max_seconds) for rows in (results, own) if rows]
    near = sorted(near_best(results, max_seconds, FINALIST_TOLERANCE), key=lambda result: result.au_mse)
    return list(dict.fromkeys(result.setting for result in [*first, *near]))[:MAX_FINALISTS]


def format_results(results: Iterable[Result]) -> str:
    header = ["sampler", "steps", "guidance", "AU guidance", "AU MSE", "r", "attributes", "sharpness", "s / picture"]
    rows = []
    for result in results:
        setting = result.setting
        au_guidance_scale = "none" if setting.au_guidance_scale is None else f"{setting.au_guidance_scale:g}"
        rows.append(
            [
                setting.sampler,
                str(setting.steps),
                f"{setting.guidance_scale:g}",
                au_guidance_scale,
                f"{result.au_mse:.2f}",
                f"{result.au_r:.2f}",
                f"{100 * result.attributes:.0f} %",
                f"{100 * result.sharpness:.0f} %",
                f"{result.seconds:.2f}",
            ]
        )
    return markdown_table(header, rows)


def recommendation(result: Result, own_sampler: str, size: dict[str, int]) -> str:
    setting = result.setting
    values = {
        "num_inference_steps": setting.steps,
        "guidance_scale": setting.guidance_scale,
        "au_guidance_scale": setting.au_guidance_scale,
    }
    if size:
        values["size"] = size["height"]
    text = f"fineface.json: {json.dumps(values)}"
    if setting.sampler == own_sampler:
        return text
    scheduler_class, options = SAMPLERS[setting.sampler]
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"{text}\nwith pipe.scheduler = {scheduler_class.__name__}.from_config(pipe.scheduler.config{arguments})"


# --------------------------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TOY_MODEL, help="(default: the embedded model)")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=DEFAULT_SAMPLERS)
    parser.add_argument("--steps", nargs="+", type=count, default=[2, 3, 4, 6, 8])
    parser.add_argument("--guidance-scales", nargs="+", type=float, default=[1.0, 2.0, 3.0, 4.5])
    parser.add_argument("--au-guidance-scales", nargs="+", type=number_or_none, default=[None, 3.0, 5.0, 8.0])
    parser.add_argument("--pictures", type=count, default=20, help="in each setting (default: 20)")
    parser.add_argument("--final-pictures", type=count, default=40, help="in the last round (default: 40)")
    parser.add_argument("--max-seconds", type=float, default=1.0, help="a picture may take (default: 1)")
    parser.add_argument("--choose", action="store_true", help="print the recommended fineface.json as well")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw what the printed settings make")
    add_clock_argument(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs/few_steps.csv"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if not (args.model / "meter").is_dir():
        parser.error(f"`--model` is {str(args.model)!r}, a folder without a meter/ to measure with.")
    args.device = pick_device(None)
    args.clock = pick_clock(args.processor_time, args.device, parser)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    defaults = read_model_defaults(str(args.model))
    size = {name: defaults[name] for name in ("height", "width") if name in defaults}
    guidance = (defaults.get("guidance_scale", 7.5), defaults.get("au_guidance_scale"))
    bench = Bench(args.model, 1, {})
    # As the page and the command line do.
    fuse_lora(bench.pipeline)
    model_scheduler = type(bench.pipeline.scheduler)
    # The first of them: a class may be there with several options.
    own_sampler = next((name for name, (scheduler, _) in SAMPLERS.items() if scheduler is model_scheduler), "")
    weights = fingerprint(args.model)

    def begin(pictures: int) -> tuple[Sweep, ResultFile]:
        clock = "processor" if args.processor_time else "wall"
        conditions = {"weights": weights, "pictures": pictures, "threads": torch.get_num_threads(), "clock": clock}
        conditions = {name: str(value) for name, value in conditions.items()}
        return Sweep(bench, pictures, size, args.clock), ResultFile(args.output, conditions)

    sweep, file = begin(args.pictures)
    # A first call is slower than all others.
    sweep.draw(Setting(args.samplers[0], 1, *guidance), 1)
    samplers = (Setting(*pair, *guidance) for pair in itertools.product(args.samplers, args.steps))
    results = sweep.run(samplers, file, "samplers × steps")
    best = choose(results, args.max_seconds).setting
    scales = itertools.product(args.guidance_scales, args.au_guidance_scales)
    results += sweep.run((Setting(best.sampler, best.steps, *pair) for pair in scales), file, "guidance")
    best = choose(results, args.max_seconds).setting
    best_scales = (best.guidance_scale, best.au_guidance_scale)
    again = {best.sampler: None, own_sampler or best.sampler: None}
    pairs = itertools.product(again, args.steps)
    results += sweep.run((Setting(*pair, *best_scales) for pair in pairs), file, "steps")

    seconds = "seconds of processor time" if args.processor_time else "seconds"
    print(f"{describe_machine(bench.device)} Times are {seconds}.")
    print(f"\n{args.pictures} pictures in each of {len(set(results))} settings; those that no faster one beats:\n")
    print(format_results(pareto(results)))

    sweep, file = begin(args.final_pictures)
    final = sweep.run(finalists(results, args.max_seconds, own_sampler), file, "finalists")
    final.sort(key=lambda result: result.seconds)
    print(f"\nSettings near the best of these, with {args.final_pictures} pictures:\n\n{format_results(final)}")
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        sweep.sheet(final).save(args.sheet)
    if args.choose:
        chosen = choose(final, args.max_seconds)
        print(f"\nRecommended, at most {args.max_seconds:g} s a picture:\n\n{format_results([chosen])}\n")
        print(recommendation(chosen, own_sampler, size))
        own = [result for result in final if result.setting.sampler == own_sampler]
        if own and chosen.setting.sampler != own_sampler:
            chosen = choose(own, args.max_seconds)
            print(f"\nWith the model's own sampler:\n\n{format_results([chosen])}\n")
            print(recommendation(chosen, own_sampler, size))


if __name__ == "__main__":
    main()
