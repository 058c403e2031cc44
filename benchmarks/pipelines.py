# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the benchmarks compare: models of published sizes with random weights, or the toy model, and a pipeline for each
row of the tables of `benchmarks.bench_inference`, all on one set of weights.
"""

import copy
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, IPAdapterAttnProcessor
from peft import LoraConfig
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from action_units import au_image_embeds, parse_aus
from au_attention_processor import au_layers
from au_encoder import AUAdapter, AUEncoder, base_unet
from drawing.model import quiet
from evaluation.systems import embed_with_tokens
from hub.ip_adapter import ip_adapter_state_dict
from paper.baselines import add_ip_adapter
from pipeline_fineface import LORA_NAME, FineFacePipeline
from pipeline_fineface_xl import FineFaceXLPipeline
from program import TOY_MODEL
from train_fineface import LORA_TARGETS


PROMPT = "a closeup of a boy in a park"
AUS = "AU6=2.5 AU12=5"
GUIDANCE_SCALE = 7.5
IP_IMAGE_DIM = 1024
LORA_RANK = 32
"""The rank of the paper's LoRA, which is also that of the toy model."""
# The sizes of the published configurations, where these are not the defaults of the classes.
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SD21 = {
    "unet": {
        "sample_size": 64,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "text_encoder": {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"},
}
SD15 = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
    "text_encoder": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}
SDXL = {
    "unet": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "text_encoder": SD15["text_encoder"],
    "text_encoder_2": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
}


def random_components(sizes: dict[str, dict], device: torch.device, dtype: torch.dtype) -> dict:
    """The components of a pipeline, with random weights that are made on `device`."""
    torch.manual_seed(0)
    models = {}
    with device:
        models["unet"] = UNet2DConditionModel(**sizes["unet"])
        models["vae"] = AutoencoderKL(**VAE)
        for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            if name in sizes:
                models[name] = kind(CLIPTextConfig(intermediate_size=4 * sizes[name]["hidden_size"], **sizes[name]))
    for model in models.values():
        # Use `nn.Module.to`: `ModelMixin.to` logs a warning on casts.
        nn.Module.to(model, dtype).eval()
    # The cost of a prompt is that of 77 tokens, however it is cut, and that of a step does not depend on its noise.
    tokenizer = CLIPTokenizer.from_pretrained(TOY_MODEL, subfolder="tokenizer", model_max_length=77)
    models |= {"tokenizer": tokenizer, "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1)}
    models |= {"feature_extractor": None, "image_encoder": None}
    return models | ({"tokenizer_2": tokenizer} if is_xl(models) else {"safety_checker": None})


def is_xl(components: dict) -> bool:
    return "text_encoder_2" in components


def toy_components(device: torch.device, dtype: torch.dtype) -> dict:
    with quiet():
        return StableDiffusionPipeline.from_pretrained(TOY_MODEL, dtype=dtype).to(device).components


ARCHITECTURES = {
    "sd21": ("Stable Diffusion 2.1", partial(random_components, SD21)),
    "sd15": ("Stable Diffusion 1.5", partial(random_components, SD15)),
    "sdxl": ("Stable Diffusion XL", partial(random_components, SDXL)),
    "toy": ("the toy model", toy_components),
}
"""The title of each model, and a function that makes its components on a device in a dtype."""


def resolution_of(components: dict) -> int:
    return components["unet"].config.sample_size * 2 ** (len(components["vae"].config.block_out_channels) - 1)


class TextbookAUAttnProcessor(IPAdapterAttnProcessor):
    """Eq. 2 as it stands: at every step both keys and values, both matrices of scores, both attentions."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, *args, **kwargs):
        """The last one of `encoder_hidden_states` is the AU token."""
        text_and_aus = encoder_hidden_states[:, :-1], [encoder_hidden_states[:, -1:]]
        return super().__call__(attn, hidden_states, text_and_aus, *args, **kwargs)


def set_textbook_processors(unet: nn.Module, adapter: AUAdapter) -> None:
    """Give each cross-attention layer copies of its keys and values, and the attention of the textbook to all."""
    weights = adapter.attn_processors_state_dict()
    processors = {name: AttnProcessor() for name in unet.attn_processors}
    for layer in adapter.layers:
        to_k, to_v = (weights[f"{layer}.processor.{name}.weight"].detach() for name in ("to_k_au", "to_v_au"))
        processor = TextbookAUAttnProcessor(*to_k.shape, num_tokens=(1,)).to(to_k)
        processor.load_state_dict({"to_k_ip.0.weight": to_k, "to_v_ip.0.weight": to_v})
        processors[f"{layer}.processor"] = processor
    unet.set_attn_processor(processors)


@dataclass(frozen=True)
class Row:
    """
    A row of the tables: what a pipeline has beside the plain one. Its ratio is to the row `baseline`. `lora` is "on",
    "fused", or "baked in": fused, then unloaded.
    """

    label: str
    tokens: int = 0
    lora: str | None = None
    ip_adapter: bool = False
    plain_aus: bool = False
    textbook: bool = False
    kwargs: dict = field(default_factory=dict)
    baseline: str = "plain"


ROWS = {
    "plain": Row("plain pipeline of diffusers"),
    "one-token": Row("one token, no LoRA", 1),
    "lora-baked": Row("one token, LoRA fused, then unloaded", 1, "baked in"),
    "lora-fused": Row("one token, LoRA fused", 1, "fused"),
    "lora": Row("one token, LoRA not fused", 1, "on"),
    "attention-4": Row("general attention, 4 tokens", 4),
    "attention-16": Row("general attention, 16 tokens", 16),
    "ip-plain": Row("plain with an IP-Adapter", ip_adapter=True),
    "ip": Row("one token beside an IP-Adapter, to plain with it", 1, ip_adapter=True, baseline="ip-plain"),
    "plain-aus": Row("plain with the AUs as an IP-Adapter, no LoRA", plain_aus=True),
    "third-branch": Row("one token, `au_guidance_scale`", 1, kwargs={"au_guidance_scale": 5}),
    "textbook": Row("textbook: bmm attention each step, LoRA not fused", 1, "on", textbook=True),
}
"""Each row of a table by its name on the command line."""


@dataclass
class Variant:
    """The pipeline of a row, and how it is called. The textbook's plain pipeline gets tokens from `token_encoder`."""

    row: Row
    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline
    kwargs: dict
    token_encoder: AUEncoder | None = None

    @torch.no_grad()
    def __call__(self, batch_size: int, steps: int, on_step_end=None, **kwargs):
        prompts = [PROMPT] * batch_size
        called = {"prompt": prompts}
        if self.token_encoder is not None:
            aus = parse_aus(AUS).expand(batch_size, -1)
            called = embed_with_tokens(self.pipeline, self.token_encoder, prompts, aus, guided=True)
        return self.pipeline(
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=on_step_end,
            **called,
            **self.kwargs,
            **kwargs,
        ).images


def make_row(name: str, components: dict, lora_rank: int = LORA_RANK) -> Variant:
    """Make the pipeline of a row from `components`. Rows share all weights that they do not change."""
    row, unet = ROWS[name], base_unet(components["unet"]).eval()
    is_fused = row.lora in ("fused", "baked in")
    if is_fused:
        unet = copy.deepcopy(unet)  # fusing writes into the weights
    plain, ours, options = StableDiffusionPipeline, FineFacePipeline, {"requires_safety_checker": False}
    if is_xl(components):
        plain, ours, options = StableDiffusionXLPipeline, FineFaceXLPipeline, {"add_watermarker": False}
    kwargs, token_encoder = dict(row.kwargs), None
    torch.manual_seed(1)
    if row.ip_adapter:
        add_ip_adapter(unet, IP_IMAGE_DIM)
        embeds = torch.randn(2, 1, IP_IMAGE_DIM, device=unet.device, dtype=unet.dtype)
        kwargs["ip_adapter_image_embeds"] = [embeds]
    if row.tokens or row.plain_aus:
        adapter = AUAdapter(au_layers(unet), unet.config.cross_attention_dim, num_tokens=row.tokens or 1)
    if row.plain_aus:
        tensors = {"image_proj": {}, "ip_adapter": {}}
        for key, tensor in ip_adapter_state_dict(adapter).items():
            part, _, tensor_name = key.partition(".")
            tensors[part][tensor_name] = tensor
        unet._load_ip_adapter_weights([tensors])
        kwargs["ip_adapter_image_embeds"] = [t.to(unet.device) for t in au_image_embeds(AUS, dtype=unet.dtype)]
    if row.tokens:
        adapter = nn.Module.to(adapter, unet.device, unet.dtype).eval()
    if row.textbook:
        token_encoder, ours = adapter.encoder, plain
        set_textbook_processors(unet, adapter)
    elif row.tokens:
        options["au_adapter"], kwargs["aus"] = adapter, AUS
    pipeline = (ours if row.tokens else plain)(**components | {"unet": unet}, **options)
    pipeline.set_progress_bar_config(disable=True)
    if row.lora:
        torch.manual_seed(2)
        config = LoraConfig(r=lora_rank, target_modules=LORA_TARGETS, init_lora_weights=False)
        unet.add_adapter(config, LORA_NAME)
    if is_fused:
        pipeline.fuse_lora(components=["unet"])
    if row.lora == "baked in":
        pipeline.unload_lora_weights()
    return Variant(row, pipeline, kwargs, token_encoder)
