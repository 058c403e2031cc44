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
import itertools
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
from au_encoder import LORA_WEIGHTS_NAME, AUAdapter, base_unet, ip_adapter_numbers
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
# Models. The sizes are those of the published configurations, where these are not the defaults of the classes.
# --------------------------------------------------------------------------------------------------------------------

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


def random_components(config: dict[str, dict], device: torch.device, dtype: torch.dtype) -> dict:
    """The components of a pipeline with random weights, made in `dtype` on `device`: nothing is copied."""
    torch.manual_seed(0)
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    models, default_dtype = {}, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            models["unet"] = UNet2DConditionModel(**config["unet"]).eval()
            models["vae"] = AutoencoderKL(**VAE).eval()
            for name in config.keys() & classes.keys():
                text_config = CLIPTextConfig(intermediate_size=4 * config[name]["hidden_size"], **config[name])
                models[name] = classes[name](text_config).eval()
    finally:
        torch.set_default_dtype(default_dtype)
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


def default_resolution(components: dict) -> int:
    return components["unet"].config.sample_size * 2 ** (len(components["vae"].config.block_out_channels) - 1)


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


def set_textbook_processors(unet: nn.Module, adapter: AUAdapter) -> None:
    """Give each cross-attention layer copies of its keys and values, and the attention of the textbook to all."""
    weights = adapter.attn_processors_state_dict()
    processors = {name: AttnProcessor() for name in unet.attn_processors}
    for layer in adapter.layers:
        name = f"{layer}.processor"
        projections = (weights[f"{name}.{projection}.weight"] for projection in ("to_k_au", "to_v_au"))
        processors[name] = TextbookAUAttnProcessor(*(weight.detach().clone() for weight in projections))
    unet.set_attn_processor(processors)


class TextbookPipeline(StableDiffusionPipeline):
    """Passes the AU token behind the tokens of the text, by the arguments of plain Stable Diffusion."""

    def __call__(self, prompt: list[str], aus: str, **kwargs):
        embeds = self.encode_prompt(prompt, self._execution_device, 1, do_classifier_free_guidance=True)
        intensities = parse_aus(aus).expand(len(prompt), -1).to(self._execution_device)
        au_tokens = [self.au_encoder(rows) for rows in (intensities, torch.zeros_like(intensities))]
        embeds = [torch.cat([text, au.to(text.dtype)], dim=1) for text, au in zip(embeds, au_tokens, strict=True)]
        return super().__call__(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], **kwargs)


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
    """The pipeline of a row, and how it is called."""

    row: Row
    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline
    kwargs: dict

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


def make_row(name: str, components: dict, lora_rank: int) -> Variant:
    """Make the pipeline of a row from `components`. Rows share all weights that they do not change."""
    row, unet = ROWS[name], base_unet(components["unet"]).eval()
    is_fused = row.lora in ("fused", "baked in")
    if is_fused:
        unet = copy.deepcopy(unet)  # fusing writes into the weights
    plain, ours = StableDiffusionPipeline, TextbookPipeline if row.textbook else FineFacePipeline
    options = {"requires_safety_checker": False}
    if is_xl(components):
        plain, ours, options = StableDiffusionXLPipeline, FineFaceXLPipeline, {"add_watermarker": False}
    kwargs = dict(row.kwargs)
    torch.manual_seed(1)
    if row.tokens or row.plain_aus:
        adapter = AUAdapter(au_layers(unet), unet.config.cross_attention_dim, num_tokens=row.tokens or 1)
    if row.tokens:
        adapter = nn.Module.to(adapter, unet.device, unet.dtype).eval()
        options |= {} if row.textbook else {"au_adapter": adapter}
        kwargs["aus"] = AUS
    pipeline = (ours if row.tokens else plain)(**components | {"unet": unet}, **options)
    pipeline.set_progress_bar_config(disable=True)
    if row.textbook:
        pipeline.au_encoder = adapter.encoder
        set_textbook_processors(unet, adapter)
    if row.plain_aus:
        _load_ip_adapter(pipeline, ip_adapter_state_dict(adapter))
        kwargs["ip_adapter_image_embeds"] = [t.to(unet.device) for t in au_image_embeds(AUS, dtype=unet.dtype)]
    if row.ip_adapter:
        _load_ip_adapter(pipeline, _random_ip_adapter(unet))
        embeds = torch.randn(2, 1, IP_IMAGE_DIM, device=unet.device, dtype=unet.dtype)
        kwargs["ip_adapter_image_embeds"] = [embeds]
    if row.lora:
        torch.manual_seed(2)
        config = LoraConfig(r=lora_rank, target_modules=LORA_TARGETS, init_lora_weights=False)
        unet.add_adapter(config, LORA_NAME)
    if is_fused:
        pipeline.fuse_lora(components=["unet"])
    if row.lora == "baked in":
        pipeline.unload_lora_weights()
    return Variant(row, pipeline, kwargs)


def _random_ip_adapter(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Random weights in the form of a published IP-Adapter."""
    width, widths = unet.config.cross_attention_dim, au_layers(unet)
    tensors = {
        "image_proj.proj.weight": torch.randn(IP_TOKENS * width, IP_IMAGE_DIM) / IP_IMAGE_DIM**0.5,
        "image_proj.proj.bias": torch.zeros(IP_TOKENS * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    for layer, number in ip_adapter_numbers(widths).items():
        for name in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{number}.{name}.weight"] = torch.randn(widths[layer], width) / width**0.5
    return tensors


def _load_ip_adapter(pipeline: StableDiffusionPipeline, tensors: dict[str, torch.Tensor]) -> None:
    parts = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    pipeline.load_ip_adapter(parts, subfolder="", weight_name="", image_encoder_folder=None)


# --------------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    row: Row
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
    rows, measured = list(variants), {name: Measured(variant.row) for name, variant in variants.items()}
    device = variants[rows[0]].pipeline.unet.device
    with tqdm(total=len(rows) * (1 + repeats), desc="calls", leave=False) as bar:
        for name, variant in variants.items():
            if mode != "no":
                variant.pipeline.unet.compile(mode=mode, fullgraph=True, dynamic=False)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            variant(batch_size, WARM_UP_STEPS if mode != "no" or device.type != "cpu" else 1, **size)
            # The statistics leave out the memory of recorded CUDA graphs, so there is no figure with them.
            if device.type == "cuda" and mode == "no":
                measured[name].peak_bytes = torch.cuda.max_memory_allocated(device)
            bar.update()
        for number in range(repeats):
            first = number % len(rows)
            for name in (*rows[first:], *rows[:first]):
                time_call(variants[name], measured[name], batch_size, steps, **size)
                bar.update()
    return measured


def time_call(variant: Variant, measured: Measured, batch_size: int, steps: int, **size) -> None:
    """Add the seconds of a call, and of a step in it. Nothing waits for a GPU inside the call."""
    device, marks = variant.pipeline.unet.device, []

    def on_step_end(pipeline, step, timestep, tensors):
        if step in (0, steps - 1):
            marks.append(_mark(device))
        return tensors

    synchronize(device)
    started = time.perf_counter()
    variant(batch_size, steps, on_step_end, **size)
    synchronize(device)
    measured.calls.append(time.perf_counter() - started)
    if steps > 1:
        first, last = marks
        between = first.elapsed_time(last) / 1000 if device.type == "cuda" else last - first
        measured.steps.append(between / (steps - 1))


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
    for one in measured.values():
        ratios = [ours / theirs for ours, theirs in zip(one.calls, measured[one.row.baseline].calls, strict=True)]
        call, ratio = statistics.median(one.calls), statistics.median(ratios)
        step = f"{statistics.median(one.steps):.4f}" if one.steps else "–"
        peak = "–" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:,.1f}"
        spread = f"{min(ratios):.3f} – {max(ratios):.3f}"
        rows.append([one.row.label, f"{call:.3f}", step, f"{ratio:.3f}", spread, peak])
    return markdown_table(["", "s / call", "s / step", "ratio", "lowest – highest", "peak MiB"], rows)


@torch.no_grad()
def step_flops(variant: Variant, batch_size: int, resolution: int | None = None) -> int:
    """Floating-point operations of the UNet in one denoising step with guidance."""
    pipeline, unet, is_textbook = variant.pipeline, variant.pipeline.unet, variant.row.textbook
    rows = batch_size * (3 if "au_guidance_scale" in variant.kwargs else 2)
    side = resolution // pipeline.vae_scale_factor if resolution else unet.config.sample_size
    empty = partial(torch.empty, device=unet.device, dtype=unet.dtype)
    added, kwargs = {}, {}
    if variant.row.tokens and not is_textbook:
        kwargs["cross_attention_kwargs"] = pipeline.encode_aus(AUS, unet.device, batch_size=rows)[0]
    if "ip_adapter_image_embeds" in variant.kwargs:
        embeds = variant.kwargs["ip_adapter_image_embeds"]
        added["image_embeds"] = [empty(rows, *tensor.shape[1:]) for tensor in embeds]
    if unet.config.addition_embed_type == "text_time":
        added["text_embeds"] = empty(rows, pipeline.text_encoder_2.config.projection_dim)
        added["time_ids"] = empty(rows, 6)
    sample = empty(rows, unet.config.in_channels, side, side)
    text = empty(rows, pipeline.tokenizer.model_max_length + is_textbook, unet.config.cross_attention_dim)
    with FlopCounterMode(display=False) as counter:
        unet(sample, torch.zeros((), device=unet.device), text, added_cond_kwargs=added, **kwargs)
    return counter.get_total_flops()


def format_counts(variants: dict[str, Variant], batch_size: int, resolution: int | None) -> str:
    counts = {name: step_flops(variant, batch_size, resolution) for name, variant in variants.items()}
    lines = []
    for name, variant in variants.items():
        ratio = counts[name] / counts[variant.row.baseline]
        lines.append([variant.row.label, f"{counts[name] / 1e9:,.2f}", f"{ratio:.5f}"])
    return markdown_table(["", "GFLOP / step", "ratio"], lines)


# --------------------------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("benchmarks.bench_inference", __doc__)
    add = parser.add_argument
    add("--device", help="(default: the accelerator, if there is one)")
    add("--models", nargs="+", choices=ARCHITECTURES, help="(default: toy on cpu, else all)")
    add("--batch-sizes", nargs="+", type=count, default=[1, 4, 8], metavar="N")
    add("--dtypes", nargs="+", choices=DTYPES, help="(default: float32 on cpu, else float16)")
    add("--compile", nargs="+", choices=COMPILE_MODES, default=["no"], help="modes of torch.compile")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to measure (default: all)")
    add("--steps", type=count, help="(default: 10 on cpu, else 50)")
    add("--resolution", type=count, metavar="PIXELS", help="a multiple of 8 (default: the model's)")
    add("--repeats", type=count, default=5, help="rounds of interleaved calls (default: 5)")
    add("--count", action="store_true", help="count what is computed instead, on no device")
    add("--output", type=Path, metavar="FILE.md", help="write the tables to a file as well")
    args = parser.parse_args(argv)
    if args.resolution is not None and args.resolution % 8:
        raise ValueError(f"`--resolution` is {args.resolution}, but has to be a multiple of 8.")
    args.device = torch.device("meta") if args.count else pick_device(args.device)
    on_cpu = args.device.type == "cpu"
    args.models = args.models or (["toy"] if on_cpu else list(ARCHITECTURES))
    args.dtypes = args.dtypes or ["float32" if on_cpu else "float16"]
    args.steps = args.steps or (10 if on_cpu else 50)
    # The baseline of each row is measured too.
    needed = {"plain", *args.rows, *(ROWS[row].baseline for row in args.rows)}
    args.rows = [row for row in ROWS if row in needed]
    args.compile = ["no"] if args.count else args.compile
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
    for model, dtype in itertools.product(args.models, args.dtypes):
        architecture = ARCHITECTURES[model]
        components = architecture.make_components(args.device, DTYPES[dtype])
        side = args.resolution or default_resolution(components)
        for batch_size, mode in itertools.product(args.batch_sizes, args.compile):
            title, what = f"{architecture.title}, batch {batch_size}", "one step"
            if not args.count:
                title += f", {dtype}, {'eager' if mode == 'no' else f'compiled ({mode})'}"
                what = f"{args.steps} steps, medians of {args.repeats}"
            try:
                table = make_table(components, architecture.lora_rank(), batch_size, mode, args)
            except torch.OutOfMemoryError:
                table = "Not enough memory on the device for all rows at once. Name fewer with `--rows`."
            report.add(f"### {title}\n\n{side} × {side} pixels, {what}.\n\n{table}")


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
