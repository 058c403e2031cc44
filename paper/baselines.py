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
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

import train_fineface
from action_units import AU_NAMES
from au_attention_processor import au_layers
from au_encoder import ENCODER_FOLDER, LORA_WEIGHTS_NAME, AUEncoder, ip_adapter_numbers
from drawing.files import write_png
from drawing.jobs import Job, read_model_defaults
from drawing.model import Weights
from evaluation.systems import UNET_FOLDER, System, append_tokens, au_words, aus_in_words, is_toy_model
from face_data.store import write_lines
from pipeline_fineface import LORA_NAME
from program import Parser, check_settings, only_run_in, run_program, write_settings
from train_fineface import FineFaceModel, make_accelerator, train
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
from training.encoders import StableDiffusionEncoders, find_family, load_encoders


BASELINES = ("dreambooth", "lora_t", "lora_au", "ip_adapter")
IP_ADAPTER_NAME = "ip_adapter.safetensors"
IMAGE_TOKENS = 4
PRIOR_FOLDER = "prior"
PRIOR_PICTURES = 200
PRIOR_WEIGHT = 1.0
"""Weight of the prior in the loss. As in DreamBooth, each step has as many pictures of the prior as of the data."""
SETTINGS_NAME = "baseline.json"
DONE_NAME = "done.json"
NOT_FOR_BASELINES = (
    *("streaming", "push_to_hub", "validation_prompt", "adapter_name_or_path", "au_feedback_meter"),
    *("aus", "au_kv_init", "allow_tf32", "dry_run"),
)
"""Flags of train_fineface.py that baselines do not have."""


class BaselineModel(FineFaceModel):
    """The UNet of a system and, for LoRA-AU alone, an `AUEncoder` that makes the AUs a token of the text sequence."""

    def forward(self, noisy_latents, timesteps, prompt_embeds, au_intensities, added_cond_kwargs=None):
        """`au_intensities`, `(batch, 12)`, are for LoRA-AU; an IP-Adapter takes its input from `added_cond_kwargs`."""
        dtype = self.unet.dtype
        # A cache has them in float16, and autocast on a CPU cannot concatenate these with bfloat16 tokens.
        prompt_embeds = prompt_embeds.to(dtype)
        if self.au_adapter is not None:
            prompt_embeds = append_tokens(prompt_embeds, self.au_adapter(au_intensities))
        noisy_latents = noisy_latents.to(dtype)
        return self.unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=added_cond_kwargs).sample


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
    if system in ("lora_t", "lora_au"):
        lora = {"r": config.rank, "lora_alpha": config.rank, "init_lora_weights": "gaussian"}
        unet.add_adapter(LoraConfig(**lora, target_modules=train_fineface.LORA_TARGETS), LORA_NAME)
    token_encoder = None
    if system == "lora_au":
        sizes = (len(AU_NAMES), unet.config.cross_attention_dim)
        token_encoder = AUEncoder(*sizes, config.encoder_type, config.num_au_tokens, config.au_hidden_dim)
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
    layers = {
        f"{number}.to_{kind}_ip.weight": getattr(attn, f"to_{kind}").weight.detach().clone()
        for number, attn in _ip_layers(unet).items()
        for kind in "kv"
    }
    projection, norm = nn.Linear(image_embed_dim, IMAGE_TOKENS * width), nn.LayerNorm(width)
    image_proj = nn.ModuleDict({"proj": projection, "norm": norm}).state_dict()
    unet._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": layers}])
    for attn in _ip_layers(unet).values():
        attn.processor.requires_grad_(True)
    unet.encoder_hid_proj.requires_grad_(True)


def _ip_layers(unet: UNet2DConditionModel) -> dict[int, nn.Module]:
    """Cross-attention layers by their numbers in published files."""
    return {number: unet.get_submodule(name) for name, number in ip_adapter_numbers(au_layers(unet)).items()}


def ip_adapter_state_dict(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The tensors of the IP-Adapter, by the names in published `.safetensors` files."""
    tensors = {
        f"ip_adapter.{number}.to_{kind}_ip.weight": getattr(attn.processor, f"to_{kind}_ip")[0].weight
        for number, attn in _ip_layers(unet).items()
        for kind in "kv"
    }
    projection = unet.encoder_hid_proj.image_projection_layers[0].state_dict()
    tensors |= {f"image_proj.{name.replace('image_embeds', 'proj')}": tensor for name, tensor in projection.items()}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


@dataclass
class BaselineState(TrainingState):
    """The training state of `train_fineface.py`, but it saves a baseline instead of an adapter."""

    system: str = ""

    def save_adapter(self, folder: Path) -> None:
        """Write the files that `evaluation.run` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        with self.ema_weights():
            unet = self.model.unet
            if self.system == "dreambooth":
                unet.save_pretrained(folder / UNET_FOLDER)
            if self.system in ("lora_t", "lora_au"):
                lora = get_peft_model_state_dict(unet, adapter_name=LORA_NAME)
                StableDiffusionPipeline.save_lora_weights(
                    folder,
                    unet_lora_layers=convert_state_dict_to_diffusers(lora),
                    unet_lora_adapter_metadata=unet.peft_config[LORA_NAME].to_dict(),
                    weight_name=LORA_WEIGHTS_NAME,
                )
            if self.system == "lora_au":
                self.model.au_adapter.save_pretrained(folder / ENCODER_FOLDER)
            if self.system == "ip_adapter":
                save_file(ip_adapter_state_dict(unet), folder / IP_ADAPTER_NAME)


# ---- Data -----------------------------------------------------------------------------------------------------------


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


def make_prior(config: TrainConfig, captions: list[str], device: torch.device) -> Path:
    """
    Draw captions of the data with the untrained base, as a data set of pictures with all AUs 0. Its metadata appear
    when it is complete. Returns its folder.
    """
    folder = config.output_dir / PRIOR_FOLDER
    if (folder / "metadata.jsonl").exists():
        return folder
    model = config.pretrained_model_name_or_path
    sampling = read_model_defaults(model) | {"au_guidance_scale": None}
    order = np.random.default_rng(0).permutation(len(captions))[:PRIOR_PICTURES]
    jobs = [Job(captions[row], "", seed, **sampling) for seed, row in enumerate(order)]
    system, lines = System("sd", Weights(model), device, torch.float32), []
    for start in tqdm(range(0, len(jobs), config.train_batch_size), desc="prior", unit="batch"):
        batch = jobs[start : start + config.train_batch_size]
        for job, image in zip(batch, system.draw(batch), strict=True):
            name = f"{job.seed:05d}.png"
            write_png(image, folder / name)
            lines.append({"file_name": name, "text": job.prompt, **dict.fromkeys(AU_NAMES, 0.0)})
    write_lines(folder / "metadata.jsonl", lines)
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
        images = []
        for row in range(start, min(start + 64, len(data))):
            with data.open_picture(row) as picture:
                images.append(picture.convert("RGB"))
        pixel_values = processor(images, return_tensors="pt").pixel_values.to(device)
        embeds.append(encoder(pixel_values).image_embeds.cpu())
    return torch.cat(embeds)


# ---- Training -------------------------------------------------------------------------------------------------------


def encode_data(
    data: TrainingData,
    config: TrainConfig,
    accelerator: Accelerator,
    encoders: StableDiffusionEncoders,
    unet: nn.Module,
) -> PixelInputs | LatentInputs:
    """The inputs of training. With `--cache_latents`, they come from the same cache as in `train_fineface.py`."""
    inputs = PixelInputs(data, encoders, train_fineface.choose_resolution(config, unet, encoders.vae_scale_factor))
    return cache_inputs(inputs, config, accelerator) if config.cache_latents else inputs


def check_request(system: str, config: TrainConfig) -> None:
    """Raise a ValueError for flags and bases that `system` cannot be trained with. No model is loaded."""
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    for name in NOT_FOR_BASELINES:
        if getattr(config, name) != defaults[name]:
            raise ValueError(f"`--{name}` is for train_fineface.py alone: leave it out.")
    if system == "lora_au" and config.encoder_type == "direct":
        raise ValueError(
            "`--encoder_type direct` makes no token for the text sequence, as `--system lora_au` needs it. Choose"
            " another type."
        )
    base = config.pretrained_model_name_or_path
    index = DiffusionPipeline.load_config(base, revision=config.revision)
    if find_family(config) is not StableDiffusionEncoders:
        raise ValueError(
            f"The base {base!r} is a {index['_class_name']}, but the paper's other systems are trained on Stable"
            " Diffusion 1 or 2 alone. Name such a base, or train an AU adapter with train_fineface.py."
        )
    if system == "ip_adapter" and not (index.get("image_encoder") or [None])[0]:
        raise ValueError(
            f"`--system ip_adapter` reads pictures with the image encoder of the base, but {base!r} has none. Name a"
            " base with a CLIPVisionModelWithProjection as `image_encoder`, such as the toy model."
        )


def run(system: str, config: TrainConfig) -> None:
    """Train a baseline, or continue a training that was stopped."""
    check_request(system, config)
    # The paper's systems have its twelve AUs and no others.
    config = replace(config, aus=AU_NAMES)
    config.check_machine()
    settings = {"system": system, **config.fixed_settings()}
    has_settings = check_settings(config.output_dir / SETTINGS_NAME, settings, "a baseline", default_settings())
    done = config.output_dir / DONE_NAME
    if done.exists() and json.loads(done.read_text(encoding="utf-8"))["steps"] >= config.max_train_steps:
        return
    accelerator = make_accelerator(config)
    with only_run_in(config.output_dir) if accelerator.is_main_process else nullcontext():
        _train(system, config, accelerator, {} if has_settings else settings)
    accelerator.end_training()


def _train(system: str, config: TrainConfig, accelerator: Accelerator, new_settings: dict) -> None:
    """Train a baseline, and write `new_settings`, if there are any, when the data have been checked."""
    checkpoint, device, dtype = find_checkpoint(config), accelerator.device, train_fineface.frozen_dtype(accelerator)
    samples_per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    check_same_work(checkpoint, samples_per_step=samples_per_step)
    with accelerator.main_process_first():
        data = load_training_data(config)
        if accelerator.is_main_process:
            check_pictures(data)
            if new_settings:
                write_settings(config.output_dir / SETTINGS_NAME, new_settings)
    train_fineface.init_trackers(accelerator, config)
    noise_scheduler = train_fineface.load_noise_scheduler(config)
    plain_captions = data.captions.to_pylist()
    if system in ("dreambooth", "lora_t"):
        word_captions(data, au_words(is_toy_model(config.pretrained_model_name_or_path)))
    image_embeds = embed_pictures(data, config, device) if system == "ip_adapter" else None
    set_seed(config.seed)
    model = make_baseline(system, config, dtype, 0 if image_embeds is None else image_embeds.shape[1]).to(device)
    make_encoders = EncodersWithPictures.from_pretrained if system == "ip_adapter" else load_encoders
    encoders = make_encoders(config, device, dtype)

    def make_samples(data: TrainingData, config: TrainConfig) -> TrainingSamples:
        inputs = encode_data(data, config, accelerator, encoders, model.unet)
        return TrainingSamples(inputs, noise_scheduler.config.num_train_timesteps, config, samples_per_step)

    samples = make_samples(data, config)
    if system == "dreambooth":
        with accelerator.main_process_first():
            prior_dir = make_prior(config, plain_captions, device)
        others = {"dataset_name": None, "max_train_samples": None, "face_loss_weight": 1.0}
        prior_config = replace(config, train_data_dir=prior_dir, **others)
        samples = WithPrior(samples, make_samples(load_training_data(prior_config), prior_config))
    if system == "ip_adapter":
        samples = WithPictures(samples, image_embeds)
    if config.cache_latents:
        encoders.unload()
    ema = EMAModel(model.trained_parameters().values(), config.ema_decay) if config.use_ema else None
    state = BaselineState(model, ema, samples_per_step, system=system)
    with train_fineface.attention_for_training(device):
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
