# SPDX-License-Identifier: Apache-2.0
"""The networks of the toy world: ordinary diffusers and transformers classes, and one small picture reader."""

import json
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from action_units import AU_NAMES
from toy_faces.renderer import ATTRIBUTES, SIZE, TOY_AU_NAMES


TEXT_WIDTH = 128
MAX_TOKENS = 48


class PictureReader(ModelMixin, ConfigMixin):
    r"""
    A convolutional network that reads numbers from a 128×128 picture, or from its latents: the AU meter and the
    attribute reader are two trained instances of it.

    Faces are nearly aligned, so the last feature map is flattened, not pooled: where a stroke is, is what it means.

    Args:
        outputs (`int`): how many numbers it reads.
        block_out_channels (`tuple[int, ...]`): channels after each halving of the resolution.
        hidden_size (`int`): width of the layer between the feature map and the outputs.
        scale (`float`): what an output of 1 stands for; 5 for AU intensities keeps the network's numbers near 1.
        au_names (`tuple[str, ...]`, *optional*): the AUs that a meter reads, one for each output.
        in_channels, sample_size (`int`): shape of the input; 16 channels of side 16 for latents of the toy world.
    """

    @register_to_config
    def __init__(
        self,
        outputs: int,
        block_out_channels: tuple[int, ...] = (24, 48, 64, 64),
        hidden_size: int = 128,
        scale: float = 1.0,
        au_names: tuple[str, ...] | None = None,
        in_channels: int = 3,
        sample_size: int = SIZE,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for index, channels in enumerate(block_out_channels):
            # A 5×5 first layer sees a whole stroke; every layer halves the resolution to stay cheap.
            kernel_size = 5 if index == 0 else 3
            layers += [
                nn.Conv2d(in_channels, channels, kernel_size, stride=2, padding=kernel_size // 2),
                nn.GroupNorm(8, channels),
                nn.SiLU(),
            ]
            if index:
                layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(8, channels), nn.SiLU()]
            in_channels = channels
        self.features = nn.Sequential(*layers)
        side = sample_size // 2 ** len(block_out_channels)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(in_channels * side**2, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, outputs),
        )

    @property
    def reads_latents(self) -> bool:
        """Whether feedback hands it latents instead of decoded pictures."""
        return self.config.in_channels != 3

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, 3, 128, 128)` in [-1, 1], or latents, → `(batch, outputs)`."""
        return self.config.scale * self.head(self.features(pixel_values))


class SecondMeter(ModelMixin, ConfigMixin):
    r"""
    Reads AU intensities by another architecture than `PictureReader`, so that a picture which fools the one need not
    fool the other: square patches, then blocks of depthwise 7×7 convolutions between narrow layers (ConvNeXt,
    https://huggingface.co/papers/2201.03545), then one linear layer over all places.

    Args:
        au_names (`tuple[str, ...]`): the AUs that it reads.
        widths (`tuple[int, ...]`): channels of each level; the first has a quarter of the resolution, each next half.
        depth (`int`): blocks a level.
    """

    @register_to_config
    def __init__(self, au_names: tuple[str, ...], widths: tuple[int, ...] = (48, 96, 128), depth: int = 2):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=4)]
        for level, width in enumerate(widths):
            if level:
                layers.append(nn.Conv2d(widths[level - 1], width, 2, stride=2))
            layers += [DepthwiseBlock(width) for _ in range(depth)]
        # As many channels as the flattened features may cost.
        layers.append(nn.Conv2d(widths[-1], 24, 1))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(24 * (SIZE // (2 * 2 ** len(widths))) ** 2, len(au_names))

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, 3, 128, 128)` in [-1, 1] → `(batch, features)`: the numbers from which the intensities are read."""
        return self.features(pixel_values).flatten(1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, 3, 128, 128)` in [-1, 1] → `(batch, len(au_names))`, in FACS intensity units."""
        return 5 * self.head(self.embed(pixel_values))


class DepthwiseBlock(nn.Module):
    """A depthwise 7×7 convolution and two pointwise layers, added to their input."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            nn.GroupNorm(1, width),
            nn.Conv2d(width, 3 * width, 1),
            nn.GELU(),
            nn.Conv2d(3 * width, width, 1),
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.layers(hidden_states)


def attribute_logits(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cut the attribute reader's `(batch, outputs)` into one `(batch, number of values)` per attribute."""
    sizes = [len(values) for values in ATTRIBUTES.values()]
    return dict(zip(ATTRIBUTES, logits.split(sizes, dim=1), strict=True))


def attribute_numbers(people: list[dict[str, str]]) -> torch.Tensor:
    """Which of its values each attribute has: `(people, number of attributes)`."""
    return torch.tensor([[values.index(person[name]) for name, values in ATTRIBUTES.items()] for person in people])


def attribute_loss(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the attributes of a batch. `numbers` are from `attribute_numbers`."""
    pairs = zip(attribute_logits(logits).values(), numbers.to(logits.device).unbind(1), strict=True)
    return torch.stack([F.cross_entropy(values, number) for values, number in pairs]).mean()


def make_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """
    A CLIP tokenizer whose byte-pair merges are learned from the world's captions: its words become one token each,
    any other text falls back to pieces and bytes.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    # The normalisation and splitting of CLIPTokenizer itself: the learned merges are then the ones it will use.
    bpe.normalizer = CLIPTokenizer().backend_tokenizer.normalizer
    bpe.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False, min_frequency=2
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, one entry a merge, the two special tokens.
    words = alphabet + [f"{byte}</w>" for byte in alphabet] + ["".join(pair) for pair in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_image_encoder() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=16,
        )
    )


def make_vae(block_out_channels: tuple[int, ...], layers_per_block: int) -> AutoencoderKL:
    """Three halvings and 16 latent channels: as many numbers as four channels at twice the resolution would hold, in
    a quarter of the positions, so the UNet costs a quarter."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def make_unet(block_out_channels: tuple[int, ...]) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=16,
        out_channels=16,
        down_block_types=("CrossAttnDownBlock2D",) * len(block_out_channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(block_out_channels),
        block_out_channels=block_out_channels,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=tuple(channels // 32 for channels in block_out_channels),
        norm_num_groups=16,
        use_linear_projection=True,
    )


def make_scheduler() -> DDIMScheduler:
    """Zero terminal SNR with v-prediction: flat backgrounds need a first step that really starts from noise."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # without effect on trailing timesteps; another value makes diffusers warn
    )


def make_meter() -> PictureReader:
    """Reads the AUs of the toy world. It teaches the adapter, so it must not judge it."""
    return PictureReader(outputs=len(TOY_AU_NAMES), scale=5.0, au_names=TOY_AU_NAMES)


def make_latent_meter() -> PictureReader:
    """Reads the paper's AUs from latents, where feedback needs no decoder."""
    channels = {"in_channels": 16, "sample_size": SIZE // 8, "block_out_channels": (96, 128)}
    return PictureReader(outputs=len(AU_NAMES), scale=5.0, au_names=AU_NAMES, **channels)


def make_attribute_reader() -> PictureReader:
    return PictureReader(outputs=sum(len(values) for values in ATTRIBUTES.values()))


def normalize_latents(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """
    Give every latent channel mean 0 and standard deviation 1 by folding the change into the VAE's two 1×1
    convolutions: the VAE's reconstructions stay the same, and `scaling_factor` is 1.
    """
    channels = len(mean)
    with torch.no_grad():
        quant, post_quant = vae.quant_conv, vae.post_quant_conv
        post_quant.bias += (post_quant.weight[:, :, 0, 0] * mean).sum(1)
        post_quant.weight *= std[None, :, None, None]
        quant.bias[:channels] = (quant.bias[:channels] - mean) / std
        quant.weight[:channels] /= std[:, None, None, None]
        # The second half are log variances.
        quant.bias[channels:] -= 2 * std.log()
