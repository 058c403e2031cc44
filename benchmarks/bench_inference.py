"""
What AU control costs, as a multiple of plain Stable Diffusion: `python -m benchmarks.bench_inference`.

Every row of a table is a whole call: prompt in, pictures out. The calls of all rows are interleaved, each ratio is
taken within one round of calls, and what is printed is the median of the rounds. The architectures sd21 and sd15 have
random weights, which take as long as trained ones and need no download; toy is the embedded model.

  on a CPU, a few minutes       python -m benchmarks.bench_inference --models toy
  on a GPU, eager               python -m benchmarks.bench_inference --models sd21 --batch-sizes 1 4 8
  on a GPU, CUDA graphs         python -m benchmarks.bench_inference --models sd21 --batch-sizes 1 \\
                                    --compile reduce-overhead --rows plain one-token lora-fused lora
  where the time of a step goes python -m benchmarks.bench_inference --models sd21 --batch-sizes 1 --profile
  what a step computes          python -m benchmarks.bench_inference --models sd21 sd15 --batch-sizes 1 --count

The last runs on no device: it counts the multiplications and additions of matrix products and convolutions.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from peft import LoraConfig
from safetensors import safe_open
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import pipeline_fineface
from action_units import parse_aus
from au_attention_processor import au_layers
from au_encoder import LORA_WEIGHTS_NAME, AUAdapter, base_unet
from benchmarks.tables import Report, add_clock_argument, count, device_or_error, markdown_table, pick_clock
from drawing.model import quiet
from pipeline_fineface import LORA_NAME, FineFacePipeline
from program import TOY_MODEL


PROMPT = "a closeup of a boy in a park"
AUS = "AU6=2.5 AU12=5"
GUIDANCE_SCALE = 7.5
LORA_RANK = 32
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
IP_IMAGE_DIM, IP_TOKENS = 1024, 4
# Enough for compilation, for recording CUDA graphs after it, and for a first replay.
WARM_UP_STEPS = 4
PROFILED_STEPS = 5
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
    unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    return {**models, "tokenizer": tokenizer, "scheduler": scheduler, **unused}


def embedded_components(device: torch.device, dtype: torch.dtype) -> dict:
    with quiet():
        return StableDiffusionPipeline.from_pretrained(TOY_MODEL, dtype=dtype).to(device).components


def _make_tokenizer() -> CLIPTokenizer:
    """It spells: how a prompt is cut has no influence on what its 77 tokens cost."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.<>=-"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _embedded_lora_rank() -> int:
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
    "toy": Architecture("the embedded model", embedded_components, _embedded_lora_rank),
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
    """The AU token goes in behind the text's, through the arguments of plain Stable Diffusion."""

    def __call__(self, prompt: list[str], aus: str, **kwargs):
        embeds = self.encode_prompt(prompt, self._execution_device, 1, do_classifier_free_guidance=True)
        intensities = parse_aus(aus).expand(len(prompt), -1).to(self._execution_device)
        au_tokens = [self.au_encoder(rows) for rows in (intensities, torch.zeros_like(intensities))]
        embeds = [torch.cat([text, au.to(text.dtype)], dim=1) for text, au in zip(embeds, au_tokens, strict=True)]
        return super().__call__(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], **kwargs)


@dataclass
class Contender:
    """A row of the tables: a pipeline and how it is called. Its ratio is to `baseline`."""

    label: str
    pipeline: StableDiffusionPipeline
    kwargs: dict = field(default_factory=dict)
    baseline: str = "plain"
    general: bool = False

    def attention(self) -> AbstractContextManager:
        """Inside, the pipeline takes the general attention if this row is about it."""
        if not self.general:
            return nullcontext()
        general = partial(pipeline_fineface.au_cross_attention_kwargs, general=True)
        return mock.patch.object(pipeline_fineface, "au_cross_attention_kwargs", general)

    def __call__(self, batch_size: int, steps: int, on_step_end=None, **kwargs):
        with torch.no_grad(), self.attention():
            return self.pipeline(
                [PROMPT] * batch_size,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE_SCALE,
                generator=torch.Generator().manual_seed(0),
                callback_on_step_end=on_step_end,
                **self.kwargs,
                **kwargs,
            ).images

    def weight_bytes(self) -> int:
        modules = [module for module in self.pipeline.components.values() if isinstance(module, nn.Module)]
        storages = {}
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values())


class Stand:
    """Builds contenders on one set of weights. They share all weights that they do not change."""

    def __init__(self, components: dict, lora_rank: int, clock: Callable[[], float] = time.perf_counter):
        self.components, self.lora_rank, self.clock = components, lora_rank, clock

    def make(self, row: str) -> Contender:
        label, arguments = ROWS[row]
        return self._make(label, **arguments)

    def _make(
        self,
        label: str,
        tokens: int = 0,
        lora: str | None = None,
        ip_adapter: bool = False,
        textbook: bool = False,
        **arguments,
    ) -> Contender:
        unet = base_unet(self.components["unet"]).eval()
        if lora in ("fused", "baked in"):
            unet = copy.deepcopy(unet)  # fusing writes into the weights
        extra = {}
        if tokens:
            torch.manual_seed(1)
            adapter = AUAdapter(au_layers(unet), unet.config.cross_attention_dim, num_tokens=tokens)
            adapter = nn.Module.to(adapter, unet.device, unet.dtype).eval()
            arguments["kwargs"] = {"aus": AUS, **arguments.get("kwargs", {})}
            if not textbook:
                extra["au_adapter"] = adapter
        pipeline_class = TextbookPipeline if textbook else FineFacePipeline if tokens else StableDiffusionPipeline
        pipeline = pipeline_class(**self.components | {"unet": unet} | extra, requires_safety_checker=False)
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
        if ip_adapter:
            _add_ip_adapter(pipeline)
            embeds = torch.randn(2, 1, IP_IMAGE_DIM, device=unet.device, dtype=unet.dtype)
            arguments["kwargs"] = {"ip_adapter_image_embeds": [embeds], **arguments.get("kwargs", {})}
        if lora:
            torch.manual_seed(2)
            config = LoraConfig(r=self.lora_rank, target_modules=LORA_TARGETS, init_lora_weights=False)
            unet.add_adapter(config, LORA_NAME)
        if lora in ("fused", "baked in"):
            pipeline.fuse_lora(components=["unet"])
        if lora == "baked in":
            pipeline.unload_lora_weights()
        return Contender(label, pipeline, **arguments)


ROWS = {
    "plain": ("plain `StableDiffusionPipeline`", {}),
    "one-token": ("one token, no LoRA", {"tokens": 1}),
    "lora-baked": ("one token, LoRA fused, then unloaded", {"tokens": 1, "lora": "baked in"}),
    "lora-fused": ("one token, LoRA fused", {"tokens": 1, "lora": "fused"}),
    "lora": ("one token, LoRA not fused", {"tokens": 1, "lora": "on"}),
    "attention-1": ("general attention, 1 token", {"tokens": 1, "general": True}),
    "attention-4": ("general attention, 4 tokens", {"tokens": 4}),
    "attention-16": ("general attention, 16 tokens", {"tokens": 16}),
    "ip-plain": ("plain with an IP-Adapter", {"ip_adapter": True}),
    "ip": (
        "one token beside an IP-Adapter, to plain with it",
        {"tokens": 1, "ip_adapter": True, "baseline": "ip-plain"},
    ),
    "third-branch": ("one token, `au_guidance_scale`", {"tokens": 1, "kwargs": {"au_guidance_scale": 5}}),
    "textbook": ("textbook: bmm attention each step, LoRA not fused", {"tokens": 1, "lora": "on", "textbook": True}),
}
"""Each row of a table by its name on the command line: its label, and what `Stand` makes for it."""


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
    state_dict = {"image_proj": image_proj, "ip_adapter": layers}
    pipeline.load_ip_adapter(state_dict, subfolder="", weight_name="", image_encoder_folder=None)


# --------------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    label: str
    baseline: str
    weight_bytes: int
    peak_bytes: int | None = None
    calls: list[float] = field(default_factory=list)
    """Seconds of each call."""
    steps: list[float] = field(default_factory=list)
    """Seconds of a denoising step in each call, without the first; empty if there is but one."""


def measure(
    stand: Stand, rows: list[str], batch_size: int, steps: int, repeats: int, mode: str, **size
) -> dict[str, Measured]:
    """Measure the contenders `rows` in `repeats` rounds of one call each."""
    contenders = {row: stand.make(row) for row in rows}
    measured = {row: Measured(c.label, c.baseline, c.weight_bytes()) for row, c in contenders.items()}
    device = stand.components["unet"].device
    bar = tqdm(total=len(rows) * (1 + repeats), desc="calls", leave=False)
    for row, contender in contenders.items():
        if mode != "no":
            contender.pipeline.unet.compile(mode=mode, fullgraph=True, dynamic=False)
        contender(batch_size, WARM_UP_STEPS if mode != "no" or device.type != "cpu" else 1, **size)
        # The pool of recorded graphs stands in no statistics, nor is a profile of compiled code complete.
        if mode == "no":
            measured[row].peak_bytes = _peak_bytes(contender, measured[row].weight_bytes, device, batch_size, **size)
        bar.update()
    for number in range(repeats):
        for row in [*rows[number % len(rows) :], *rows[: number % len(rows)]]:
            seconds, seconds_per_step = time_call(contenders[row], batch_size, steps, device, stand.clock, **size)
            measured[row].calls.append(seconds)
            if seconds_per_step is not None:
                measured[row].steps.append(seconds_per_step)
            bar.update()
    bar.close()
    return measured


def time_call(
    contender: Contender,
    batch_size: int,
    steps: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    **size,
) -> tuple[float, float | None]:
    """Seconds of a call, and of a step in it. Nothing waits for the device inside the call."""
    marks = []

    def on_step_end(pipeline, step, timestep, tensors):
        if step in (0, steps - 1):
            marks.append(_mark(device, clock))
        return tensors

    synchronize(device)
    started = clock()
    contender(batch_size, steps, on_step_end, **size)
    synchronize(device)
    seconds = clock() - started
    if steps == 1:
        return seconds, None
    first, last = marks
    between = first.elapsed_time(last) / 1000 if device.type == "cuda" else last - first
    return seconds, between / (steps - 1)


def _mark(device: torch.device, clock: Callable[[], float]):
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    synchronize(device)
    return clock()


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _peak_bytes(contender: Contender, weight_bytes: int, device: torch.device, batch_size: int, **size) -> int | None:
    """Its weights and the most that a call adds. The weights of the other contenders do not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contender(batch_size, 2, **size)
        synchronize(device)
        return weight_bytes + torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        contender(batch_size, 2, **size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    allocations = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    allocated = peak = 0
    for _, num_bytes in allocations:
        allocated += num_bytes
        peak = max(peak, allocated)
    return weight_bytes + peak


def ratios(measured: dict[str, Measured], row: str) -> list[float]:
    """Of each round, the call of `row` to that of its baseline."""
    baseline = measured[measured[row].baseline]
    return [ours / theirs for ours, theirs in zip(measured[row].calls, baseline.calls, strict=True)]


def format_measured(measured: dict[str, Measured]) -> str:
    header = ["", "s / call", "s / step", "ratio", "lowest – highest", "peak MiB", "of it weights"]
    rows = []
    for row, result in measured.items():
        found = ratios(measured, row)
        rows.append(
            [
                result.label,
                f"{statistics.median(result.calls):.3f}",
                f"{statistics.median(result.steps):.4f}" if result.steps else "–",
                f"{statistics.median(found):.3f}",
                f"{min(found):.3f} – {max(found):.3f}",
                "–" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:,.1f}",
                f"{result.weight_bytes / 2**20:,.1f}",
            ]
        )
    return markdown_table(header, rows)


# --------------------------------------------------------------------------------------------------------------------
# What is computed
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def step_flops(contender: Contender, batch_size: int, resolution: int | None = None) -> int:
    """Floating-point operations of the UNet in one denoising step with guidance."""
    pipeline, unet = contender.pipeline, contender.pipeline.unet
    rows = batch_size * (3 if "au_guidance_scale" in contender.kwargs else 2)
    side = resolution // pipeline.vae_scale_factor if resolution else unet.config.sample_size
    is_textbook = isinstance(pipeline, TextbookPipeline)
    empty = partial(torch.empty, device=unet.device, dtype=unet.dtype)
    kwargs = {}
    if "aus" in contender.kwargs and not is_textbook:
        with contender.attention():
            kwargs["cross_attention_kwargs"] = pipeline.encode_aus(AUS, unet.device, batch_size=rows)[0]
    if "ip_adapter_image_embeds" in contender.kwargs:
        kwargs["added_cond_kwargs"] = {"image_embeds": [empty(rows, 1, IP_IMAGE_DIM)]}
    num_tokens = pipeline.tokenizer.model_max_length + is_textbook
    with FlopCounterMode(display=False) as counter:
        unet(
            empty(rows, unet.config.in_channels, side, side),
            torch.zeros((), device=unet.device),
            encoder_hidden_states=empty(rows, num_tokens, unet.config.cross_attention_dim),
            **kwargs,
        )
    return counter.get_total_flops()


def format_counts(stand: Stand, rows: list[str], batch_size: int, resolution: int | None) -> str:
    counts, lines = {}, []
    for row in rows:
        contender = stand.make(row)
        counts[row] = step_flops(contender, batch_size, resolution)
        ratio = counts[row] / counts[contender.baseline]
        lines.append([contender.label, f"{counts[row] / 1e9:,.2f}", f"{ratio:.5f}"])
    return markdown_table(["", "GFLOP / step", "ratio"], lines)


# --------------------------------------------------------------------------------------------------------------------
# Where the time goes
# --------------------------------------------------------------------------------------------------------------------

# The first that fits counts.
OPERATIONS = (
    ("convolutions", ("conv",)),
    ("attention", ("scaled_dot_product", "attention", "softmax", "bmm")),
    ("linear layers", ("linear", "addmm", "mm")),
    ("normalization", ("norm", "moments")),
    ("activations", ("silu", "gelu", "sigmoid")),
    ("additions and products", ("add", "sub", "mul", "div", "pow", "sqrt", "rsub")),
    ("copies", ("copy", "cat", "to", "clone", "contiguous", "fill", "zero", "upsample", "pad")),
)
REST = "views and bookkeeping"
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass
class Share:
    calls: int = 0
    host_ms: float = 0.0
    device_ms: float = 0.0


def profile_step(
    contender: Contender, batch_size: int, device: torch.device, **size
) -> tuple[dict[str, Share], float]:
    """
    The operations of a whole denoising step by kind, and its milliseconds, which the profiler makes longer: means of
    `PROFILED_STEPS`.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    profiler = profile(activities=activities)
    marks = []

    def on_step_end(pipeline, step, timestep, tensors):
        synchronize(device)
        if step == 1:
            profiler.start()
        marks.append(time.perf_counter())
        if step == 1 + PROFILED_STEPS:
            profiler.stop()
        return tensors

    contender(batch_size, WARM_UP_STEPS, **size)
    contender(batch_size, 2 + PROFILED_STEPS, on_step_end, **size)
    shares = {name: Share() for name, _ in OPERATIONS} | {REST: Share(), "waits for the device": Share()}
    for event in profiler.key_averages():
        kind = _kind_of(event.key)
        if kind is None or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        shares[kind].calls += round(event.count / PROFILED_STEPS)
        shares[kind].host_ms += event.self_cpu_time_total / 1000 / PROFILED_STEPS
        shares[kind].device_ms += event.self_device_time_total / 1000 / PROFILED_STEPS
    return shares, 1000 * (marks[1 + PROFILED_STEPS] - marks[1]) / PROFILED_STEPS


def _kind_of(operation: str) -> str | None:
    if operation in WAITING:
        return "waits for the device"
    library, _, name = operation.partition("::")
    if library != "aten" or not name:
        return None
    return next((kind for kind, parts in OPERATIONS if any(part in name for part in parts)), REST)


def format_profiles(profiles: dict[str, tuple[dict[str, Share], float]], on_cpu: bool) -> str:
    """Kinds of operations in the rows; for each contender, calls and milliseconds."""
    header = [""]
    for label in profiles:
        header += [f"{label}: calls", "ms"] + ([] if on_cpu else ["ms on the device"])
    rows = []
    for kind in next(iter(profiles.values()))[0]:
        row = [kind]
        for shares, _ in profiles.values():
            share = shares[kind]
            row += [str(share.calls), f"{share.host_ms:.2f}"] + ([] if on_cpu else [f"{share.device_ms:.2f}"])
        if any(shares[kind].calls for shares, _ in profiles.values()):
            rows.append(row)
    rest, total = ["Python, and the profiler"], ["the step"]
    for shares, milliseconds in profiles.values():
        inside = sum(share.host_ms for share in shares.values())
        device_ms = sum(share.device_ms for share in shares.values())
        rest += ["", f"{milliseconds - inside:.2f}"] + ([] if on_cpu else [""])
        total += [str(sum(share.calls for share in shares.values())), f"{milliseconds:.2f}"]
        total += [] if on_cpu else [f"{device_ms:.2f}"]
    return markdown_table(header, [*rows, rest, total])


def parts_of_call(
    contender: Contender, batch_size: int, steps: int, device: torch.device, clock: Callable[[], float], **size
) -> str:
    """Milliseconds of the parts of a call, medians of three."""
    pipeline = contender.pipeline
    latents = contender(batch_size, 1, output_type="latent", **size)

    def milliseconds(function) -> float:
        times = []
        for _ in range(3):
            synchronize(device)
            started = clock()
            function()
            synchronize(device)
            times.append(1000 * (clock() - started))
        return statistics.median(times)

    with torch.no_grad():
        text = milliseconds(lambda: pipeline.encode_prompt([PROMPT] * batch_size, device, 1, True))
        aus = milliseconds(lambda: pipeline.encode_aus(AUS, device, 1, batch_size))
        decode = milliseconds(lambda: pipeline.vae.decode(latents))
    runs = [time_call(contender, batch_size, steps, device, clock, **size) for _ in range(3)]
    call = 1000 * statistics.median(seconds for seconds, _ in runs)
    denoise = 1000 * steps * statistics.median(seconds_per_step for _, seconds_per_step in runs)
    parts = {"text encoder": text, "AU encoder and residuals": aus, f"{steps} steps": denoise, "VAE": decode}
    parts["the rest"] = call - sum(parts.values())
    rows = [[name, f"{ms:.1f}", f"{100 * ms / call:.1f} %"] for name, ms in parts.items()]
    return markdown_table(["a call of one token", "ms", "share"], [*rows, ["all", f"{call:.1f}", "100 %"]])


# --------------------------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_or_error, default=None, help="(default: the accelerator, if any)")
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, help="(default: toy on cpu, else all)")
    parser.add_argument("--batch-sizes", nargs="+", type=count, default=[1, 4, 8], metavar="N")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="(default: float32 on cpu, else float16)")
    parser.add_argument("--compile", nargs="+", choices=COMPILE_MODES, default=["no"], help="modes of torch.compile")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to measure (default: all)")
    parser.add_argument("--steps", type=count, help="(default: 10 on cpu, else 50)")
    parser.add_argument("--resolution", type=count, metavar="PIXELS", help="a multiple of 8 (default: the model's)")
    parser.add_argument("--repeats", type=count, default=5, help="rounds of interleaved calls (default: 5)")
    parser.add_argument("--max-minutes", type=float, help="begin no further table after so long")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--profile", action="store_true", help="show where the time goes instead")
    instead.add_argument("--count", action="store_true", help="count what is computed instead, on no device")
    add_clock_argument(parser)
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the tables to a file as well")
    args = parser.parse_args(argv)
    if args.resolution is not None and args.resolution % 8:
        parser.error(f"`--resolution` is {args.resolution}, but has to be a multiple of 8.")
    if args.profile and args.steps == 1:
        parser.error("`--profile` shows a step among others: `--steps` has to be 2 or more.")
    args.device = torch.device("meta") if args.count else args.device or device_or_error(None)
    args.clock = pick_clock(args.processor_time, args.device, parser)
    on_cpu = args.device.type == "cpu"
    args.models = args.models or (["toy"] if on_cpu else list(ARCHITECTURES))
    args.dtypes = args.dtypes or ["float32" if on_cpu else "float16"]
    args.steps = args.steps or (10 if on_cpu else 50)
    # A ratio needs what it is a ratio to.
    needed = {"plain", *(ROWS[row][1].get("baseline", "plain") for row in args.rows)}
    args.rows = [row for row in ROWS if row in needed.union(args.rows)]
    return args


def make_table(stand: Stand, batch_size: int, mode: str, args: argparse.Namespace) -> str:
    size = {"height": args.resolution, "width": args.resolution} if args.resolution else {}
    if args.count:
        return format_counts(stand, args.rows, batch_size, args.resolution)
    if not args.profile:
        torch._dynamo.reset()
        # All contenders run the code of one class, and each is compiled on its own.
        with torch._dynamo.config.patch(recompile_limit=16 * len(ROWS)):
            return format_measured(measure(stand, args.rows, batch_size, args.steps, args.repeats, mode, **size))
    contenders = [stand.make(row) for row in ("plain", "one-token")]
    profiles = {c.label: profile_step(c, batch_size, args.device, **size) for c in contenders}
    parts = parts_of_call(contenders[1], batch_size, args.steps, args.device, args.clock, **size)
    return f"{format_profiles(profiles, args.device.type == 'cpu')}\n\n{parts}"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    report = Report(args.output, args.device)
    started, left_out = time.monotonic(), []
    modes = ["no"] if args.profile or args.count else args.compile
    for model in args.models:
        architecture = ARCHITECTURES[model]
        for dtype in args.dtypes:
            stand = None
            for batch_size, mode in ((b, m) for b in args.batch_sizes for m in modes):
                compiled = "eager" if mode == "no" else f"compiled ({mode})"
                title = f"{architecture.title}, {dtype}, batch {batch_size}, {compiled}"
                if args.count:
                    title = f"{architecture.title}, batch {batch_size}"
                if args.max_minutes is not None and time.monotonic() - started > 60 * args.max_minutes:
                    left_out.append(title)
                    continue
                if stand is None:
                    components = architecture.make_components(args.device, DTYPES[dtype])
                    stand = Stand(components, architecture.lora_rank(), args.clock)
                scale_factor = 2 ** (len(components["vae"].config.block_out_channels) - 1)
                side = args.resolution or components["unet"].config.sample_size * scale_factor
                what = "one step" if args.profile or args.count else f"{args.steps} steps, medians of {args.repeats}"
                what += ", processor time" if args.processor_time else ""
                try:
                    table = make_table(stand, batch_size, mode, args)
                except torch.OutOfMemoryError:
                    table = "Not enough memory on the device for all rows at once. Name fewer with `--rows`."
                report.add(f"### {title}\n\n{side} × {side} pixels, {what}.\n\n{table}")
    if left_out:
        report.add(f"Not measured, for want of time: {'; '.join(left_out)}.")


if __name__ == "__main__":
    main()
