# SPDX-License-Identifier: Apache-2.0
r"""
What the toy weights are worth: `python -m toy_faces.report`.

Everything is measured on pictures that were never trained on, from fixed seeds: 15 prompts with each AU alone at five
intensities, and 50 combinations with three prompts each. The goals stand beside each figure. `--quick` takes three of
the prompts.

The meter that teaches never judges: where the model's folder has a `second_meter`, of another architecture and trained
on other pictures, its column counts, and the column of the teaching meter stands beside it.
"""

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from action_units import AU_NAMES, au_projection, mirrored_columns
from drawing.jobs import read_model_defaults
from pipeline_fineface import FineFacePipeline
from program import TOY_MODEL, Parser, number_or_none, pick_device, run_program, write_atomically
from toy_faces import renderer
from toy_faces.networks import PictureReader, attribute_logits
from toy_faces.pictures import UNSEEN, aus_of, render_seed, to_pixel_values
from training.feedback import load_meter


PROMPTS = (
    "a closeup of a boy with short brown hair in a park, wearing a red sweater",
    "a portrait of a woman with long black hair and tan skin at the beach, wearing a blue shirt",
    "a man with dark skin, short black hair and a beard in the city, wearing a white shirt",
    "a girl with curly red hair and pale skin in the snow, wearing a green jacket",
    "a photo of a woman with gray hair in a bun and glasses in a studio, wearing a purple sweater",
    "a bald man with brown skin in the desert, wearing a yellow shirt",
    "a boy with blond hair and glasses at night, wearing a black jacket",
    "a woman with curly black hair and dark skin at sunset, wearing a red shirt",
    "a closeup of a man with short gray hair and pale skin in a studio, wearing a black sweater",
    "a girl with long blond hair and tan skin in a park, wearing a purple shirt",
    "a portrait of a woman with long red hair in the city, wearing a green sweater",
    "a man with curly brown hair and brown skin at the beach, wearing a white jacket",
    "a girl with black hair in a bun and brown skin in the desert, wearing a blue jacket",
    "a photo of a man with short blond hair, a beard and glasses in the snow, wearing a red jacket",
    "a boy with dark skin and curly black hair in a park, wearing a yellow sweater",
)
INTENSITIES = (1.0, 2.0, 3.0, 4.0, 5.0)
SAMPLING = ("num_inference_steps", "guidance_scale", "au_guidance_scale")
SCORED_ATTRIBUTES = ("hair_color", "hair_style", "skin", "clothes", "background", "glasses")
GOALS = {
    "VAE PSNR, dB": "≥ 31",
    "meter MSE, renders": "≤ 0.12",
    "meter MSE, through the VAE": "≤ 0.2",
    "mean r": "≥ 0.95",
    "lowest r": "≥ 0.88",
    "lowest slope": "≥ 0.88",
    "highest slope": "≤ 1.12",
    "single AUs, MSE / without AUs": "≤ 10 %",
    "combinations, MSE / without AUs": "≤ 12 %",
    "other AUs move by": "≤ 0.10",
    "other side moves at full command": "≤ 0.30",
    "attributes as prompted": "≥ 98 %",
    "seconds per picture": "< 3",
}


@dataclass(frozen=True)
class Commanded:
    """
    Pictures that were drawn of commands: the number of each prompt, AUs `(pictures, AUs)` or None, and pixel values in
    [-1, 1], `(pictures, 3, 128, 128)`.
    """

    prompts: Sequence[int]
    commands: torch.Tensor | None
    pictures: torch.Tensor


class Bench:
    """The model under test and what measures it. Pictures of one prompt share one seed."""

    def __init__(self, folder: Path, batch_size: int, call_kwargs: dict, adapter: Path | None = None):
        device = pick_device(None)
        self.pipeline = FineFacePipeline.from_pretrained(folder, dtype=torch.float32).to(device)
        if adapter is not None:
            self.pipeline.load_au_adapter(adapter)
        self.pipeline.set_progress_bar_config(disable=True)
        self.au_names = self.pipeline.au_names
        # The judge first, if there is one.
        names = [name for name in ("second_meter", "meter") if (folder / name).is_dir()]
        self.meters = {name: load_meter(str(folder / name), device) for name in names}
        self.reader = PictureReader.from_pretrained(folder / "attribute_reader", dtype=torch.float32).to(device).eval()
        self.device, self.batch_size, self.call_kwargs = device, batch_size, call_kwargs

    @torch.no_grad()
    def read(self, network: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(part.to(self.device)).cpu() for part in pixel_values.split(64)])

    def measure(self, meter: str, pixel_values: torch.Tensor) -> torch.Tensor:
        """Read the AUs of the adapter by the meter of this name, `(pictures, AUs)`."""
        network = self.meters[meter]
        return self.read(network, pixel_values) @ au_projection(network.au_names, self.au_names)

    def draw(self, prompts: Sequence[int], aus: torch.Tensor | None, desc: str) -> Commanded:
        """Pictures of `PROMPTS[prompts[i]]` with `aus[i]`."""
        pictures = []
        for start in tqdm(range(0, len(prompts), self.batch_size), desc=desc, mininterval=5):
            part = slice(start, start + self.batch_size)
            output = self.pipeline(
                [PROMPTS[index] for index in prompts[part]],
                aus=None if aus is None else aus[part],
                generator=[torch.Generator().manual_seed(UNSEEN + index) for index in prompts[part]],
                output_type="pt",
                **self.call_kwargs,
            )
            pictures.append(output.images.cpu() * 2 - 1)
        return Commanded(prompts, aus, torch.cat(pictures))

    def vae_round_trip(self, pixel_values: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        decoded = self.read(lambda part: vae.decode(vae.encode(part).latent_dist.mode()).sample, pixel_values)
        return decoded.clamp(-1, 1)

    def attribute_agreement(self, pixel_values: torch.Tensor, named: list[dict[str, str]]) -> dict[str, float]:
        """The share of pictures that show what `named` says of each, per attribute that is named at all."""
        logits = attribute_logits(self.read(self.reader, pixel_values))
        agreement = {}
        for name in SCORED_ATTRIBUTES:
            seen = [renderer.ATTRIBUTES[name][number] for number in logits[name].argmax(1).tolist()]
            right = [value == says[name] for value, says in zip(seen, named, strict=True) if name in says]
            agreement |= {name: float(np.mean(right))} if right else {}
        return agreement


def measure_instruments(bench: Bench, count: int) -> dict[str, dict[str, float]]:
    """The VAE and the readers on renders that nothing was trained on. Figures of a meter have its name before them."""
    seeds = range(UNSEEN, UNSEEN + count)
    pixel_values = to_pixel_values(np.stack([render_seed(seed) for seed in seeds]))
    reconstructed = bench.vae_round_trip(pixel_values)
    truth = aus_of(seeds) @ au_projection(AU_NAMES, bench.au_names)
    error = (reconstructed - pixel_values).square().mean((1, 2, 3))
    agreement = bench.attribute_agreement(reconstructed, [renderer.sample_portrait(seed).attributes for seed in seeds])
    figures = {"VAE PSNR, dB": {"": (10 * torch.log10(4 / error)).mean().item()}}
    for what, pictures in (("renders", pixel_values), ("through the VAE", reconstructed)):
        figures[f"meter MSE, {what}"] = {
            meter: F.mse_loss(bench.measure(meter, pictures), truth).item() for meter in bench.meters
        }
    return figures | {"attribute reader, through the VAE": {"": float(np.mean(list(agreement.values())))}}


def single_commands(prompts: range, au_names: Sequence[str] = AU_NAMES) -> tuple[list[int], torch.Tensor]:
    """Every prompt with every AU alone at every intensity."""
    each = torch.eye(len(au_names))
    commands = [each[au] * intensity for _ in prompts for au in range(len(each)) for intensity in INTENSITIES]
    return [prompt for prompt in prompts for _ in range(len(each) * len(INTENSITIES))], torch.stack(commands)


def combination_commands(
    prompts: range, count: int, au_names: Sequence[str] = AU_NAMES
) -> tuple[list[int], torch.Tensor]:
    """`count` combinations of two to five AUs, each with three of the prompts in turn."""
    sided = set(au_names) - set(AU_NAMES)
    names, sample = (renderer.TOY_AU_NAMES, renderer.sample_toy_aus) if sided else (AU_NAMES, renderer.sample_aus)
    drawn = (torch.from_numpy(sample(seed)) for seed in range(UNSEEN, UNSEEN + 100 * count))
    combinations = [aus for aus in drawn if (aus > 0).sum() >= 2][:count]
    commands = torch.stack(combinations) @ au_projection(names, au_names)
    return [prompts[index % len(prompts)] for index in range(3 * count)], commands.repeat(3, 1)


def dose_response(
    commands: torch.Tensor, measured: torch.Tensor, neutral: torch.Tensor, au_names: Sequence[str] = AU_NAMES
) -> list[dict]:
    """
    Per AU: Pearson r and slope of command → measurement, and how far all other AUs move from the neutral face; for one
    side, also how far the other side of the same AU moves at full command.
    """
    rows, mirrored = [], mirrored_columns(au_names)
    for au in range(len(au_names)):
        chosen = commands[:, au] > 0
        x, y = commands[chosen, au], measured[chosen, au]
        slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
        moved = (measured[chosen] - neutral[chosen]).abs()
        others = [other for other in range(len(au_names)) if other != au]
        row = {
            "r": torch.corrcoef(torch.stack([x, y]))[0, 1].item(),
            "slope": slope.item(),
            "mse": F.mse_loss(measured[chosen], commands[chosen]).item(),
            "others": moved[:, others].mean().item(),
        }
        if mirrored[au] != au:
            row["leak"] = moved[x == x.max(), mirrored[au]].mean().item()
        rows.append(row)
    return rows


def wholeness(bench: Bench, drawn: Commanded) -> dict[str, float]:
    """
    How whole drawn faces are, by the second meter. *Asymmetry*: the mean difference between the two sides of AUs that
    were commanded alike. *Distance from renders*: of its features, to a render of the same AUs and attributes, as a
    multiple of the distance between two such renders of different people.
    """
    meter = bench.meters.get("second_meter")
    if meter is None:
        return {}
    read, names = bench.read(meter, drawn.pictures), list(meter.au_names)
    alike = drawn.commands @ au_projection(bench.au_names, names)
    pairs = [(names.index(name), names.index(f"{name[:-1]}R")) for name in names if name.endswith("L")]
    differences = [(read[:, left] - read[:, right])[alike[:, left] == alike[:, right]].abs() for left, right in pairs]
    toy_aus = (drawn.commands @ au_projection(bench.au_names, renderer.TOY_AU_NAMES)).numpy()

    def rendered(first_seed: int) -> torch.Tensor:
        named = enumerate(map(renderer.attributes_in, (PROMPTS[prompt] for prompt in drawn.prompts)))
        people = (renderer.sample_portrait(first_seed + row, **attributes) for row, attributes in named)
        pictures = [np.asarray(renderer.render(person, aus)) for person, aus in zip(people, toy_aus, strict=True)]
        return bench.read(meter.embed, to_pixel_values(np.stack(pictures)))

    one, another = rendered(UNSEEN), rendered(UNSEEN + 10_000)
    features = bench.read(meter.embed, drawn.pictures)
    distance = (features - one).norm(dim=1).mean() / (another - one).norm(dim=1).mean()
    return {
        "asymmetry of what was commanded alike": torch.cat(differences).mean().item(),
        "distance from renders": distance.item(),
    }


def seconds_per_picture(bench: Bench) -> float:
    """Median of five calls for one picture, after one to warm up."""
    times = []
    for seed in range(6):
        started = time.perf_counter()
        bench.pipeline(PROMPTS[0], aus="6C+12D", generator=torch.Generator().manual_seed(seed), **bench.call_kwargs)
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def measure_obedience(
    bench: Bench, meter: str, plain: torch.Tensor, neutral: torch.Tensor, single: Commanded, combined: Commanded
) -> tuple[dict[str, float], list[dict]]:
    """Figures of what one meter reads, and the dose response. `plain` and `neutral` hold a picture of each prompt."""
    plain, neutral = bench.measure(meter, plain), bench.measure(meter, neutral)
    measured = bench.measure(meter, single.pictures)
    doses = dose_response(single.commands, measured, neutral[single.prompts], bench.au_names)
    slopes, leaks = [row["slope"] for row in doses], [row["leak"] for row in doses if "leak" in row]
    figures = {
        "mean r": float(np.mean([row["r"] for row in doses])),
        "lowest r": min(row["r"] for row in doses),
        "lowest slope": min(slopes),
        "highest slope": max(slopes),
        "other AUs move by": float(np.mean([row["others"] for row in doses])),
        **({"other side moves at full command": max(leaks)} if leaks else {}),
    }
    for kind, drawn in (("single AUs", single), ("combinations", combined)):
        error = F.mse_loss(bench.measure(meter, drawn.pictures), drawn.commands).item()
        without = F.mse_loss(plain[drawn.prompts], drawn.commands).item()
        figures |= {f"{kind}, MSE": error, f"{kind}, MSE without AUs": without}
        figures[f"{kind}, MSE / without AUs"] = error / without
    return figures, doses


def evaluate(bench: Bench, quick: bool) -> tuple[dict[str, dict[str, float]], dict[str, list[dict]], dict[str, float]]:
    """Figures by name and meter, where `""` stands for none; the dose response by meter; agreement with prompts."""
    prompts = range(3) if quick else range(len(PROMPTS))
    figures = measure_instruments(bench, 128 if quick else 512)
    plain = bench.draw(prompts, None, "without AUs").pictures
    neutral = bench.draw(prompts, torch.zeros(len(prompts), len(bench.au_names)), "neutral").pictures
    single = bench.draw(*single_commands(prompts, bench.au_names), "single AUs")
    combined = bench.draw(*combination_commands(prompts, 50, bench.au_names), "combinations")
    doses = {}
    for meter in bench.meters:
        found, doses[meter] = measure_obedience(bench, meter, plain, neutral, single, combined)
        for name, value in found.items():
            figures.setdefault(name, {})[meter] = value
    figures |= {name: {"second_meter": value} for name, value in wholeness(bench, combined).items()}
    named = [renderer.attributes_in(prompt) for prompt in PROMPTS]
    agreement = bench.attribute_agreement(combined.pictures, [named[prompt] for prompt in combined.prompts])
    unmoved = bench.attribute_agreement(plain, [named[prompt] for prompt in prompts])
    figures["attributes as prompted"] = {"": float(np.mean(list(agreement.values())))}
    figures["attributes as prompted, without AUs"] = {"": float(np.mean(list(unmoved.values())))}
    figures["seconds per picture"] = {"": seconds_per_picture(bench)}
    return figures, doses, agreement


def format_figure(name: str, value: float) -> str:
    if "/ without" in name or "attribute" in name:
        return f"{100 * value:.1f} %"
    return f"{value:.2f}" if math.isfinite(value) else "not defined"


METER_TITLES = {"second_meter": "second meter, which judges", "meter": "meter that teaches"}


def table_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def format_report(
    figures: dict, doses: dict[str, list[dict]], au_names: Sequence[str], agreement: dict, settings: str
) -> str:
    titles = [METER_TITLES[meter] for meter in doses]
    lines = ["# What the toy weights are worth", "", settings, ""]
    if "second_meter" not in doses:
        lines += ["There is no second meter in this folder: the meter that may have taught the adapter judges it too."]
        lines += [""]
    lines += [f"| {table_row([*titles, 'goal'])}", "|---" * (2 + len(titles)) + "|"]
    for name, values in figures.items():
        # What no meter has read stands in the first column.
        columns = ["" if "" in values else next(iter(doses)), *list(doses)[1:]]
        cells = [format_figure(name, values[column]) if column in values else "" for column in columns]
        lines.append(table_row([name, *cells, GOALS.get(name, "")]))
    lines += [
        "",
        f"Each AU alone, 1 … 5, by the {titles[0]}. *Slope*: measured against commanded intensity; *others",
        "move* is the mean absolute change of all other AUs from the neutral face of the same seed; *other side*",
        "is that of the same AU on the other side, at full command.",
        "",
        "| AU | r | slope | MSE | others move | other side |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in zip(au_names, next(iter(doses.values())), strict=True):
        numbers = (f"{row[key]:.2f}" if key in row else "" for key in ("r", "slope", "mse", "others", "leak"))
        lines.append(table_row([name, *numbers]))
    lines += ["", "Pictures of combinations that show what the prompt names:", ""]
    lines += [table_row(name.replace("_", " ") for name in agreement), "|---" * len(agreement) + "|"]
    lines += [table_row(f"{100 * value:.0f} %" for value in agreement.values())]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = Parser("toy_faces.report", __doc__)
    parser.add_argument("--model", type=Path, default=TOY_MODEL)
    parser.add_argument("--adapter", type=Path, help="another AU adapter than the one in the model's folder")
    group = parser.add_argument_group("sampling", "Default: what the fineface.json of the model says.")
    group.add_argument("--num-inference-steps", type=int, default=argparse.SUPPRESS)
    group.add_argument("--guidance-scale", type=float, default=argparse.SUPPRESS)
    group.add_argument("--au-guidance-scale", type=number_or_none, default=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="3 prompts instead of 15")
    parser.add_argument("--output", type=Path, help="write the report to this file as well")

    def work() -> str:
        arguments = parser.parse_args(argv)
        if not (arguments.model / "meter").is_dir():
            parser.error(f"{arguments.model} has no meter/: it is not a folder that `toy_faces.train --export` wrote.")
        given = {name: value for name, value in vars(arguments).items() if name in SAMPLING}
        call_kwargs = read_model_defaults(str(arguments.model)) | given
        bench = Bench(arguments.model, arguments.batch_size, call_kwargs, arguments.adapter)
        chosen = ", ".join(f"`{name}={call_kwargs[name]}`" for name in SAMPLING if name in call_kwargs)
        settings = (
            f"{chosen}; torch {torch.__version__}, {bench.device.type}, {platform.machine()}, "
            f"{torch.get_num_threads()} threads{', 3 prompts (--quick)' if arguments.quick else ''}."
        )
        figures, doses, agreement = evaluate(bench, arguments.quick)
        report = format_report(figures, doses, bench.au_names, agreement, settings)
        if arguments.output:
            write_atomically(arguments.output, report)
        return report

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
