r"""
Make the toy model from nothing: `python -m toy_faces.train --preset cpu` (2 cores, under 3 hours) or
`--preset gpu` (one large card, under 25 minutes).

    pictures → VAE → latents → tokenizer, text encoder, UNet → image encoder → meter, attribute reader → AU adapter

Every stage writes into `--output_dir` and is skipped when its result is there; inside a stage a checkpoint a minute is
kept. Kill it at any moment and run the same command again. `--until STAGE` stops after a stage, `--export` copies the
finished weights in half precision to `toy_faces/weights`.
"""

import argparse
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

import train_fineface
from action_units import AU_NAMES
from au_encoder import ATTN_PROCESSORS_NAME
from pipeline_fineface import FineFacePipeline
from program import TOY_MODEL, pick_device
from toy_faces import networks
from toy_faces.fit import fit
from toy_faces.networks import PictureReader
from toy_faces.pictures import aus_of, captions_of, render_pictures, to_pixel_values
from toy_faces.renderer import SIZE, caption, sample_portrait
from train_fineface import attention_for_training
from training.config import TrainConfig
from training.data import FACE_BOX


WORDINGS = 4
"""Captions of each picture that the base is trained with."""
FACE = (slice(26, 122), slice(26, 102))
"""Rows and columns that hold the face, pixels at 128: where all AU evidence is."""


@dataclass(frozen=True)
class Preset:
    """Sizes and lengths of one run of the recipe; `steps` are optimizer steps."""

    pictures: int
    vae_channels: tuple[int, ...]
    vae_layers: int
    vae_steps: int
    vae_batch: int
    unet_channels: tuple[int, ...]
    base_steps: int
    base_batch: int
    image_encoder_steps: int
    meter_steps: int
    attribute_reader_steps: int
    adapter_steps: int
    adapter_batch: int
    adapter_rank: int
    mixed_precision: str
    dataloader_workers: int


PRESETS = {
    "cpu": Preset(
        pictures=24_000,
        # No residual layers before the deepest level: four fifths of a small VAE's time is spent at full resolution.
        vae_channels=(32, 32, 32, 32),
        vae_layers=0,
        vae_steps=4_000,
        vae_batch=4,
        unet_channels=(64, 128),
        base_steps=8_000,
        base_batch=16,
        image_encoder_steps=250,
        meter_steps=1_600,
        attribute_reader_steps=400,
        adapter_steps=15_000,
        adapter_batch=16,
        adapter_rank=32,
        mixed_precision="no",
        dataloader_workers=0,
    ),
    "gpu": Preset(
        pictures=100_000,
        vae_channels=(32, 64, 128, 128),
        vae_layers=1,
        vae_steps=6_000,
        vae_batch=48,
        unet_channels=(96, 160),
        base_steps=7_000,
        base_batch=256,
        image_encoder_steps=1_500,
        meter_steps=6_000,
        attribute_reader_steps=2_000,
        adapter_steps=5_000,
        adapter_batch=256,
        adapter_rank=32,
        mixed_precision="bf16",
        dataloader_workers=8,
    ),
    "tiny": Preset(
        pictures=32,
        vae_channels=(8, 8, 8, 8),
        vae_layers=0,
        vae_steps=2,
        vae_batch=2,
        unet_channels=(32, 32),
        base_steps=2,
        base_batch=2,
        image_encoder_steps=2,
        meter_steps=2,
        attribute_reader_steps=2,
        adapter_steps=2,
        adapter_batch=2,
        adapter_rank=4,
        mixed_precision="no",
        dataloader_workers=0,
    ),
}
"""`tiny` trains nothing worth having; it runs every line in seconds."""


class Recipe:
    """The stages, in order. Each is a method that returns at once if its result exists."""

    STAGES = ("vae", "latents", "base", "image_encoder", "meter", "attribute_reader", "adapter")

    def __init__(self, preset: Preset, folder: Path, device: torch.device, torch_compile: bool = False):
        self.preset, self.folder, self.device, self.torch_compile = preset, folder, device, torch_compile
        folder.mkdir(parents=True, exist_ok=True)
        self.pictures = render_pictures(folder / "pictures.npy", preset.pictures)

    def run(self, until: str) -> None:
        for stage in self.STAGES:
            torch.manual_seed(0)
            getattr(self, stage)()
            if stage == until:
                break

    def is_done(self, stage: str) -> bool:
        return (self.folder / stage).exists()

    def finish(self, stage: str, model) -> None:
        """Save what a stage made in a folder that appears in one rename."""
        unfinished = self.folder / f"{stage}.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        unfinished.rename(self.folder / stage)

    def draw(self, rng: np.random.Generator, batch: int) -> tuple[np.ndarray, torch.Tensor]:
        """Indices and pixel values of random training pictures."""
        indices = np.sort(rng.choice(len(self.pictures), batch, replace=False))
        return indices, to_pixel_values(self.pictures[indices]).to(self.device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.preset.mixed_precision == "bf16")

    def vae(self) -> None:
        if self.is_done("vae"):
            return
        vae = networks.make_vae(self.preset.vae_channels, self.preset.vae_layers)
        vae.to(self.device, memory_format=torch.channels_last)
        # The face counts more than the place: brows and wrinkles are what the adapter has to bring back.
        weight = torch.full((1, 1, SIZE, SIZE), 0.6, device=self.device)
        weight[..., FACE[0], FACE[1]] = 1.6

        def loss_function(rng: np.random.Generator) -> torch.Tensor:
            _, pixel_values = self.draw(rng, self.preset.vae_batch)
            with self.autocast():
                posterior = vae.encode(pixel_values).latent_dist
                error = (vae.decode(posterior.sample()).sample - pixel_values).float()
            divergence = posterior.kl().mean() / posterior.mean[0].numel()
            return (weight * (error**2 + 0.1 * error.abs())).mean() + 5e-5 * divergence

        fit("vae", {"vae": vae}, loss_function, self.folder, self.preset.vae_steps, 2e-3)
        mean, std = self.latent_statistics(vae)
        networks.normalize_latents(vae, mean, std)
        self.finish("vae", vae)

    @torch.no_grad()
    def latent_statistics(self, vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of every latent channel over some training pictures."""
        sample = to_pixel_values(self.pictures[: min(512, len(self.pictures))]).to(self.device)
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in sample.split(16)])
        return latents.mean((0, 2, 3)), latents.std((0, 2, 3))

    @torch.no_grad()
    def latents(self) -> None:
        path = self.folder / "latents.npy"
        if path.exists():
            return
        vae = self.load(AutoencoderKL, "vae").to(memory_format=torch.channels_last)
        shape = (len(self.pictures), 16, SIZE // 8, SIZE // 8)
        unfinished = path.with_suffix(".part.npy")
        latents = np.lib.format.open_memmap(unfinished, "w+", np.float16, shape)
        for start in tqdm(range(0, len(latents), 64), desc="latents", mininterval=10):
            pixel_values = to_pixel_values(self.pictures[start : start + 64]).to(self.device)
            latents[start : start + 64] = vae.encode(pixel_values).latent_dist.mode().half().cpu().numpy()
        latents.flush()
        unfinished.rename(path)

    def base(self) -> None:
        """Text encoder and UNet together: text → portrait, with any expression if the caption names none."""
        if self.is_done("base"):
            return
        seeds = range(len(self.pictures))
        # Half of the wordings say what the face does, as captions of photographs do at times: so the base has ways
        # from words to expressions, as Stable Diffusion has, which the AU adapter finds.
        wordings = [captions_of(seeds, wording, wording >= WORDINGS // 2) for wording in range(WORDINGS)]
        tokenizer = networks.make_tokenizer(wordings[-1] + [caption(sample_portrait(seed)) for seed in seeds])
        input_ids = torch.stack([tokenize(tokenizer, captions) for captions in wordings])
        empty = tokenize(tokenizer, [""])
        latents = torch.from_numpy(np.load(self.folder / "latents.npy")).to(self.device)
        unet = networks.make_unet(self.preset.unet_channels).to(self.device, memory_format=torch.channels_last)
        text_encoder = networks.make_text_encoder(tokenizer).to(self.device)
        scheduler = networks.make_scheduler()
        batch = self.preset.base_batch
        predict = torch.compile(unet) if self.torch_compile else unet

        def loss_function(rng: np.random.Generator) -> torch.Tensor:
            indices = torch.from_numpy(rng.integers(0, len(latents), batch))
            ids = input_ids[torch.from_numpy(rng.integers(0, WORDINGS, batch)), indices]
            ids = torch.where(torch.from_numpy(rng.random((batch, 1))) < 0.1, empty, ids)
            clean = latents[indices.to(self.device)].float()
            # One timestep from each of `batch` equal intervals: the same distribution, less noise in the gradient.
            timesteps = torch.from_numpy((np.arange(batch) + rng.random(batch)) / batch * 1000).long()
            timesteps, noise = timesteps.to(self.device), torch.randn_like(clean)
            with self.autocast():
                text = text_encoder(ids.to(self.device)).last_hidden_state
                prediction = predict(scheduler.add_noise(clean, noise, timesteps), timesteps, text).sample
            return F.mse_loss(prediction.float(), scheduler.get_velocity(clean, noise, timesteps))

        modules = {"unet": unet, "text_encoder": text_encoder}
        with attention_for_training(self.device):
            fit("base", modules, loss_function, self.folder, self.preset.base_steps, 1e-3, ema_decay=0.999)
        pipeline = StableDiffusionPipeline(
            vae=self.load(AutoencoderKL, "vae"),
            text_encoder=text_encoder.eval(),
            tokenizer=tokenizer,
            unet=unet.eval(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self.finish("base", pipeline)

    def image_encoder(self) -> None:
        """A CLIP image encoder: its embedding of a picture agrees with the (frozen) text embedding of its caption."""
        if self.is_done("image_encoder"):
            return
        tokenizer = CLIPTokenizer.from_pretrained(self.folder / "base" / "tokenizer")
        text_encoder = self.load(CLIPTextModel, "base/text_encoder")
        image_encoder = networks.make_image_encoder().to(self.device)
        text_projection = nn.Linear(networks.TEXT_WIDTH, networks.TEXT_WIDTH, bias=False).to(self.device)
        batch = min(64, len(self.pictures))

        def loss_function(rng: np.random.Generator) -> torch.Tensor:
            indices, pixel_values = self.draw(rng, batch)
            ids = tokenize(tokenizer, captions_of(indices, 0)).to(self.device)
            with torch.no_grad():
                text = text_encoder(ids).pooler_output
            images = F.normalize(image_encoder(pixel_values).image_embeds, dim=-1)
            similarity = 14 * images @ F.normalize(text_projection(text), dim=-1).T
            target = torch.arange(batch, device=self.device)
            return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2

        modules = {"image_encoder": image_encoder, "text_projection": text_projection}
        fit("image_encoder", modules, loss_function, self.folder, self.preset.image_encoder_steps, 1e-3)
        self.finish("image_encoder", image_encoder.eval())

    def meter(self) -> None:
        """Half of its pictures have gone through the VAE: that is how it will see them."""
        self.reader(
            "meter",
            networks.make_meter(),
            self.preset.meter_steps,
            lambda meter, pixel_values, indices: F.mse_loss(meter(pixel_values), aus_of(indices).to(self.device)),
        )

    def attribute_reader(self) -> None:
        self.reader(
            "attribute_reader",
            networks.make_attribute_reader(),
            self.preset.attribute_reader_steps,
            lambda reader, pixel_values, indices: networks.attribute_loss(
                reader(pixel_values), [sample_portrait(int(index)).attributes for index in indices]
            ),
        )

    def reader(self, name: str, network: PictureReader, steps: int, loss_of) -> None:
        if self.is_done(name):
            return
        reconstructions = self.reconstructions()
        network.to(self.device, memory_format=torch.channels_last)

        def loss_function(rng: np.random.Generator) -> torch.Tensor:
            through_vae = np.sort(rng.choice(len(reconstructions), min(16, len(reconstructions)), replace=False))
            indices, pixel_values = self.draw(rng, 16)
            decoded = to_pixel_values(reconstructions[through_vae]).to(self.device)
            pixel_values = torch.cat([pixel_values, decoded])
            # Slight noise and brightness: generated pictures are not quite renders.
            pixel_values = pixel_values * (1 + 0.05 * torch.randn(len(pixel_values), 1, 1, 1, device=self.device))
            pixel_values = pixel_values + 0.03 * torch.randn_like(pixel_values)
            return loss_of(network, pixel_values, np.concatenate([indices, through_vae]))

        fit(name, {name: network}, loss_function, self.folder, steps, 1e-3)
        self.finish(name, network.eval())

    @torch.no_grad()
    def reconstructions(self) -> np.ndarray:
        """The first pictures after a trip through the VAE, uint8."""
        path = self.folder / "reconstructions.npy"
        if not path.exists():
            vae = self.load(AutoencoderKL, "vae").to(memory_format=torch.channels_last)
            latents = np.load(self.folder / "latents.npy", mmap_mode="r")[: max(1, len(self.pictures) // 8)]
            decoded = []
            for part in tqdm(torch.from_numpy(np.array(latents)).split(64), desc="reconstructions", mininterval=10):
                pixels = vae.decode(part.float().to(self.device)).sample.clamp(-1, 1)
                decoded.append(((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
            np.save(path.with_suffix(".part.npy"), np.concatenate(decoded))
            path.with_suffix(".part.npy").rename(path)
        return np.load(path, mmap_mode="r")

    def dataset(self) -> Path:
        """The pictures as a Hugging Face image folder, the format that `train_fineface.py` reads."""
        folder = self.folder / "dataset"
        metadata = folder / "metadata.jsonl"
        if not metadata.exists():
            folder.mkdir(exist_ok=True)
            seeds = range(len(self.pictures))
            rows, columns = FACE
            corners = (columns.start, rows.start, columns.stop, rows.stop)
            box = {name: round(pixel / SIZE, 4) for name, pixel in zip(FACE_BOX, corners, strict=True)}
            lines = []
            for seed, text, aus in zip(seeds, captions_of(seeds, 0), aus_of(seeds).tolist(), strict=True):
                Image.fromarray(self.pictures[seed]).save(folder / f"{seed:06}.png", compress_level=1)
                named = dict(zip(AU_NAMES, (round(value, 4) for value in aus), strict=True))
                lines.append(json.dumps({"file_name": f"{seed:06}.png", "text": text, **named, **box}))
            unfinished = folder / "metadata.part"
            unfinished.write_text("\n".join(lines) + "\n")
            unfinished.rename(metadata)
        return folder

    def adapter(self) -> None:
        """The AU adapter, by the same script that users run."""
        if (self.folder / "adapter" / ATTN_PROCESSORS_NAME).exists():
            return
        preset = self.preset
        config = TrainConfig(
            pretrained_model_name_or_path=str(self.folder / "base"),
            train_data_dir=self.dataset(),
            output_dir=self.folder / "adapter",
            cache_latents=True,
            max_train_steps=preset.adapter_steps,
            train_batch_size=preset.adapter_batch,
            rank=preset.adapter_rank,
            learning_rate=1e-3,
            # The unconditional branch has to stay what it was under the LoRA.
            caption_drop_prob=0.1,
            # AUs explain one hundredth of the loss, in the face, and hardly any of it where little noise is left.
            face_loss_weight=8,
            timestep_bias_strategy="range",
            timestep_bias_begin=400,
            timestep_bias_multiplier=4,
            timestep_sampling="stratified",
            use_ema=True,
            ema_decay=0.998,
            dataloader_num_workers=preset.dataloader_workers,
            lr_scheduler="cosine",
            lr_warmup_steps=100,
            mixed_precision=preset.mixed_precision,
            torch_compile=self.torch_compile,
            checkpointing_steps=max(1, preset.adapter_steps // 10),
            checkpoints_total_limit=2,
            resume_from_checkpoint="latest",
        )
        train_fineface.run(config)

    def load(self, model_class, name: str):
        return model_class.from_pretrained(self.folder / name).to(self.device).eval()

    def export(self, weights: Path = TOY_MODEL) -> None:
        """Write everything that was trained, in half precision, to `weights`."""
        pipeline = FineFacePipeline.from_pretrained(self.folder / "base", dtype=torch.float16)
        pipeline.load_au_adapter(self.folder / "adapter")
        encoder = CLIPVisionModelWithProjection.from_pretrained(self.folder / "image_encoder")
        pipeline.register_modules(image_encoder=encoder.half())
        pipeline.save_pretrained(weights)
        for name in ("meter", "attribute_reader"):
            network = PictureReader.from_pretrained(self.folder / name, dtype=torch.float16)
            network.save_pretrained(weights / name)
        for path in weights.rglob("config.json"):
            # Where the stages lay on this disk is nobody else's business.
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)
            path.write_text(json.dumps(config, indent=2) + "\n")


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids as Stable Diffusion wants them: cut and padded to the tokenizer's full length."""
    kwargs = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, max_length=tokenizer.model_max_length, **kwargs).input_ids


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/toy_faces"))
    parser.add_argument("--device", default=None, help="default: an accelerator if there is one, else cpu")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), help="default: the preset's")
    parser.add_argument(
        "--torch_compile", action="store_true", help="compile the UNet; on CPUs it needs a C++ compiler"
    )
    parser.add_argument("--until", choices=Recipe.STAGES, default=Recipe.STAGES[-1], help="stop after this stage")
    parser.add_argument("--export", action="store_true", help="copy the finished weights to toy_faces/weights")
    arguments = parser.parse_args(argv)
    preset = PRESETS[arguments.preset]
    if arguments.mixed_precision is not None:
        preset = replace(preset, mixed_precision=arguments.mixed_precision)
    recipe = Recipe(preset, arguments.output_dir, pick_device(arguments.device), arguments.torch_compile)
    recipe.run(arguments.until)
    if arguments.export:
        recipe.export()


if __name__ == "__main__":
    main()
