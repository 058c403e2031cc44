# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""The settings of a training run, as the flags of `train_fineface.py` and as one checked value."""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from huggingface_hub.utils import validate_repo_id

from action_units import ALL_AU_NAMES, au_columns, read_aus
from au_encoder import ENCODER_TYPES, KV_INITS


TRAINING_PRESETS = {
    "paper": {},
    "best": {
        "face_loss_weight": 8.0,
        "timestep_bias_strategy": "range",
        "timestep_bias_begin": 400,
        "timestep_bias_multiplier": 4.0,
        "timestep_sampling": "stratified",
        # Ten times the default learning rate of the LoRA.
        "au_learning_rate": 1e-3,
        "au_drop_prob": 0.1,
        "au_noise_variance": 0.05,
    },
}
"""Flags for each `--preset`: "paper" keeps the defaults; "best" has the flags that did best in docs/results.md."""

FEEDBACK_MODES = ("draw", "random_step", "one_step")


def option(default, description: str, *, low: float | None = None, high: float | None = None, resumable: bool = False):
    r"""
    A field of `TrainConfig` and its flag.

    Args:
        default:
            `dataclasses.MISSING` for a flag that is required.
        description (`str`):
            The text of `--help`.
        low, high (`float`, *optional*):
            The range of a number, both ends included.
        resumable (`bool`, defaults to `False`):
            Whether a run may be resumed with another value. True for paths, the length of the run, logging and
            validation, and options that change only time or memory.
    """
    metadata = {"help": description, "low": low, "high": high, "resumable": resumable}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """
    The settings of a training run. Each field is a flag of the same name, and its default is the paper's value if the
    paper names one. The constructor checks values without reading the disk; `check_machine` checks the rest.
    """

    pretrained_model_name_or_path: str = option(
        dataclasses.MISSING, "Folder or Hub id of the base model.", resumable=True
    )
    output_dir: Path = option(dataclasses.MISSING, "Folder for the adapter and the checkpoints.", resumable=True)
    revision: str | None = option(None, "Revision of the base model on the Hub.", resumable=True)
    variant: str | None = option(None, "Variant of the base model's files, for instance fp16.", resumable=True)

    pretrained_vae_model_name_or_path: str | None = option(
        None,
        "Folder or Hub id of another VAE, such as one for Stable Diffusion XL that works in fp16.",
    )

    train_data_dir: Path | None = option(
        None, "Folder with pictures and metadata, or with Parquet files.", resumable=True
    )
    dataset_name: str | None = option(None, "Hub id of a data set, instead of --train_data_dir.", resumable=True)
    streaming: bool = option(False, "Read Parquet files from a folder or the Hub while training, without a copy.")
    shuffle_buffer_size: int = option(4096, "Rows that are shuffled together with --streaming.", low=1)
    image_column: str = option("image", "Column of the pictures.")
    caption_column: str = option("text", "Column of the captions.")
    max_train_samples: int | None = option(None, "Use only this number of rows from the start.", low=1)
    resolution: int | None = option(
        None, "Side of the training pictures in pixels; by default the base model's.", low=1
    )
    random_flip: bool = option(False, "Mirror half of the pictures, and the sides of their AUs.")
    cache_latents: bool = option(False, "Encode pictures and captions once, to disk, before training.", resumable=True)
    cache_dir: Path | None = option(None, "Folder of the cache; by default OUTPUT_DIR/cache.", resumable=True)
    dataloader_num_workers: int = option(
        0, "Processes that prepare batches; 0 does it in the main process.", low=0, resumable=True
    )

    aus: tuple[str, ...] = option(
        (), "AUs to train: AU12, or AU12L AU12R; by default all AUs that have a column.", resumable=True
    )
    adapter_name_or_path: str | None = option(
        None,
        "Folder or Hub id of an AU adapter to start from. It sets encoder type, AUs and rank.",
        resumable=True,
    )
    encoder_type: Literal[ENCODER_TYPES] = option("res_mlp64", "AU encoder (paper Table 2).")
    au_hidden_dim: int = option(64, "Features, or width of the hidden layers, of the AU encoder.", low=1)
    num_au_tokens: int = option(1, "Tokens that the AU encoder makes.", low=1)
    au_kv_init: Literal[KV_INITS] = option(
        "text", "Initial keys and values: copies of the text's, random, or values of zero."
    )
    rank: int = option(32, "Rank and alpha of the LoRA.", low=1)

    au_noise_variance: float = option(
        0.2, "Label smoothing: variance of the Gaussian noise on the intensities.", low=0
    )
    au_rounding_prob: float = option(
        0.2, "Label smoothing: share of samples with intensities rounded to integers.", low=0, high=1
    )
    face_loss_weight: float = option(
        1.0,
        "Weight of the loss inside the columns face_x0, face_y0, face_x1, face_y1 (0 to 1), against 1 outside.",
        low=0,
    )
    au_drop_prob: float = option(0.0, "Share of samples trained with all AUs at 0.", low=0, high=1)
    caption_drop_prob: float = option(0.0, "Share of samples trained with an empty caption.", low=0, high=1)
    snr_gamma: float | None = option(None, "Min-SNR loss weighting, usually with 5.0; by default none.", low=0)
    noise_offset: float = option(0.0, "Standard deviation of noise that is constant over each channel.", low=0)
    timestep_sampling: Literal["uniform", "stratified"] = option(
        "uniform", "Draw timesteps independently, or one from each of N equal intervals for the N samples of a step."
    )
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = option(
        "none", "Draw more timesteps of the first or last --timestep_bias_portion, or from begin to end."
    )
    timestep_bias_multiplier: float = option(1.0, "Factor on the probability of these timesteps.", low=0)
    timestep_bias_begin: int = option(0, 'First timestep of the strategy "range".', low=0)
    timestep_bias_end: int = option(1000, 'Timestep before which the strategy "range" ends.', low=1)
    timestep_bias_portion: float = option(0.25, 'Share of the timesteps for "earlier" and "later".', low=1e-3, high=1)

    au_feedback_meter: str | None = option(
        None,
        "Read the AUs of pictures drawn in training with this meter, and train on its error: a folder, or"
        " package.module:callable.",
        resumable=True,
    )
    au_feedback_weight: float = option(
        1.0, "Weight of the meter's error (in squared intensities), which is added to the loss.", low=0
    )
    au_feedback_start: int = option(0, "Optimizer steps before the feedback begins.", low=0)
    au_feedback_mode: Literal[FEEDBACK_MODES] = option(
        "draw",
        "Pictures: drawn from noise; drawn with gradient through one random step; or the one-step estimates of the"
        " clean pictures in the ordinary training.",
    )
    au_feedback_steps: int = option(4, "Denoising steps of a drawn picture.", low=1)
    au_feedback_backprop: int | None = option(
        None, "Number of last denoising steps that carry gradient in the mode draw; by default all.", low=1
    )
    au_feedback_guidance_scale: float = option(7.5, "Guidance scale of a drawn picture.", low=0)
    au_feedback_batch_size: int | None = option(
        None, "Pictures of a process in a forward pass; by default --train_batch_size.", low=1
    )

    max_train_steps: int = option(20_000, "Optimizer steps.", low=1, resumable=True)
    train_batch_size: int = option(16, "Samples for each process and forward pass.", low=1, resumable=True)
    gradient_accumulation_steps: int = option(1, "Forward passes for each optimizer step.", low=1, resumable=True)
    learning_rate: float = option(
        1e-4, "Learning rate of the LoRA, and of everything else unless --au_learning_rate is set.", low=0
    )
    au_learning_rate: float | None = option(None, "Learning rate of the AU encoder, keys and values.", low=0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option("constant", "Learning rate schedule.")
    lr_warmup_steps: int = option(
        0, "Optimizer steps in which the learning rate rises, for schedules with warm-up.", low=0
    )
    lr_num_cycles: int = option(1, "Hard restarts of the schedule cosine_with_restarts.", low=1)
    lr_power: float = option(1.0, "Power of the schedule polynomial.", low=0)
    use_8bit_adam: bool = option(False, "AdamW of bitsandbytes, with a quarter of the memory for its state.")
    adam_beta1: float = option(0.9, "AdamW: beta1.", low=0)
    adam_beta2: float = option(0.999, "AdamW: beta2.", low=0)
    adam_weight_decay: float = option(1e-2, "AdamW: weight decay.", low=0)
    adam_epsilon: float = option(1e-8, "AdamW: epsilon.", low=0)
    max_grad_norm: float = option(
        1.0, "Largest norm of the gradient of all trained parameters together; a larger one is clipped.", low=0
    )
    use_ema: bool = option(False, "Save an exponential moving average of the trained parameters.")
    ema_decay: float = option(0.9999, "Largest decay of the moving average.", low=0)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "By default what accelerate is set to.", resumable=True
    )
    allow_tf32: bool = option(False, "Multiply float32 matrices as TF32, on GPUs that support it.", resumable=True)
    torch_compile: bool = option(
        False, "Compile the UNet, which takes about a minute and makes steps faster.", resumable=True
    )
    gradient_checkpointing: bool = option(False, "Save memory, at the cost of a second forward pass.", resumable=True)
    seed: int = option(0, "Seed of everything that is random.", low=0)

    checkpointing_steps: int = option(500, "Optimizer steps between two checkpoints.", low=1, resumable=True)
    checkpoints_total_limit: int | None = option(
        None, "Keep only this number of checkpoints, the newest.", low=1, resumable=True
    )
    resume_from_checkpoint: str | None = option(
        None, 'A checkpoint folder, or "latest" for the last one if any.', resumable=True
    )
    report_to: str | None = option(
        None,
        'tensorboard, wandb, another tracker of accelerate, "all" or "none"; by default TensorBoard if installed.',
        resumable=True,
    )
    validation_prompt: tuple[str, ...] = option(
        (), "Prompts of the pictures that are drawn during training.", resumable=True
    )
    validation_aus: tuple[str, ...] = option(
        ("neutral", "AU6=3 AU12=5", "AU4=5", "AU1=4 AU2=4 AU5=4 AU26=4", "AU1=4 AU15=5 AU17=3"),
        "Expressions of these pictures, in any notation that the pipeline reads.",
        resumable=True,
    )
    validation_steps: int = option(
        500,
        "Optimizer steps between two sheets of validation pictures. The last step has one as well.",
        low=1,
        resumable=True,
    )
    num_validation_images: int = option(
        1, "Pictures of each prompt and expression, each from another seed.", low=1, resumable=True
    )
    validation_inference_steps: int = option(25, "Denoising steps of these pictures.", low=1, resumable=True)
    validation_guidance_scale: float = option(7.5, "Guidance scale of these pictures.", low=0, resumable=True)
    push_to_hub: bool = option(
        False,
        "At the end, upload a repository as hub.export makes it. Log in first: `hf auth login`, or HF_TOKEN.",
        resumable=True,
    )
    hub_model_id: str | None = option(
        None, "Repository to upload to; by default the name of the output folder.", resumable=True
    )
    dry_run: bool = option(False, "Print these settings and stop.", resumable=True)

    def __post_init__(self):
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("The data come either from `--train_data_dir` or from `--dataset_name`: set one of them.")
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self._check_range(field)
        if self.aus:
            try:
                au_columns(self.aus)
            except ValueError as error:
                raise ValueError(f"`--aus`: {error}") from error
        for aus in self.validation_aus:
            # The AUs of the data are not known yet.
            read_aus(aus, "--validation_aus", ALL_AU_NAMES)
        if any(not prompt.strip() for prompt in self.validation_prompt):
            raise ValueError("`--validation_prompt` must not contain empty prompts.")
        if self.encoder_type == "direct":
            self._check("num_au_tokens", self.num_au_tokens == 1, "1 with `--encoder_type direct`, which has no keys")
        if self.timestep_bias_begin >= self.timestep_bias_end:
            raise ValueError(
                f"`--timestep_bias_end` {self.timestep_bias_end} has to be after `--timestep_bias_begin`."
            )
        if self.timestep_bias_strategy != "none":
            self._check("timestep_bias_multiplier", self.timestep_bias_multiplier > 0, "greater than 0")
        if self.au_feedback_backprop is not None and self.au_feedback_mode != "draw":
            self._check("au_feedback_mode", False, "draw with `--au_feedback_backprop`")
        if (self.au_feedback_backprop or 1) > self.au_feedback_steps:
            self._check("au_feedback_backprop", False, f"at most `--au_feedback_steps`, {self.au_feedback_steps}")
        if (self.au_feedback_batch_size or 1) > self.train_batch_size:
            self._check("au_feedback_batch_size", False, f"at most `--train_batch_size`, {self.train_batch_size}")
        if self.streaming and self.cache_latents:
            raise ValueError(
                "`--cache_latents` writes every row to disk, but `--streaming` exists to avoid that: leave one out."
            )
        if self.report_to not in (None, "none", "all"):
            trackers = [str(tracker) for tracker in LoggerType if tracker != LoggerType.ALL]
            self._check("report_to", self.report_to in trackers, f"all, none or one of {', '.join(trackers)}")
        if self.push_to_hub:
            validate_repo_id(self.repo_id)

    def _check_range(self, field: dataclasses.Field) -> None:
        name, value, kind = field.name, getattr(self, field.name), _value_type(field.name)
        low, high = field.metadata["low"], field.metadata["high"]
        if typing.get_origin(kind) is Literal:
            self._check(name, value in typing.get_args(kind), f"one of {', '.join(typing.get_args(kind))}")
        elif kind in (int, float):
            what = {int: "an integer", float: "a finite number"}[kind]
            allowed = f"{what}, at least {low}" if high is None else f"{what} in [{low}, {high}]"
            if name.endswith("_prob"):
                allowed = f"a probability in [{low}, {high}]"
            is_number = isinstance(value, int | kind) and not isinstance(value, bool)
            in_range = is_number and math.isfinite(value) and value >= low and (high is None or value <= high)
            self._check(name, in_range, allowed)

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"`--{name}` has to be {allowed}, but is {getattr(self, name)!r}.")

    def check_machine(self) -> None:
        """
        Check settings that depend on this machine, before a run begins.

        Raises:
            ValueError: if a folder does not exist, or a package that an option needs is not installed.
        """
        if self.train_data_dir is not None and not self.train_data_dir.is_dir():
            raise ValueError(f"`--train_data_dir` has to be a folder, but {str(self.train_data_dir)!r} is none.")
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ValueError(f"`--output_dir` has to be a folder, but {str(self.output_dir)!r} is a file.")
        if self.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("`--use_8bit_adam` needs bitsandbytes. Install it: `pip install bitsandbytes`.")
        if self.report_to not in (None, "none", "all", *map(str, get_available_trackers())):
            package = self.report_to.replace("_", "-")
            raise ValueError(f"`--report_to {self.report_to}` needs {package}. Install it: `pip install {package}`.")

    def fixed_settings(self) -> dict:
        """The settings that a run has to keep when it is resumed, as `to_json` writes them."""
        settings = json.loads(self.to_json())
        return {f.name: settings[f.name] for f in dataclasses.fields(self) if not f.metadata["resumable"]}

    @property
    def repo_id(self) -> str:
        """The repository for `--push_to_hub`."""
        return self.hub_model_id or self.output_dir.resolve().name

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"


def published_settings(settings: dict) -> dict:
    """
    The settings of a `train_config.json` that a model card may show: those that decide the weights, without paths and
    prompts, which are private.
    """
    more = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "mixed_precision")
    names = [f.name for f in dataclasses.fields(TrainConfig) if not f.metadata["resumable"] or f.name in more]
    shown = {name: settings[name] for name in names if settings.get(name) is not None}
    return {name: value for name, value in shown.items() if not re.search(r"[/\\|\n]", str(value))}


def default_settings() -> dict:
    """The default settings, as `TrainConfig.to_json` writes them."""
    fields = dataclasses.fields(TrainConfig)
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    return json.loads(json.dumps(defaults, default=str))


@functools.cache
def _value_type(field_name: str):
    """The type of a field of `TrainConfig`, without None."""
    hint = typing.get_type_hints(TrainConfig)[field_name]
    if typing.get_origin(hint) in (Literal, tuple):
        return hint
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    return members[0] if members else hint


def parse_args(argv: list[str] | None = None) -> TrainConfig:
    """Read the command line. An error is printed, and the program exits with status 2."""
    parser = argparse.ArgumentParser(
        description="Fine-tune an AU adapter on a frozen Stable Diffusion base.", allow_abbrev=False
    )
    for field in dataclasses.fields(TrainConfig):
        kind, options = _value_type(field.name), {"help": field.metadata["help"]}
        if field.default is dataclasses.MISSING:
            options["required"] = True
        elif typing.get_origin(kind) is not tuple:
            options["default"] = field.default
        if kind is bool:
            options["action"] = "store_true"
        elif typing.get_origin(kind) is Literal:
            options["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            # Several values after one flag, or the flag several times.
            options |= {"action": "extend", "nargs": "+"}
        else:
            options["type"] = kind
        parser.add_argument(f"--{field.name}", **options)
    parser.add_argument(
        "--preset",
        choices=TRAINING_PRESETS,
        default="paper",
        help='Set of defaults: "best" did best in docs/results.md. Flags on the command line override it.',
    )
    parser.set_defaults(**TRAINING_PRESETS[parser.parse_args(argv).preset])
    arguments = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    del arguments["preset"]
    try:
        return TrainConfig(**{n: tuple(value) if isinstance(value, list) else value for n, value in arguments.items()})
    except ValueError as error:
        parser.error(str(error))
