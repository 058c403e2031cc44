# SPDX-License-Identifier: Apache-2.0
r"""
Make the toy model: `python -m toy_faces.train --preset cpu` from nothing (2 cores, within 8 hours), or `--preset gpu`
from the VAE and the readers of earlier weights (one H100-class card with 16 processor cores, within 8 minutes).

    pictures ─ VAE ─ latents ─ base ─┬─ twelve
          └─ captions ┘    └─ readers ┴─ sided

`twelve` is an adapter for the paper's AUs, both sides alike; `sided` moves each side by itself and knows more AUs.

Every stage writes into `--output_dir` and is skipped when its result is there; inside a stage a checkpoint a minute is
kept, and the weights in half precision beside it. Kill it at any moment and run the same command again. With `--until
STAGE` it stops after a stage, with `--export` it copies the finished weights to `toy_faces/weights`.

On processors with AMX and a C++ compiler, `--mixed_precision bf16 --compile` trains the base three times as fast.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from action_units import AU_NAMES, action_units_of, au_projection, available_presets, mirrored_columns, parse_aus
from au_encoder import write_au_adapter
from pipeline_fineface import LORA_NAME, FineFacePipeline
from program import TOY_MODEL, Parser, new_folder, pick_device, run_program
from toy_faces import networks
from toy_faces.fit import Length, fit
from toy_faces.networks import PictureReader, SecondMeter
from toy_faces.pictures import JUDGE_SEEDS, Pictures, aus_of, captions_of, expression_of, save_array
from toy_faces.renderer import SIZE, TOY_AU_NAMES, caption, sample_portrait
from train_fineface import FineFaceModel, diffusion_loss, make_model
from training.config import TrainConfig
from training.data import face_sides
from training.encoders import StableDiffusionEncoders
from training.feedback import AUFeedback, appearance_change, first_weights_of, load_meter, shake
from training.sides import SideAttention


WORDINGS = 4
"""Captions of each picture that the base is trained with."""
FACE = (slice(26, 122), slice(26, 102))
"""Rows and columns that hold the face, pixels at 128: where all AU evidence is."""
UPPER_FACE = (slice(32, 80), slice(32, 96))
"""Rows and columns of the face above the lips: no expression brings teeth or a tongue there."""

ATTRIBUTES_WEIGHT = 0.2
"""Weight of the attribute reader's cross-entropy beside the feedback: an expression must not change the person."""
PLACE_WEIGHT = 4.0
"""Weight of the squared change of what surrounds the face beside the feedback: an expression must not change that."""
APPEARANCE_WEIGHT = 20.0
"""Weight of the change of tones and colours of the upper face beside the feedback."""
NEUTRAL_WEIGHT = 20.0
"""Weight of the squared change of neutral faces beside the feedback: without this, all pictures became duller."""
SIDES_WEIGHT = 1.0
"""Weight of the attention to the right side of the face beside the diffusion loss; a tenth of it beside feedback."""
GUIDANCE_SCALE = 1.9
"""Guidance of the pictures that feedback looks at: that of `fineface.json`, with which the weights are used."""
TAKEN = ("tokenizer", "vae", "meter", "second_meter", "attribute_reader", "image_encoder")
"""What a run that goes on from earlier weights takes from them. Their base and adapters go on."""


@dataclass(frozen=True)
class Size:
    """Sizes and lengths of one run of the recipe."""

    pictures: int
    judge_pictures: int
    vae_channels: tuple[int, ...]
    vae_layers: int
    unet_channels: tuple[int, ...]
    rank: int
    vae: Length
    base: Length
    image_encoder: Length
    reader: Length
    """The meter that teaches and the meter that judges."""
    attribute_reader: Length
    adapter: Length
    """Of each adapter, by the diffusion loss alone."""
    feedback: Length
    """Of each adapter, after that."""
    feedback_steps: int
    bf16: bool = False
    compile: bool = False
    """Compile the base: minutes at the start, which only hours of training pay back."""
    parallel: bool = False
    """Two processes share the device: one makes the base and the adapters, the other what looks at pictures."""


CPU = Size(
    pictures=64_000,
    judge_pictures=24_000,
    **{"vae_channels": (32, 48, 64, 64), "vae_layers": 1, "unet_channels": (96, 128), "rank": 32},
    vae=Length(12_000, 4, 5_400),
    base=Length(20_000, 64, 11_000),
    image_encoder=Length(400, 64, 300),
    reader=Length(6_000, 24, 1_500),
    attribute_reader=Length(600, 32, 400),
    adapter=Length(6_000, 32, 1_200),
    feedback=Length(1_200, 8, 2_400),
    feedback_steps=4,
)
SIZES = {
    "cpu": CPU,
    # It takes the VAE and the readers of earlier weights, so it trains none of them.
    "gpu": replace(
        CPU,
        pictures=96_000,
        base=Length(40_000, 768, 160),
        adapter=Length(6_000, 384, 45),
        feedback=Length(3_000, 160, 220),
        feedback_steps=8,
        bf16=True,
        parallel=True,
    ),
    "tiny": Size(
        **{"pictures": 8, "judge_pictures": 4, "rank": 4, "feedback_steps": 2},
        **{"vae_channels": (8, 8, 8, 8), "vae_layers": 0, "unet_channels": (32, 32)},
        **{field.name: Length(2, 2) for field in fields(Size) if field.type is Length},
    ),
}
"""`tiny` trains nothing worth having; it runs every line in seconds."""
NEEDS = {
    "captions": (),
    "vae": (),
    "latents": ("vae",),
    "base": ("captions", "latents"),
    "meter": ("vae",),
    "attribute_reader": ("vae",),
    "second_meter": ("vae",),
    "image_encoder": ("base",),
    "twelve": ("base", "meter", "attribute_reader"),
    "sided": ("base", "meter", "attribute_reader"),
}
"""The stages in their order, and what each needs."""
FIRST_TRACK = ("vae", "latents", "base", "sided")
TRACKS = (FIRST_TRACK, tuple(stage for stage in NEEDS if stage not in FIRST_TRACK))
*_, LAST = NEEDS


class Recipe:
    """The stages. Each is a method that writes a result of its name into `folder`."""

    def __init__(self, size: Size, folder: Path, device: torch.device, start: Path | None = None):
        self.size, self.folder, self.device, self.start = size, folder, device, start
        self.renderers = ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        for part in TAKEN if start else ():
            if not self.is_done(part):
                with new_folder(folder / part) as unfinished:
                    shutil.copytree(start / part, unfinished, dirs_exist_ok=True)

    def run(self, stages: Iterable[str]) -> None:
        """Run each stage that is not done, once what it needs is there: another process may be making that."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        with self.renderers:
            for stage in stages:
                started = time.monotonic()
                while not self.is_done(stage) and not all(map(self.is_done, NEEDS[stage])):
                    time.sleep(0.5)
                if not self.is_done(stage):
                    torch.manual_seed(0)
                    getattr(self, stage)()
                print(f"{stage}: {time.monotonic() - started:.1f} s", flush=True)

    # ---- What the stages share --------------------------------------------------------------------------------------

    @cached_property
    def pictures(self) -> Pictures:
        return self.renderers.enter_context(closing(Pictures(self.folder / "pictures", self.size.pictures)))

    @cached_property
    def judge_pictures(self) -> Pictures:
        pictures = Pictures(self.folder / "judge_pictures", self.size.judge_pictures, JUDGE_SEEDS)
        return self.renderers.enter_context(closing(pictures))

    @cached_property
    def expressions(self) -> torch.Tensor:
        """`(pictures, 24)` intensities of the training pictures, in the order of `TOY_AU_NAMES`."""
        return aus_of(range(self.size.pictures), expression_of).to(self.device)

    @cached_property
    def attributes(self) -> torch.Tensor:
        """`(pictures, attributes)`: which value each attribute of a training picture has."""
        people = [sample_portrait(seed).attributes for seed in range(self.size.pictures)]
        return networks.attribute_numbers(people).to(self.device)

    def is_done(self, stage: str) -> bool:
        return (self.folder / stage).exists() or (self.folder / f"{stage}.npy").exists()

    def finish(self, stage: str, model) -> None:
        """Save what a stage made in half precision, in a folder that appears in one rename."""
        for part in model.components.values() if hasattr(model, "components") else [model]:
            if isinstance(part, nn.Module):
                part.half()
        with new_folder(self.folder / stage) as unfinished:
            model.save_pretrained(unfinished)

    def load(self, model_class, name: str):
        """A finished network, in float32, frozen."""
        model = model_class.from_pretrained(self.folder / name, dtype=torch.float32)
        return model.to(self.device).eval().requires_grad_(False)

    def load_vae(self) -> AutoencoderKL:
        return self.load(AutoencoderKL, "vae").to(memory_format=torch.channels_last)

    def save_array(self, stage: str, tensor: torch.Tensor) -> None:
        save_array(self.folder / f"{stage}.npy", tensor.cpu().numpy())

    def read_array(self, stage: str) -> torch.Tensor:
        return self.to_device(np.load(self.folder / f"{stage}.npy"))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.size.bf16)

    def fit(self, name: str, modules, loss_function, length: Length, peak: float, ema_decay: float = 0.0) -> None:
        # On CPUs a step with plain matrix products is faster than one with fused attention.
        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
            fit(name, modules, loss_function, self.folder, length, peak, ema_decay)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def draw_timesteps(self, rng: np.random.Generator, batch: int) -> torch.Tensor:
        """One timestep from each of `batch` equal intervals: uniform as ever, with less noise in the gradient."""
        return self.to_device((np.arange(batch) + rng.random(batch)) / batch * 1000).long()

    # ---- The base ---------------------------------------------------------------------------------------------------

    def captions(self) -> None:
        """The tokenizer, and the tokens of every picture's captions: `(WORDINGS, pictures, 48)` int32."""
        seeds = range(self.size.pictures)
        # Half of the wordings say what the face does, as captions of photographs do at times: so the base has ways
        # from words to expressions, as Stable Diffusion has, which the AU adapter finds.
        wordings = [
            captions_of(seeds, wording, expression_of if wording >= WORDINGS // 2 else None)
            for wording in range(WORDINGS)
        ]
        if not self.is_done("tokenizer"):
            some = seeds[:20_000]
            canonical = [caption(sample_portrait(seed), aus=expression_of(seed)) for seed in some]
            self.finish("tokenizer", networks.make_tokenizer(wordings[-1][: len(some)] + canonical))
        tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer")
        self.save_array("captions", torch.stack([tokenize(tokenizer, captions) for captions in wordings]).int())

    def vae(self) -> None:
        vae = networks.make_vae(self.size.vae_channels, self.size.vae_layers)
        vae.to(self.device, memory_format=torch.channels_last)
        # The face counts more than the place: brows and wrinkles are what the adapter has to bring back.
        weight = torch.full((1, 1, SIZE, SIZE), 0.6, device=self.device)
        weight[..., FACE[0], FACE[1]] = 1.6

        def loss_function(rng: np.random.Generator) -> torch.Tensor:
            _, pixel_values = self.pictures.draw(rng, self.size.vae.batch, self.device, finished_only=True)
            with self.autocast():
                posterior = vae.encode(pixel_values).latent_dist
                error = (vae.decode(posterior.sample()).sample - pixel_values).float()
            divergence = posterior.kl().mean() / posterior.mean[0].numel()
            return (weight * (error**2 + 0.1 * error.abs())).mean() + 3e-5 * divergence

        self.fit("vae", {"vae": vae}, loss_function, self.size.vae, 2e-3, ema_decay=0.995)
        latents = self.encode(vae, min(512, self.size.pictures), batch=16)
        networks.normalize_latents(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
        self.finish("vae", vae)

    def latents(self) -> None:
        with self.autocast():
            latents = self.encode(self.load_vae(), self.size.pictures, 512 if self.device.type == "cuda" else 32)
        self.save_array("latents", latents.half())

    @torch.no_grad()
    def encode(self, vae: AutoencoderKL, count: int, batch: int) -> torch.Tensor:
        """The latents of the first `count` training pictures."""
        self.pictures.wait()
        parts = []
        for start in tqdm(range(0, count, batch), desc="latents", mininterval=10):
            pixel_values = self.pictures.pixel_values(range(start, min(start + batch, count)), self.device)
            parts.append(vae.encode(pixel_values).latent_dist.mode())
        return torch.cat(parts)

    def base(self) -> None:
        """Text encoder and UNet together: text → portrait, with any expression if the caption names none."""
        tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer")
        input_ids, latents = self.read_array("captions").long(), self.read_array("latents")
        empty = tokenize(tokenizer, [""]).to(self.device)
        if self.start:
            unet = UNet2DConditionModel.from_pretrained(self.start / "unet", dtype=torch.float32).train()
            text_encoder = CLIPTextModel.from_pretrained(self.start / "text_encoder", dtype=torch.float32).train()
        else:
            unet, text_encoder = networks.make_unet(self.size.unet_channels), networks.make_text_encoder(tokenizer)
        unet.to(self.device, memory_format=torch.channels_last)
        text_encoder.to(self.device)
        forward = torch.compile(unet) if self.size.compile else unet
        scheduler, batch = networks.make_scheduler(), self.size.base.batch
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(self.device)

        def loss_function(rng: np.random.Generator) -> torch.Tensor:
            indices = self.to_device(rng.integers(0, len(latents), batch))
            ids = input_ids[self.to_device(rng.integers(0, WORDINGS, batch)), indices]
            ids = torch.where(self.to_device(rng.random((batch, 1)) < 0.1), empty, ids)
            clean, timesteps = latents[indices].float(), self.draw_timesteps(rng, batch)
            noise = torch.randn_like(clean)
            with self.autocast():
                text = text_encoder(ids).last_hidden_state
                prediction = forward(scheduler.add_noise(clean, noise, timesteps), timesteps, text).sample
            return F.mse_loss(prediction.float(), scheduler.get_velocity(clean, noise, timesteps))

        modules = {"unet": unet, "text_encoder": text_encoder}
        self.fit("base", modules, loss_function, self.size.base, 1e-3, ema_decay=0.999)
        components = {"vae": self.load_vae(), "tokenizer": tokenizer, "scheduler": networks.make_scheduler()}
        components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        self.finish("base", StableDiffusionPipeline(unet=unet.eval(), text_encoder=text_encoder.eval(), **components))

    # ---- What looks at pictures -------------------------------------------------------------------------------------

    def image_encoder(self) -> None:
        """A CLIP image encoder: its embedding of a picture agrees with the (frozen) text embedding of its caption."""
        text_encoder = self.load(CLIPTextModel, "base/text_encoder")
        image_encoder = networks.make_image_encoder().to(self.device)
        text_projection = nn.Linear(networks.TEXT_WIDTH, networks.TEXT_WIDTH, bias=False).to(self.device)
        input_ids, batch = self.read_array("captions")[0].long(), self.size.image_encoder.batch

        def loss_function(rng: np.random.Generator) -> torch.Tensor:
            indices, pixel_values = self.pictures.draw(rng, batch, self.device)
            with torch.no_grad():
                text = text_encoder(input_ids[self.to_device(indices)]).pooler_output
            images = F.normalize(image_encoder(pixel_values).image_embeds, dim=-1)
            similarity = 14 * images @ F.normalize(text_projection(text), dim=-1).T
            target = torch.arange(batch, device=self.device)
            return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2

        modules = {"image_encoder": image_encoder, "text_projection": text_projection}
        self.fit("image_encoder", modules, loss_function, self.size.image_encoder, 1e-3)
        self.finish("image_encoder", image_encoder.eval())

    def meter(self) -> None:
        """The meter that teaches: feedback reads the pictures of the adapters with it."""
        # Other processes render the pictures of the second meter meanwhile.
        self.judge_pictures  # noqa: B018
        self.train_reader("meter", networks.make_meter(), self.pictures)

    def second_meter(self) -> None:
        """The meter that judges, of another architecture and seed, on other pictures. No training uses it."""
        torch.manual_seed(2)
        self.train_reader("second_meter", SecondMeter(TOY_AU_NAMES), self.judge_pictures)

    def attribute_reader(self) -> None:
        self.train_reader("attribute_reader", networks.make_attribute_reader(), self.pictures)

    def train_reader(self, name: str, network: PictureReader | SecondMeter, pictures: Pictures) -> None:
        """Half of the pictures have gone through the VAE, as all that the reader sees later will have."""
        reads_aus = name != "attribute_reader"
        length = self.size.reader if reads_aus else self.size.attribute_reader
        vae, batch = self.load_vae(), max(2, length.batch)
        network.to(self.device, memory_format=torch.channels_last)

        def loss_function(rng: np.random.Generator) -> torch.Tensor:
            numbers, pixel_values = pictures.draw(rng, batch, self.device)
            with torch.no_grad(), self.autocast():
                decoded = vae.decode(vae.encode(pixel_values[batch // 2 :]).latent_dist.mode()).sample.float()
            pixel_values = shake(torch.cat([pixel_values[: batch // 2], decoded]))
            with self.autocast():
                if reads_aus:
                    expressions = aus_of(pictures.first + numbers, expression_of).to(self.device)
                    return F.mse_loss(network(pixel_values), expressions).float()
                return networks.attribute_loss(network(pixel_values), self.attributes[numbers]).float()

        self.fit(name, {name: network}, loss_function, length, 1e-3, ema_decay=0.998)
        self.finish(name, network.eval())

    # ---- The adapters -----------------------------------------------------------------------------------------------

    def twelve(self) -> None:
        """The paper's AUs, both sides alike."""
        self.train_adapter("twelve", AU_NAMES)

    def sided(self) -> None:
        """All AUs of the toy world, each side by itself."""
        self.train_adapter("sided", TOY_AU_NAMES)

    def train_adapter(self, name: str, au_names: tuple[str, ...]) -> None:
        """Train by the diffusion loss alone, unless an adapter goes on, and then with feedback beside it."""
        model, is_new = self.make_model(name, au_names)
        # Of even seeds, both sides are alike and none of the AUs is beyond the twelve.
        symmetric = au_names == AU_NAMES
        seeds = torch.arange(0, self.size.pictures, 1 + symmetric, device=self.device)
        projection = au_projection(TOY_AU_NAMES, au_names).to(self.device)
        text_encoder = self.load(CLIPTextModel, "base/text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(self.folder / "base" / "tokenizer")
        with torch.no_grad():
            empty = text_encoder(tokenize(tokenizer, [""]).to(self.device)).last_hidden_state
        input_ids, latents = self.read_array("captions").long(), self.read_array("latents")
        scheduler = networks.make_scheduler()
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(self.device)
        weights, surroundings = face_weights().to(self.device), face_weights(0.0, 1).to(self.device)
        side_attention = None if symmetric else SideAttention(model)
        box = np.array([FACE[1].start, FACE[0].start, FACE[1].stop, FACE[0].stop]) / SIZE
        sides = self.to_device(face_sides(box, np.array([SIZE, SIZE]), SIZE // 8))
        meter = load_meter(str(self.folder / "meter"), self.device)
        encoders = StableDiffusionEncoders([tokenizer], [text_encoder], self.load_vae())
        options = {"steps": self.size.feedback_steps, "guidance_scale": GUIDANCE_SCALE}
        feedback = AUFeedback(meter, encoders, networks.make_scheduler(), TOY_AU_NAMES, **options)
        reader = self.load(PictureReader, "attribute_reader")

        def predict(noisy_latents, timesteps, prompt_embeds, au_intensities, network=model, **kwargs) -> torch.Tensor:
            """The model, commanded by the intensities of `TOY_AU_NAMES`."""
            return network(noisy_latents, timesteps, prompt_embeds, au_intensities @ projection, **kwargs)

        def draw(rng: np.random.Generator, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
            """Numbers of pictures, and embeddings of captions that name no AUs."""
            indices = seeds[self.to_device(rng.integers(0, len(seeds), batch))]
            wordings = self.to_device(rng.integers(0, WORDINGS // 2, batch))
            with torch.no_grad():
                return indices, text_encoder(input_ids[wordings, indices]).last_hidden_state

        def loss_of(
            rng: np.random.Generator, indices: torch.Tensor, prompt_embeds: torch.Tensor, sides_weight: float
        ) -> torch.Tensor:
            batch, clean = len(indices), latents[indices].float()
            dropped = self.to_device(rng.random((batch, 1, 1)) < 0.1)
            # AUs explain little of the loss, in the face, and hardly any of it where little noise is left.
            timesteps = self.draw_timesteps(rng, batch)
            later = self.to_device(rng.random(batch) < 0.7)
            timesteps = torch.where(later, 400 + timesteps * 6 // 10, timesteps)
            noise, captions = torch.randn_like(clean), torch.where(dropped, empty, prompt_embeds)
            noisy_latents = scheduler.add_noise(clean, noise, timesteps)
            prediction = predict(noisy_latents, timesteps, captions, self.expressions[indices])
            loss = diffusion_loss(prediction, scheduler, clean, noise, timesteps, weights)
            if side_attention is not None:
                loss = loss + sides_weight * side_attention.loss(sides.expand(batch, -1, -1))
            return loss

        def diffusion(rng: np.random.Generator) -> torch.Tensor:
            with self.autocast():
                return loss_of(rng, *draw(rng, self.size.adapter.batch), SIDES_WEIGHT)

        def with_feedback(rng: np.random.Generator) -> torch.Tensor:
            indices, prompt_embeds = draw(rng, self.size.feedback.batch)
            with self.autocast():
                loss = loss_of(rng, indices, prompt_embeds, SIDES_WEIGHT / 10)
                # Other people make the commanded faces: the expression must not depend on who it is.
                commanded, batch = self.expressions[indices].roll(1, 0), {"prompt_embeds": prompt_embeds}
                commanded = name_expressions(leave_one_au(commanded, symmetric, rng), au_names, rng)
                if not symmetric:
                    commanded = rest_one_side(commanded, rng)
                num_neutral = math.ceil(len(commanded) / 20)
                commanded[:num_neutral] = 0
                noise = torch.randn_like(latents[indices].float())
                pictures = feedback.draw(predict, batch, noise, commanded)
                read, to_read = pictures, commanded
                if rng.random() < 0.5:
                    # A mirrored face is read alike, and what deceives the meter is not.
                    read, to_read = pictures.flip(-1), commanded[:, mirrored_columns(TOY_AU_NAMES)]
                loss = loss + feedback.error(read, to_read, au_weights=command_weights(to_read))
                attributes = networks.attribute_loss(reader(shake(pictures)), self.attributes[indices])
                with torch.no_grad():
                    neutral = feedback.draw(predict_first, batch, noise, torch.zeros_like(commanded))
                change = pictures - neutral
                place = (surroundings * change**2).mean()
                face = appearance_change(change[..., UPPER_FACE[0], UPPER_FACE[1]], SIZE // 8).mean()
                kept = ATTRIBUTES_WEIGHT * attributes + PLACE_WEIGHT * place + APPEARANCE_WEIGHT * face
            return loss + kept + NEUTRAL_WEIGHT * change[:num_neutral].square().mean()

        modules = {name: model}
        if is_new:
            self.fit(f"{name}_start", modules, diffusion, self.size.adapter, 1e-3, ema_decay=0.998)
        predict_first = partial(predict, network=first_weights_of(model))
        self.fit(name, modules, with_feedback, self.size.feedback, 5e-4, ema_decay=0.985)
        with new_folder(self.folder / name) as unfinished:
            write_au_adapter(unfinished, model.au_adapter.half(), model.unet.half(), LORA_NAME)

    def make_model(self, name: str, au_names: tuple[str, ...]) -> tuple[FineFaceModel, bool]:
        """The model of an adapter, and whether the adapter is new; otherwise it goes on from the earlier weights."""
        earlier = self.start and (self.start if name == "twelve" else self.start / name)
        is_new = earlier is None or not earlier.exists()
        config = TrainConfig(
            pretrained_model_name_or_path=str(self.folder / "base"),
            output_dir=self.folder,
            train_data_dir=self.folder,
            rank=self.size.rank,
            au_side_tokens=au_names == TOY_AU_NAMES,
            adapter_name_or_path=None if is_new else str(earlier),
        )
        model = make_model(self.load(UNet2DConditionModel, "base/unet"), config, au_names=au_names)
        return model.to(self.device, memory_format=torch.channels_last), is_new

    def export(self, weights: Path = TOY_MODEL) -> None:
        """Write everything that was trained, in half precision, to `weights`."""
        pipeline = FineFacePipeline.from_pretrained(self.folder / "base", dtype=torch.float16)
        pipeline.load_au_adapter(self.folder / "twelve")
        encoder = CLIPVisionModelWithProjection.from_pretrained(self.folder / "image_encoder")
        pipeline.register_modules(image_encoder=encoder.half())
        pipeline.save_pretrained(weights)
        pipeline.load_au_adapter(self.folder / "sided")
        pipeline.save_au_adapter(weights / "sided")
        readers = {"meter": PictureReader, "second_meter": SecondMeter, "attribute_reader": PictureReader}
        for name, network in readers.items():
            network.from_pretrained(self.folder / name, dtype=torch.float16).save_pretrained(weights / name)
        for path in weights.rglob("config.json"):
            # A published config must not name a folder of this disk.
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)
            if "dtype" in config:
                # transformers loads in this type where nobody names one, and diffusers in float32.
                config["dtype"] = "float32"
            path.write_text(json.dumps(config, indent=2) + "\n")


def rest_one_side(commanded: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """
    Of half of the commands, `(batch, 24)`, let a side of the face rest, left or right at random: both sides of most
    expressions move nearly alike, so these commands teach best which side is meant.
    """
    sides = np.array([name[-1] for name in TOY_AU_NAMES])
    resting = (rng.random((len(commanded), 1)) < 0.5) & (sides == rng.choice(["L", "R"], (len(commanded), 1)))
    return commanded.masked_fill(torch.from_numpy(resting).to(commanded.device), 0.0)


def leave_one_au(commanded: torch.Tensor, symmetric: bool, rng: np.random.Generator) -> torch.Tensor:
    """
    Replace half of the commands, `(batch, 24)`, by one AU alone, on both sides, from 0.6 to 5: what a single AU does
    wrong is hardly seen in an expression of many. With `symmetric` it is one of the paper's AUs.
    """
    names = AU_NAMES if symmetric else [unit.name for unit in action_units_of(TOY_AU_NAMES)]
    batch = len(commanded)
    alone = au_projection(names, TOY_AU_NAMES)[rng.integers(len(names), size=batch)]
    alone = alone * torch.from_numpy(rng.uniform(0.6, 5, (batch, 1))).float()
    replaced = torch.from_numpy(rng.random((batch, 1)) < 0.5).to(commanded.device)
    return torch.where(replaced, alone.to(commanded), commanded)


def name_expressions(commanded: torch.Tensor, au_names: tuple[str, ...], rng: np.random.Generator) -> torch.Tensor:
    """
    Replace a quarter of the commands, `(batch, 24)`, by named expressions of an adapter with `au_names`, from half to
    full strength: people ask for these most, and random AUs hardly ever meet in them.
    """
    batch, presets = len(commanded), parse_aus(list(available_presets(au_names)), au_names=au_names)
    named = (presets @ au_projection(au_names, TOY_AU_NAMES))[rng.integers(len(presets), size=batch)]
    named = named * torch.from_numpy(rng.uniform(0.5, 1, (batch, 1))).float()
    replaced = torch.from_numpy(rng.random((batch, 1)) < 0.25).to(commanded.device)
    return torch.where(replaced, named.to(commanded), commanded)


def command_weights(commanded: torch.Tensor) -> torch.Tensor:
    """
    Weights of the squared errors of commands, `(batch, 24)`. Faint commands, and a side that has to rest while the
    other one moves, count more: their errors are small beside those of strong expressions, but are seen at once.
    """
    is_faint = (commanded > 0) & (commanded < 3.2)
    rests = (commanded == 0) & (commanded[:, mirrored_columns(TOY_AU_NAMES)] > 0)
    return 1.0 + 3 * is_faint + 12 * rests


def face_weights(face: float = 8.0, cell: int = 8) -> torch.Tensor:
    """Weights of mean 1, `(1, SIZE / cell, SIZE / cell)`: the face counts `face` times as much as the rest."""
    weights = torch.ones(SIZE, SIZE)
    weights[FACE] = face
    weights = F.avg_pool2d(weights[None], cell)
    return weights / weights.mean()


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids as Stable Diffusion wants them: cut and padded to the tokenizer's full length."""
    kwargs = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, max_length=tokenizer.model_max_length, **kwargs).input_ids


def run_track(number: int, *arguments) -> None:
    Recipe(*arguments).run(TRACKS[number])


def run_in_parallel(*arguments) -> None:
    """Both tracks at once on one device. If one fails, the other one ends too."""
    Recipe(*arguments)  # takes what is taken from earlier weights before both tracks look for it
    torch.multiprocessing.spawn(run_track, arguments, len(TRACKS))


def main(argv: list[str] | None = None) -> int:
    parser = Parser("toy_faces.train", __doc__)
    parser.add_argument("--preset", choices=SIZES, default="cpu")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/toy_faces"))
    parser.add_argument("--start", type=Path, help="earlier weights to go on from (default of gpu: toy_faces/weights)")
    parser.add_argument("--device", default=None, help="default: an accelerator if there is one, else cpu")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), help="default: the preset's")
    parser.add_argument("--compile", action="store_true", help="compile the base, which is trained for hours")
    parser.add_argument("--until", choices=NEEDS, default=LAST, help="stop after this stage")
    parser.add_argument("--export", action="store_true", help="copy the finished weights to toy_faces/weights")

    def work() -> None:
        arguments, stages = parser.parse_args(argv), list(NEEDS)
        size, device = SIZES[arguments.preset], pick_device(arguments.device)
        size = replace(size, compile=arguments.compile)
        if arguments.mixed_precision is not None:
            size = replace(size, bf16=arguments.mixed_precision == "bf16")
        start = arguments.start or (TOY_MODEL if arguments.preset == "gpu" else None)
        of_recipe = (size, arguments.output_dir, device, start)
        if size.parallel and arguments.until == LAST:
            run_in_parallel(*of_recipe)
        else:
            Recipe(*of_recipe).run(stages[: stages.index(arguments.until) + 1])
        if arguments.export:
            Recipe(*of_recipe).export()

    return run_program(
        work,
        interrupted="the same command goes on from the last checkpoint",
        failures=(FloatingPointError,),
    )


if __name__ == "__main__":
    sys.exit(main())
