# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: the state that changes during training, how it is written and read, and where a run resumes."""

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
from au_encoder import ENCODER_CONFIG_NAME, copy_checked, read_tensors, write_au_adapter
from pipeline_fineface import LORA_NAME
from program import is_integer, show_value
from training.config import TrainConfig, default_settings


CONFIG_NAME = "train_config.json"
STATE_NAME = "training_state.json"
PARAMETERS_NAME = "trained_parameters.safetensors"
EMA_PARAMETERS_NAME = "ema_parameters.safetensors"


@dataclass
class TrainingState:
    """
    The state that changes during training: the `FineFaceModel` without the wrappers of accelerate, the moving average
    of its trained parameters, and the number of optimizer steps done. A step has `samples_per_step` over all processes
    and accumulated batches; the data set has `num_samples` rows. A checkpoint holds all this, and the state of
    optimizer and schedule.
    """

    model: nn.Module
    ema: EMAModel | None
    samples_per_step: int = 1
    num_samples: int = 0
    step: int = 0

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Put the averaged weights, if there are any, into the model, and restore its own weights at the end."""
        if self.ema is None:
            yield
            return
        parameters = list(self.model.trained_parameters().values())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def save_adapter(self, folder: Path) -> None:
        with self.ema_weights():
            write_au_adapter(folder, self.model.au_adapter, self.model.unet, LORA_NAME)

    def _files(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of a checkpoint, by the name of their file and their own names."""
        parameters = self.model.trained_parameters()
        files = {PARAMETERS_NAME: {name: parameter.detach() for name, parameter in parameters.items()}}
        if self.ema is not None:
            files[EMA_PARAMETERS_NAME] = dict(zip(parameters, self.ema.shadow_params, strict=True))
        return files

    def save(self, folder: Path) -> None:
        for file, tensors in self._files().items():
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / file)
        progress = {"step": self.step, "samples_per_step": self.samples_per_step, "num_samples": self.num_samples}
        (folder / STATE_NAME).write_text(json.dumps(progress))
        self.save_adapter(folder)

    def load(self, folder: Path) -> None:
        for file, tensors in self._files().items():
            copy_checked(read_tensors(folder / file), tensors, folder / file)
        self.step = _read_json(folder, STATE_NAME)["step"]
        if self.ema is not None:
            self.ema.optimization_step = self.step


def register_state(accelerator: Accelerator, state: TrainingState) -> None:
    """Make accelerate save and load only the trained parameters instead of the whole model with its frozen base."""

    def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            state.save(Path(folder))

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()
        state.load(Path(folder))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in `output_dir`, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(accelerator: Accelerator, state: TrainingState, config: TrainConfig) -> None:
    """
    Write `checkpoint-<step>` under a hidden name and rename it when it is complete. Then remove old checkpoints, which
    are renamed first, so that a checkpoint under its own name is always complete.
    """
    folder = config.output_dir / f"checkpoint-{state.step}"
    unfinished = config.output_dir / f".{folder.name}.part"
    if accelerator.is_main_process:
        # Remove what a killed process left behind while it wrote or removed a checkpoint.
        for path in config.output_dir.glob(".checkpoint-*"):
            shutil.rmtree(path)
        unfinished.mkdir()
    accelerator.wait_for_everyone()
    with disk_errors_explained(folder.name, config.output_dir):
        try:
            if accelerator.is_main_process:
                (unfinished / CONFIG_NAME).write_text(config.to_json())
            # By default, DeepSpeed writes the frozen base too. Without DeepSpeed, the option is an error.
            uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
            accelerator.save_state(unfinished, **({"exclude_frozen_parameters": True} if uses_deepspeed else {}))
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(unfinished, folder)
        limit = config.checkpoints_total_limit
        for old in list_checkpoints(config.output_dir)[:-limit] if limit else []:
            removed = old.with_name(f".{old.name}.old")
            os.replace(old, removed)
            shutil.rmtree(removed)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """
    Load weights, optimizer, schedule and random state. Call `register_state` first. Raises a ValueError if a file of
    the checkpoint is missing or broken.
    """
    # A checkpoint of DeepSpeed does not contain the base.
    options = {"load_module_strict": False} if accelerator.distributed_type == DistributedType.DEEPSPEED else {}
    try:
        accelerator.load_state(checkpoint, **options)
    except (MemoryError, torch.OutOfMemoryError):
        # The checkpoint may be whole, and nobody should be told to delete it.
        raise
    # torch, pickle and accelerate raise errors of many types for a truncated file.
    except Exception as error:
        broken = [f"{path.name} is broken" for path in sorted(checkpoint.glob("*.bin")) if not _is_loadable(path)]
        raise _broken(checkpoint, ", ".join(broken) or str(error) or type(error).__name__) from error


def _is_loadable(path: Path) -> bool:
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return False
    return True


def _broken(checkpoint: Path, reason: str) -> ValueError:
    return ValueError(
        f"The checkpoint {str(checkpoint)!r} cannot be read: {reason}. Delete it to resume from the one before."
    )


def _read_json(checkpoint: Path, name: str) -> dict:
    try:
        values = json.loads((checkpoint / name).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(checkpoint, f"{name}: {error}") from error
    if not isinstance(values, dict) or (name == STATE_NAME and not is_integer(values.get("step"))):
        raise _broken(checkpoint, f"{name} holds {show_value(values)}")
    return values


def find_checkpoint(config: TrainConfig) -> Path | None:
    """
    Find the checkpoint to resume from, or return None for a new run.

    Raises:
        FileNotFoundError: if `--resume_from_checkpoint` names no checkpoint.
        ValueError: if `--output_dir` holds another run, or the checkpoint is broken or has other settings.
    """
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
        # A bare name means a checkpoint in `--output_dir`, as in the scripts of diffusers.
        if checkpoint.name in [path.name for path in present] and len(checkpoint.parts) == 1:
            checkpoint = config.output_dir / checkpoint
        if not (checkpoint / STATE_NAME).is_file():
            there = f" {str(config.output_dir)!r} holds {', '.join(p.name for p in present) or 'none'}."
            raise FileNotFoundError(f"`--resume_from_checkpoint`: {str(checkpoint)!r} is no checkpoint.{there}")
        if present and checkpoint.resolve() != present[-1].resolve():
            raise ValueError(
                f"{str(config.output_dir)!r} holds {present[-1].name}, which is not {str(checkpoint)!r}. Delete later"
                " checkpoints to resume from an earlier one, or set another `--output_dir`."
            )
    if checkpoint is not None:
        _read_json(checkpoint, STATE_NAME)
        saved = default_settings() | _read_json(checkpoint, CONFIG_NAME)
        settings, meter = config.fixed_settings(), config.au_feedback_meter
        # A meter may have moved, but feedback neither begins nor ends because a run is resumed.
        if meter is None or saved["au_feedback_meter"] is None:
            settings = {"au_feedback_meter": meter, **settings}
        for name, value in settings.items():
            if saved[name] != value:
                raise ValueError(
                    f"`--{name}` is {value!r}, but {str(checkpoint)!r} was trained with {show_value(saved[name])}. A"
                    " run continues with the settings it began with."
                )
    return checkpoint


SAME_WORK = {
    "samples_per_step": "A step has {now} samples, but had {saved} in {checkpoint!r}. They are the product of"
    " `--train_batch_size`, `--gradient_accumulation_steps` and the number of processes: keep it.",
    # The order of the samples depends on the number of rows.
    "num_samples": "The data set has {now} rows, but had {saved} in {checkpoint!r}. A run continues with the data it"
    " began with: restore them, or begin a new run in another `--output_dir`.",
    "au_names": "The AUs to train are {now}, but {checkpoint!r} was trained with {saved}. Name these by `--aus`, or"
    " begin a new run.",
}


def check_same_work(checkpoint: Path | None, **current) -> None:
    """Raise a ValueError if one of `current`, with names of `SAME_WORK`, was different in `checkpoint`."""
    if checkpoint is None:
        return
    saved = _read_json(checkpoint, STATE_NAME)
    if "au_names" in current:
        saved["au_names"] = tuple(_read_json(checkpoint, ENCODER_CONFIG_NAME).get("au_names") or AU_NAMES)
    for name, now in current.items():
        if saved.get(name, now) != now:
            now, then = (", ".join(value) if name == "au_names" else value for value in (now, saved[name]))
            raise ValueError(SAME_WORK[name].format(now=now, saved=then, checkpoint=str(checkpoint)))


@contextmanager
def disk_errors_explained(what: str, folder: Path) -> Iterator[None]:
    """Turn an error of writing into `folder` into an OSError that tells the free space."""
    try:
        yield
    # torch and safetensors raise their own types of errors if the disk is full.
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free / 2**20
        raise OSError(
            f"{what} cannot be written to {str(folder)!r}, where {free:.0f} MiB are free: {error}. Earlier files are"
            " kept. Free some space, and continue with `--resume_from_checkpoint latest`."
        ) from error
