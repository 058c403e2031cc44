"""AU control in other pipelines of diffusers that share the UNet, and the example that edits a picture with them."""

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
)
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from tiny import HIDDEN_DIM, add_lora, make_components

from action_units import AU_NAMES, au_projection, parse_aus
from au_encoder import AUAdapter, write_au_adapter
from drawing.files import read_metadata
from drawing.photo import edit_photo, face_mask
from examples.edit_expression import main as edit_main
from pipeline_fineface import LORA_NAME, FineFacePipeline
from program import TOY_MODEL
from toy_faces.renderer import caption, render, sample_portrait
from training.feedback import load_meter


PROMPTS = ["a boy in a park", "a girl"]
SMILE = {"AU6": 2.5, "AU12": 5}


def some_picture(seed: int = 0, size: int = 32) -> Image.Image:
    pixels = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def make_other(pipeline_class, pipe: FineFacePipeline):
    components = {}
    if pipeline_class is StableDiffusionControlNetPipeline:
        torch.manual_seed(3)
        components["controlnet"] = ControlNetModel.from_unet(
            make_components()["unet"], conditioning_embedding_out_channels=(16, 32)
        ).eval()
        for parameter in components["controlnet"].controlnet_mid_block.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    other = pipeline_class.from_pipe(pipe, dtype=pipe.dtype, **components)
    other.set_progress_bar_config(disable=True)
    return other


def latents_for(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def plain_sd() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(**make_components(), requires_safety_checker=False)


# Calls that make of each pipeline text-to-image: all is masked, and the ControlNet says nothing.


def draw_by_inpainting(pipe, **kwargs) -> torch.Tensor:
    white = Image.new("L", (32, 32), 255)
    other = make_other(StableDiffusionInpaintPipeline, pipe)
    return other(image=some_picture(), mask_image=white, strength=1.0, height=32, width=32, **kwargs).images


def draw_by_control(pipe, scale: float = 0.0, **kwargs) -> torch.Tensor:
    other = make_other(StableDiffusionControlNetPipeline, pipe)
    return other(image=some_picture(), controlnet_conditioning_scale=scale, **kwargs).images


LEFT_AND_RIGHT = torch.zeros(2, 32, 32)
LEFT_AND_RIGHT[0, :, :16] = LEFT_AND_RIGHT[1, :, 16:] = 1


@pytest.mark.parametrize("draw_by", [draw_by_inpainting, draw_by_control])
@pytest.mark.parametrize(
    ("au_options", "options"),
    [
        ({"aus": SMILE}, {}),
        ({"aus": SMILE}, {"guidance_scale": 1.0}),
        ({"aus": [SMILE, None], "negative_aus": "4", "au_scale": 0.7}, {"prompt": PROMPTS}),
        ({"aus": [SMILE, "1+4"]}, {"prompt": PROMPTS, "num_images_per_prompt": 2}),
        ({"aus": [SMILE, "1+4"], "au_masks": LEFT_AND_RIGHT}, {}),
        ({"aus": SMILE}, {"cross_attention_kwargs": {"scale": 0.4}}),
    ],
    ids=["guided", "unguided", "batch", "images_per_prompt", "masks", "lora_scale"],
)
def test_another_pipeline_draws_the_same(steady_pipe, draw_by, au_options, options):
    options = {"prompt": PROMPTS[0], "num_inference_steps": 2, "output_type": "latent", **options}
    batch_size = len(options["prompt"]) if isinstance(options["prompt"], list) else 1
    options["latents"] = latents_for(batch_size * options.get("num_images_per_prompt", 1))
    expected = steady_pipe(**options, **au_options).images
    shared = {name: options[name] for name in options if name in ("num_images_per_prompt", "guidance_scale")}
    shared["cross_attention_kwargs"] = options.pop("cross_attention_kwargs", None)
    au_kwargs = steady_pipe.au_cross_attention_kwargs(batch_size=batch_size, **shared, **au_options)
    found = draw_by(steady_pipe, **options, cross_attention_kwargs=au_kwargs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    without = draw_by(steady_pipe, **options, cross_attention_kwargs=shared["cross_attention_kwargs"])
    assert not torch.allclose(without, expected, atol=1e-3)


def test_lcm_and_another_lora_on_top(tiny_pipe, tmp_path):
    unet = make_components()["unet"]
    add_lora(unet, "style", seed=8)
    layers = {name: weight for name, weight in unet.state_dict().items() if ".lora_" in name}
    layers = {name.replace(".style.", "."): weight for name, weight in layers.items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent", "latents": latents_for(1)}
    tiny_pipe.scheduler = LCMScheduler.from_config(tiny_pipe.scheduler.config)

    def draw_both(aus):
        au_kwargs = tiny_pipe.au_cross_attention_kwargs(aus, guidance_scale=1.0)
        generators = [torch.Generator().manual_seed(0) for _ in "ab"]
        ours = tiny_pipe(PROMPTS[0], aus=aus, generator=generators[0], **options).images
        theirs = draw_by_control(
            tiny_pipe, prompt=PROMPTS[0], generator=generators[1], cross_attention_kwargs=au_kwargs, **options
        )
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
        return ours

    before = draw_both(SMILE)
    tiny_pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert set(tiny_pipe._active_loras()) == {LORA_NAME, "style"}
    styled = draw_both(SMILE)
    assert not torch.allclose(styled, before, atol=1e-3)
    assert not torch.allclose(styled, draw_both("1+4"), atol=1e-3)


def test_a_controlnet_and_the_aus_both_count(steady_pipe):
    au_kwargs = steady_pipe.au_cross_attention_kwargs(SMILE)
    options = {"prompt": PROMPTS[0], "num_inference_steps": 2, "output_type": "latent", "latents": latents_for(1)}
    pictures = [
        draw_by_control(steady_pipe, scale, cross_attention_kwargs=kwargs, **options)
        for scale in (0.0, 1.0)
        for kwargs in (None, au_kwargs)
    ]
    for index, picture in enumerate(pictures):
        assert not any(torch.allclose(picture, other, atol=1e-3) for other in pictures[:index])


def test_image_to_image(steady_pipe):
    other = make_other(StableDiffusionImg2ImgPipeline, steady_pipe)

    def draw(prompt, aus, seeds, **kwargs):
        count = len(seeds)
        if aus is not None:
            kwargs["cross_attention_kwargs"] = steady_pipe.au_cross_attention_kwargs(aus, batch_size=count, **kwargs)
            kwargs.pop("au_scale", None)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = [some_picture()] * count
        options = {"strength": 0.7, "num_inference_steps": 4, "output_type": "latent"}
        return other(prompt, images, generator=generators, **options, **kwargs).images

    both = draw(PROMPTS, [SMILE, "1+4"], [0, 1])
    torch.testing.assert_close(both[1:], draw(PROMPTS[1:], "1+4", [1]), atol=1e-5, rtol=1e-5)
    plain = draw(PROMPTS[:1], None, [0])
    assert not torch.allclose(both[:1], plain, atol=1e-3)
    assert torch.equal(draw(PROMPTS[:1], SMILE, [0], au_scale=0.0), plain)


def test_aus_computed_before_the_processors_are_replaced_still_count(tiny_pipe):
    other = make_other(StableDiffusionImg2ImgPipeline, tiny_pipe)

    def draw(aus) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"strength": 0.7, "num_inference_steps": 4, "output_type": "latent", "generator": generator}
        return other(PROMPTS[0], some_picture(), cross_attention_kwargs=au_kwargs[aus], **options).images

    au_kwargs = {aus: tiny_pipe.au_cross_attention_kwargs(aus) for aus in ("6C+12E", "1+4")}
    expected = {aus: draw(aus) for aus in au_kwargs}
    for replace in (
        other.enable_attention_slicing,
        other.disable_attention_slicing,
        lambda: other.unet.set_attn_processor(AttnProcessor()),
    ):
        replace()
        for aus, picture in expected.items():
            torch.testing.assert_close(draw(aus), picture, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected["6C+12E"], expected["1+4"], atol=1e-3)


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_perturbed_attention_guidance(tiny_pipe, plain_sd, guidance_scale):
    """PAG sets processors of its own, and adds a branch to those of guidance."""

    def draw(pipe, pag_scale, aus=None, **au_options) -> torch.Tensor:
        other = StableDiffusionPAGPipeline.from_pipe(pipe, pag_applied_layers=["mid"], dtype=pipe.dtype)
        other.set_progress_bar_config(disable=True)
        options = {"guidance_scale": guidance_scale, "num_inference_steps": 2, "output_type": "latent"}
        if aus is not None:
            au_options = {"guidance_scale": guidance_scale, "pag_scale": pag_scale, **au_options}
            options["cross_attention_kwargs"] = tiny_pipe.au_cross_attention_kwargs(aus, **au_options)
        return other(PROMPTS[0], pag_scale=pag_scale, latents=latents_for(1), **options).images

    without_pag = draw(tiny_pipe, 0.0, SMILE)
    expected = tiny_pipe(
        PROMPTS[0],
        aus=SMILE,
        guidance_scale=guidance_scale,
        latents=latents_for(1),
        num_inference_steps=2,
        output_type="latent",
    ).images
    torch.testing.assert_close(without_pag, expected, atol=1e-5, rtol=1e-5)
    smile = draw(tiny_pipe, 3.0, SMILE)
    # A tiny scale is a third branch that changes next to nothing, if its AUs are those of the second.
    torch.testing.assert_close(draw(tiny_pipe, 1e-6, SMILE), without_pag, atol=1e-4, rtol=1e-4)
    for other in (without_pag, draw(tiny_pipe, 3.0, "1+4"), draw(tiny_pipe, 3.0)):
        assert not torch.allclose(smile, other, atol=1e-3)
    assert torch.equal(draw(tiny_pipe, 3.0, SMILE, au_scale=0.0), draw(tiny_pipe, 3.0))
    with pytest.raises(ValueError, match="`pag_scale`"):
        draw(tiny_pipe, 3.0, SMILE, batch_size=2)
    tiny_pipe.unload_au_adapter()
    assert torch.equal(draw(tiny_pipe, 3.0), draw(plain_sd, 3.0))


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_self_attention_guidance(tiny_pipe, plain_sd, guidance_scale):
    """SAG sets a processor that it reads from after the call, and calls the UNet once more without AUs."""

    def draw(pipe, aus=None) -> torch.Tensor:
        other = StableDiffusionSAGPipeline.from_pipe(pipe, dtype=pipe.dtype)
        other.set_progress_bar_config(disable=True)
        options = {"guidance_scale": guidance_scale, "num_inference_steps": 2, "output_type": "latent"}
        if aus is not None:
            au_kwargs = tiny_pipe.au_cross_attention_kwargs(aus, guidance_scale=guidance_scale)
            options["cross_attention_kwargs"] = au_kwargs
        return other(PROMPTS[0], sag_scale=0.75, latents=latents_for(1), **options).images

    smile, frown, plain = draw(tiny_pipe, SMILE), draw(tiny_pipe, "1+4"), draw(tiny_pipe)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in ((smile, frown), (smile, plain), (frown, plain)))
    tiny_pipe.unload_au_adapter()
    assert torch.equal(draw(tiny_pipe), draw(plain_sd))


@pytest.mark.parametrize("change", [{"guidance_scale": 1.0}, {"batch_size": 2}, {"num_images_per_prompt": 3}])
def test_aus_for_another_call_name_the_cause(steady_pipe, change):
    other = make_other(StableDiffusionImg2ImgPipeline, steady_pipe)
    au_kwargs = steady_pipe.au_cross_attention_kwargs(SMILE, **change)
    with pytest.raises(ValueError, match="this call of the UNet has 2. Make them with the values of this call"):
        other(PROMPTS[0], some_picture(), num_inference_steps=2, cross_attention_kwargs=au_kwargs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aus": None}, "`aus` is None"),
        ({"aus": "AU7"}, "AU7"),
        ({"aus": [SMILE, SMILE]}, "2 expressions, but there are 1 prompts"),
        ({"aus": SMILE, "batch_size": 0}, "`batch_size`"),
        ({"aus": SMILE, "num_images_per_prompt": 1.5}, "`num_images_per_prompt`"),
        ({"aus": SMILE, "au_scale": float("nan")}, "`au_scale`"),
        ({"aus": SMILE, "au_masks": torch.ones(1, 8, 16)}, "another shape"),
    ],
)
def test_a_bad_argument_is_an_error(steady_pipe, options, message):
    with pytest.raises(ValueError, match=message):
        steady_pipe.au_cross_attention_kwargs(**options)


def test_without_an_adapter_there_are_no_aus(steady_base):
    with pytest.raises(ValueError, match="load_au_adapter"):
        steady_base.au_cross_attention_kwargs(SMILE)


# Editing a picture


def test_what_is_outside_the_mask_stays(steady_pipe):
    picture = some_picture()
    mask = face_mask((32, 32), (4, 6, 26, 30))
    outside = np.asarray(mask) == 0
    assert outside[:, :4].all() and outside[:6].all() and outside[:, 27:].all() and np.asarray(mask).max() == 255
    smile, frown = (
        np.asarray(edit_photo(steady_pipe, picture, mask, "a boy", aus, num_inference_steps=4))
        for aus in (SMILE, "1+4")
    )
    for edited in (smile, frown):
        assert (edited[outside] == np.asarray(picture)[outside]).all()
        assert (edited[~outside] != np.asarray(picture)[~outside]).any()
    assert (smile != frown).any()


def test_the_surroundings_are_in_the_latents(steady_pipe):
    """What is kept guides what is drawn: beside other surroundings, the same face becomes another."""
    mask = face_mask((32, 32), (8, 8, 24, 24))
    inside = np.asarray(mask) == 255
    other = Image.composite(some_picture(0), some_picture(1), mask)
    first, second = (
        np.asarray(edit_photo(steady_pipe, picture, mask, "a boy", SMILE, strength=1.0, num_inference_steps=2))
        for picture in (some_picture(0), other)
    )
    assert (first[inside] != second[inside]).any()


@pytest.fixture(scope="module")
def toy_pipeline() -> FineFacePipeline:
    pipe = FineFacePipeline.from_pretrained(TOY_MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def meter():
    """Reads the paper's twelve AUs."""
    network = load_meter(str(TOY_MODEL / "second_meter"))
    return lambda pixel_values: network(pixel_values) @ au_projection(network.au_names, AU_NAMES)


@torch.no_grad()
def measure(meter, picture: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
    return meter(pixels / 127.5 - 1)[0]


def test_an_edited_face_shows_the_new_expression(toy_pipeline, meter):
    mask = face_mask((128, 128), (24, 34, 104, 114))
    errors = {"source": [], "without AUs": [], "with AUs": []}
    for seed, aus in enumerate(("6D+12E", "1D+2D+5D+26E", "4E+17D")):
        portrait = sample_portrait(5000 + seed, glasses="no", beard="no")
        source = render(portrait)
        options = {"num_inference_steps": 8, "guidance_scale": 1.9, "seed": seed}
        pictures = {
            "source": source,
            "without AUs": edit_photo(toy_pipeline, source, mask, caption(portrait), None, **options),
            "with AUs": edit_photo(toy_pipeline, source, mask, caption(portrait), aus, **options),
        }
        outside = np.asarray(mask) == 0
        assert (np.asarray(pictures["with AUs"])[outside] == np.asarray(source)[outside]).all()
        for name, picture in pictures.items():
            errors[name].append((measure(meter, picture) - parse_aus(aus)[0]).square().mean().item())
    means = {name: np.mean(values) for name, values in errors.items()}
    assert means["with AUs"] < 0.85 * means["without AUs"] and means["with AUs"] < 0.85 * means["source"], means


def test_two_people_have_expressions_of_their_own(toy_pipeline, meter):
    """On a wide canvas the meter reads in each half that half's AUs, whatever the other half's are."""
    masks = torch.zeros(2, 128, 256)
    masks[0, :, :128] = masks[1, :, 128:] = 1
    prompt = "a portrait of a woman with short black hair and tan skin in a park, wearing a red sweater"
    options = {"height": 128, "width": 256, "num_inference_steps": 4, "guidance_scale": 2.5, "output_type": "pt"}

    @torch.no_grad()
    def read(*aus) -> torch.Tensor:
        """AU5 and AU26 of both halves, `(2, 2)`, as means over three pictures."""
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        images = toy_pipeline([prompt] * 3, aus=list(aus), au_masks=masks, generator=generators, **options).images
        halves = torch.stack([images[..., :128], images[..., 128:]]) * 2 - 1
        return torch.stack([meter(half).mean(0)[[AU_NAMES.index("AU5"), AU_NAMES.index("AU26")]] for half in halves])

    neutral = read("neutral", "neutral")
    for own, aus in enumerate((("5E+26E", "neutral"), ("neutral", "5E+26E"))):
        moved = read(*aus) - neutral
        assert moved[own].min() > 1.5 and moved[1 - own].abs().max() < moved[own].min() / 3


def test_the_example_runs_from_the_command_line(tiny_sd_dir, tiny_adapter_dir, tmp_path, capsys):
    picture, output = tmp_path / "picture.png", tmp_path / "new" / "edited.png"
    some_picture().save(picture)
    options = [str(picture), "--prompt", "a boy", "--aus", "12E", "--model", tiny_sd_dir, "--output", str(output)]
    options += ["--adapter", tiny_adapter_dir, "--num-inference-steps", "2", "--device", "cpu"]
    assert edit_main([*options, "--box", "4,4,28,28"]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    with Image.open(output) as edited:
        assert edited.size == (32, 32) and (np.asarray(edited)[:4] == np.asarray(some_picture())[:4]).all()
    about = read_metadata(output)
    assert (about["aus"], about["num_inference_steps"], about["picture"]) == ("AU12=5", 2, "picture.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    for changes, part in (
        (["--mask", str(tmp_path / "mask.png")], "16 × 16"),
        (["--box", "4,4,28,28", "--aus", "AU7"], "AU7"),
        (["--box", "40,40,60,60"], "lies outside"),
        (["--box", "4,4,28,28", "--strength", "0"], "--strength"),
        (["--box", "4,4,28,28", "--au-guidance-scale", "nan"], "--au-guidance-scale"),
    ):
        assert edit_main([*options, *changes]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and part in error


def test_the_example_takes_the_aus_of_its_adapter(tiny_sd_dir, tmp_path):
    unet = make_components()["unet"]
    adapter = AUAdapter.from_unet(unet, hidden_dim=HIDDEN_DIM, au_names=["AU12L", "AU12R", "AU43L", "AU43R"])
    write_au_adapter(tmp_path / "adapter", adapter, unet, LORA_NAME)
    some_picture().save(tmp_path / "picture.png")
    options = ["--prompt", "a boy", "--model", tiny_sd_dir, "--adapter", str(tmp_path / "adapter"), "--device", "cpu"]
    options += ["--box", "4,4,28,28", "--num-inference-steps", "1", "--output", str(tmp_path / "edited.png")]
    assert edit_main([str(tmp_path / "picture.png"), *options, "--aus", "smirk + L43E"]) == 0
    assert read_metadata(tmp_path / "edited.png")["aus"] == "AU12R=4 AU43L=5"
