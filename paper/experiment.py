# SPDX-License-Identifier: Apache-2.0
"""
An experiment: a data set of the toy world, systems that are trained on it under one budget, and their evaluations.
One folder keeps all of it, and nothing is made twice. The paper's tables and the trials share one experiment.
"""

import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from diffusers import UNet2DConditionModel
from PIL import Image

import train_fineface
from action_units import AU_NAMES
from au_encoder import ATTN_PROCESSORS_NAME
from drawing.jobs import read_model_defaults
from evaluation import run
from evaluation.metrics import Figure, au_mse, bootstrap
from evaluation.report import PICTURE_METRICS, find_figure
from evaluation.run import TOY_FACE_BOX, EvaluationConfig
from evaluation.systems import au_words
from evaluation.testset import COMBINATIONS, Item, Prompt, read_combinations
from face_data.store import write_lines
from paper import baselines
from paper.baselines import IP_ADAPTER_NAME
from program import TOY_MODEL, check_options, option, spell_option, write_atomically
from training.config import TrainConfig, default_settings
from training.data import FACE_BOX, LatentInputs, load_training_data
from training.encoders import load_encoders


SETTINGS_NAME = "experiment.json"
METER = "toy"
SAMPLED = ("num_inference_steps", "guidance_scale")
"""The fields of `Job` that one experiment has everywhere."""


@dataclass(frozen=True)
class Budget:
    """
    How much is spent on a system. It is trained on `pictures` for `steps` optimizer steps of `batch_size` samples, and
    evaluated with so many `prompts` and `combinations`; None means all. A trial of feedback is trained for
    `feedback_seconds` in steps of `feedback_batch_size` samples, and evaluated with `feedback_prompts`.
    """

    name: str
    pictures: int
    steps: int
    batch_size: int
    rank: int
    workers: int = 0
    mixed_precision: str = "no"
    prompts: int | None = None
    combinations: int | None = None
    evaluation_batch: int = 16
    bootstrap_draws: int = 1000
    feedback_seconds: float = option(40, "processor time of each trial of feedback (default: 40; full: 3600)", low=0)
    feedback_batch_size: int | None = option(None, "samples of their steps (default: 8; full: 128)", low=2)
    feedback_prompts: int | None = option(1, "prompts that judge each (default: 1; full: all)", low=1)
    latent_meter_steps: int = 1000

    def __post_init__(self):
        check_options(self, spell_option)


TRAINING = ("name", "pictures", "steps", "batch_size", "rank", "mixed_precision")
"""The fields of `Budget` on which the trained systems depend."""
BUDGETS = {
    "quick": Budget("quick", 4_000, 1_000, 8, 16, prompts=4, combinations=12),
    "full": Budget(
        *("full", 60_000, 5_000, 128, 32, 8, "bf16"),
        evaluation_batch=110,
        feedback_seconds=3600,
        feedback_prompts=None,
        latent_meter_steps=10_000,
    ),
}
"""`quick` finishes on two cores within an hour, `full` is for a GPU."""


class Experiment:
    """
    A `folder` of the data, the trained systems and their evaluations; each system has the same `budget`. `model`, the
    frozen base, is of the toy world. `sampling` replaces `num_inference_steps` and `guidance_scale` of its
    `fineface.json`. The file's `au_guidance_scale` is not used, because the paper guides AUs and text together.

    Raises:
        ValueError: if the folder was made with another budget, model or sampling.
        FileNotFoundError: if the model is not one of the toy world.
    """

    def __init__(self, folder: Path, budget: Budget, model: str = str(TOY_MODEL), sampling: dict | None = None):
        for part in ("meter", "second_meter", "image_encoder", "attribute_reader"):
            if not (Path(model) / part / "config.json").is_file():
                raise FileNotFoundError(f"`--model` is {model!r}, which has no {part}/ of the toy world.")
        self.folder, self.budget, self.model = folder, budget, model
        self.data = folder / "data" / "pictures"
        defaults = read_model_defaults(model)
        self.sampling = {name: defaults[name] for name in SAMPLED if name in defaults} | (sampling or {})
        settings = {name: getattr(budget, name) for name in TRAINING} | {"model_files": run.digest_if_folder(model)}
        settings |= self.sampling
        run.keep_settings(folder / SETTINGS_NAME, settings, "systems", PartialState())

    # ---- data ------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the data, and the caches that all systems share, before several processes train side by side."""
        with PartialState().main_process_first():
            self.render()
        self.inputs()
        self.inputs(in_words=True)

    def inputs(self, in_words: bool = False) -> LatentInputs:
        """The latents and captions of the data, from the cache; `in_words` with the AUs in the captions."""
        config = self.config("prepared")
        accelerator = train_fineface.make_accelerator(config)
        encoders = load_encoders(config, accelerator.device, train_fineface.frozen_dtype(accelerator))
        unet = UNet2DConditionModel.from_pretrained(self.model, subfolder="unet")
        with accelerator.main_process_first():
            data = load_training_data(config)
        if in_words:
            baselines.word_captions(data, au_words(is_toy=True))
        return baselines.encode_data(data, config, accelerator, encoders, unet)

    def render(self) -> None:
        """Render the training pictures as an image folder, with face boxes and captions that name no expression."""
        from toy_faces.pictures import Pictures, aus_of, captions_of, render_seed

        metadata = self.data / "metadata.jsonl"
        if metadata.exists():
            return
        self.data.mkdir(parents=True, exist_ok=True)
        seeds, box, lines = range(self.budget.pictures), dict(zip(FACE_BOX, TOY_FACE_BOX, strict=True)), []
        shards = Pictures(self.data.parent / "pictures", self.budget.pictures, draw=render_seed).wait()
        rows = zip(seeds, itertools.chain(*shards), captions_of(seeds, 0), aus_of(seeds).tolist(), strict=True)
        for seed, picture, text, aus in rows:
            Image.fromarray(picture).save(self.data / f"{seed:06}.png", compress_level=1)
            named = dict(zip(AU_NAMES, (round(value, 4) for value in aus), strict=True))
            lines.append({"file_name": f"{seed:06}.png", "text": text, **named, **box})
        write_lines(metadata, lines)

    # ---- training --------------------------------------------------------------------------------------------------

    def config(self, name: str, **changes) -> TrainConfig:
        """The training settings of a system: those of the budget, and `changes` of them."""
        budget = self.budget
        config = TrainConfig(
            pretrained_model_name_or_path=self.model,
            train_data_dir=self.data,
            output_dir=self.folder / "systems" / name,
            cache_latents=True,
            cache_dir=self.folder / "cache",
            max_train_steps=budget.steps,
            train_batch_size=budget.batch_size,
            rank=budget.rank,
            learning_rate=1e-3,
            lr_scheduler="cosine",
            lr_warmup_steps=min(100, budget.steps // 10),
            use_ema=True,
            # An average over a tenth of the run.
            ema_decay=max(0.9, 1 - 10 / budget.steps),
            # Some captions are empty, so that the LoRA leaves the unconditional prediction as it was.
            caption_drop_prob=0.1,
            dataloader_num_workers=budget.workers,
            mixed_precision=budget.mixed_precision,
            checkpointing_steps=max(1, budget.steps // 10),
            checkpoints_total_limit=1,
            resume_from_checkpoint="latest",
            report_to="none",
        )
        return replace(config, **changes)

    def train_fineface(self, name: str, **changes) -> Path:
        """Train an adapter by the script that users run, if it is not trained yet. Returns its folder."""
        folder = self.system_folder(name, changes)
        if not (folder / ATTN_PROCESSORS_NAME).exists():
            train_fineface.run(self.config(name, **changes))
        return folder

    def train_baseline(self, name: str, system: str, **changes) -> Path:
        """Train another system, if it is not trained yet. Returns what `evaluation.run` reads."""
        config = self.config(name, **changes)
        baselines.run(system, config)
        return config.output_dir / IP_ADAPTER_NAME if system == "ip_adapter" else config.output_dir

    def system_folder(self, name: str, changes: dict) -> Path:
        """The folder of a system. It records the training's settings, and other settings than those are an error."""
        folder = self.folder / "systems" / name
        settings = self.config(name, **changes).fixed_settings()
        run.keep_settings(folder / SETTINGS_NAME, settings, "a system", PartialState(), default_settings())
        return folder

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self, name: str, adapter: Path | None, system: str = "fineface", sampling=None, **changes) -> None:
        """Evaluate a system. `sampling` replaces the experiment's own, and `changes` replace other settings."""
        sampling = {**self.sampling, **(sampling or {})}
        if system == "fineface":
            sampling.setdefault("au_guidance_scale", None)
        config = EvaluationConfig(
            output=self.folder / "runs" / name,
            model=self.model,
            adapter=None if adapter is None else str(adapter),
            system=system,
            sampling=sampling,
            limit=self.budget.prompts,
            limit_combinations=self.budget.combinations,
            batch_size=self.budget.evaluation_batch,
            bootstrap_draws=self.budget.bootstrap_draws,
        )
        config = replace(config, **changes)
        finished = config.output / "finished.json"
        asked = json.dumps(asdict(config), default=str)
        if finished.exists() and finished.read_text(encoding="utf-8") == asked:
            return
        run.run(config)
        if torch.accelerator.is_available():
            torch.accelerator.memory.empty_cache()
        if PartialState().is_main_process:
            write_atomically(finished, asked)

    def summary(self, name: str) -> pd.DataFrame | None:
        """The summary of an evaluated run, or None."""
        path = self.folder / "runs" / name / "summary.csv"
        return pd.read_csv(path) if path.exists() else None

    def pictures(self, name: str) -> Path:
        return self.folder / "runs" / name / "pictures"

    def combinations(self, prompt: Prompt, count: int) -> dict[str, str]:
        """The file names of a prompt's first combinations, at most `count`, by their labels in a drawing."""
        found = enumerate(read_combinations(COMBINATIONS)[: min(count, self.budget.combinations or count)])
        return {aus.replace("AU", ""): Item("combination", prompt, aus, number).name for number, aus in found}

    def figure(self, name: str, metric: str, part: str, au: str = "") -> Figure:
        """A figure of an evaluated run, by the toy world's meter where it is measured by one."""
        return find_figure(self.summary(name), metric, part, "" if metric in PICTURE_METRICS else METER, au)

    def num_pictures(self, name: str) -> int:
        """The number of pictures that the AU MSE of single AUs and combinations is from."""
        return sum(self.figure(name, "au_mse", part).pictures for part in ("single", "combination"))

    def paired_difference(self, names: tuple[str, str], metric: str, part: str) -> Figure:
        """
        The mean AU MSE or CLIP-I of the first run minus the second, over pictures of the same prompt, AUs and seed.
        Pictures that are hard for both runs do not widen the interval.
        """

        def values_of(name: str) -> pd.Series:
            results = pd.read_csv(self.folder / "runs" / name / "results.csv")
            rows = results[(results["part"] == part) & (results["meter"] == METER)].set_index(["name", "prompt_index"])
            if metric in rows:
                return rows[metric]
            measured = rows[[f"measured_{name}" for name in AU_NAMES]]
            return pd.Series(au_mse(rows[list(AU_NAMES)].to_numpy(), measured.to_numpy()), rows.index)

        difference = values_of(names[0]).sub(values_of(names[1])).dropna()
        prompts = difference.index.get_level_values("prompt_index").to_numpy()
        return bootstrap(np.mean, difference.to_numpy(), prompts=prompts, draws=self.budget.bootstrap_draws)
