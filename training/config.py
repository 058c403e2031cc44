# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""Everything that can be set in a training run, as the flags of `train_fineface.py` and as one checked value."""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from huggingface_hub.utils import validate_repo_id

from action_units import parse_aus
from au_encoder import ENCODER_TYPES, KV_INITS


# What may change when a run is resumed: where things are, how long it goes on, what is shown of it, and what costs
# time or memory only.
RESUME_WITH_OTHER = {
    *("pretrained_model_name_or_path", "revision", "variant", "train_data_dir", "dataset_name", "output_dir"),
    *("max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "report_to"),
    *("cache_latents", "cache_dir", "dataloader_num_workers", "gradient_checkpointing", "mixed_precision", "dry_run"),
    *("torch_compile", "allow_tf32", "push_to_hub", "hub_model_id"),
    # Their product with the number of processes has to stay, which `train_fineface.py` checks.
    *("train_batch_size", "gradient_accumulation_steps"),
    *("validation_prompt", "validation_aus", "validation_steps", "num_validation_images"),
    *("validation_inference_steps", "validation_guidance_scale"),
}


PRESETS = {
    "paper": {},
    "best": {
        "face_loss_weight": 8.0,
        "timestep_bias_strategy": "range",
        "timestep_bias_begin": 400,
        "timestep_bias_multiplier": 4.0,
        "timestep_sampling": "stratified",
        # Ten times that of the LoRA, if that is the default.
        "au_learning_rate": 1e-3,
        "au_drop_prob": 0.1,
        "au_noise_variance": 0.05,
    },
}
"""Flags by the name of `--preset`: the paper's, which are the defaults, and what did best in docs/results.md."""


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
    streaming: bool = option(False, "Read Parquet files, here or on the Hub, while training: nothing is copied.")
    shuffle_buffer_size: int = option(4096, "Rows that are shuffled together with --streaming.")
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
    au_kv_init: Literal[KV_INITS] = option(
        "text", "Keys and values start as copies of the text's, at random, or with values of zero."
    )
    rank: int = option(32, "Rank of the LoRA, and its alpha.")

    au_noise_variance: float = option(0.2, "Label smoothing: variance of the Gaussian noise on the intensities.")
    au_rounding_prob: float = option(0.2, "Label smoothing: share of samples with intensities rounded to integers.")
    face_loss_weight: float = option(
        1.0, "Weight of the loss inside the columns face_x0, face_y0, face_x1, face_y1 (0 to 1), against 1 outside."
    )
    au_drop_prob: float = option(0.0, "Share of samples trained with all AUs at 0.")
    caption_drop_prob: float = option(0.0, "Share of samples trained with an empty caption.")
    snr_gamma: float | None = option(None, "Min-SNR loss weighting, usually with 5.0; by default none.")
    noise_offset: float = option(0.0, "Standard deviation of a noise that is the same all over a channel.")
    timestep_sampling: Literal["uniform", "stratified"] = option(
        "uniform", "Timesteps drawn freely, or one from each of as many equal intervals as a step has samples."
    )
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = option(
        "none", "Draw more timesteps of the first or last --timestep_bias_portion, or from begin to end."
    )
    timestep_bias_multiplier: float = option(1.0, "How many times as often.")
    timestep_bias_begin: int = option(0, 'First timestep of the strategy "range".')
    timestep_bias_end: int = option(1000, 'Timestep before which the strategy "range" ends.')
    timestep_bias_portion: float = option(0.25, 'Share of the timesteps for "earlier" and "later".')

    max_train_steps: int = option(20_000, "Optimizer steps.")
    train_batch_size: int = option(16, "Samples for each process and forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes for each optimizer step.")
    learning_rate: float = option(1e-4, "Learning rate.")
    au_learning_rate: float | None = option(None, "That of the AU encoder, keys and values, if it is another one.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option("constant", "Learning rate schedule.")
    lr_warmup_steps: int = option(0, "Optimizer steps in which the learning rate rises, for schedules with warm-up.")
    lr_num_cycles: int = option(1, "Hard restarts of the schedule cosine_with_restarts.")
    lr_power: float = option(1.0, "Power of the schedule polynomial.")
    use_8bit_adam: bool = option(False, "AdamW of bitsandbytes, with a quarter of the memory for its state.")
    adam_beta1: float = option(0.9, "AdamW: beta1.")
    adam_beta2: float = option(0.999, "AdamW: beta2.")
    adam_weight_decay: float = option(1e-2, "AdamW: weight decay.")
    adam_epsilon: float = option(1e-8, "AdamW: epsilon.")
    max_grad_norm: float = option(1.0, "Norm to which the gradient of all trained parameters together is clipped.")
    use_ema: bool = option(False, "Save an exponential moving average of the trained parameters.")
    ema_decay: float = option(0.9999, "Largest decay of that average.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "By default what accelerate is set to.")
    allow_tf32: bool = option(False, "Multiply float32 matrices as TF32, on GPUs that can.")
    torch_compile: bool = option(False, "Compile the UNet: a minute of waiting, then faster steps.")
    gradient_checkpointing: bool = option(False, "Save memory, at the cost of a second forward pass.")
    seed: int = option(0, "Seed of everything that is random.")

    checkpointing_steps: int = option(500, "Optimizer steps between two checkpoints.")
    checkpoints_total_limit: int | None = option(None, "Keep only so many checkpoints, the last ones.")
    resume_from_checkpoint: str | None = option(None, 'A checkpoint folder, or "latest" for the last one if any.')
    report_to: str | None = option(
        None,
        'tensorboard, wandb, another tracker of accelerate, "all" or "none"; by default TensorBoard if installed.',
    )
    validation_prompt: tuple[str, ...] = option((), "Prompts of the pictures that are drawn during training.")
    validation_aus: tuple[str, ...] = option(
        ("neutral", "AU6=3 AU12=5", "AU4=5", "AU1=4 AU2=4 AU5=4 AU26=4", "AU1=4 AU15=5 AU17=3"),
        "Expressions they are drawn with, in any notation that the pipeline reads.",
    )
    validation_steps: int = option(500, "Optimizer steps between two sheets of them. The last step has one as well.")
    num_validation_images: int = option(1, "Pictures of each prompt and expression, from as many seeds.")
    validation_inference_steps: int = option(25, "Denoising steps of these pictures.")
    validation_guidance_scale: float = option(7.5, "Guidance scale of these pictures.")
    push_to_hub: bool = option(
        False, "Upload a repository as hub.export makes it, at the end. Log in before: `hf auth login`, or HF_TOKEN."
    )
    hub_model_id: str | None = option(None, "Repository to upload to; by default the name of the output folder.")
    dry_run: bool = option(False, "Print these settings and stop.")

    def __post_init__(self):
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("The data come either from `--train_data_dir` or from `--dataset_name`: set one of them.")
        if self.train_data_dir is not None and not self.train_data_dir.is_dir():
            raise ValueError(f"`--train_data_dir` has to be a folder, but {str(self.train_data_dir)!r} is none.")
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ValueError(f"`--output_dir` has to be a folder, but {str(self.output_dir)!r} is a file.")
        self._check_values()
        self._check_combinations()
        self._check_installed()

    def _check_values(self) -> None:
        for field in dataclasses.fields(self):
            name, value, kind = field.name, getattr(self, field.name), _value_type(field.name)
            if value is None:
                continue
            if typing.get_origin(kind) is Literal:
                choices = typing.get_args(kind)
                self._check(name, value in choices, f"one of {', '.join(choices)}")
            elif name.endswith("_prob"):
                self._check(name, 0 <= value <= 1, "a probability in [0, 1]")
            elif name.endswith("_portion"):
                self._check(name, 0 < value <= 1, "a share in (0, 1]")
            elif kind is float:
                self._check(name, math.isfinite(value) and value >= 0, "a finite number, at least 0")
            elif kind is int:
                may_be_0 = ("dataloader_num_workers", "lr_warmup_steps", "seed", "timestep_bias_begin")
                lowest = 0 if name in may_be_0 else 1
                self._check(name, value >= lowest, f"an integer, at least {lowest}")

    def _check_combinations(self) -> None:
        for aus in self.validation_aus:
            parse_aus(aus, "--validation_aus")
        if any(not prompt.strip() for prompt in self.validation_prompt):
            raise ValueError("`--validation_prompt` has to say something, in each of its prompts.")
        if self.timestep_bias_begin >= self.timestep_bias_end:
            raise ValueError(
                f"`--timestep_bias_end` {self.timestep_bias_end} has to be after `--timestep_bias_begin`."
            )
        if self.timestep_bias_strategy != "none":
            self._check("timestep_bias_multiplier", self.timestep_bias_multiplier > 0, "greater than 0")
        if self.streaming and self.cache_latents:
            raise ValueError(
                "`--cache_latents` writes every row to disk, which `--streaming` is there to avoid: leave one out."
            )
        if self.push_to_hub:
            validate_repo_id(self.repo_id)

    def _check_installed(self) -> None:
        if self.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("`--use_8bit_adam` needs bitsandbytes. Install it: `pip install bitsandbytes`.")
        if self.report_to not in (None, "none", "all"):
            trackers = [str(tracker) for tracker in LoggerType if tracker != LoggerType.ALL]
            self._check("report_to", self.report_to in trackers, f"all, none or one of {', '.join(trackers)}")
            if self.report_to not in map(str, get_available_trackers()):
                package = self.report_to.replace("_", "-")
                raise ValueError(
                    f"`--report_to {self.report_to}` needs {package}. Install it: `pip install {package}`."
                )

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"`--{name}` has to be {allowed}, but is {getattr(self, name)!r}.")

    @property
    def repo_id(self) -> str:
        """Where `--push_to_hub` uploads to."""
        return self.hub_model_id or self.output_dir.resolve().name

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"


def default_settings() -> dict:
    """The settings that have a default, as `TrainConfig.to_json` writes them."""
    fields = dataclasses.fields(TrainConfig)
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    return json.loads(json.dumps(defaults, default=str))


@functools.cache
def _value_type(field_name: str):
    """The type of a field of `TrainConfig`, where it is not None."""
    hint = typing.get_type_hints(TrainConfig)[field_name]
    if typing.get_origin(hint) in (Literal, tuple):
        return hint
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    return members[0] if members else hint


def parse_args(argv: list[str] | None = None) -> TrainConfig:
    """The command line as a `TrainConfig`. What is wrong with it is printed, with exit status 2."""
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
        choices=PRESETS,
        default="paper",
        help='Other defaults: "best" has what did best in docs/results.md. Flags that are given count all the same.',
    )
    parser.set_defaults(**PRESETS[parser.parse_args(argv).preset])
    arguments = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    del arguments["preset"]
    try:
        return TrainConfig(**{n: tuple(value) if isinstance(value, list) else value for n, value in arguments.items()})
    except ValueError as error:
        parser.error(str(error))
