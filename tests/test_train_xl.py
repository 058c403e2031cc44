"""Training on Stable Diffusion XL: what its family alone has. The rest is in `test_train_fineface.py`."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from test_feedback import TinyMeter
from tiny import CROSS_ATTENTION_DIM, FAMILIES
from training_runs import (  # noqa: F401
    arguments_fixture,
    datasets_cache_fixture,
    faces_dir_fixture,
)

from action_units import AU_NAMES
from au_encoder import find_adapter_files, read_au_adapter
from train_fineface import FineFaceModel, diffusion_loss, main, make_model
from training.config import parse_args
from training.data import PixelInputs, TrainingSamples, load_training_data, make_dataloader
from training.encoders import StableDiffusionXLEncoders, load_encoders
from training.feedback import AUFeedback


pytestmark = pytest.mark.parametrize("arguments", ["sdxl"], indirect=True)
CPU = torch.device("cpu")


@pytest.fixture
def config(arguments):
    return parse_args(arguments("run"))


@pytest.fixture
def encoders(config):
    return load_encoders(config, CPU, torch.float32)


def test_the_base_is_recognised(encoders):
    assert type(encoders) is StableDiffusionXLEncoders and encoders.zeros_for_empty


def test_captions_are_what_the_pipeline_makes_of_them(encoders):
    pipe = FAMILIES["sdxl"].make_pipe()
    captions = ["a boy in a park", "", "a girl"]
    found = encoders.encode_captions(torch.stack([encoders.tokenize(caption) for caption in captions]))
    embeds, _, pooled, _ = pipe.encode_prompt([captions[0], captions[2]], device="cpu")
    _, no_embeds, _, no_pooled = pipe.encode_prompt("a boy", device="cpu")
    assert found["prompt_embeds"].shape == (3, 16, CROSS_ATTENTION_DIM)
    torch.testing.assert_close(found["prompt_embeds"], torch.stack([embeds[0], no_embeds[0], embeds[1]]))
    torch.testing.assert_close(found["text_embeds"], torch.stack([pooled[0], no_pooled[0], pooled[1]]))
    encoders.zeros_for_empty = False
    assert encoders.encode_captions(encoders.tokenize("")[None])["prompt_embeds"].any()


def test_sizes_are_those_of_the_picture_and_of_its_cut(encoders):
    batch = {"original_size": torch.tensor([[40, 48], [64, 32]]), "noise": torch.zeros(2, 4, 16, 16)}
    time_ids = encoders.added_cond_kwargs({**batch, "text_embeds": torch.zeros(2, 16)})["time_ids"]
    # 40 by 48 becomes 32 by 38.4, of which the middle is taken.
    assert time_ids.tolist() == [[40, 48, 0, 3, 32, 32], [64, 32, 16, 0, 32, 32]]


def test_each_sample_has_its_size(config, encoders):
    samples = TrainingSamples(PixelInputs(load_training_data(config), encoders, 32), 1000, config)
    assert samples[0]["original_size"].tolist() == [40, 48] and samples[0]["input_ids"].shape == (2, 16)


def test_another_vae_takes_the_place_of_the_base_s(arguments, tmp_path):
    vae = FAMILIES["sdxl"].make_components()["vae"]
    torch.nn.init.zeros_(vae.encoder.conv_out.weight)
    vae.save_pretrained(tmp_path / "vae")
    options = f"--pretrained_vae_model_name_or_path {tmp_path / 'vae'}"
    encoders = load_encoders(parse_args(arguments("run", options)), CPU, torch.float32)
    assert not encoders.vae.encoder.conv_out.weight.any()


@pytest.mark.parametrize("force_upcast", [True, False])
def test_a_vae_that_overflows_in_float16_stays_in_float32(arguments, tmp_path, force_upcast):
    vae = FAMILIES["sdxl"].make_components()["vae"]
    vae.register_to_config(force_upcast=force_upcast)
    vae.save_pretrained(tmp_path / "vae")
    options = f"--pretrained_vae_model_name_or_path {tmp_path / 'vae'}"
    encoders = load_encoders(parse_args(arguments("run", options)), CPU, torch.float16)
    assert encoders.text_encoders[1].dtype == torch.float16
    assert encoders.vae.dtype == (torch.float32 if force_upcast else torch.float16)


@pytest.mark.parametrize("encoder_type", ["res_mlp64", "direct"])
def test_a_short_run_lowers_the_loss_and_moves_the_picture(arguments, tmp_path, encoder_type):
    options = f"--max_train_steps 20 --encoder_type {encoder_type} --caption_drop_prob 0.1"
    config = parse_args(arguments("run", options))
    main(arguments("run", options))
    encoders = load_encoders(config, CPU, torch.float32)
    noise_scheduler = DDPMScheduler.from_pretrained(config.pretrained_model_name_or_path, subfolder="scheduler")
    unseen = dataclasses.replace(config, seed=99, max_train_steps=4)
    samples = TrainingSamples(PixelInputs(load_training_data(config), encoders, 32), 1000, unseen, 2)

    class Process:
        num_processes, process_index, device = 1, 0, CPU

    @torch.no_grad()
    def loss(pipe) -> float:
        model, losses = FineFaceModel(pipe.unet, pipe.au_adapter), []
        for batch in make_dataloader(samples, 0, unseen, Process):
            batch |= encoders.encode_pictures(batch["pixel_values"]) | encoders.encode_captions(batch["input_ids"])
            latents = batch["latents_mean"] * encoders.scaling_factor
            noisy = noise_scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
            added = encoders.added_cond_kwargs(batch)
            predicted = model(noisy, batch["timesteps"], batch["prompt_embeds"], batch["au_intensities"], added)
            losses.append(diffusion_loss(predicted, noise_scheduler, latents, batch["noise"], batch["timesteps"]))
        return torch.stack(losses).mean().item()

    def draw(pipe, **kwargs) -> torch.Tensor:
        options = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        return pipe("a face", **options, **kwargs).images

    pipe = FAMILIES["sdxl"].make_pipe()
    base = draw(pipe)
    trained = read_au_adapter(find_adapter_files(tmp_path / "run"))
    assert trained.config.encoder_type == encoder_type
    pipe.load_au_adapter(tmp_path / "run")
    after = loss(pipe)
    assert not torch.allclose(draw(pipe, aus="12E"), draw(pipe, aus="neutral"), atol=1e-3)
    main(arguments("start", f"{options} --max_train_steps 1 --learning_rate 1e-9"))
    pipe.load_au_adapter(tmp_path / "start")
    assert after < 0.95 * loss(pipe)
    pipe.unload_au_adapter()
    assert torch.equal(draw(pipe), base)


def test_pictures_of_au_feedback_are_those_of_the_pipeline(config, encoders):
    model = make_model(FAMILIES["sdxl"].make_components()["unet"], config)
    scheduler = DDIMScheduler.from_pretrained(config.pretrained_model_name_or_path, subfolder="scheduler")
    feedback = AUFeedback(TinyMeter(), encoders, scheduler, AU_NAMES, steps=3, guidance_scale=2.5)
    prompts, noise = ["a boy", "a girl"], torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = encoders.encode_captions(torch.stack([encoders.tokenize(prompt) for prompt in prompts]))
    batch |= {"original_size": torch.tensor([[32, 32]] * 2), "noise": noise}
    aus = 5 * torch.rand(2, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        drawn = feedback.draw(model.eval(), batch, noise, aus)
    pipe = FAMILIES["sdxl"].make_pipe(unet=model.unet, au_adapter=model.au_adapter)
    options = {"num_inference_steps": 3, "guidance_scale": 2.5, "output_type": "pt"}
    expected = pipe(prompts, aus=aus, latents=noise, **options).images
    torch.testing.assert_close((drawn / 2 + 0.5).clamp(0, 1), expected, atol=1e-4, rtol=0)
    feedback.loss(model.train(), batch, noise, aus).backward()
    assert model.au_adapter.to_v_au.weight.grad.any()
