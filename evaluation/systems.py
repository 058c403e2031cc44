# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""The systems of the paper's Table 1. Each of them draws prompts with AUs."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from action_units import AU_NAMES, action_units_of, parse_aus
from au_encoder import ENCODER_FOLDER, LORA_WEIGHTS_NAME, AUEncoder
from drawing.model import Weights, load_pipeline, pipeline_class_of
from program import number_or_none, option


SYSTEMS = {
    "sd": "the base model; AUs as words in the prompt",
    "dreambooth": "its whole UNet fine-tuned with prior preservation; AUs as words",
    "lora_t": "a LoRA; AUs as words",
    "lora_au": "a LoRA; AUs as a token in the text sequence",
    "fineface": "the AU adapter",
}
UNET_FOLDER = "unet"
TRAINED_FILES = {
    "dreambooth": [f"{UNET_FOLDER}/config.json"],
    "lora_t": [LORA_WEIGHTS_NAME],
    "lora_au": [LORA_WEIGHTS_NAME, f"{ENCODER_FOLDER}/config.json"],
}
"""What `paper.baselines` writes."""


@dataclass(frozen=True)
class Sampling:
    """Arguments of `FineFacePipeline.__call__`. Only `"fineface"` uses `au_guidance_scale` and `au_scale`."""

    num_inference_steps: int = option(50, None)
    guidance_scale: float = option(7.5, None)
    au_guidance_scale: float | None = option(None, "a number, or none for joint guidance", type=number_or_none)
    au_scale: float = option(1.0, None)
    height: int | None = option(None, None)
    width: int | None = option(None, None)


def is_toy_model(model: str) -> bool:
    """Whether a model belongs to the toy world: then its folder has the attribute reader."""
    return (Path(model) / "attribute_reader" / "config.json").is_file()


def au_words(is_toy: bool) -> tuple[str, ...]:
    """The words for each AU in a prompt: those of the toy world's captions, or its FACS name."""
    if is_toy:
        from toy_faces.renderer import EXPRESSION_WORDS

        return EXPRESSION_WORDS
    return tuple(unit.facs_name.lower() for unit in action_units_of())


def aus_in_words(intensities, words: tuple[str, ...]) -> str:
    """
    Write AUs as the end of a prompt, such as `", very parted lips"`; "" for a neutral face. Words tell three degrees
    of intensity ("slightly", no adverb, "very"). AUs up to half a grade are left out.
    """
    named = []
    for word, intensity in zip(words, intensities, strict=True):
        if intensity > 0.5:
            degree = "slightly " if intensity < 2 else "very " if intensity > 3.5 else ""
            named.append(degree + word)
    return "".join(f", {words}" for words in named)


def check_system(system: str, weights: Weights) -> None:
    """Raise an error if `weights.adapter` lacks the files that training this system writes."""
    if system == "sd" and weights.adapter is not None:
        raise ValueError("`--system sd` is the base model alone: leave out `--adapter`.")
    for name in TRAINED_FILES.get(system, ()):
        if weights.adapter is None:
            raise ValueError(f"`--system {system}` needs `--adapter`, the folder that `paper.baselines` wrote.")
        if not (Path(weights.adapter) / name).is_file():
            raise FileNotFoundError(f"`--adapter` is {weights.adapter!r}, which has no {name} of {system}.")


class System:
    """A loaded system. All systems start from the same noise for a seed, so their pictures can be compared."""

    def __init__(self, system: str, weights: Weights, device: torch.device, dtype: torch.dtype, sampling: Sampling):
        self.system, self.device, self.sampling = system, device, sampling
        self.words = au_words(is_toy_model(weights.model))
        self.au_names, self.has_image_prompt = AU_NAMES, False
        if system == "fineface":
            self.pipeline = load_pipeline(weights, device, dtype, needs_adapter=True)
            self.au_names = self.pipeline.au_names
        else:
            self.pipeline = _load_baseline(system, weights, device, dtype)
        if system == "lora_au":
            encoder = AUEncoder.from_pretrained(weights.adapter, subfolder=ENCODER_FOLDER, dtype=dtype)
            self.token_encoder = encoder.to(device).eval()
        self.pipeline.set_progress_bar_config(disable=True)

    def load_ip_adapter(self, path: Path) -> None:
        """An IP-Adapter from a file (paper Eq. 5 with both scales 1)."""
        encoder = "image_encoder" if self.pipeline.image_encoder is None else None
        options = {"subfolder": "", "weight_name": path.name, "image_encoder_folder": encoder}
        self.pipeline.load_ip_adapter(str(path.parent), **options)
        self.has_image_prompt = True

    @torch.no_grad()
    def draw(
        self, prompts: list[str], aus: list[str], seeds: list[int], references: list[Image.Image] | None = None
    ) -> list[Image.Image]:
        """One picture for each prompt, with the AUs as `format_aus` writes them; "" is the neutral face."""
        settings = asdict(self.sampling)
        # Each picture has its own generator on the CPU, so it depends neither on its neighbours nor on the device.
        settings["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        if self.has_image_prompt:
            settings["ip_adapter_image_embeds"] = self._embed_references(references)
        intensities = parse_aus(aus, au_names=self.au_names)
        if self.system == "fineface":
            return self.pipeline(prompts, aus=intensities, **settings).images
        del settings["au_scale"], settings["au_guidance_scale"]
        if self.system != "lora_au":
            rows = zip(prompts, intensities.tolist(), strict=True)
            settings["prompt"] = [prompt + aus_in_words(row, self.words) for prompt, row in rows]
            return self.pipeline(**settings).images
        guided = self.sampling.guidance_scale > 1
        embeds, negative_embeds = self.pipeline.encode_prompt(prompts, self.device, 1, guided)
        intensities = intensities.to(self.device)
        settings["prompt_embeds"] = append_tokens(embeds, self.token_encoder(intensities))
        if guided:
            neutral = self.token_encoder(torch.zeros_like(intensities))
            settings["negative_prompt_embeds"] = append_tokens(negative_embeds, neutral)
        return self.pipeline(**settings).images

    def _embed_references(self, references: list[Image.Image]) -> list[torch.Tensor]:
        """The image encoder's embeddings, unconditional rows first: one reference for each prompt of the batch."""
        image_embeds, negative_embeds = self.pipeline.encode_image(references, self.device, 1)
        rows = [negative_embeds, image_embeds] if self.sampling.guidance_scale > 1 else [image_embeds]
        return [torch.cat(rows)[:, None]]


def append_tokens(encoder_hidden_states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Append AU tokens to the text sequence."""
    return torch.cat([encoder_hidden_states, tokens.to(encoder_hidden_states.dtype)], dim=1)


def _load_baseline(system: str, weights: Weights, device: torch.device, dtype: torch.dtype):
    from diffusers import UNet2DConditionModel

    components = {}
    if system == "dreambooth":
        components["unet"] = UNet2DConditionModel.from_pretrained(weights.adapter, subfolder=UNET_FOLDER, dtype=dtype)
    pipeline_class = pipeline_class_of(weights.model)
    pipeline = pipeline_class.from_pretrained(weights.model, dtype=dtype, au_adapter=None, **components)
    if system in ("lora_t", "lora_au"):
        pipeline.unet.load_lora_adapter(weights.adapter, prefix="unet", weight_name=LORA_WEIGHTS_NAME)
    return pipeline.to(device)
