# SPDX-License-Identifier: Apache-2.0
"""
What the benchmarks compare: models of published sizes with random weights, or the toy model, and a pipeline for each
row of the tables of `benchmarks.bench_inference`, all on one set of weights.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, IPAdapterAttnProcessor
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from peft import LoraConfig
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from action_units import au_image_embeds
from au_attention_processor import au_layers
from au_encoder import AUAdapter, base_unet
from drawing.model import fuse_lora, quiet
from hub.ip_adapter import ip_adapter_state_dict
from paper.baselines import add_ip_adapter
from pipeline_fineface import LORA_NAME, FineFacePipeline
from pipeline_fineface_xl import FineFaceXLPipeline
from program import TOY_MODEL
from train_fineface import LORA_TARGETS


AUS = "AU6=2.5 AU12=5"
IP_IMAGE_DIM = 1024


def text_encoder(kind: type[nn.Module], width: int, layers: int, heads: int, **others) -> Callable[[], nn.Module]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return partial(kind, CLIPTextConfig(**sizes, num_attention_heads=heads, **others))


# What makes each model in the sizes of the published configurations, where these are not the defaults of the classes.
VAE = partial(
    AutoencoderKL,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    # The VAE of Stable Diffusion XL that can decode in half precision. Other pipelines ignore this.
    force_upcast=False,
)
UNET = partial(UNet2DConditionModel, sample_size=64)
LINEAR_UNET = partial(UNET, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
SD21 = {
    "unet": partial(LINEAR_UNET, cross_attention_dim=1024),
    "text_encoder": text_encoder(CLIPTextModel, 1024, 23, 16, hidden_act="gelu"),
}
SD15 = {"unet": partial(UNET, cross_attention_dim=768), "text_encoder": text_encoder(CLIPTextModel, 768, 12, 12)}
SDXL = {
    "unet": partial(
        LINEAR_UNET,
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        transformer_layers_per_block=(1, 2, 10),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    "text_encoder": SD15["text_encoder"],
    "text_encoder_2": text_encoder(CLIPTextModelWithProjection, 1280, 32, 20, projection_dim=1280, hidden_act="gelu"),
}


def empty_model(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model that `make` makes, but on `device` from the start, and with uninitialized weights."""
    with init_empty_weights():
        model = make()
    weights = {k: torch.empty_like(weight, device=device, dtype=dtype) for k, weight in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval()


def random_components(makers: dict[str, Callable], device: torch.device, dtype: torch.dtype) -> dict:
    """The components of a pipeline, with random weights."""
    torch.manual_seed(0)
    components = {name: empty_model(make, device, dtype) for name, make in {"vae": VAE, **makers}.items()}
    for parameter in itertools.chain.from_iterable(model.parameters() for model in components.values()):
        nn.init.normal_(parameter, std=0.02)
    # The cost of a prompt is that of 77 tokens, however it is cut, and that of a step does not depend on its noise.
    tokenizer = CLIPTokenizer.from_pretrained(TOY_MODEL, subfolder="tokenizer", model_max_length=77)
    components |= {"tokenizer": tokenizer, "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1)}
    absent = {"safety_checker": None, "feature_extractor": None}
    return components | ({"tokenizer_2": tokenizer} if "text_encoder_2" in makers else absent)


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


def make_textbook(unet: nn.Module, adapter: AUAdapter) -> None:
    """
    Make `adapter` an IP-Adapter of `unet`, whose picture is the AUs. Each layer computes Eq. 2 as it stands: at every
    step both keys and values, both matrices of scores, both attentions.
    """
    weights = adapter.attn_processors_state_dict()
    processors = {name: AttnProcessor() for name in unet.attn_processors}
    for layer in adapter.layers:
        to_k, to_v = (weights[f"{layer}.processor.{name}.weight"].detach() for name in ("to_k_au", "to_v_au"))
        with to_k.device:
            processor = IPAdapterAttnProcessor(*to_k.shape, num_tokens=(1,)).to(to_k)
        processor.load_state_dict({"to_k_ip.0.weight": to_k, "to_v_ip.0.weight": to_v})
        processors[f"{layer}.processor"] = processor
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([adapter.encoder])
    unet.config.encoder_hid_dim_type = "ip_image_proj"


@dataclass(frozen=True)
class Row:
    """
    A row of the tables: what a pipeline has beside the plain one. Its ratio is to the row `baseline`. `lora` is "on",
    "fused", or "baked in": fused, then unloaded. `ip_adapter` is one for "pictures", or one for "AUs", in diffusers'
    own attention or in that of the "textbook".
    """

    label: str
    tokens: int = 0
    lora: str | None = None
    ip_adapter: str | None = None
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
    "ip-plain": Row("plain with an IP-Adapter", ip_adapter="pictures"),
    "ip": Row("one token beside an IP-Adapter, to plain with it", 1, ip_adapter="pictures", baseline="ip-plain"),
    "plain-aus": Row("plain with the AUs as an IP-Adapter, no LoRA", ip_adapter="AUs"),
    "third-branch": Row("one token, `au_guidance_scale`", 1, kwargs={"au_guidance_scale": 5}),
    "textbook": Row("textbook: bmm attention each step, LoRA not fused", 1, "on", "textbook"),
}
"""Each row of a table by its name on the command line."""


@dataclass
class Variant:
    """The pipeline of a row, and how it is called."""

    pipeline: DiffusionPipeline
    kwargs: dict

    def __call__(self, batch_size: int, steps: int, **kwargs):
        return self.pipeline(
            ["a closeup of a boy in a park"] * batch_size,
            num_inference_steps=steps,
            guidance_scale=7.5,
            generator=torch.Generator().manual_seed(0),
            **self.kwargs,
            **kwargs,
        ).images


def make_row(name: str, components: dict, lora_rank: int = 32) -> Variant:
    """
    Make the pipeline of a row from `components`. Rows share all weights that they do not change. The default of
    `lora_rank` is the paper's.
    """
    row, unet = ROWS[name], base_unet(components["unet"]).eval()
    if row.lora in ("fused", "baked in"):
        unet = copy.deepcopy(unet)  # fusing writes into the weights
    ours, options = FineFacePipeline, {"requires_safety_checker": False}
    if "text_encoder_2" in components:
        ours, options = FineFaceXLPipeline, {"add_watermarker": False}
    layers, width = au_layers(unet), unet.config.cross_attention_dim
    kwargs, (embeds,) = dict(row.kwargs), au_image_embeds(AUS)
    torch.manual_seed(1)
    if row.ip_adapter == "pictures":
        add_ip_adapter(unet, IP_IMAGE_DIM)
        embeds = torch.randn(2, 1, IP_IMAGE_DIM)
    elif row.ip_adapter == "AUs":
        # As an IP-Adapter, every adapter of one token has the same form, and that of this one is made at once.
        tensors = {"image_proj": {}, "ip_adapter": {}}
        for key, tensor in ip_adapter_state_dict(AUAdapter(layers, width, encoder_type="direct")).items():
            part, _, tensor_name = key.partition(".")
            tensors[part][tensor_name] = tensor
        unet._load_ip_adapter_weights([tensors])
    if row.tokens:
        # For Stable Diffusion XL, drawing 341 million numbers on a CPU takes seconds.
        with unet.device:
            adapter = AUAdapter(layers, width, num_tokens=row.tokens)
        adapter = nn.Module.to(adapter, unet.dtype).eval()
    if row.ip_adapter == "textbook":
        make_textbook(unet, adapter)
    elif row.tokens:
        options["au_adapter"], kwargs["aus"] = adapter, AUS
    if row.ip_adapter is not None:
        kwargs["ip_adapter_image_embeds"] = [embeds.to(unet.device, unet.dtype)]
    kind = ours if "aus" in kwargs else ours.base_class
    pipeline = kind(**components | {"unet": unet}, **options)
    pipeline.set_progress_bar_config(disable=True)
    if row.lora:
        torch.manual_seed(2)
        with unet.device:
            unet.add_adapter(LoraConfig(r=lora_rank, target_modules=LORA_TARGETS, init_lora_weights=False), LORA_NAME)
    if row.lora == "fused":
        pipeline.fuse_lora(components=["unet"])
    elif row.lora == "baked in":
        fuse_lora(pipeline)
    return Variant(pipeline, kwargs)
