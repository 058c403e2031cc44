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
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from action_units import AU_NAMES, action_units_of, au_projection, mirrored_columns
from au_encoder import write_au_adapter
from pipeline_fineface import LORA_NAME, FineFacePipeline
from program import TOY_MODEL, Parser, new_folder, pick_device, replacing, run_program
from toy_faces import networks
from toy_faces.fit import Length, fit
from toy_faces.networks import PictureReader, SecondMeter
from toy_faces.pictures import JUDGE_SEEDS, Pictures, captions_of, expression_of, to_pixel_values
from toy_faces.renderer import SIZE, TOY_AU_NAMES, caption, sample_portrait
from train_fineface import FineFaceModel, diffusion_loss, make_model
from training.config import TrainConfig
from training.data import face_sides
from training.encoders import StableDiffusionEncoders
from training.feedback import AUFeedback, appearance_change, load_meter, shake
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


NETWORKS = {"vae_channels": (32, 48, 64, 64), "vae_layers": 1, "unet_channels": (96, 128), "rank": 32}

CPU = Size(
    pictures=64_000,
    judge_pictures=24_000,
    **NETWORKS,
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
        pictures=8,
        judge_pictures=4,
        vae_channels=(8, 8, 8, 8),
        vae_layers=0,
        unet_channels=(32, 32),
        rank=4,
        vae=Length(2, 2),
        base=Length(2, 2),
        image_encoder=Length(2, 2),
        reader=Length(2, 2),
        attribute_reader=Length(2, 2),
        adapter=Length(2, 2),
        feedback=Length(2, 2),
        feedback_steps=2,
    ),
}
"""`tiny` trains nothing worth having; it runs every line in seconds."""


class Recipe:
    """The stages. Each is a method that returns at once if its result exists, and waits for what it needs."""

    FIRST_TRACK = ("vae", "latents", "base", "sided")
    SECOND_TRACK = ("captions", "meter", "attribute_reader", "second_meter", "image_encoder", "twelve")
    STAGES = ("captions", *FIRST_TRACK[:3], *SECOND_TRACK[1:], "sided")

    def __init__(self, size: Size, folder: Path, device: torch.device, start: Path | None = None):
        self.size, self.folder, self.device, self.start = size, folder, device, start
        folder.mkdir(parents=True, exist_ok=True)
        for part in TAKEN if start else ():
            if not self.is_done(part):
                with new_folder(folder / part) as unfinished:
                    shutil.copytree(start / part, unfinished, dirs_exist_ok=True)

    def run(self, stages: tuple[str, ...]) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        for stage in stages:
            torch.manual_seed(0)
            started = time.monotonic()
            getattr(self, stage)()
            print(f"{stage}: {time.monotonic() - started:.1f} s", flush=True)

    # ----------------------------------------------------------------------------------------------------------------
    # What the stages share
    # ----------------------------------------------------------------------------------------------------------------

    @cached_property
    def pictures(self) -> "PictureBank":
        return PictureBank(Pictures(self.folder / "pictures", self.size.pictures), self.device)

    @cached_property
    def judge_pictures(self) -> "PictureBank":
        pictures = Pictures(self.folder / "judge_pictures", self.size.judge_pictures, JUDGE_SEEDS)
        return PictureBank(pictures, self.device)

    @cached_property
    def expressions(self) -> torch.Tensor:
        """`(pictures, 24)` intensities of the training pictures, in the order of `TOY_AU_NAMES`."""
        expressions = np.stack([expression_of(seed) for seed in range(self.size.pictures)])
        return torch.from_numpy(expressions).to(self.device)

    @cached_property
    def attributes(self) -> torch.Tensor:
        """`(pictures, attributes)`: which value each attribute of a training picture has."""
        people = [sample_portrait(seed).attributes for seed in range(self.size.pictures)]
        return networks.attribute_numbers(people).to(self.device)

    def is_done(self, stage: str) -> bool:
        return (self.folder / stage).exists()

    def wait_for(self, *results: str) -> None:
        """Wait until another process has made them."""
        while not all(self.is_done(result) for result in results):
            time.sleep(0.5)

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

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.size.bf16)

    def fit(self, name: str, modules, loss_function, length: Length, peak: float, ema_decay: float = 0.0) -> None:
        # On CPUs a step with plain matrix products is faster than one with fused attention.
        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
            fit(name, modules, loss_function, self.folder, length, peak, ema_decay)

    # ----------------------------------------------------------------------------------------------------------------
    # The base
    # ----------------------------------------------------------------------------------------------------------------

    def vae(self) -> None:
        if self.is_done("vae"):
            return
        vae = networks.make_vae(self.size.vae_channels, self.size.vae_layers)
        vae.to(self.device, memory_format=torch.channels_last)
        # The face counts more than the place: brows and wrinkles are what the adapter has to bring back.
        weight = torch.full((1, 1, SIZE, SIZE), 0.6, device=self.device)
        weight[..., FACE[0], FACE[1]] = 1.6

        def loss_function(rng: np.random.Generator) -> torch.Tensor:
            _, pixel_values = self.pictures.draw(rng, self.size.vae.batch, finished_only=True)
            with self.autocast():
                posterior = vae.encode(pixel_values).latent_dist
                error = (vae.decode(posterior.sample()).sample - pixel_values).float()
            divergence = posterior.kl().mean() / posterior.mean[0].numel()
            return (weight * (error**2 + 0.1 * error.abs())).mean() + 3e-5 * divergence

        self.fit("vae", {"vae": vae}, loss_function, self.size.vae, 2e-3, ema_decay=0.995)
        self.pictures.load_all()
        mean, std = self.latent_statistics(vae)
        networks.normalize_latents(vae, mean, std)
        self.finish("vae", vae)

    @torch.no_grad()
    def latent_statistics(self, vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of every latent channel over some training pictures."""
        sample = self.pictures.pixel_values(range(min(512, self.size.pictures)))
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in sample.split(16)])
        return latents.mean((0, 2, 3)), latents.std((0, 2, 3))

    @torch.no_grad()
    def latents(self) -> None:
        if self.is_done("latents.npy"):
            return
        vae, batch = self.load_vae(), 512 if self.device.type == "cuda" else 32
        self.pictures.load_all()
        parts = []
        for start in tqdm(range(0, self.size.pictures, batch), desc="latents", mininterval=10):
            pixel_values = self.pictures.pixel_values(range(start, min(start + batch, self.size.pictures)))
            with self.autocast():
                parts.append(vae.encode(pixel_values).latent_dist.mode().half().cpu())
        self.save_array("latents.npy", torch.cat(parts).numpy())

    def save_array(self, name: str, array: np.ndarray) -> None:
        with replacing(self.folder / name) as unfinished, open(unfinished, "wb") as file:
            np.save(file, array)

    def captions(self) -> None:
        """The tokenizer, and the tokens of every picture's captions: `(WORDINGS, pictures, 48)` int32."""
        if self.is_done("captions.npy"):
            return
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
        ids = torch.stack([tokenize(tokenizer, captions) for captions in wordings])
        self.save_array("captions.npy", ids.int().numpy())

    def base(self) -> None:
        """Text encoder and UNet together: text → portrait, with any expression if the caption names none."""
        if self.is_done("base"):
            return
        self.wait_for("captions.npy")
        tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer")
        input_ids = self.read_array("captions.npy").long()
        empty = tokenize(tokenizer, [""]).to(self.device)
        latents = self.read_array("latents.npy")
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
            indices = torch.from_numpy(rng.integers(0, len(latents), batch)).to(self.device)
            ids = input_ids[torch.from_numpy(rng.integers(0, WORDINGS, batch)).to(self.device), indices]
            ids = torch.where(torch.from_numpy(rng.random((batch, 1)) < 0.1).to(self.device), empty, ids)
            clean, timesteps = latents[indices].float(), self.draw_timesteps(rng, batch)
            noise = torch.randn_like(clean)
            with self.autocast():
                text = text_encoder(ids).last_hidden_state
                prediction = forward(scheduler.add_noise(clean, noise, timesteps), timesteps, text).sample
            return F.mse_loss(prediction.float(), scheduler.get_velocity(clean, noise, timesteps))

        modules = {"unet": unet, "text_encoder": text_encoder}
        self.fit("base", modules, loss_function, self.size.base, 1e-3, ema_decay=0.999)
        pipeline = StableDiffusionPipeline(
            vae=self.load_vae(),
            text_encoder=text_encoder.eval(),
            tokenizer=tokenizer,
            unet=unet.eval(),
            scheduler=networks.make_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self.finish("base", pipeline)

    def draw_timesteps(self, rng: np.random.Generator, batch: int) -> torch.Tensor:
        """One timestep from each of `batch` equal intervals: uniform as ever, with less noise in the gradient."""
        return torch.from_numpy((np.arange(batch) + rng.random(batch)) / batch * 1000).long().to(self.device)

    def read_array(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.load(self.folder / name)).to(self.device)

    # ----------------------------------------------------------------------------------------------------------------
    # What looks at pictures
    # ----------------------------------------------------------------------------------------------------------------

    def image_encoder(self) -> None:
        """A CLIP image encoder: its embedding of a picture agrees with the (frozen) text embedding of its caption."""
        if self.is_done("image_encoder"):
            return
        self.wait_for("base")
        text_encoder = self.load(CLIPTextModel, "base/text_encoder")
        image_encoder = networks.make_image_encoder().to(self.device)
        text_projection = nn.Linear(networks.TEXT_WIDTH, networks.TEXT_WIDTH, bias=False).to(self.device)
        input_ids, batch = self.read_array("captions.npy")[0].long(), self.size.image_encoder.batch

        def loss_function(rng: np.random.Generator) -> torch.Tensor:
            indices, pixel_values = self.pictures.draw(rng, batch)
            with torch.no_grad():
                text = text_encoder(input_ids[torch.from_numpy(indices).to(self.device)]).pooler_output
            images = F.normalize(image_encoder(pixel_values).image_embeds, dim=-1)
            similarity = 14 * images @ F.normalize(text_projection(text), dim=-1).T
            target = torch.arange(batch, device=self.device)
            return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2

        modules = {"image_encoder": image_encoder, "text_projection": text_projection}
        self.fit("image_encoder", modules, loss_function, self.size.image_encoder, 1e-3)
        self.finish("image_encoder", image_encoder.eval())

    def meter(self) -> None:
        """Train the meter that teaches: feedback reads the pictures of the adapters with it."""
        if self.is_done("meter"):
            return
        self.wait_for("vae")
        # Other processes render the pictures of the second meter meanwhile.
        self.judge_pictures  # noqa: B018
        self.read_aus("meter", networks.make_meter(), self.pictures)

    def second_meter(self) -> None:
        """Train the meter that judges, of another architecture and seed, on other pictures. No training uses it."""
        torch.manual_seed(2)
        self.read_aus("second_meter", networks.make_second_meter(), self.judge_pictures)

    def read_aus(self, name: str, network: PictureReader | SecondMeter, pictures: "PictureBank") -> None:
        first = pictures.pictures.first

        def loss_of(pixel_values: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
            expressions = np.stack([expression_of(first + int(index)) for index in indices])
            return F.mse_loss(network(pixel_values), torch.from_numpy(expressions).to(self.device))

        self.reader(name, network, pictures, self.size.reader, loss_of)

    def attribute_reader(self) -> None:
        network = networks.make_attribute_reader()
        self.reader(
            "attribute_reader",
            network,
            self.pictures,
            self.size.attribute_reader,
            lambda pixel_values, indices: networks.attribute_loss(network(pixel_values), self.attributes[indices]),
        )

    def reader(
        self,
        name: str,
        network: nn.Module,
        pictures: "PictureBank",
        length: Length,
        loss_of: Callable[[torch.Tensor, np.ndarray], torch.Tensor],
    ) -> None:
        """Train a reader. Half of its pictures have gone through the VAE, as all that it reads later will have."""
        if self.is_done(name):
            return
        self.wait_for("vae")
        vae = self.load_vae()
        network.to(self.device, memory_format=torch.channels_last)
        batch = max(2, length.batch)

        def loss_function(rng: np.random.Generator) -> torch.Tensor:
            indices, pixel_values = pictures.draw(rng, batch)
            with torch.no_grad(), self.autocast():
                decoded = vae.decode(vae.encode(pixel_values[batch // 2 :]).latent_dist.mode()).sample.float()
            pixel_values = shake(torch.cat([pixel_values[: batch // 2], decoded]))
            with self.autocast():
                return loss_of(pixel_values, indices).float()

        self.fit(name, {name: network}, loss_function, length, 1e-3, ema_decay=0.998)
        self.finish(name, network.eval())

    # ----------------------------------------------------------------------------------------------------------------
    # The adapters
    # ----------------------------------------------------------------------------------------------------------------

    def twelve(self) -> None:
        """The paper's AUs, both sides alike."""
        self.train_adapter("twelve", AU_NAMES)

    def sided(self) -> None:
        """All AUs of the toy world, each side by itself."""
        self.train_adapter("sided", TOY_AU_NAMES)

    def train_adapter(self, name: str, au_names: tuple[str, ...]) -> None:
        """Train by the diffusion loss alone, unless an adapter goes on, and then with feedback beside it."""
        if self.is_done(name):
            return
        self.wait_for("base", "meter", "attribute_reader")
        model, is_new = self.make_model(name, au_names)
        # Of even seeds, both sides are alike and none of the AUs is beyond the twelve.
        symmetric = au_names == AU_NAMES
        seeds = torch.arange(0, self.size.pictures, 1 + symmetric, device=self.device)
        projection = au_projection(TOY_AU_NAMES, au_names).to(self.device)
        text_encoder = self.load(CLIPTextModel, "base/text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(self.folder / "base" / "tokenizer")
        with torch.no_grad():
            empty = text_encoder(tokenize(tokenizer, [""]).to(self.device)).last_hidden_state
        input_ids, latents = self.read_array("captions.npy").long(), self.read_array("latents.npy")
        scheduler = networks.make_scheduler()
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(self.device)
        weights, surroundings = face_weights().to(self.device), torch.ones(SIZE, SIZE, device=self.device)
        surroundings[FACE] = 0.0
        surroundings /= surroundings.mean()
        side_attention = None if symmetric else SideAttention(model)
        box = np.array([FACE[1].start, FACE[0].start, FACE[1].stop, FACE[0].stop]) / SIZE
        sides = torch.from_numpy(face_sides(box, np.array([SIZE, SIZE]), SIZE // 8)).to(self.device)
        feedback = self.make_feedback(tokenizer, text_encoder)
        reader = self.load(PictureReader, "attribute_reader")

        def predict(noisy_latents, timesteps, prompt_embeds, au_intensities, **kwargs) -> torch.Tensor:
            """The model, commanded by the intensities of `TOY_AU_NAMES`."""
            return model(noisy_latents, timesteps, prompt_embeds, au_intensities @ projection, **kwargs)

        def embed(rng: np.random.Generator, indices: torch.Tensor) -> torch.Tensor:
            wording = torch.from_numpy(rng.integers(0, WORDINGS // 2, len(indices))).to(self.device)
            with torch.no_grad():
                return text_encoder(input_ids[wording, indices]).last_hidden_state

        def draw_indices(rng: np.random.Generator, batch: int) -> torch.Tensor:
            return seeds[torch.from_numpy(rng.integers(0, len(seeds), batch)).to(self.device)]

        def loss_of(
            rng: np.random.Generator, indices: torch.Tensor, prompt_embeds: torch.Tensor, sides_weight: float
        ) -> torch.Tensor:
            batch, clean = len(indices), latents[indices].float()
            dropped = torch.from_numpy(rng.random((batch, 1, 1)) < 0.1).to(self.device)
            # AUs explain little of the loss, in the face, and hardly any of it where little noise is left.
            timesteps = self.draw_timesteps(rng, batch)
            later = torch.from_numpy(rng.random(batch) < 0.7).to(self.device)
            timesteps = torch.where(later, 400 + timesteps * 6 // 10, timesteps)
            noise, captions = torch.randn_like(clean), torch.where(dropped, empty, prompt_embeds)
            noisy_latents = scheduler.add_noise(clean, noise, timesteps)
            prediction = predict(noisy_latents, timesteps, captions, self.expressions[indices])
            loss = diffusion_loss(prediction, scheduler, clean, noise, timesteps, weights)
            if side_attention is not None:
                loss = loss + sides_weight * side_attention.loss(sides.expand(batch, -1, -1))
            return loss

        def diffusion(rng: np.random.Generator) -> torch.Tensor:
            indices = draw_indices(rng, self.size.adapter.batch)
            with self.autocast():
                return loss_of(rng, indices, embed(rng, indices), SIDES_WEIGHT)

        def with_feedback(rng: np.random.Generator) -> torch.Tensor:
            indices = draw_indices(rng, self.size.feedback.batch)
            prompt_embeds = embed(rng, indices)
            with self.autocast():
                loss = loss_of(rng, indices, prompt_embeds, SIDES_WEIGHT / 10)
                # Other people make the commanded faces: the expression must not depend on who it is.
                commanded, batch = self.expressions[indices].roll(1, 0), {"prompt_embeds": prompt_embeds}
                commanded = leave_one_au(commanded, symmetric, rng)
                if not symmetric:
                    commanded = rest_one_side(commanded, rng)
                noise = torch.randn_like(latents[indices].float())
                pictures = feedback.draw(predict, batch, noise, commanded)
                loss = loss + feedback.error(pictures, commanded, au_weights=command_weights(commanded))
                attributes = networks.attribute_loss(reader(shake(pictures)), self.attributes[indices])
                with torch.no_grad():
                    neutral = feedback.draw(predict, batch, noise, torch.zeros_like(commanded))
                change = pictures - neutral
                place = (surroundings * change**2).mean()
                face = appearance_change(change[..., UPPER_FACE[0], UPPER_FACE[1]], SIZE // 8).mean()
            return loss + ATTRIBUTES_WEIGHT * attributes + PLACE_WEIGHT * place + APPEARANCE_WEIGHT * face

        modules = {name: Trained(model)}
        if is_new:
            self.fit(f"{name}_start", modules, diffusion, self.size.adapter, 1e-3, ema_decay=0.998)
        self.fit(name, modules, with_feedback, self.size.feedback, 5e-4, ema_decay=0.985)
        with new_folder(self.folder / name) as unfinished:
            write_au_adapter(unfinished, model.au_adapter.half(), model.unet.half(), LORA_NAME)

    def make_model(self, name: str, au_names: tuple[str, ...]) -> tuple[FineFaceModel, bool]:
        """The model of an adapter, and whether the adapter is new; otherwise it goes on from the earlier weights."""
        earlier = None
        if self.start and name == "twelve":
            earlier = self.start
        elif self.start and (self.start / name).exists():
            earlier = self.start / name
        config = TrainConfig(
            pretrained_model_name_or_path=str(self.folder / "base"),
            output_dir=self.folder,
            train_data_dir=self.folder,
            rank=self.size.rank,
            au_side_tokens=au_names == TOY_AU_NAMES,
            adapter_name_or_path=None if earlier is None else str(earlier),
        )
        model = make_model(self.load(UNet2DConditionModel, "base/unet"), config, au_names=au_names)
        return model.to(self.device, memory_format=torch.channels_last), earlier is None

    def make_feedback(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> AUFeedback:
        meter = load_meter(str(self.folder / "meter"), self.device)
        encoders = StableDiffusionEncoders([tokenizer], [text_encoder], self.load_vae())
        steps = self.size.feedback_steps
        return AUFeedback(
            [meter], encoders, networks.make_scheduler(), TOY_AU_NAMES, steps, guidance_scale=GUIDANCE_SCALE
        )

    # ----------------------------------------------------------------------------------------------------------------

    def export(self, weights: Path = TOY_MODEL) -> None:
        """Write everything that was trained, in half precision, to `weights`."""
        pipeline = FineFacePipeline.from_pretrained(self.folder / "base", dtype=torch.float16)
        pipeline.load_au_adapter(self.folder / "twelve")
        encoder = CLIPVisionModelWithProjection.from_pretrained(self.folder / "image_encoder")
        pipeline.register_modules(image_encoder=encoder.half())
        pipeline.save_pretrained(weights)
        pipeline.load_au_adapter(self.folder / "sided")
        pipeline.save_au_adapter(weights / "sided")
        for name, network in (
            ("meter", PictureReader),
            ("second_meter", SecondMeter),
            ("attribute_reader", PictureReader),
        ):
            network.from_pretrained(self.folder / name, dtype=torch.float16).save_pretrained(weights / name)
        for path in weights.rglob("config.json"):
            # A published config must not name a folder of this disk.
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)
            if "dtype" in config:
                # transformers loads in this type where nobody names one, and diffusers in float32.
                config["dtype"] = "float32"
            path.write_text(json.dumps(config, indent=2) + "\n")


class Trained(nn.Module):
    """The trained parameters of a model alone, by their order, so that a checkpoint leaves the frozen base out."""

    def __init__(self, model: FineFaceModel):
        super().__init__()
        self.parameter_list = nn.ParameterList(model.trained_parameters().values())


class PictureBank:
    """Training pictures where they are needed: all of them on an accelerator, memory-mapped files on a CPU."""

    def __init__(self, pictures: Pictures, device: torch.device):
        self.pictures, self.device = pictures, device
        shape = (pictures.count, SIZE, SIZE, 3)
        self.on_device = torch.empty(shape, dtype=torch.uint8, device=device) if device.type == "cuda" else None
        self.shards: list[np.ndarray] = []
        self.num_loaded = 0

    def update(self, at_least: int = 1) -> None:
        shards = self.pictures.finished(at_least)
        for shard in shards[len(self.shards) :]:
            if self.on_device is not None:
                self.on_device[self.num_loaded : self.num_loaded + len(shard)] = torch.from_numpy(np.array(shard)).to(
                    self.device
                )
            self.num_loaded += len(shard)
            self.shards.append(shard)

    def load_all(self) -> None:
        if self.num_loaded < self.pictures.count:
            self.pictures.wait()
            self.update(len(self.pictures.seeds))

    def pixel_values(self, indices) -> torch.Tensor:
        """Pixel values of the pictures of these numbers, counted from the first one: `(batch, 3, 128, 128)`."""
        if self.on_device is not None:
            return to_pixel_values(self.on_device[torch.as_tensor(np.asarray(indices), device=self.device)])
        size = len(self.shards[0])
        return to_pixel_values(np.stack([self.shards[index // size][index % size] for index in indices]))

    def draw(
        self, rng: np.random.Generator, batch: int, finished_only: bool = False
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Numbers and pixel values of random pictures; with `finished_only`, of those that are rendered by now."""
        if finished_only:
            self.update()
        else:
            self.load_all()
        indices = rng.integers(0, self.num_loaded, batch)
        return indices, self.pixel_values(indices)


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


def command_weights(commanded: torch.Tensor) -> torch.Tensor:
    """
    Weights of the squared errors of commands, `(batch, 24)`. Faint commands, and a side that has to rest while the
    other one moves, count more: their errors are small beside those of strong expressions, but are seen at once.
    """
    is_faint = (commanded > 0) & (commanded < 3.2)
    rests = (commanded == 0) & (commanded[:, mirrored_columns(TOY_AU_NAMES)] > 0)
    return 1.0 + 3 * is_faint + 12 * rests


def face_weights() -> torch.Tensor:
    """`(1, 16, 16)` weights of the loss, of mean 1: the face counts eight times as much as the rest."""
    weights = torch.ones(SIZE, SIZE)
    weights[FACE] = 8.0
    weights = F.avg_pool2d(weights[None], 8)
    return weights / weights.mean()


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids as Stable Diffusion wants them: cut and padded to the tokenizer's full length."""
    kwargs = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, max_length=tokenizer.model_max_length, **kwargs).input_ids


def run_track(stages: tuple[str, ...], *arguments) -> None:
    Recipe(*arguments).run(stages)


def run_in_parallel(*arguments) -> None:
    """Both tracks at once on one device. If one fails, the other one ends too."""
    Recipe(*arguments)  # takes what is taken from earlier weights before both tracks look for it
    context = get_context("spawn")
    tracks = [
        context.Process(target=run_track, args=(stages, *arguments))
        for stages in (Recipe.FIRST_TRACK, Recipe.SECOND_TRACK)
    ]
    for track in tracks:
        track.start()
    while any(track.is_alive() for track in tracks):
        failed = [track for track in tracks if track.exitcode]
        if failed:
            for track in tracks:
                track.terminate()
            raise RuntimeError("A part of the recipe has failed; its message is above.")
        time.sleep(0.5)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status of `run_program`."""
    parser = Parser("toy_faces.train", __doc__)
    parser.add_argument("--preset", choices=SIZES, default="cpu")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/toy_faces"))
    parser.add_argument("--start", type=Path, help="earlier weights to go on from (default of gpu: toy_faces/weights)")
    parser.add_argument("--device", default=None, help="default: an accelerator if there is one, else cpu")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), help="default: the preset's")
    parser.add_argument("--compile", action="store_true", help="compile the base, which is trained for hours")
    parser.add_argument("--until", choices=Recipe.STAGES, default=Recipe.STAGES[-1], help="stop after this stage")
    parser.add_argument("--export", action="store_true", help="copy the finished weights to toy_faces/weights")

    def work() -> None:
        arguments = parser.parse_args(argv)
        size, device = SIZES[arguments.preset], pick_device(arguments.device)
        size = replace(size, compile=arguments.compile)
        if arguments.mixed_precision is not None:
            size = replace(size, bf16=arguments.mixed_precision == "bf16")
        start = arguments.start or (TOY_MODEL if arguments.preset == "gpu" else None)
        of_recipe = (size, arguments.output_dir, device, start)
        if size.parallel and arguments.until == Recipe.STAGES[-1]:
            run_in_parallel(*of_recipe)
        else:
            run_track(Recipe.STAGES[: Recipe.STAGES.index(arguments.until) + 1], *of_recipe)
        if arguments.export:
            Recipe(*of_recipe).export()

    return run_program(
        work,
        interrupted="the same command goes on from the last checkpoint",
        failures=(FloatingPointError,),
    )


if __name__ == "__main__":
    sys.exit(main())
