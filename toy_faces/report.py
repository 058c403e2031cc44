r"""
What the embedded weights are worth: `python -m toy_faces.report`.

Everything is measured on pictures that were never trained on, from fixed seeds: 15 prompts with 12 AUs × 5 intensities
alone, and 50 combinations with three prompts each. The goals stand beside each figure. `--quick` takes 3 prompts.
"""

import argparse
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from action_units import AU_NAMES
from drawing.jobs import read_model_defaults
from pipeline_fineface import FineFacePipeline
from program import TOY_MODEL, number_or_none, pick_device
from toy_faces.networks import PictureReader, attribute_logits
from toy_faces.pictures import UNSEEN, aus_of, render_seed, to_pixel_values
from toy_faces.renderer import ATTRIBUTES, attributes_in, sample_portrait


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
    "VAE PSNR, dB": "≥ 30",
    "meter MSE, renders": "≤ 0.12",
    "meter MSE, through the VAE": "≤ 0.2",
    "mean r": "≥ 0.85",
    "lowest r": "≥ 0.6",
    "single AUs, MSE / without AUs": "≤ 50 %",
    "combinations, MSE / without AUs": "≤ 60 %",
    "attributes as prompted": "≥ 85 %",
    "seconds per picture": "< 3",
}


class Bench:
    """The model under test and what measures it. Pictures of one prompt share one seed."""

    def __init__(self, folder: Path, batch_size: int, call_kwargs: dict, adapter: Path | None = None):
        device = pick_device(None)
        self.pipeline = FineFacePipeline.from_pretrained(folder, dtype=torch.float32).to(device)
        if adapter is not None:
            self.pipeline.load_au_adapter(adapter)
        self.pipeline.set_progress_bar_config(disable=True)
        self.meter = PictureReader.from_pretrained(folder / "meter", dtype=torch.float32).to(device).eval()
        self.reader = PictureReader.from_pretrained(folder / "attribute_reader", dtype=torch.float32).to(device).eval()
        self.device, self.batch_size, self.call_kwargs = device, batch_size, call_kwargs

    @torch.no_grad()
    def read(self, network: PictureReader, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(part.to(self.device)).cpu() for part in pixel_values.split(64)])

    def generate(self, prompts: list[int], aus: torch.Tensor | None, desc: str) -> torch.Tensor:
        """Pixel values in [-1, 1] of `PROMPTS[prompts[i]]` with `aus[i]`, `(len(prompts), 3, 128, 128)`."""
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
        return torch.cat(pictures)

    @torch.no_grad()
    def vae_round_trip(self, pixel_values: torch.Tensor) -> torch.Tensor:
        vae, outputs = self.pipeline.vae, []
        for part in pixel_values.split(16):
            latents = vae.encode(part.to(self.device)).latent_dist.mode()
            outputs.append(vae.decode(latents).sample.clamp(-1, 1).cpu())
        return torch.cat(outputs)


def measure_instruments(bench: Bench, count: int) -> dict[str, float]:
    """The VAE and the two readers on renders that nothing was trained on."""
    seeds = range(UNSEEN, UNSEEN + count)
    pixel_values = to_pixel_values(np.stack([render_seed(seed) for seed in seeds]))
    truth, reconstructed = aus_of(seeds), bench.vae_round_trip(pixel_values)
    error = (reconstructed - pixel_values).square().mean((1, 2, 3))
    logits = attribute_logits(bench.read(bench.reader, reconstructed))
    portraits = [sample_portrait(seed).attributes for seed in seeds]
    right = [
        ATTRIBUTES[name][int(row)] == portrait[name]
        for name in SCORED_ATTRIBUTES
        for row, portrait in zip(logits[name].argmax(1), portraits, strict=True)
    ]
    return {
        "VAE PSNR, dB": (10 * torch.log10(4 / error)).mean().item(),
        "meter MSE, renders": (bench.read(bench.meter, pixel_values) - truth).square().mean().item(),
        "meter MSE, through the VAE": (bench.read(bench.meter, reconstructed) - truth).square().mean().item(),
        "attribute reader, through the VAE": float(np.mean(right)),
    }


def single_commands(prompts: range) -> tuple[list[int], torch.Tensor]:
    """Every prompt with every AU alone at every intensity."""
    commands = [torch.eye(12)[au] * intensity for _ in prompts for au in range(12) for intensity in INTENSITIES]
    return [prompt for prompt in prompts for _ in range(12 * len(INTENSITIES))], torch.stack(commands)


def combination_commands(prompts: range, count: int) -> tuple[list[int], torch.Tensor]:
    """`count` combinations of two to five AUs, each with three of the prompts in turn."""
    drawn = (aus_of([seed])[0] for seed in range(UNSEEN, UNSEEN + 100 * count))
    combinations = [aus for aus in drawn if (aus > 0).sum() >= 2][:count]
    return [prompts[index % len(prompts)] for index in range(3 * count)], torch.stack(combinations).repeat(3, 1)


def dose_response(commands: torch.Tensor, measured: torch.Tensor, neutral: torch.Tensor) -> list[dict]:
    """Per AU: Pearson r and slope of command → measurement, and how far all other AUs move from the neutral face."""
    rows = []
    for au in range(12):
        chosen = commands[:, au] > 0
        x, y = commands[chosen, au], measured[chosen, au]
        slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
        others = [other for other in range(12) if other != au]
        moved = (measured[chosen][:, others] - neutral[chosen][:, others]).abs().mean()
        rows.append(
            {
                "r": torch.corrcoef(torch.stack([x, y]))[0, 1].item(),
                "slope": slope.item(),
                "mse": (measured[chosen] - commands[chosen]).square().mean().item(),
                "others": moved.item(),
            }
        )
    return rows


def attribute_agreement(bench: Bench, prompts: list[int], pixel_values: torch.Tensor) -> dict[str, float]:
    """Share of pictures that show what the prompt names, per attribute that any prompt names."""
    logits = attribute_logits(bench.read(bench.reader, pixel_values))
    right: dict[str, list[bool]] = {name: [] for name in SCORED_ATTRIBUTES}
    for row, prompt in enumerate(prompts):
        named = attributes_in(PROMPTS[prompt])
        for name in SCORED_ATTRIBUTES:
            if name in named:
                right[name].append(ATTRIBUTES[name][int(logits[name][row].argmax())] == named[name])
    return {name: float(np.mean(values)) for name, values in right.items() if values}


def seconds_per_picture(bench: Bench) -> float:
    """Median of five calls for one picture, after one to warm up."""
    times = []
    for seed in range(6):
        started = time.perf_counter()
        bench.pipeline(PROMPTS[0], aus="6C+12D", generator=torch.Generator().manual_seed(seed), **bench.call_kwargs)
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def mean_squared_error(measured: torch.Tensor, commands: torch.Tensor) -> float:
    return (measured - commands).square().mean().item()


def evaluate(bench: Bench, quick: bool) -> tuple[dict[str, float], list[dict], dict[str, float]]:
    prompts = range(3) if quick else range(len(PROMPTS))
    figures = measure_instruments(bench, 128 if quick else 512)
    all_prompts = list(prompts)
    plain = bench.generate(all_prompts, None, "without AUs")
    neutral = bench.generate(all_prompts, torch.zeros(len(all_prompts), 12), "neutral")
    measured_plain, measured_neutral = (bench.read(bench.meter, pictures) for pictures in (plain, neutral))

    single_prompts, single = single_commands(prompts)
    measured = bench.read(bench.meter, bench.generate(single_prompts, single, "single AUs"))
    per_au = dose_response(single, measured, measured_neutral[single_prompts])
    figures["mean r"] = float(np.mean([row["r"] for row in per_au]))
    figures["lowest r"] = min(row["r"] for row in per_au)
    figures["single AUs, MSE"] = mean_squared_error(measured, single)
    figures["single AUs, MSE without AUs"] = mean_squared_error(measured_plain[single_prompts], single)
    figures["other AUs move by"] = float(np.mean([row["others"] for row in per_au]))

    combination_prompts, combinations = combination_commands(prompts, 50)
    pictures = bench.generate(combination_prompts, combinations, "combinations")
    measured = bench.read(bench.meter, pictures)
    figures["combinations, MSE"] = mean_squared_error(measured, combinations)
    figures["combinations, MSE without AUs"] = mean_squared_error(measured_plain[combination_prompts], combinations)
    for kind in ("single AUs", "combinations"):
        figures[f"{kind}, MSE / without AUs"] = figures[f"{kind}, MSE"] / figures[f"{kind}, MSE without AUs"]

    agreement = attribute_agreement(bench, combination_prompts, pictures)
    figures["attributes as prompted"] = float(np.mean(list(agreement.values())))
    figures["attributes as prompted, without AUs"] = float(
        np.mean(list(attribute_agreement(bench, all_prompts, plain).values()))
    )
    figures["seconds per picture"] = seconds_per_picture(bench)
    return figures, per_au, agreement


def format_figure(name: str, value: float) -> str:
    if "/ without" in name or "attribute" in name:
        return f"{100 * value:.1f} %"
    return f"{value:.2f}" if math.isfinite(value) else "not defined"


def format_report(figures: dict, per_au: list[dict], agreement: dict, settings: str) -> str:
    lines = ["# What the embedded weights are worth", "", settings, "", "| | measured | goal |", "|---|---|---|"]
    lines += [f"| {name} | {format_figure(name, value)} | {GOALS.get(name, '')} |" for name, value in figures.items()]
    lines += ["", "Each AU alone, 1 … 5. *Slope* is measured against commanded intensity; *others move* is the mean"]
    lines += ["absolute change of the other eleven AUs from the neutral face of the same seed.", ""]
    lines += ["| AU | r | slope | MSE | others move |", "|---|---|---|---|---|"]
    for name, row in zip(AU_NAMES, per_au, strict=True):
        lines.append(f"| {name} | {row['r']:.2f} | {row['slope']:.2f} | {row['mse']:.2f} | {row['others']:.2f} |")
    lines += ["", "Pictures of combinations that show what the prompt names:", ""]
    lines += ["| " + " | ".join(name.replace("_", " ") for name in agreement) + " |", "|---" * len(agreement) + "|"]
    lines += ["| " + " | ".join(f"{100 * value:.0f} %" for value in agreement.values()) + " |"]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TOY_MODEL)
    parser.add_argument("--adapter", type=Path, help="another AU adapter than the one in the model's folder")
    group = parser.add_argument_group("sampling", "Default: what the fineface.json of the model says.")
    group.add_argument("--num-inference-steps", type=int, default=argparse.SUPPRESS)
    group.add_argument("--guidance-scale", type=float, default=argparse.SUPPRESS)
    group.add_argument("--au-guidance-scale", type=number_or_none, default=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="3 prompts instead of 15")
    parser.add_argument("--output", type=Path, help="write the report to this file as well")
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
    report = format_report(*evaluate(bench, arguments.quick), settings)
    print(report)
    if arguments.output:
        unfinished = arguments.output.with_suffix(".part")
        unfinished.write_text(report, encoding="utf-8")
        unfinished.rename(arguments.output)


if __name__ == "__main__":
    main()
