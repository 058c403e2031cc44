# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what changes during training, how it is written and read, and which checkpoint a run goes on from."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from action_units import AU_NAMES
from au_encoder import ENCODER_CONFIG_NAME, check_tensors, read_tensors, write_au_adapter
from pipeline_fineface import LORA_NAME
from training.config import TrainConfig, default_settings


CONFIG_NAME = "train_config.json"
STATE_NAME = "training_state.json"
PARAMETERS_NAME = "trained_parameters.safetensors"
EMA_PARAMETERS_NAME = "ema_parameters.safetensors"


@dataclass
class TrainingState:
    """
    What changes during training, and what a checkpoint holds beside optimizer and schedule.

    Args:
        model (`FineFaceModel`):
            Without the wrappers of accelerate.
        ema (`EMAModel`, *optional*):
            The moving average of what is trained.
        samples_per_step (`int`):
            Over all processes and accumulated batches.
        step (`int`):
            How many optimizer steps are done.
    """

    model: nn.Module
    ema: EMAModel | None
    samples_per_step: int = 1
    step: int = 0

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, if there are any."""
        parameters = list(self.model.trained_parameters().values())
        if self.ema is not None:
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
        try:
            yield
        finally:
            if self.ema is not None:
                self.ema.restore(parameters)

    def save_adapter(self, folder: Path) -> None:
        with self.ema_weights():
            write_au_adapter(folder, self.model.au_adapter, self.model.unet, LORA_NAME)

    def save(self, folder: Path) -> None:
        parameters = self.model.trained_parameters()
        save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, folder / PARAMETERS_NAME)
        if self.ema is not None:
            averages = {n: p.cpu() for n, p in zip(parameters, self.ema.shadow_params, strict=True)}
            save_file(averages, folder / EMA_PARAMETERS_NAME)
        progress = {"step": self.step, "samples_per_step": self.samples_per_step}
        (folder / STATE_NAME).write_text(json.dumps(progress))
        self.save_adapter(folder)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        parameters = self.model.trained_parameters()
        files = {PARAMETERS_NAME: list(parameters.values())}
        if self.ema is not None:
            files[EMA_PARAMETERS_NAME] = self.ema.shadow_params
        for name, targets in files.items():
            saved = read_tensors(folder / name)
            check_tensors(saved, {key: tuple(p.shape) for key, p in parameters.items()}, folder / name)
            for key, target in zip(parameters, targets, strict=True):
                target.copy_(saved[key])
        self.step = json.loads((folder / STATE_NAME).read_text())["step"]
        if self.ema is not None:
            self.ema.optimization_step = self.step


def register_state(accelerator: Accelerator, state: TrainingState) -> None:
    """Make `accelerator.save_state` write what is trained instead of the whole frozen base, and read it back."""

    def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            state.save(Path(folder))

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()
        state.load(Path(folder))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def if_deepspeed(accelerator: Accelerator, **options) -> dict:
    """`options`, which only DeepSpeed knows, or none of them without it."""
    return options if accelerator.distributed_type == DistributedType.DEEPSPEED else {}


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in `output_dir`, the oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(accelerator: Accelerator, state: TrainingState, config: TrainConfig) -> None:
    """Write `checkpoint-<step>` under another name, rename it, and only then remove old ones."""
    folder = config.output_dir / f"checkpoint-{state.step}"
    unfinished = config.output_dir / f".{folder.name}.part"
    if accelerator.is_main_process:
        # A process that was killed may have left some too.
        for path in config.output_dir.glob(".checkpoint-*.part"):
            shutil.rmtree(path)
        unfinished.mkdir()
    accelerator.wait_for_everyone()
    with disk_errors_explained(folder.name, unfinished):
        try:
            if accelerator.is_main_process:
                (unfinished / CONFIG_NAME).write_text(config.to_json())
            # DeepSpeed would write the base too.
            accelerator.save_state(unfinished, **if_deepspeed(accelerator, exclude_frozen_parameters=True))
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(unfinished, folder)
        limit = config.checkpoints_total_limit
        for old in list_checkpoints(config.output_dir)[:-limit] if limit else []:
            shutil.rmtree(old)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """Read weights, optimizer, schedule and random state back; `register_state` comes before."""
    # DeepSpeed has not written the base.
    accelerator.load_state(checkpoint, **if_deepspeed(accelerator, load_module_strict=False))


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, or None for a new run."""
    present = list_checkpoints(config.output_dir)
    if config.resume_from_checkpoint is None:
        if present:
            raise ValueError(
                f"{str(config.output_dir)!r} holds {present[-1].name} of an earlier run. Continue it with"
                " `--resume_from_checkpoint latest`, or set another `--output_dir`."
            )
        return None
    if config.resume_from_checkpoint == "latest":
        checkpoint = present[-1] if present else None
    else:
        checkpoint = Path(config.resume_from_checkpoint)
        if not (checkpoint / STATE_NAME).is_file():
            raise FileNotFoundError(f"`--resume_from_checkpoint`: {str(checkpoint)!r} is no checkpoint.")
        if present and checkpoint.resolve() != present[-1].resolve():
            raise ValueError(
                f"{str(config.output_dir)!r} holds {present[-1].name}, which is not {str(checkpoint)!r}. Delete later"
                " checkpoints to go on from an earlier one, or set another `--output_dir`."
            )
    if checkpoint is not None:
        saved = default_settings() | json.loads((checkpoint / CONFIG_NAME).read_text())
        for name, value in config.fixed_settings().items():
            if saved[name] != value:
                raise ValueError(
                    f"`--{name}` is {value!r}, but {str(checkpoint)!r} was trained with {saved[name]!r}. A run"
                    " continues with the settings it began with."
                )
    return checkpoint


def check_samples_per_step(checkpoint: Path, samples_per_step: int) -> None:
    """Raise a ValueError if a step had another number of samples: they are counted through, on any processes."""
    saved = json.loads((checkpoint / STATE_NAME).read_text()).get("samples_per_step", samples_per_step)
    if saved != samples_per_step:
        raise ValueError(
            f"A step has {samples_per_step} samples, but had {saved} in {str(checkpoint)!r}. They are the product of"
            " `--train_batch_size`, `--gradient_accumulation_steps` and the number of processes: keep it."
        )


def check_same_aus(checkpoint: Path, au_names: tuple[str, ...]) -> None:
    """Raise a ValueError if the adapter of `checkpoint` was trained for other AUs."""
    saved = json.loads((checkpoint / ENCODER_CONFIG_NAME).read_text()).get("au_names") or AU_NAMES
    if tuple(saved) != au_names:
        raise ValueError(
            f"The AUs to train are {', '.join(au_names)}, but {str(checkpoint)!r} was trained with {', '.join(saved)}."
            " Name these by `--aus`, or begin a new run."
        )


def write_config(config: TrainConfig) -> None:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    unfinished = config.output_dir / f".{CONFIG_NAME}.part"
    with disk_errors_explained(CONFIG_NAME, unfinished):
        unfinished.write_text(config.to_json())
    os.replace(unfinished, config.output_dir / CONFIG_NAME)


@contextmanager
def disk_errors_explained(what: str, unfinished: Path) -> Iterator[None]:
    """Report what fails to be written inside as an OSError with the space that is left."""
    try:
        yield
    # The writers of torch and safetensors raise errors of their own for a full disk.
    except (OSError, RuntimeError, SafetensorError) as error:
        folder = unfinished.parent
        free = shutil.disk_usage(folder).free / 2**20
        raise OSError(
            f"{what} cannot be written to {str(folder)!r}, where {free:.0f} MiB are free: {error}. What was written"
            " before is kept. Make room, and go on with `--resume_from_checkpoint latest`."
        ) from error
