# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Measures the cost of AU control as a multiple of plain Stable Diffusion: `python -m benchmarks.bench_inference`.

Each row of a table is a whole call, from the prompt to the pictures. The calls of all rows are interleaved, a ratio is
taken within one round of calls, and the table has the median of the rounds. The architectures sd21, sd15 and sdxl have
random weights, which take as long as trained ones and need no download.

  on a CPU, a few minutes  python -m benchmarks.bench_inference --models toy
  on a GPU, eager          python -m benchmarks.bench_inference --models sd21 --batch-sizes 1 4 8
  on a GPU, CUDA graphs    python -m benchmarks.bench_inference --models sd21 --batch-sizes 1 \\
                               --compile reduce-overhead --rows plain one-token lora-fused lora
  what a step computes     python -m benchmarks.bench_inference --models sd21 sd15 sdxl --batch-sizes 1 --count

The last one runs on no device: it counts the multiplications and additions of matrix products and convolutions.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor
from peft import LoraConfig
from safetensors import safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from action_units import au_image_embeds, parse_aus
from au_attention_processor import au_layers
from au_encoder import LORA_WEIGHTS_NAME, AUAdapter, base_unet
from benchmarks.tables import Report, count, markdown_table
from drawing.model import quiet
from hub.ip_adapter import ip_adapter_state_dict
from pipeline_fineface import LORA_NAME, FineFacePipeline
from pipeline_fineface_xl import FineFaceXLPipeline
from program import TOY_MODEL, Parser, pick_device, run_program


PROMPT = "a closeup of a boy in a park"
AUS = "AU6=2.5 AU12=5"
GUIDANCE_SCALE = 7.5
LORA_RANK = 32
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
IP_IMAGE_DIM, IP_TOKENS = 1024, 4
# Enough for compilation, for recording CUDA graphs after it, and for a first replay.
WARM_UP_STEPS = 4
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COMPILE_MODES = ("no", "default", "reduce-overhead", "max-autotune")


# --------------------------------------------------------------------------------------------------------------------
# Models. The sizes are those of the published configurations.
# --------------------------------------------------------------------------------------------------------------------

UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}
SD21 = {
    "unet": UNET | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "text_encoder": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "vocab_size": 49408,
    },
    "vae": VAE,
}
SD15 = {
    "unet": UNET | {"cross_attention_dim": 768, "attention_head_dim": 8},
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 49408,
    },
    "vae": VAE,
}


SDXL = {
    "unet": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
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
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
        "vocab_size": 49408,
    },
    "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
}


def random_components(config: dict[str, dict], device: torch.device, dtype: torch.dtype) -> dict:
    """The components of a pipeline with random weights, made in `dtype` on `device`: nothing is copied."""
    torch.manual_seed(0)
    tokenizer = _make_tokenizer()
    from_tokenizer = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    from_tokenizer["max_position_embeddings"] = tokenizer.model_max_length
    text_config = CLIPTextConfig(**from_tokenizer, **config["text_encoder"])
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            unet, vae = UNet2DConditionModel(**config["unet"]), AutoencoderKL(**config["vae"])
            text_encoder = CLIPTextModel(text_config)
            second = None
            if "text_encoder_2" in config:
                second = CLIPTextModelWithProjection(CLIPTextConfig(**from_tokenizer, **config["text_encoder_2"]))
    finally:
        torch.set_default_dtype(default_dtype)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    models = {"unet": unet.eval(), "vae": vae.eval(), "text_encoder": text_encoder.eval()}
    models |= {"tokenizer": tokenizer, "scheduler": scheduler, "feature_extractor": None, "image_encoder": None}
    if second is not None:
        return {**models, "text_encoder_2": second.eval(), "tokenizer_2": tokenizer}
    return {**models, "safety_checker": None}


def toy_components(device: torch.device, dtype: torch.dtype) -> dict:
    with quiet():
        return StableDiffusionPipeline.from_pretrained(TOY_MODEL, dtype=dtype).to(device).components


def _make_tokenizer() -> CLIPTokenizer:
    """A tokenizer that knows only letters. The cost of a prompt is that of 77 tokens, however it is cut."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.<>=-"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _toy_lora_rank() -> int:
    with safe_open(TOY_MODEL / LORA_WEIGHTS_NAME, framework="pt") as file:
        return min(min(file.get_slice(key).get_shape()) for key in file.keys())


@dataclass(frozen=True)
class Architecture:
    title: str
    make_components: Callable[[torch.device, torch.dtype], dict]
    lora_rank: Callable[[], int] = lambda: LORA_RANK


ARCHITECTURES = {
    "sd21": Architecture("Stable Diffusion 2.1", partial(random_components, SD21)),
    "sd15": Architecture("Stable Diffusion 1.5", partial(random_components, SD15)),
    "sdxl": Architecture("Stable Diffusion XL", partial(random_components, SDXL)),
    "toy": Architecture("the toy model", toy_components, _toy_lora_rank),
}


# --------------------------------------------------------------------------------------------------------------------
# What is compared
# --------------------------------------------------------------------------------------------------------------------


class TextbookAUAttnProcessor(nn.Module):
    """Eq. 2 as it stands: at every step both keys and values, both matrices of scores, both attentions."""

    def __init__(self, to_k_au: torch.Tensor, to_v_au: torch.Tensor):
        super().__init__()
        self.to_k_au, self.to_v_au = nn.Parameter(to_k_au), nn.Parameter(to_v_au)

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states=None, attention_mask=None):
        text, aus = encoder_hidden_states[:, :-1], encoder_hidden_states[:, -1:]
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        text_attended = self._attend(attn, query, attn.to_k(text), attn.to_v(text))
        au_attended = self._attend(attn, query, aus @ self.to_k_au.T, aus @ self.to_v_au.T)
        return attn.to_out[1](attn.to_out[0](text_attended + au_attended)) / attn.rescale_output_factor

    @staticmethod
    def _attend(attn: Attention, query, key, value):
        scores = attn.get_attention_scores(query, attn.head_to_batch_dim(key))
        return attn.batch_to_head_dim(torch.bmm(scores, attn.head_to_batch_dim(value)))


class TextbookPipeline(StableDiffusionPipeline):
    """Passes the AU token behind the tokens of the text, by the arguments of plain Stable Diffusion."""

    def __call__(self, prompt: list[str], aus: str, **kwargs):
        embeds = self.encode_prompt(prompt, self._execution_device, 1, do_classifier_free_guidance=True)
        intensities = parse_aus(aus).expand(len(prompt), -1).to(self._execution_device)
        au_tokens = [self.au_encoder(rows) for rows in (intensities, torch.zeros_like(intensities))]
        embeds = [torch.cat([text, au.to(text.dtype)], dim=1) for text, au in zip(embeds, au_tokens, strict=True)]
        return super().__call__(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], **kwargs)


@dataclass
class Variant:
    """A pipeline and how it is called: a row of the tables. Its ratio is to the row `baseline`."""

    label: str
    pipeline: StableDiffusionPipeline
    kwargs: dict = field(default_factory=dict)
    baseline: str = "plain"

    @torch.no_grad()
    def __call__(self, batch_size: int, steps: int, on_step_end=None, **kwargs):
        return self.pipeline(
            [PROMPT] * batch_size,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=on_step_end,
            **self.kwargs,
            **kwargs,
        ).images


ROWS = {
    "plain": ("plain pipeline of diffusers", {}),
    "one-token": ("one token, no LoRA", {"tokens": 1}),
    "lora-baked": ("one token, LoRA fused, then unloaded", {"tokens": 1, "lora": "baked in"}),
    "lora-fused": ("one token, LoRA fused", {"tokens": 1, "lora": "fused"}),
    "lora": ("one token, LoRA not fused", {"tokens": 1, "lora": "on"}),
    "attention-4": ("general attention, 4 tokens", {"tokens": 4}),
    "attention-16": ("general attention, 16 tokens", {"tokens": 16}),
    "ip-plain": ("plain with an IP-Adapter", {"ip_adapter": True}),
    "ip": (
        "one token beside an IP-Adapter, to plain with it",
        {"tokens": 1, "ip_adapter": True, "baseline": "ip-plain"},
    ),
    "plain-aus": ("plain with the AUs as an IP-Adapter, no LoRA", {"plain_aus": True}),
    "third-branch": ("one token, `au_guidance_scale`", {"tokens": 1, "kwargs": {"au_guidance_scale": 5}}),
    "textbook": ("textbook: bmm attention each step, LoRA not fused", {"tokens": 1, "lora": "on", "textbook": True}),
}
"""Each row of a table by its name on the command line: its label, and the arguments of `make_variant`."""


def make_row(row: str, components: dict, lora_rank: int) -> Variant:
    label, arguments = ROWS[row]
    return make_variant(components, lora_rank, label, **arguments)


def make_variant(
    components: dict,
    lora_rank: int,
    label: str,
    tokens: int = 0,
    lora: str | None = None,
    ip_adapter: bool = False,
    textbook: bool = False,
    plain_aus: bool = False,
    kwargs: dict | None = None,
    baseline: str = "plain",
) -> Variant:
    """Make a pipeline from `components`. Variants share all weights that they do not change."""
    unet, kwargs = base_unet(components["unet"]).eval(), dict(kwargs or {})
    if lora in ("fused", "baked in"):
        unet = copy.deepcopy(unet)  # fusing writes into the weights
    extra = {}
    if tokens:
        torch.manual_seed(1)
        adapter = AUAdapter(au_layers(unet), unet.config.cross_attention_dim, num_tokens=tokens)
        adapter = nn.Module.to(adapter, unet.device, unet.dtype).eval()
        kwargs["aus"] = AUS
        if not textbook:
            extra["au_adapter"] = adapter
    if is_xl(components):
        pipeline_class = FineFaceXLPipeline if tokens else StableDiffusionXLPipeline
        options = {"add_watermarker": False}
    else:
        pipeline_class = TextbookPipeline if textbook else FineFacePipeline if tokens else StableDiffusionPipeline
        options = {"requires_safety_checker": False}
    pipeline = pipeline_class(**components | {"unet": unet} | extra, **options)
    pipeline.set_progress_bar_config(disable=True)
    if textbook:
        pipeline.au_encoder = adapter.encoder
        weights = adapter.attn_processors_state_dict()
        for name, attn in _attention_layers(unet):
            processor = AttnProcessor()
            if name in adapter.layers:
                projections = (weights[f"{name}.processor.{proj}.weight"] for proj in ("to_k_au", "to_v_au"))
                processor = TextbookAUAttnProcessor(*projections)
            attn.set_processor(processor)
    if plain_aus:
        torch.manual_seed(1)
        adapter = AUAdapter(au_layers(unet), unet.config.cross_attention_dim)
        _load_ip_adapter(pipeline, ip_adapter_state_dict(adapter))
        kwargs["ip_adapter_image_embeds"] = [t.to(unet.device) for t in au_image_embeds(AUS, dtype=unet.dtype)]
    if ip_adapter:
        _add_ip_adapter(pipeline)
        embeds = torch.randn(2, 1, IP_IMAGE_DIM, device=unet.device, dtype=unet.dtype)
        kwargs["ip_adapter_image_embeds"] = [embeds]
    if lora:
        torch.manual_seed(2)
        config = LoraConfig(r=lora_rank, target_modules=LORA_TARGETS, init_lora_weights=False)
        unet.add_adapter(config, LORA_NAME)
    if lora in ("fused", "baked in"):
        pipeline.fuse_lora(components=["unet"])
    if lora == "baked in":
        pipeline.unload_lora_weights()
    return Variant(label, pipeline, kwargs, baseline)


def is_xl(components: dict) -> bool:
    return "text_encoder_2" in components


def _attention_layers(unet: nn.Module) -> list[tuple[str, Attention]]:
    return [(name, module) for name, module in unet.named_modules() if isinstance(module, Attention)]


def _add_ip_adapter(pipeline: StableDiffusionPipeline) -> None:
    """Random weights in the form of a published IP-Adapter; layers are numbered as the UNet lists its processors."""
    unet = pipeline.unet
    width, widths = unet.config.cross_attention_dim, au_layers(unet)
    layers = {}
    for number, processor in enumerate(unet.attn_processors):
        inner_dim = widths.get(processor.removesuffix(".processor"))
        if inner_dim:
            layers[f"{number}.to_k_ip.weight"] = torch.randn(inner_dim, width) / width**0.5
            layers[f"{number}.to_v_ip.weight"] = torch.randn(inner_dim, width) / width**0.5
    image_proj = {
        "proj.weight": torch.randn(IP_TOKENS * width, IP_IMAGE_DIM) / IP_IMAGE_DIM**0.5,
        "proj.bias": torch.zeros(IP_TOKENS * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    parts = {"image_proj": image_proj, "ip_adapter": layers}
    _load_ip_adapter(pipeline, {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()})


def _load_ip_adapter(pipeline: StableDiffusionPipeline, tensors: dict[str, torch.Tensor]) -> None:
    parts = {
        part: {key.removeprefix(f"{part}."): tensor for key, tensor in tensors.items() if key.startswith(f"{part}.")}
        for part in ("image_proj", "ip_adapter")
    }
    pipeline.load_ip_adapter(parts, subfolder="", weight_name="", image_encoder_folder=None)


# --------------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    label: str
    baseline: str
    peak_bytes: int | None = None
    """The peak memory of the device in a call, with the weights of all rows; None where torch cannot tell."""
    calls: list[float] = field(default_factory=list)
    """Seconds of each call."""
    steps: list[float] = field(default_factory=list)
    """Seconds of a denoising step in each call, without the first step; empty if there is only one step."""


def measure(
    variants: dict[str, Variant], batch_size: int, steps: int, repeats: int, mode: str, **size
) -> dict[str, Measured]:
    """Measure `variants` in `repeats` rounds of one call each."""
    rows, measured = list(variants), {row: Measured(v.label, v.baseline) for row, v in variants.items()}
    device = variants[rows[0]].pipeline.unet.device
    with tqdm(total=len(rows) * (1 + repeats), desc="calls", leave=False) as bar:
        for row, variant in variants.items():
            if mode != "no":
                variant.pipeline.unet.compile(mode=mode, fullgraph=True, dynamic=False)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            variant(batch_size, WARM_UP_STEPS if mode != "no" or device.type != "cpu" else 1, **size)
            # The statistics leave out the memory of recorded CUDA graphs, so there is no figure with them.
            if device.type == "cuda" and mode == "no":
                measured[row].peak_bytes = torch.cuda.max_memory_allocated(device)
            bar.update()
        for number in range(repeats):
            for row in [*rows[number % len(rows) :], *rows[: number % len(rows)]]:
                seconds, seconds_per_step = time_call(variants[row], batch_size, steps, device, **size)
                measured[row].calls.append(seconds)
                if seconds_per_step is not None:
                    measured[row].steps.append(seconds_per_step)
                bar.update()
    return measured


def time_call(
    variant: Variant, batch_size: int, steps: int, device: torch.device, **size
) -> tuple[float, float | None]:
    """Seconds of a call, and of a step in it. Nothing waits for the device inside the call."""
    marks = []

    def on_step_end(pipeline, step, timestep, tensors):
        if step in (0, steps - 1):
            marks.append(_mark(device))
        return tensors

    synchronize(device)
    started = time.perf_counter()
    variant(batch_size, steps, on_step_end, **size)
    synchronize(device)
    seconds = time.perf_counter() - started
    if steps == 1:
        return seconds, None
    first, last = marks
    between = first.elapsed_time(last) / 1000 if device.type == "cuda" else last - first
    return seconds, between / (steps - 1)


def _mark(device: torch.device):
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    synchronize(device)
    return time.perf_counter()


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def format_measured(measured: dict[str, Measured]) -> str:
    rows = []
    for result in measured.values():
        baseline = measured[result.baseline].calls
        ratios = [ours / theirs for ours, theirs in zip(result.calls, baseline, strict=True)]
        rows.append(
            [
                result.label,
                f"{statistics.median(result.calls):.3f}",
                f"{statistics.median(result.steps):.4f}" if result.steps else "–",
                f"{statistics.median(ratios):.3f}",
                f"{min(ratios):.3f} – {max(ratios):.3f}",
                "–" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:,.1f}",
            ]
        )
    return markdown_table(["", "s / call", "s / step", "ratio", "lowest – highest", "peak MiB"], rows)


@torch.no_grad()
def step_flops(variant: Variant, batch_size: int, resolution: int | None = None) -> int:
    """Floating-point operations of the UNet in one denoising step with guidance."""
    pipeline, unet = variant.pipeline, variant.pipeline.unet
    rows = batch_size * (3 if "au_guidance_scale" in variant.kwargs else 2)
    side = resolution // pipeline.vae_scale_factor if resolution else unet.config.sample_size
    is_textbook = isinstance(pipeline, TextbookPipeline)
    empty = partial(torch.empty, device=unet.device, dtype=unet.dtype)
    kwargs = {}
    if "aus" in variant.kwargs and not is_textbook:
        kwargs["cross_attention_kwargs"] = pipeline.encode_aus(AUS, unet.device, batch_size=rows)[0]
    if "ip_adapter_image_embeds" in variant.kwargs:
        kwargs["added_cond_kwargs"] = {
            "image_embeds": [empty(rows, *embeds.shape[1:]) for embeds in variant.kwargs["ip_adapter_image_embeds"]]
        }
    if unet.config.addition_embed_type == "text_time":
        num_sizes, pooled_dim = 6, pipeline.text_encoder_2.config.projection_dim
        added = {"text_embeds": empty(rows, pooled_dim), "time_ids": empty(rows, num_sizes)}
        kwargs["added_cond_kwargs"] = kwargs.get("added_cond_kwargs", {}) | added
    num_tokens = pipeline.tokenizer.model_max_length + is_textbook
    with FlopCounterMode(display=False) as counter:
        unet(
            empty(rows, unet.config.in_channels, side, side),
            torch.zeros((), device=unet.device),
            encoder_hidden_states=empty(rows, num_tokens, unet.config.cross_attention_dim),
            **kwargs,
        )
    return counter.get_total_flops()


def format_counts(variants: dict[str, Variant], batch_size: int, resolution: int | None) -> str:
    counts = {row: step_flops(variant, batch_size, resolution) for row, variant in variants.items()}
    lines = [
        [variant.label, f"{counts[row] / 1e9:,.2f}", f"{counts[row] / counts[variant.baseline]:.5f}"]
        for row, variant in variants.items()
    ]
    return markdown_table(["", "GFLOP / step", "ratio"], lines)


# --------------------------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("benchmarks.bench_inference", __doc__)
    parser.add_argument("--device", help="(default: the accelerator, if there is one)")
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, help="(default: toy on cpu, else all)")
    parser.add_argument("--batch-sizes", nargs="+", type=count, default=[1, 4, 8], metavar="N")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="(default: float32 on cpu, else float16)")
    parser.add_argument("--compile", nargs="+", choices=COMPILE_MODES, default=["no"], help="modes of torch.compile")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to measure (default: all)")
    parser.add_argument("--steps", type=count, help="(default: 10 on cpu, else 50)")
    parser.add_argument("--resolution", type=count, metavar="PIXELS", help="a multiple of 8 (default: the model's)")
    parser.add_argument("--repeats", type=count, default=5, help="rounds of interleaved calls (default: 5)")
    parser.add_argument("--count", action="store_true", help="count what is computed instead, on no device")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the tables to a file as well")
    args = parser.parse_args(argv)
    if args.resolution is not None and args.resolution % 8:
        raise ValueError(f"`--resolution` is {args.resolution}, but has to be a multiple of 8.")
    args.device = torch.device("meta") if args.count else pick_device(args.device)
    on_cpu = args.device.type == "cpu"
    args.models = args.models or (["toy"] if on_cpu else list(ARCHITECTURES))
    args.dtypes = args.dtypes or ["float32" if on_cpu else "float16"]
    args.steps = args.steps or (10 if on_cpu else 50)
    # The baseline of each row is measured too.
    needed = {"plain", *(ROWS[row][1].get("baseline", "plain") for row in args.rows)}
    args.rows = [row for row in ROWS if row in needed.union(args.rows)]
    return args


def make_table(components: dict, lora_rank: int, batch_size: int, mode: str, args: argparse.Namespace) -> str:
    # The textbook's pipeline is one for Stable Diffusion 1.x and 2.x.
    rows = [row for row in args.rows if row != "textbook" or not is_xl(components)]
    variants = {row: make_row(row, components, lora_rank) for row in rows}
    if args.count:
        return format_counts(variants, batch_size, args.resolution)
    size = {"height": args.resolution, "width": args.resolution} if args.resolution else {}
    torch._dynamo.reset()
    # All variants run the code of one class, but each is compiled by itself, which would exceed the usual limit.
    with torch._dynamo.config.patch(recompile_limit=16 * len(ROWS)):
        return format_measured(measure(variants, batch_size, args.steps, args.repeats, mode, **size))


def run(args: argparse.Namespace) -> None:
    report = Report(args.output, args.device)
    for model in args.models:
        architecture = ARCHITECTURES[model]
        for dtype in args.dtypes:
            components = architecture.make_components(args.device, DTYPES[dtype])
            side = args.resolution or default_resolution(components)
            for batch_size in args.batch_sizes:
                for mode in ["no"] if args.count else args.compile:
                    title, what = f"{architecture.title}, batch {batch_size}", "one step"
                    if not args.count:
                        title += f", {dtype}, {'eager' if mode == 'no' else f'compiled ({mode})'}"
                        what = f"{args.steps} steps, medians of {args.repeats}"
                    try:
                        table = make_table(components, architecture.lora_rank(), batch_size, mode, args)
                    except torch.OutOfMemoryError:
                        table = "Not enough memory on the device for all rows at once. Name fewer with `--rows`."
                    report.add(f"### {title}\n\n{side} × {side} pixels, {what}.\n\n{table}")


def default_resolution(components: dict) -> int:
    return components["unet"].config.sample_size * 2 ** (len(components["vae"].config.block_out_channels) - 1)


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
