# SPDX-License-Identifier: Apache-2.0
"""The settings of a training run, as the flags of `train_fineface.py` and as one checked value."""

import argparse
import dataclasses
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from huggingface_hub.utils import validate_repo_id

from action_units import ALL_AU_NAMES, au_columns, read_aus
from au_encoder import ENCODER_TYPES, KV_INITS
from program import add_options, check_options, option, take_options


_MORE_OF_THE_FACE = {
    "face_loss_weight": 8.0,
    "timestep_bias_strategy": "range",
    "timestep_bias_begin": 400,
    "timestep_bias_multiplier": 4.0,
    "timestep_sampling": "stratified",
}
TRAINING_PRESETS = {
    "paper": {},
    "best": {
        **_MORE_OF_THE_FACE,
        # Ten times the default learning rate of the LoRA.
        "au_learning_rate": 1e-3,
        "au_drop_prob": 0.1,
        "au_noise_variance": 0.05,
    },
    "best_feedback": {**_MORE_OF_THE_FACE, "au_feedback_steps": 8, "au_feedback_appearance_weight": 20.0},
}
"""
Flags for each `--preset`: "paper" keeps the defaults; "best" has the flags that did best in docs/results.md, and
"best_feedback" those that did best with `--au_feedback_meter`.
"""

FEEDBACK_MODES = ("draw", "random_step", "one_step")


free = option
"""For a flag that may change: paths, the length of the run, logging, and what changes only time or memory."""


def fixed(default, description: str, low: float | None = None, high: float | None = None):
    """The same for a flag that keeps its value when a run is resumed."""
    metadata = option(default, description, low, high).metadata
    return dataclasses.field(default=default, metadata=metadata | {"is_fixed": True})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """
    The settings of a training run. Each field is a flag of the same name, and its default is the paper's value if the
    paper names one. The constructor checks values without reading the disk; `check_machine` checks the rest.
    """

    pretrained_model_name_or_path: str = free(dataclasses.MISSING, "Folder or Hub id of the base model.")
    output_dir: Path = free(dataclasses.MISSING, "Folder for the adapter and the checkpoints.")
    revision: str | None = free(None, "Revision of the base model on the Hub.")
    variant: str | None = free(None, "Variant of the base model's files, for instance fp16.")
    pretrained_vae_model_name_or_path: str | None = fixed(
        None, "Folder or Hub id of another VAE, such as one for Stable Diffusion XL that works in fp16."
    )

    train_data_dir: Path | None = free(None, "Folder with pictures and metadata, or with Parquet files.")
    dataset_name: str | None = free(None, "Hub id of a data set, instead of --train_data_dir.")
    streaming: bool = fixed(False, "Read Parquet files from a folder or the Hub while training, without a copy.")
    shuffle_buffer_size: int = fixed(4096, "Rows that are shuffled together with --streaming.", low=1)
    image_column: str = fixed("image", "Column of the pictures.")
    caption_column: str = fixed("text", "Column of the captions.")
    max_train_samples: int | None = fixed(None, "Use only this number of rows from the start.", low=1)
    resolution: int | None = fixed(None, "Side of the training pictures; by default the base model's.", low=1)
    random_flip: bool = fixed(False, "Mirror half of the pictures, and the sides of their AUs.")
    cache_latents: bool = free(False, "Encode pictures and captions once, to disk, before training.")
    cache_dir: Path | None = free(None, "Folder of the cache; by default OUTPUT_DIR/cache.")
    dataloader_num_workers: int = free(0, "Processes that prepare batches; 0 does it in the main process.", low=0)

    aus: tuple[str, ...] = free((), "AUs to train: AU12, or AU12L AU12R; by default all AUs that have a column.")
    adapter_name_or_path: str | None = free(
        None, "Folder or Hub id of an AU adapter to start from. It sets encoder type, AUs and rank."
    )
    encoder_type: Literal[ENCODER_TYPES] = fixed("res_mlp64", "AU encoder (paper Table 2).")
    au_hidden_dim: int = fixed(64, "Features, or width of the hidden layers, of the AU encoder.", low=1)
    num_au_tokens: int = fixed(1, "Tokens that the AU encoder makes.", low=1)
    au_side_tokens: bool = fixed(
        False, "Make these tokens for each side of the face, for AUs such as AU12L and AU12R."
    )
    au_kv_init: Literal[KV_INITS] = fixed(
        "text", "Initial keys and values: copies of the text's, random, or values of zero."
    )
    au_side_attention_weight: float = fixed(
        0.0, "Weight of a loss that teaches which position is on which side of the face's box. 0.1 does.", low=0
    )
    rank: int = fixed(32, "Rank and alpha of the LoRA.", low=1)

    au_noise_variance: float = fixed(0.2, "Label smoothing: variance of the noise on the intensities.", low=0)
    au_rounding_prob: float = fixed(0.2, "Label smoothing: share of samples that are rounded to integers.", 0, 1)
    face_loss_weight: float = fixed(
        1.0, "Weight of the loss inside the columns face_x0, face_y0, face_x1, face_y1, against 1 outside.", low=0
    )
    au_drop_prob: float = fixed(0.0, "Share of samples trained with all AUs at 0.", 0, 1)
    caption_drop_prob: float = fixed(0.0, "Share of samples trained with an empty caption.", 0, 1)
    snr_gamma: float | None = fixed(None, "Min-SNR loss weighting, usually with 5.0; by default none.", low=0)
    noise_offset: float = fixed(0.0, "Standard deviation of noise that is constant over each channel.", low=0)
    timestep_sampling: Literal["uniform", "stratified"] = fixed(
        "uniform", "Draw timesteps independently, or one from each of N equal intervals for the N samples of a step."
    )
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = fixed(
        "none", "Draw more timesteps of the first or last --timestep_bias_portion, or from begin to end."
    )
    timestep_bias_multiplier: float = fixed(1.0, "Factor on the probability of these timesteps.", low=0)
    timestep_bias_begin: int = fixed(0, 'First timestep of the strategy "range".', low=0)
    timestep_bias_end: int = fixed(1000, 'Timestep before which the strategy "range" ends.', low=1)
    timestep_bias_portion: float = fixed(0.25, 'Share of the timesteps for "earlier" and "later".', 1e-3, 1)

    au_feedback_meter: str | None = free(
        None,
        "Read the AUs of pictures drawn in training with this meter, and train on its error: a folder, or"
        " package.module:callable.",
    )
    au_feedback_weight: float = fixed(
        1.0, "Weight of the meter's error (in squared intensities), which is added to the loss.", low=0
    )
    au_feedback_start: int = fixed(0, "Optimizer steps before the feedback begins.", low=0)
    au_feedback_mode: Literal[FEEDBACK_MODES] = fixed(
        "draw",
        "Pictures: drawn from noise; drawn with gradient through one random step; or the one-step estimates of the"
        " clean pictures in the ordinary training.",
    )
    au_feedback_steps: int = fixed(4, "Denoising steps of a drawn picture.", low=1)
    au_feedback_backprop: int | None = fixed(
        None, "Number of last denoising steps that carry gradient in the mode draw; by default all.", low=1
    )
    au_feedback_guidance_scale: float = fixed(7.5, "Guidance scale of a drawn picture.", low=0)
    au_feedback_appearance_weight: float = fixed(
        0.0,
        "Weight of the change of a drawn picture's tones and colours from the neutral face that the first weights draw"
        " from the same noise. It is added to the meter's error.",
        low=0,
    )
    au_feedback_single_prob: float = fixed(
        0.0, "Share of drawn pictures that are commanded one AU alone, instead of the AUs of another sample.", 0, 1
    )
    au_feedback_batch_size: int | None = fixed(
        None, "Pictures of a process in a forward pass; by default --train_batch_size.", low=1
    )

    max_train_steps: int = free(20_000, "Optimizer steps.", low=1)
    train_batch_size: int = free(16, "Samples for each process and forward pass.", low=1)
    gradient_accumulation_steps: int = free(1, "Forward passes for each optimizer step.", low=1)
    learning_rate: float = fixed(
        1e-4, "Learning rate of the LoRA, and of everything else unless --au_learning_rate is set.", low=0
    )
    au_learning_rate: float | None = fixed(None, "Learning rate of the AU encoder, keys and values.", low=0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = fixed("constant", "Learning rate schedule.")
    lr_warmup_steps: int = fixed(
        0, "Optimizer steps in which the learning rate rises, if the schedule warms up.", low=0
    )
    lr_num_cycles: int = fixed(1, "Hard restarts of the schedule cosine_with_restarts.", low=1)
    lr_power: float = fixed(1.0, "Power of the schedule polynomial.", low=0)
    use_8bit_adam: bool = fixed(False, "AdamW of bitsandbytes, with a quarter of the memory for its state.")
    adam_beta1: float = fixed(0.9, "AdamW: beta1.", low=0)
    adam_beta2: float = fixed(0.999, "AdamW: beta2.", low=0)
    adam_weight_decay: float = fixed(1e-2, "AdamW: weight decay.", low=0)
    adam_epsilon: float = fixed(1e-8, "AdamW: epsilon.", low=0)
    max_grad_norm: float = fixed(1.0, "Norm to which the gradient of all trained parameters is clipped.", low=0)
    use_ema: bool = fixed(False, "Save an exponential moving average of the trained parameters.")
    ema_decay: float = fixed(0.9999, "Largest decay of the moving average.", low=0)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = free(None, "By default what accelerate is set to.")
    allow_tf32: bool = free(False, "Multiply float32 matrices as TF32, on GPUs that support it.")
    torch_compile: bool = free(False, "Compile the UNet, which takes about a minute and makes steps faster.")
    gradient_checkpointing: bool = free(False, "Save memory, at the cost of a second forward pass.")
    seed: int = fixed(0, "Seed of everything that is random.", low=0)

    checkpointing_steps: int = free(500, "Optimizer steps between two checkpoints.", low=1)
    checkpoints_total_limit: int | None = free(None, "Keep only this number of checkpoints, the newest.", low=1)
    resume_from_checkpoint: str | None = free(None, 'A checkpoint folder, or "latest" for the last one if any.')
    report_to: str | None = free(
        None,
        'tensorboard, wandb, another tracker of accelerate, "all" or "none"; by default TensorBoard if installed.',
    )
    validation_prompt: tuple[str, ...] = free((), "Prompts of the pictures that are drawn during training.")
    validation_aus: tuple[str, ...] = free(
        ("neutral", "AU6=3 AU12=5", "AU4=5", "AU1=4 AU2=4 AU5=4 AU26=4", "AU1=4 AU15=5 AU17=3"),
        "Expressions of these pictures, in any notation that the pipeline reads.",
    )
    validation_steps: int = free(500, "Steps between two sheets of these pictures; the last step has one.", low=1)
    num_validation_images: int = free(1, "Pictures of each prompt and expression, each from another seed.", low=1)
    validation_inference_steps: int = free(25, "Denoising steps of these pictures.", low=1)
    validation_guidance_scale: float = free(7.5, "Guidance scale of these pictures.", low=0)
    push_to_hub: bool = free(
        False, "At the end, upload a repository as hub.export makes it. Log in first: `hf auth login`, or HF_TOKEN."
    )
    hub_model_id: str | None = free(None, "Repository to upload to; by default the name of the output folder.")
    dry_run: bool = free(False, "Print these settings and stop.")

    def __post_init__(self):
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("The data come either from `--train_data_dir` or from `--dataset_name`: set one of them.")
        check_options(self)
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
            self._check(
                "au_side_tokens", not self.au_side_tokens, "off with `--encoder_type direct`, which has no keys"
            )
        if self.au_side_attention_weight:
            given = self.au_side_tokens or self.adapter_name_or_path is not None
            self._check("au_side_attention_weight", given, "0 without `--au_side_tokens`")
            self._check("torch_compile", not self.torch_compile, "off with `--au_side_attention_weight`")
        begin, end = self.timestep_bias_begin, self.timestep_bias_end
        self._check("timestep_bias_end", begin < end, f"after `--timestep_bias_begin`, {begin}")
        if self.timestep_bias_strategy != "none":
            self._check("timestep_bias_multiplier", self.timestep_bias_multiplier > 0, "greater than 0")
        if self.au_feedback_backprop is not None:
            steps, mode = self.au_feedback_steps, self.au_feedback_mode
            self._check("au_feedback_mode", mode == "draw", "draw with `--au_feedback_backprop`")
            allowed = f"at most `--au_feedback_steps`, {steps}"
            self._check("au_feedback_backprop", self.au_feedback_backprop <= steps, allowed)
        if self.au_feedback_appearance_weight:
            drawn = self.au_feedback_mode != "one_step"
            self._check("au_feedback_appearance_weight", drawn, "0 in the mode one_step, which draws no picture")
        if self.au_feedback_batch_size is not None:
            allowed = f"at most `--train_batch_size`, {self.train_batch_size}"
            self._check("au_feedback_batch_size", self.au_feedback_batch_size <= self.train_batch_size, allowed)
        if self.streaming and self.cache_latents:
            raise ValueError(
                "`--cache_latents` writes every row to disk, but `--streaming` exists to avoid that: leave one out."
            )
        if self.push_to_hub:
            validate_repo_id(self.repo_id)

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"`--{name}` has to be {allowed}, but is {getattr(self, name)!r}.")

    def check_machine(self) -> None:
        """Raise a ValueError if a folder does not exist, or a package that an option needs is not installed."""
        if self.train_data_dir is not None and not self.train_data_dir.is_dir():
            raise ValueError(f"`--train_data_dir` has to be a folder, but {str(self.train_data_dir)!r} is none.")
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ValueError(f"`--output_dir` has to be a folder, but {str(self.output_dir)!r} is a file.")
        if self.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("`--use_8bit_adam` needs bitsandbytes. Install it: `pip install bitsandbytes`.")
        # accelerate leaves a tracker that is not installed out without a word.
        if self.report_to in LoggerType and self.report_to not in ("all", *map(str, get_available_trackers())):
            package = self.report_to.replace("_", "-")
            raise ValueError(f"`--report_to {self.report_to}` needs {package}. Install it: `pip install {package}`.")

    def flags_without_effect(self) -> list[str]:
        """Sentences that name flags which were changed, but have no effect because of another flag."""
        changed = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        draws_nothing, sentences = "with `--au_feedback_mode one_step`, which draws nothing", []
        for holds, names, reason in (
            (self.au_feedback_meter is None, "au_feedback_", "without `--au_feedback_meter`"),
            (self.au_feedback_mode == "one_step", "au_feedback_(steps|guidance_scale|single_prob)", draws_nothing),
            (self.timestep_bias_strategy == "none", "timestep_bias_", "without `--timestep_bias_strategy`"),
            (not self.use_ema, "ema_decay", "without `--use_ema`"),
        ):
            flags = [f"`--{name}`" for name in changed if holds and re.match(names, name)]
            if flags:
                sentences.append(f"{', '.join(flags)}: no effect {reason}.")
        return sentences

    def fixed_settings(self) -> dict:
        """The settings that a run has to keep when it is resumed, as `to_json` writes them."""
        settings = json.loads(self.to_json())
        return {field.name: settings[field.name] for field in dataclasses.fields(self) if "is_fixed" in field.metadata}

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
    names = [f.name for f in dataclasses.fields(TrainConfig) if "is_fixed" in f.metadata or f.name in more]
    shown = {name: settings[name] for name in names if settings.get(name) is not None}
    return {name: value for name, value in shown.items() if not re.search(r"[/\\|\n]", str(value))}


def default_settings() -> dict:
    """The default settings, as `TrainConfig.to_json` writes them."""
    fields = dataclasses.fields(TrainConfig)
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    return json.loads(json.dumps(defaults, default=str))


def parse_args(argv: list[str] | None = None) -> TrainConfig:
    """Read the command line. An error is printed, and the program exits with status 2."""
    parser = argparse.ArgumentParser(
        description="Fine-tune an AU adapter on a frozen Stable Diffusion base.", allow_abbrev=False
    )
    parser.add_argument(
        "--preset",
        choices=TRAINING_PRESETS,
        default="paper",
        help='Set of defaults: "best" did best in docs/results.md, and "best_feedback" with `--au_feedback_meter`.'
        " Flags on the command line override it.",
    )
    add_options(parser, TrainConfig)
    args = parser.parse_args(argv)
    try:
        return TrainConfig(**TRAINING_PRESETS[args.preset] | take_options(TrainConfig, args))
    except ValueError as error:
        parser.error(str(error))
