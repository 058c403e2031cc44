"""Tiny real components, built in memory: no network, no files, the same on every run; and fixtures made of them."""

import copy
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from au_encoder import AUAdapter, write_au_adapter
from pipeline_fineface import LORA_NAME, FineFacePipeline
from pipeline_fineface_xl import FineFaceXLPipeline


CROSS_ATTENTION_DIM = 32
# Beside 12 AUs and 8 features, 12 zeros are left.
HIDDEN_DIM = 8


def make_tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.<>=-"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)


def make_components(seed: int = 0, cross_attention_dim: int = CROSS_ATTENTION_DIM) -> dict:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=cross_attention_dim,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {
        "vae": AutoencoderKL(
            block_out_channels=(4, 8),
            norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        ).eval(),
        "text_encoder": CLIPTextModel(text_config).eval(),
        "tokenizer": tokenizer,
        "unet": UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=cross_attention_dim,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval(),
        "scheduler": DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
    }


def make_xl_components(seed: int = 0, cross_attention_dim: int = CROSS_ATTENTION_DIM) -> dict:
    """Those of Stable Diffusion XL: two text encoders whose widths add up, and sizes beside the timestep."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=cross_attention_dim // 2,
        intermediate_size=37,
        projection_dim=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        **ids,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=cross_attention_dim,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    shared = {name: part for name, part in make_components(seed).items() if name in ("vae", "scheduler")}
    return {
        **shared,
        "text_encoder": CLIPTextModel(text_config).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(text_config).eval(),
        "tokenizer": tokenizer,
        "tokenizer_2": make_tokenizer(),
        "unet": unet.eval(),
        "image_encoder": None,
        "feature_extractor": None,
    }


def shorten(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet of the same kind with two cross-attention layers: to compile, each takes long."""
    torch.manual_seed(0)
    depth = {"block_out_channels": (8,), "attention_head_dim": 2, "transformer_layers_per_block": 1}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DConditionModel.from_config({**unet.config, **depth, **blocks}).eval()


@dataclass(frozen=True)
class Family:
    """A family of bases with tiny components, and the pipelines for it."""

    pipeline_class: type
    plain_class: type
    make_components: Callable[[], dict]
    options: dict

    def make_pipe(self, **components):
        pipe = self.pipeline_class(**{**self.make_components(), **components}, **self.options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def make_plain_pipe(self, **components):
        pipe = self.plain_class(**{**self.make_components(), **components}, **self.options)
        pipe.set_progress_bar_config(disable=True)
        return pipe


FAMILIES = {
    "sd": Family(FineFacePipeline, StableDiffusionPipeline, make_components, {"requires_safety_checker": False}),
    "sdxl": Family(FineFaceXLPipeline, StableDiffusionXLPipeline, make_xl_components, {"add_watermarker": False}),
}


def make_adapter(unet: UNet2DConditionModel, seed: int = 1, num_tokens: int = 1) -> AUAdapter:
    torch.manual_seed(seed)
    adapter = AUAdapter.from_unet(unet, num_tokens=num_tokens, hidden_dim=HIDDEN_DIM).eval()
    for parameter in adapter.parameters():
        # Strong enough that every test can see the AUs.
        torch.nn.init.normal_(parameter, std=0.3)
    return adapter


def add_lora(unet: UNet2DConditionModel, name: str, seed: int = 2, rank: int = 4, alpha: int = 8) -> None:
    from peft import LoraConfig

    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=False, target_modules=targets), name)


def write_adapter(folder: Path, unet: UNet2DConditionModel) -> str:
    """Save an adapter with a LoRA, both for `unet`, and return the folder."""
    adapter = make_adapter(unet)
    add_lora(unet, LORA_NAME)
    write_au_adapter(folder, adapter, unet, LORA_NAME)
    return str(folder)


def free_address() -> dict[str, str]:
    """Where processes can meet, as the variables that say so."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


@pytest.fixture
def tiny_components() -> dict:
    return make_components()


@pytest.fixture(scope="session")
def tiny_sd_dir(tmp_path_factory) -> str:
    """A saved Stable Diffusion pipeline without an adapter."""
    folder = tmp_path_factory.mktemp("tiny_sd")
    FAMILIES["sd"].make_plain_pipe().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_adapter_dir(tmp_path_factory) -> str:
    """A saved adapter with a LoRA, for the base of `tiny_sd_dir`."""
    return write_adapter(tmp_path_factory.mktemp("tiny_adapter"), make_components()["unet"])


@pytest.fixture(scope="session")
def tiny_xl_dir(tmp_path_factory) -> str:
    """A saved Stable Diffusion XL pipeline without an adapter."""
    folder = tmp_path_factory.mktemp("tiny_xl")
    FAMILIES["sdxl"].make_plain_pipe().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_xl_adapter_dir(tmp_path_factory) -> str:
    """A saved adapter with a LoRA, for the base of `tiny_xl_dir`."""
    return write_adapter(tmp_path_factory.mktemp("tiny_xl_adapter"), make_xl_components()["unet"])


@pytest.fixture(scope="module")
def steady_base() -> FineFacePipeline:
    """A pipeline without an adapter, for all tests of a file that leave it as it was: making it takes longer."""
    return FAMILIES["sd"].make_pipe()


@pytest.fixture(scope="module")
def steady_pipe(tiny_adapter_dir) -> FineFacePipeline:
    """A pipeline with the adapter and its LoRA on, for all tests of a file that leave it as it was."""
    pipeline = FAMILIES["sd"].make_pipe()
    pipeline.load_au_adapter(tiny_adapter_dir)
    return pipeline


@pytest.fixture
def tiny_base(tiny_components) -> FineFacePipeline:
    """A pipeline without an adapter."""
    pipeline = FineFacePipeline(**tiny_components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def tiny_pipe(steady_pipe) -> FineFacePipeline:
    """A pipeline with the adapter and its LoRA on. A copy takes half as long as loading them."""
    return copy.deepcopy(steady_pipe)
