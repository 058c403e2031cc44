# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trains the other systems of the paper's Table 1, and the small IP-Adapter of its Fig. 7, on the same data and with the
same flags as `train_fineface.py`:

  python -m paper.baselines --system lora_t --pretrained_model_name_or_path BASE \\
      --train_data_dir DATA --output_dir OUT --max_train_steps 5000

  dreambooth   the whole UNet, AUs as words in the captions, and a prior preservation loss
  lora_t       a LoRA, AUs as words in the captions
  lora_au      a LoRA, and an encoder that makes the AUs a token at the end of the text sequence
  ip_adapter   keys and values for a token or more from the image encoder beside the base model

`python -m evaluation.run --system … --adapter OUT` reads the output folder. A training that was stopped goes on when
the same command runs again.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from action_units import AU_NAMES
from au_attention_processor import au_layers
from au_encoder import ENCODER_FOLDER, LORA_WEIGHTS_NAME, AUEncoder
from drawing.files import write_png
from drawing.jobs import read_model_defaults
from evaluation.run import check_settings, write_settings
from evaluation.systems import UNET_FOLDER, append_tokens, au_words, aus_in_words, is_toy_model
from pipeline_fineface import LORA_NAME
from program import Parser, only_run_in, run_program, write_atomically
from train_fineface import (
    LORA_TARGETS,
    attention_for_training,
    choose_resolution,
    frozen_dtype,
    init_trackers,
    load_noise_scheduler,
    make_accelerator,
    train,
)
from training.checkpoints import TrainingState, check_same_work, find_checkpoint
from training.config import TrainConfig, default_settings
from training.config import parse_args as parse_training_args
from training.data import (
    LatentInputs,
    PixelInputs,
    TrainingData,
    TrainingSamples,
    cache_inputs,
    check_pictures,
    load_training_data,
)
from training.encoders import StableDiffusionEncoders, load_encoders


BASELINES = ("dreambooth", "lora_t", "lora_au", "ip_adapter")
IP_ADAPTER_NAME = "ip_adapter.safetensors"
IMAGE_TOKENS = 4
PRIOR_FOLDER = "prior"
PRIOR_PICTURES = 200
PRIOR_WEIGHT = 1.0
"""Weight of the prior in the loss. As in DreamBooth, each step has as many pictures of the prior as of the data."""
SETTINGS_NAME = "baseline.json"
DONE_NAME = "done.json"
NOT_FOR_BASELINES = ("streaming", "push_to_hub", "validation_prompt", "adapter_name_or_path", "au_feedback_meter")
"""Flags of train_fineface.py that baselines do not have."""


class BaselineModel(nn.Module):
    """
    All that a system trains, in one module. It predicts as a UNet does, from the text and the inputs of its system.

    Args:
        au_adapter (`AUEncoder`, *optional*):
            For LoRA-AU only: it makes the AUs a token of the text sequence.
    """

    def __init__(self, unet: UNet2DConditionModel, au_adapter: AUEncoder | None = None):
        super().__init__()
        self.unet = unet
        self.au_adapter = au_adapter

    def forward(self, noisy_latents, timesteps, prompt_embeds, au_intensities, added_cond_kwargs=None):
        """`au_intensities`, `(batch, 12)`, are for LoRA-AU; an IP-Adapter takes its input from `added_cond_kwargs`."""
        dtype = self.unet.dtype
        # A cache has them in float16, and autocast on a CPU cannot concatenate these with bfloat16 tokens.
        prompt_embeds = prompt_embeds.to(dtype)
        if self.au_adapter is not None:
            prompt_embeds = append_tokens(prompt_embeds, self.au_adapter(au_intensities))
        noisy_latents = noisy_latents.to(dtype)
        return self.unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=added_cond_kwargs).sample

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def make_baseline(
    system: str, config: TrainConfig, dtype: torch.dtype = torch.float32, image_embed_dim: int = 0
) -> BaselineModel:
    """Make the model of a system. Frozen weights are in `dtype`, trained ones in float32."""
    unet = UNet2DConditionModel.from_pretrained(
        config.pretrained_model_name_or_path, subfolder="unet", revision=config.revision, variant=config.variant
    )
    unet.requires_grad_(system == "dreambooth")
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    token_encoder = None
    if system in ("lora_t", "lora_au"):
        lora = {"r": config.rank, "lora_alpha": config.rank, "init_lora_weights": "gaussian"}
        unet.add_adapter(LoraConfig(**lora, target_modules=LORA_TARGETS), LORA_NAME)
    if system == "lora_au":
        token_encoder = AUEncoder(
            num_aus=len(AU_NAMES),
            cross_attention_dim=unet.config.cross_attention_dim,
            encoder_type=config.encoder_type,
            num_tokens=config.num_au_tokens,
            hidden_dim=config.au_hidden_dim,
        )
    if system == "ip_adapter":
        add_ip_adapter(unet, image_embed_dim)
    # Use `nn.Module.to`: `ModelMixin.to` logs a warning on casts.
    nn.Module.to(unet, dtype)
    model = BaselineModel(unet, token_encoder)
    cast_training_params(model)
    return model.train()


def add_ip_adapter(unet: UNet2DConditionModel, image_embed_dim: int) -> None:
    """Add a new IP-Adapter by diffusers' own loader. Its keys and values start as copies of the text's."""
    width = unet.config.cross_attention_dim
    layers = {}
    for number, name in _ip_layers(unet).items():
        attn = unet.get_submodule(name)
        layers[f"{number}.to_k_ip.weight"] = attn.to_k.weight.detach().clone()
        layers[f"{number}.to_v_ip.weight"] = attn.to_v.weight.detach().clone()
    projection = nn.Linear(image_embed_dim, IMAGE_TOKENS * width)
    image_proj = {
        "proj.weight": projection.weight.detach(),
        "proj.bias": projection.bias.detach(),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    unet._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": layers}])
    for name in _ip_layers(unet).values():
        unet.get_submodule(name).processor.requires_grad_(True)
    unet.encoder_hid_proj.requires_grad_(True)


def _ip_layers(unet: UNet2DConditionModel) -> dict[int, str]:
    """Cross-attention layers by their number among all attention layers, which published files use as names."""
    widths = au_layers(unet)
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return {number: name for number, name in enumerate(names) if name in widths}


def ip_adapter_state_dict(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The tensors of the IP-Adapter, by the names in published `.safetensors` files."""
    tensors = {}
    for number, name in _ip_layers(unet).items():
        processor = unet.get_submodule(name).processor
        tensors[f"ip_adapter.{number}.to_k_ip.weight"] = processor.to_k_ip[0].weight
        tensors[f"ip_adapter.{number}.to_v_ip.weight"] = processor.to_v_ip[0].weight
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    for ours, theirs in (("image_embeds", "proj"), ("norm", "norm")):
        for kind in ("weight", "bias"):
            tensors[f"image_proj.{theirs}.{kind}"] = getattr(getattr(projection, ours), kind)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def save_baseline(system: str, model: BaselineModel, folder: Path) -> None:
    """Write the files that `evaluation.run` reads."""
    unet = model.unet
    if system == "dreambooth":
        unet.save_pretrained(folder / UNET_FOLDER)
    if system in ("lora_t", "lora_au"):
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name=LORA_NAME)),
            unet_lora_adapter_metadata=unet.peft_config[LORA_NAME].to_dict(),
            weight_name=LORA_WEIGHTS_NAME,
        )
    if system == "lora_au":
        model.au_adapter.save_pretrained(folder / ENCODER_FOLDER)
    if system == "ip_adapter":
        save_file(ip_adapter_state_dict(unet), folder / IP_ADAPTER_NAME)


@dataclass
class BaselineState(TrainingState):
    """The training state of `train_fineface.py`, but it saves a baseline instead of an adapter."""

    system: str = ""

    def save_adapter(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with self.ema_weights():
            save_baseline(self.system, self.model, folder)


# --------------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------------


def word_captions(data, words: tuple[str, ...]) -> None:
    """Append the AUs of each row to its caption, in words."""
    rows = zip(data.captions.to_pylist(), data.au_intensities.tolist(), strict=True)
    data.captions = pa.chunked_array([pa.array([text + aus_in_words(aus, words) for text, aus in rows], pa.string())])


class WithPrior(torch.utils.data.Dataset):
    """Batches of which the first half are training samples, and the second half samples of the prior."""

    def __init__(self, samples: TrainingSamples, prior: TrainingSamples):
        self.samples, self.prior, self.inputs = samples, prior, samples.inputs

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        samples, priors = [self.samples[number] for number in numbers], [self.prior[number] for number in numbers]
        side = self.inputs.latents_shape[-1]
        for sample, prior in zip(samples, priors, strict=True):
            # Error messages name the training sample of a pair.
            prior["row"] = sample["row"]
            # The loss is a mean over both halves, but has to be the sum of their means.
            sample["loss_weights"] = 2 * sample.get("loss_weights", torch.ones(side, side))
            prior["loss_weights"] = 2 * PRIOR_WEIGHT * torch.ones(side, side)
        return samples + priors


class WithPictures(torch.utils.data.Dataset):
    """Each training sample, with the embedding of its own picture as an image prompt."""

    def __init__(self, samples: TrainingSamples, image_embeds: torch.Tensor):
        self.samples, self.image_embeds, self.inputs = samples, image_embeds, samples.inputs

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        sample, config = self.samples[number], self.samples.config
        # It is dropped as often as the caption but independently, because guidance needs predictions without each.
        keep = np.random.default_rng((config.seed, 2, number)).random() >= config.caption_drop_prob
        return sample | {"image_embeds": self.image_embeds[sample["row"]] * keep}


class EncodersWithPictures(StableDiffusionEncoders):
    """The encoders of Stable Diffusion, for a UNet that also has an IP-Adapter."""

    def added_cond_kwargs(self, batch: dict[str, torch.Tensor]) -> dict:
        return {"image_embeds": [batch["image_embeds"][:, None]]}


@torch.no_grad()
def make_prior(config: TrainConfig, captions: list[str], device: torch.device, count: int, seed: int = 0) -> Path:
    """
    Draw captions of the data with the untrained base, as a data set of `count` pictures with all AUs 0. Its metadata
    appear when it is complete. Returns its folder.
    """
    folder = config.output_dir / PRIOR_FOLDER
    if (folder / "metadata.jsonl").exists():
        return folder
    pipeline = StableDiffusionPipeline.from_pretrained(
        config.pretrained_model_name_or_path,
        dtype=torch.float32,
        safety_checker=None,
        requires_safety_checker=False,
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    defaults = read_model_defaults(config.pretrained_model_name_or_path)
    sampling = {"num_inference_steps": 50, **defaults}
    sampling.pop("au_guidance_scale", None)
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(seed).permutation(len(captions))
    rows, batch_size = [], config.train_batch_size
    chosen = [captions[order[number % len(order)]] for number in range(count)]
    for start in tqdm(range(0, count, batch_size), desc="prior", unit="batch"):
        prompts = chosen[start : start + batch_size]
        numbers = range(start, start + len(prompts))
        paths = [folder / f"{number:05d}.png" for number in numbers]
        if not all(path.exists() for path in paths):
            generators = [torch.Generator().manual_seed(seed + number) for number in numbers]
            images = pipeline(prompts, generator=generators, **sampling).images
            for path, image in zip(paths, images, strict=True):
                write_png(image, path)
        neutral = dict.fromkeys(AU_NAMES, 0.0)
        rows += [{"file_name": p.name, "text": t, **neutral} for p, t in zip(paths, prompts, strict=True)]
    write_atomically(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


@torch.no_grad()
def embed_pictures(data, config: TrainConfig, device: torch.device) -> torch.Tensor:
    """The image encoder's embedding of each row, `(rows, width)`, as the pipeline of an IP-Adapter prepares it."""
    encoder = CLIPVisionModelWithProjection.from_pretrained(
        config.pretrained_model_name_or_path, subfolder="image_encoder", dtype=torch.float32
    )
    encoder.to(device).eval()
    size = encoder.config.image_size
    processor, embeds = CLIPImageProcessor(size=size, crop_size=size), []
    for start in tqdm(range(0, len(data), 64), desc="image embeddings", unit="batch"):
        images = [open_rgb(data, row) for row in range(start, min(start + 64, len(data)))]
        pixel_values = processor(images, return_tensors="pt").pixel_values.to(device)
        embeds.append(encoder(pixel_values).image_embeds.cpu())
    return torch.cat(embeds)


def open_rgb(data: TrainingData, row: int) -> Image.Image:
    with data.open_picture(row) as image:
        return image.convert("RGB")


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def check_flags(config: TrainConfig) -> None:
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    for name in NOT_FOR_BASELINES:
        if getattr(config, name) != defaults[name]:
            raise ValueError(f"`--{name}` is for train_fineface.py alone: leave it out.")


def steps_trained(folder: Path) -> int:
    """The number of steps that a finished baseline was trained for; 0 if it is not finished."""
    done = folder / DONE_NAME
    return json.loads(done.read_text(encoding="utf-8"))["steps"] if done.exists() else 0


def encode_data(
    data: TrainingData,
    config: TrainConfig,
    accelerator: Accelerator,
    encoders: StableDiffusionEncoders,
    unet: nn.Module,
) -> PixelInputs | LatentInputs:
    """The inputs of training. With `--cache_latents`, they come from the same cache as in `train_fineface.py`."""
    inputs = PixelInputs(data, encoders, choose_resolution(config, unet, encoders.vae_scale_factor))
    return cache_inputs(inputs, config, accelerator) if config.cache_latents else inputs


def run(system: str, config: TrainConfig) -> None:
    """Train a baseline, or continue a training that was stopped."""
    check_flags(config)
    # The paper's systems have its twelve AUs and no others.
    config = replace(config, aus=AU_NAMES)
    config.check_machine()
    settings = {"system": system, **config.fixed_settings()}
    has_settings = check_settings(config.output_dir / SETTINGS_NAME, settings, "a baseline", default_settings())
    if steps_trained(config.output_dir) >= config.max_train_steps:
        return
    accelerator = make_accelerator(config)
    with only_run_in(config.output_dir) if accelerator.is_main_process else nullcontext():
        _train(system, config, accelerator, settings if accelerator.is_main_process and not has_settings else None)
    accelerator.end_training()


def _train(system: str, config: TrainConfig, accelerator: Accelerator, settings: dict | None) -> None:
    """Train a baseline, and write `settings`, if there are any, when the data have been checked."""
    checkpoint = find_checkpoint(config)
    samples_per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    check_same_work(checkpoint, samples_per_step=samples_per_step)
    with accelerator.main_process_first():
        data = load_training_data(config)
        if accelerator.is_main_process:
            check_pictures(data)
    if settings is not None:
        write_settings(config.output_dir / SETTINGS_NAME, settings)
    init_trackers(accelerator, config)
    device = accelerator.device
    noise_scheduler = load_noise_scheduler(config)
    plain_captions = data.captions.to_pylist()
    if system in ("dreambooth", "lora_t"):
        word_captions(data, au_words(is_toy_model(config.pretrained_model_name_or_path)))
    image_embeds = embed_pictures(data, config, device) if system == "ip_adapter" else None
    set_seed(config.seed)
    width = 0 if image_embeds is None else image_embeds.shape[1]
    model = make_baseline(system, config, frozen_dtype(accelerator), width).to(device)
    if system == "ip_adapter":
        encoders = EncodersWithPictures.from_pretrained(config, device, frozen_dtype(accelerator))
    else:
        encoders = load_encoders(config, device, frozen_dtype(accelerator))
    num_train_timesteps = noise_scheduler.config.num_train_timesteps

    def make_samples(data: TrainingData, config: TrainConfig) -> TrainingSamples:
        inputs = encode_data(data, config, accelerator, encoders, model.unet)
        return TrainingSamples(inputs, num_train_timesteps, config, samples_per_step)

    samples = make_samples(data, config)
    if system == "dreambooth":
        with accelerator.main_process_first():
            prior_dir = make_prior(config, plain_captions, device, min(len(data), PRIOR_PICTURES))
        others = {"dataset_name": None, "max_train_samples": None, "face_loss_weight": 1.0}
        prior_config = replace(config, train_data_dir=prior_dir, **others)
        samples = WithPrior(samples, make_samples(load_training_data(prior_config), prior_config))
    if system == "ip_adapter":
        samples = WithPictures(samples, image_embeds)
    if config.cache_latents:
        encoders.unload()
    ema = EMAModel(model.trained_parameters().values(), config.ema_decay) if config.use_ema else None
    state = BaselineState(model, ema, samples_per_step, system=system)
    with attention_for_training(device):
        train(config, accelerator, state, samples, noise_scheduler, encoders, checkpoint)
    if accelerator.is_main_process:
        state.save_adapter(config.output_dir)
        write_settings(config.output_dir / DONE_NAME, {"steps": config.max_train_steps})


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status, as `train_fineface.py` has it."""
    parser = Parser("paper.baselines", __doc__, epilog="All other flags are those of train_fineface.py.")
    parser.add_argument("--system", choices=BASELINES, required=True)

    def work() -> None:
        known, others = parser.parse_known_args(argv)
        run(known.system, parse_training_args(others))

    return run_program(
        work,
        interrupted="the same command goes on from here",
        refusals=(ValueError, OSError, FloatingPointError),
    )


if __name__ == "__main__":
    sys.exit(main())
