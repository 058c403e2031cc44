# SPDX-License-Identifier: Apache-2.0
"""Validation pictures: a sheet with a row for each prompt and seed and a column for each expression."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from PIL import Image
from tqdm.auto import tqdm

from action_units import read_aus
from drawing.contact_sheet import Table, draw_sheet
from program import replacing
from training.checkpoints import TrainingState, disk_errors_explained
from training.config import TrainConfig
from training.encoders import StableDiffusionEncoders, load_encoders


def choose_validation_aus(config: TrainConfig, au_names: Sequence[str], notes: list[str]) -> tuple[str, ...]:
    """
    The expressions of `--validation_aus` that an adapter with `au_names` can draw. For a default that it cannot draw,
    `notes` gets a sentence; one that the user asked for is a ValueError.
    """
    is_default = config.validation_aus == TrainConfig.__dataclass_fields__["validation_aus"].default
    chosen, left_out = [], []
    for aus in config.validation_aus:
        try:
            read_aus(aus, "--validation_aus", au_names)
            chosen.append(aus)
        except ValueError:
            if not is_default:
                raise
            left_out.append(aus)
    if left_out:
        notes.append(
            f"The validation sheet leaves out {'; '.join(left_out)}, because the data have not all of these AUs. Set"
            " others with `--validation_aus`."
        )
    return tuple(chosen)


@torch.no_grad()
def draw_validation(
    state: TrainingState, config: TrainConfig, encoders: StableDiffusionEncoders, device: torch.device
) -> Image.Image:
    """Draw the sheet, with the same noise every time."""
    base, model = config.pretrained_model_name_or_path, state.model
    scheduler = DDIMScheduler.from_pretrained(base, subfolder="scheduler", revision=config.revision)
    pipeline = encoders.make_pipeline(model.unet, model.au_adapter, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [config.seed + number for number in range(config.num_validation_images)]
    rows = [(prompt, seed) for prompt in config.validation_prompt for seed in seeds]
    jobs = [(prompt, aus, seed) for prompt, seed in rows for aus in config.validation_aus]
    pictures: list[Image.Image] = []
    model.eval()
    # The shapes differ from those of training, so a compiled UNet would be compiled again.
    with state.ema_weights(), torch.compiler.set_stance("force_eager"):
        for start in tqdm(range(0, len(jobs), config.train_batch_size), "validation", leave=False):
            prompts, aus, seeds = zip(*jobs[start : start + config.train_batch_size], strict=True)
            pictures += pipeline(
                list(prompts),
                aus=list(aus),
                generator=[torch.Generator(device).manual_seed(seed) for seed in seeds],
                num_inference_steps=config.validation_inference_steps,
                guidance_scale=config.validation_guidance_scale,
            ).images
    model.train()
    columns = len(config.validation_aus)
    table = Table(
        [pictures[start : start + columns] for start in range(0, len(pictures), columns)],
        [f"seed {seed}\n{prompt}" for prompt, seed in rows],
        list(config.validation_aus),
    )
    return draw_sheet([[table]], f"step {state.step}")


def validate(
    accelerator: Accelerator, state: TrainingState, config: TrainConfig, encoders: StableDiffusionEncoders
) -> None:
    """Draw the sheet, write it into the folder `validation`, and show it in TensorBoard or W&B."""
    are_temporary = encoders.vae is None
    if are_temporary:
        encoders = load_encoders(config, accelerator.device, state.model.unet.dtype)
    with accelerator.autocast():
        sheet = draw_validation(state, config, encoders, accelerator.device)
    if are_temporary:
        encoders.unload()
    path = config.output_dir / "validation" / f"step-{state.step:06}.png"
    with disk_errors_explained(path.name, config.output_dir), replacing(path) as unfinished:
        sheet.save(unfinished, "PNG")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.asarray(sheet)[None]}, step=state.step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": [sheet]}, step=state.step)
