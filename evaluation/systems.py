# SPDX-License-Identifier: Apache-2.0
"""The systems of the paper's Table 1. Each of them draws prompts with AUs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from action_units import action_units_of, parse_aus
from au_encoder import ENCODER_FOLDER, LORA_WEIGHTS_NAME, AUEncoder
from drawing.jobs import Job
from drawing.model import Weights, generate_batch, load_pipeline, pipeline_class_of


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

    def __init__(self, system: str, weights: Weights, device: torch.device, dtype: torch.dtype):
        self.system, self.device = system, device
        self.words = au_words(is_toy_model(weights.model))
        if system == "fineface":
            self.pipeline = load_pipeline(weights, device, dtype, needs_adapter=True)
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

    @torch.no_grad()
    def draw(self, jobs: list[Job], references: Sequence[Image.Image] = ()) -> list[Image.Image]:
        """
        Draw one picture for each of `jobs`, which have equal settings, and each `aus`. With an IP-Adapter, there is
        one of `references` for each.
        """
        options, guided = {}, jobs[0].guidance_scale > 1
        if references:
            image_embeds, negative_embeds = self.pipeline.encode_image(list(references), self.device, 1)
            rows = [negative_embeds, image_embeds] if guided else [image_embeds]
            options["ip_adapter_image_embeds"] = [torch.cat(rows)[:, None]]
        if self.system == "fineface":
            return generate_batch(self.pipeline, jobs, **options)
        intensities = parse_aus([job.aus for job in jobs])
        jobs = [replace(job, aus=None) for job in jobs]
        if self.system == "lora_au":
            prompts = [job.prompt for job in jobs]
            embeds = embed_with_tokens(self.pipeline, self.token_encoder, prompts, intensities, guided)
            options |= {"prompt": None, **embeds}
        else:
            rows = zip(jobs, intensities.tolist(), strict=True)
            jobs = [replace(job, prompt=job.prompt + aus_in_words(row, self.words)) for job, row in rows]
        return generate_batch(self.pipeline, jobs, **options)


def embed_with_tokens(
    pipeline, token_encoder: AUEncoder, prompts: list[str], intensities: torch.Tensor, guided: bool
) -> dict[str, torch.Tensor]:
    """Arguments of `pipeline`: prompts with their AUs as tokens and, with guidance, no words with a neutral face."""
    embeds, negative_embeds = pipeline.encode_prompt(prompts, pipeline.device, 1, guided)
    intensities = intensities.to(pipeline.device)
    embedded = {"prompt_embeds": append_tokens(embeds, token_encoder(intensities))}
    if guided:
        neutral = token_encoder(torch.zeros_like(intensities))
        embedded["negative_prompt_embeds"] = append_tokens(negative_embeds, neutral)
    return embedded


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
