"""An exported adapter in plain diffusers: the pipelines of diffusers draw what `FineFacePipeline` draws."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import IPAdapterFaceIDImageProjection
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapter_files import write_original
from test_au_attention_processor import SD15_UNET, SD21_UNET, SDXL_UNET
from test_ip_adapter import make_faceid_portrait, make_ip_adapter, make_pipe, some_face, some_id_embeds
from tiny import CROSS_ATTENTION_DIM, HIDDEN_DIM, add_lora, make_adapter, make_components

from action_units import AU_NAMES, au_image_embeds, au_image_masks, parse_aus
from au_attention_processor import au_layers
from au_encoder import AUAdapter, find_adapter_files, ip_adapter_numbers, read_au_adapter, write_au_adapter
from drawing.model import Weights, read_au_names
from hub import export
from hub.ip_adapter import image_projection, ip_adapter_state_dict
from pipeline_fineface import LORA_NAME, FineFacePipeline
from program import TOY_MODEL


PROMPT = "a boy in a park"
SMILE = {"AU6": 2.5, "AU12": 5}
NAME = "au_ip_adapter.safetensors"


def write_export(adapter_dir, folder: Path, *options: str) -> Path:
    assert export.main([str(adapter_dir), str(folder), "--format", "ip-adapter", *options]) == 0
    return folder


def load_export(pipe, folder: Path):
    """The two calls of the card."""
    if (folder / "pytorch_lora_weights.safetensors").exists():
        pipe.load_lora_weights(str(folder))
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name=NAME, image_encoder_folder=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain_pipe(folder: Path, pipeline_class=StableDiffusionPipeline, **components):
    base = {**make_components(), **components}
    return load_export(pipeline_class(**base, requires_safety_checker=False), folder)


def draw(pipe, **kwargs) -> torch.Tensor:
    kwargs = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "latent", **kwargs}
    return pipe(generator=torch.Generator().manual_seed(0), **kwargs).images


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to 1e-4 of the largest number."""
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().clamp(min=1).item(), rtol=0)


@pytest.fixture(scope="module")
def exported(tiny_adapter_dir, tmp_path_factory) -> Path:
    return write_export(tiny_adapter_dir, tmp_path_factory.mktemp("exported") / "folder")


@pytest.fixture(scope="module")
def steady_plain(exported) -> StableDiffusionPipeline:
    """Plain diffusers with the export, for all tests that only draw with it."""
    return plain_pipe(exported)


# The token


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_aus", [12, 20])
@pytest.mark.parametrize("width", [768, 1024, 2048, 100])
def test_the_projection_of_diffusers_turns_aus_into_a_token_that_holds_them(width, num_aus, dtype):
    names = {"proj.0": "ff.net.0.proj", "proj.2": "ff.net.2", "norm": "norm"}
    projection = IPAdapterFaceIDImageProjection(num_aus, width, mult=2, num_tokens=1)
    weights = image_projection(num_aus, width)
    projection.load_state_dict({names[k.rpartition(".")[0]] + k[k.rindex(".") :]: t for k, t in weights.items()})
    aus = (20 * torch.rand(32, num_aus, generator=torch.Generator().manual_seed(0)) - 10).to(dtype)
    aus[0] = 0
    with torch.no_grad():
        tokens = projection.to(dtype)(aus)[:, 0].float()
    expected = torch.zeros(32, width)
    expected[:, :num_aus], expected[:, 2 * num_aus] = aus.float(), 1
    # Half precision rounds an AU of 5 by 0.002 and 0.016.
    atol = 1e-4 if dtype == torch.float32 else 1e-3
    if width == 100 and dtype != torch.float32:
        atol = 0.04  # a width without a quarter that is even: a rounded constant
    torch.testing.assert_close(tokens, expected, atol=atol, rtol=0)


def test_a_token_too_narrow_for_its_aus_is_an_error():
    with pytest.raises(ValueError, match="holds at most 15 AUs.*has 16"):
        image_projection(16, 32)


# What is drawn


@pytest.mark.parametrize(
    ("aus", "options"),
    [
        (SMILE, {}),
        ("neutral", {}),
        ({"AU1": -10, "AU4": 10, "AU12": 10}, {}),
        (SMILE, {"guidance_scale": 1.0}),
        (SMILE, {"num_images_per_prompt": 2}),
        (SMILE, {"prompt": [PROMPT, "a girl"]}),
        (SMILE, {"prompt": [PROMPT, "a girl"], "num_images_per_prompt": 2, "height": 48, "width": 32}),
        (SMILE, {"cross_attention_kwargs": {"scale": 0.4}}),
    ],
    ids=["guided", "neutral", "far", "unguided", "several", "prompts", "several prompts", "lora_scale"],
)
def test_plain_diffusers_draws_the_same(steady_plain, steady_pipe, aus, options):
    guided = options.get("guidance_scale", 7.5) > 1
    embeds = au_image_embeds(aus, do_classifier_free_guidance=guided)
    expected = draw(steady_pipe, aus=aus, **options)
    assert_same(draw(steady_plain, ip_adapter_image_embeds=embeds, **options), expected)
    other = au_image_embeds("1+15", do_classifier_free_guidance=guided)
    assert not torch.allclose(draw(steady_plain, ip_adapter_image_embeds=other, **options), expected, atol=1e-3)


def test_the_expression_to_guide_away_from(steady_plain, steady_pipe):
    expected = draw(steady_pipe, aus=SMILE, negative_aus="4")
    found = draw(steady_plain, ip_adapter_image_embeds=au_image_embeds(SMILE, "4"))
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file_dtype", ["float32", None])
def test_half_precision_errs_no_more_than_ours_does(
    exported, tiny_adapter_dir, tiny_pipe, tmp_path, dtype, file_dtype
):
    """Both against `float32`, for a file of either precision."""
    exact = draw(tiny_pipe, aus=SMILE)
    folder = exported
    if file_dtype is None:
        folder = write_export(tiny_adapter_dir, tmp_path / "half", "--dtype", str(dtype).removeprefix("torch."))
        assert {tensor.dtype for name in (NAME,) for tensor in load_file(folder / name).values()} == {dtype}
    components = {
        name: part.to(dtype) for name, part in make_components().items() if isinstance(part, torch.nn.Module)
    }
    pipe = plain_pipe(folder, **components)
    tiny_pipe.to(dtype=dtype)
    embeds = au_image_embeds(SMILE, dtype=dtype)
    ours, theirs = draw(tiny_pipe, aus=SMILE).float(), draw(pipe, ip_adapter_image_embeds=embeds).float()
    error, their_error = (ours - exact).abs().max(), (theirs - exact).abs().max()
    assert their_error < 2 * error and their_error < 0.1 * (draw(tiny_pipe, aus="1+4").float() - exact).abs().max()


def test_each_prompt_of_a_batch_has_its_expression_by_masks(steady_plain, steady_pipe):
    """diffusers shows all embeddings to every prompt. A mask for each prompt picks one of them."""
    prompts, aus = [PROMPT, "a girl", "a man"], [SMILE, "1+4", "neutral"]
    expected = draw(steady_pipe, prompt=prompts, aus=aus, num_images_per_prompt=2)
    found = draw(
        steady_plain,
        prompt=prompts,
        num_images_per_prompt=2,
        ip_adapter_image_embeds=au_image_embeds(aus, num_people=3),
        cross_attention_kwargs={"ip_adapter_masks": [au_image_masks(3, 2)]},
    )
    assert_same(found, expected)
    options = {"prompt": prompts, "guidance_scale": 1.0}
    found = draw(
        steady_plain,
        ip_adapter_image_embeds=au_image_embeds(aus, num_people=3, do_classifier_free_guidance=False),
        cross_attention_kwargs={"ip_adapter_masks": [au_image_masks(3, do_classifier_free_guidance=False)]},
        **options,
    )
    assert_same(found, draw(steady_pipe, aus=aus, **options))
    # Without masks, all get the mean.
    mean = parse_aus(aus).mean(0, keepdim=True)
    found = draw(
        steady_plain, ip_adapter_image_embeds=au_image_embeds(aus, do_classifier_free_guidance=False), **options
    )
    assert_same(found, draw(steady_pipe, aus=mean, **options))


def test_the_scale_is_that_of_the_aus(exported, steady_pipe):
    pipe = plain_pipe(exported)
    for scale in (0.0, 0.6, 1.4):
        pipe.set_ip_adapter_scale(scale)
        found = draw(pipe, ip_adapter_image_embeds=au_image_embeds(SMILE))
        assert_same(found, draw(steady_pipe, aus=SMILE, au_scale=scale))


@pytest.mark.parametrize(("kind", "tolerance"), [("whole", 1e-4), ("soft", 0.05)])
def test_masks_are_people(steady_plain, steady_pipe, kind, tolerance):
    """
    Up to how masks become smaller: by area in our pipeline, bicubic in diffusers. For whole pictures that is the same,
    for soft edges nearly.
    """
    left = torch.ones(32) if kind == "whole" else (torch.linspace(1.25, -0.25, 32).clamp(0, 1))
    masks = torch.stack([left.expand(32, 32), 1 - left.expand(32, 32)])
    expressions = [SMILE, "1+4"]
    expected = draw(steady_pipe, aus=expressions, au_masks=masks)

    def draw_plain(masks):
        embeds, options = au_image_embeds(expressions, num_people=2), {"ip_adapter_masks": [masks[None]]}
        return draw(steady_plain, ip_adapter_image_embeds=embeds, cross_attention_kwargs=options)

    effect = (draw_plain(masks.flip(0)) - expected).abs().mean()
    assert (draw_plain(masks) - expected).abs().mean() < tolerance * effect


@pytest.mark.parametrize("neighbour", ["images", "faces"])
def test_beside_another_ip_adapter(exported, tiny_adapter_dir, neighbour):
    ours, theirs = make_pipe(), make_pipe(StableDiffusionPipeline)
    weights = (make_ip_adapter if neighbour == "images" else make_faceid_portrait)(ours.unet)
    embeds = some_id_embeds(2)
    ours.load_au_adapter(tiny_adapter_dir)
    ours.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    if neighbour == "images":
        embeds = ours.prepare_ip_adapter_image_embeds([some_face()], None, "cpu", 1, True)
    ours.set_ip_adapter_scale(0.5)
    expected = draw(ours, aus=SMILE, au_scale=0.8, ip_adapter_image_embeds=embeds)
    theirs.load_lora_weights(str(exported))
    theirs.load_ip_adapter([weights, str(exported)], subfolder=["", ""], weight_name=["", NAME])
    theirs.set_ip_adapter_scale([0.5, 0.8])
    found = draw(theirs, ip_adapter_image_embeds=[*embeds, *au_image_embeds(SMILE)])
    assert_same(found, expected)


# Other pipelines


def some_picture() -> Image.Image:
    return some_face(3)


def draw_by_image_to_image(pipe, **kwargs):
    return pipe(image=some_picture(), strength=0.7, **kwargs | {"num_inference_steps": 4})


def draw_by_inpainting(pipe, **kwargs):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    return pipe(image=some_picture(), mask_image=mask, height=32, width=32, **kwargs)


def draw_by_control(pipe, **kwargs):
    return pipe(image=some_picture(), **kwargs)


def make_controlnet() -> ControlNetModel:
    torch.manual_seed(3)
    controlnet = ControlNetModel.from_unet(make_components()["unet"], conditioning_embedding_out_channels=(16, 32))
    for parameter in controlnet.controlnet_mid_block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return controlnet.eval()


@pytest.mark.parametrize(
    ("pipeline_class", "draw_by", "options"),
    [
        (StableDiffusionImg2ImgPipeline, draw_by_image_to_image, {}),
        (StableDiffusionInpaintPipeline, draw_by_inpainting, {}),
        (StableDiffusionControlNetPipeline, draw_by_control, {}),
        (StableDiffusionPAGPipeline, lambda pipe, **kwargs: pipe(**kwargs), {"pag_scale": 3.0}),
    ],
    ids=["img2img", "inpainting", "controlnet", "pag"],
)
def test_other_pipelines_draw_what_they_draw_with_our_processors(
    exported, tiny_pipe, pipeline_class, draw_by, options
):
    extra = {"controlnet": make_controlnet()} if pipeline_class is StableDiffusionControlNetPipeline else {}
    extra |= {"pag_applied_layers": "mid"} if pipeline_class is StableDiffusionPAGPipeline else {}
    shared = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "latent", **options}

    def draw_with(pipe, **kwargs):
        pipe.set_progress_bar_config(disable=True)
        return draw_by(pipe, generator=torch.Generator().manual_seed(0), **shared, **kwargs).images

    au_kwargs = tiny_pipe.au_cross_attention_kwargs(SMILE, **options)
    plain = plain_pipe(exported, pipeline_class, **extra)
    found = draw_with(plain, ip_adapter_image_embeds=au_image_embeds(SMILE))
    assert not torch.allclose(draw_with(plain, ip_adapter_image_embeds=au_image_embeds("1+4")), found, atol=1e-3)
    other = pipeline_class.from_pipe(tiny_pipe, dtype=tiny_pipe.dtype, **extra)
    assert_same(found, draw_with(other, cross_attention_kwargs=au_kwargs))


def test_each_frame_of_an_animation_is_the_picture_where_nothing_moves(exported, steady_pipe):
    torch.manual_seed(0)
    components = make_components()
    motion = MotionAdapter(
        block_out_channels=components["unet"].config.block_out_channels,
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    for name, parameter in motion.named_parameters():
        if ".proj_out." in name:
            torch.nn.init.zeros_(parameter)
    components = {name: part for name, part in components.items() if name != "safety_checker"}
    pipe = load_export(AnimateDiffPipeline(**components, motion_adapter=motion), exported)
    latents = torch.randn(1, 4, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    options = {"num_inference_steps": 2, "output_type": "latent"}
    embeds = au_image_embeds(SMILE)
    frames = pipe(PROMPT, num_frames=2, latents=latents, ip_adapter_image_embeds=embeds, **options).frames
    for index in range(2):
        expected = steady_pipe(PROMPT, aus=SMILE, latents=latents[:, :, index], **options).images
        assert_same(frames[:, :, index], expected)


# The weights of the toy model, by a process that has nothing but diffusers

STRANGER = """
import importlib.util
import sys
import torch
from diffusers import StableDiffusionPipeline

assert importlib.util.find_spec("pipeline_fineface") is None and importlib.util.find_spec("action_units") is None
base, FOLDER = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32)
pipe.load_lora_weights(FOLDER)
pipe.load_ip_adapter(FOLDER, subfolder="", weight_name="au_ip_adapter.safetensors", image_encoder_folder=None)
aus = torch.zeros(1, 1, 12)
aus[..., 4], aus[..., 6] = 2.5, 5.0
generator = torch.Generator().manual_seed(0)
options = {"num_inference_steps": 3, "guidance_scale": 2.5, "output_type": "latent", "generator": generator}
embeds = [torch.cat([torch.zeros_like(aus), aus])]
torch.save(pipe(["a boy in a park"] * 2, ip_adapter_image_embeds=embeds, **options).images, "latents.pt")
"""


def test_a_stranger_draws_with_the_weights_of_the_toy_model(processes, tmp_path):
    folder, elsewhere = write_export(TOY_MODEL, tmp_path / "folder", "--no-pictures"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (answer,) = processes({"code": STRANGER, "arguments": [TOY_MODEL, folder], "folder": elsewhere})
    assert answer["status"] == 0, answer
    pipe = FineFacePipeline.from_pretrained(TOY_MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    options = {"prompt": [PROMPT] * 2, "num_inference_steps": 3, "guidance_scale": 2.5}
    expected = draw(pipe, aus=SMILE, **options)
    found = torch.load(elsewhere / "latents.pt", weights_only=True)
    assert_same(found, expected)
    assert (draw(pipe, aus=None, **options) - expected).abs().max() > 0.1


# The published files


@pytest.mark.parametrize("variant", [None, "sd15"])
def test_the_published_files_in_plain_diffusers(variant, tmp_path):
    """In the width of their bases, and with the layers of a small UNet."""
    width = 768 if variant else 1024
    components = make_components(cross_attention_dim=width)
    torch.manual_seed(0)
    adapter = AUAdapter(au_layers(components["unet"]), width, hidden_dim=width - 12 if variant else 64).half()
    write_original(tmp_path / "original", adapter, f"{variant}_" if variant else "")
    options = ["--variant", variant] if variant else []
    folder = write_export(tmp_path / "original", tmp_path / "folder", *options)
    ours = FineFacePipeline(**make_components(cross_attention_dim=width), requires_safety_checker=False)
    ours.load_au_adapter(tmp_path / "original", variant=variant)
    ours.set_progress_bar_config(disable=True)
    pipe = load_export(StableDiffusionPipeline(**components, requires_safety_checker=False), folder)
    expected = draw(ours, aus=SMILE)
    found = draw(pipe, ip_adapter_image_embeds=au_image_embeds(SMILE))
    assert_same(found, expected)
    assert not torch.allclose(draw(ours, aus=None), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "count"), [(SD21_UNET, 16), (SD15_UNET, 16), (SDXL_UNET, 70)], ids=["sd21", "sd15", "sdxl"]
)
def test_layers_have_the_numbers_that_diffusers_gives_them(config, count):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    numbers = ip_adapter_numbers(au_layers(unet))
    assert len(numbers) == count
    assert numbers == {name: index for index, name in enumerate(names) if name.endswith(".attn2")}


@pytest.mark.parametrize("config", [SD21_UNET, SD15_UNET], ids=["sd21", "sd15"])
def test_the_real_unets_take_all_of_a_file(config):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    torch.manual_seed(0)
    adapter = AUAdapter(au_layers(unet), config["cross_attention_dim"]).eval()
    parts = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in ip_adapter_state_dict(adapter).items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    processors = unet._convert_ip_adapter_attn_to_diffusers([parts])
    token = torch.zeros(1, config["cross_attention_dim"])
    aus = parse_aus(SMILE)
    token[:, :12], token[:, 24] = aus, 1
    layers, (_, values) = adapter.layers, adapter(aus)
    for name, value in zip(layers, values[:, 0].split(list(layers.values()), dim=-1), strict=True):
        processor = processors[f"{name}.processor"]
        torch.testing.assert_close(processor.to_v_ip[0](token), value, atol=1e-5, rtol=1e-5)
        assert not processor.to_k_ip[0].weight.any()


# Reading back


@pytest.mark.parametrize("source", ["folder", "file"])
def test_our_pipeline_reads_the_file_back(exported, tiny_base, steady_pipe, tmp_path, source):
    tiny_base.load_au_adapter(exported if source == "folder" else exported / NAME)
    assert tiny_base.au_adapter.config.encoder_type == "direct" and tiny_base.au_names == AU_NAMES
    options = {"aus": [SMILE, "1+4"], "prompt": [PROMPT] * 2, "au_guidance_scale": 3.0}
    expected = draw(steady_pipe, **options)
    assert_same(draw(tiny_base, **options), expected)
    tiny_base.save_au_adapter(tmp_path / "ours")
    again = FineFacePipeline(**make_components(), requires_safety_checker=False)
    again.load_au_adapter(tmp_path / "ours")
    assert torch.equal(draw(again, **options), draw(tiny_base, **options))


def test_a_base_with_the_file_beside_it_has_aus(exported, steady_pipe, tmp_path):
    StableDiffusionPipeline(**make_components(), requires_safety_checker=False).save_pretrained(tmp_path)
    for name in (NAME, "pytorch_lora_weights.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    pipe = FineFacePipeline.from_pretrained(tmp_path)
    assert_same(draw(pipe, aus=SMILE), draw(steady_pipe, aus=SMILE))


def test_the_file_names_its_aus(tmp_path):
    names = ["AU1", "AU12L", "AU12R", "AU45"]
    unet = make_components()["unet"]
    torch.manual_seed(0)
    adapter = AUAdapter.from_unet(unet, au_names=names, hidden_dim=HIDDEN_DIM)
    write_au_adapter(tmp_path / "adapter", adapter, unet, LORA_NAME)
    folder = write_export(tmp_path / "adapter", tmp_path / "folder")
    with safe_open(folder / NAME, framework="pt") as file:
        assert json.loads(file.metadata()["au_names"]) == names
    code = re.search('au_names = "AU1 AU12L.*?\n(?=embeds)', (folder / "README.md").read_text(), re.DOTALL)[0]
    exec(code, said := {"torch": torch})
    assert said["au_names"] == names and said["aus"].tolist() == [[[0.0, 5.0, 5.0, 0.0]]]
    pipe = FineFacePipeline(**make_components(), requires_safety_checker=False)
    pipe.load_au_adapter(folder)
    assert pipe.au_names == tuple(names) == read_au_names(Weights("base", str(folder)))
    embeds = au_image_embeds("L12E", au_names=names)
    found = draw(plain_pipe(folder), ip_adapter_image_embeds=embeds)
    assert_same(found, draw(pipe, aus="L12E"))


def changed(exported: Path, folder: Path, edit, metadata: dict | None = None) -> Path:
    tensors = load_file(exported / NAME)
    edit(tensors)
    folder.mkdir()
    save_file(tensors, folder / NAME, metadata=metadata)
    return folder


FOREIGN = {
    "for faces": (
        lambda t: (t.clear(), t.update(flat(make_faceid_portrait(make_components()["unet"])))),
        "IP-Adapter-FaceID: it takes the 512 numbers",
    ),
    "for images": (
        lambda t: (t.clear(), t.update(flat(make_ip_adapter(make_components()["unet"])))),
        "is no AU adapter.*holds norm.bias, norm.weight, proj.bias",
    ),
    "another file": (lambda t: (t.clear(), t.update(x=torch.zeros(2))), "is no AU adapter.*but holds x"),
    "another projection": (lambda t: t["image_proj.proj.2.weight"].mul_(2), "is not a token with the intensities"),
    "a layer less": (lambda t: t.pop("ip_adapter.1.to_v_ip.weight"), "misses ip_adapter.1.to_v_ip.weight"),
    "a wider layer": (lambda t: t.update({"ip_adapter.1.to_v_ip.weight": torch.zeros(9, 32)}), "of shape .9, 32."),
    "not a number": (lambda t: t["ip_adapter.1.to_v_ip.weight"].fill_(torch.nan), "not finite"),
    "no numbers": (lambda t: t.update({"image_proj.norm.weight": torch.tensor(1.0)}), "is no AU adapter"),
}


def flat(parts: dict) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": tensor for part, values in parts.items() for name, tensor in values.items()}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_an_error(exported, steady_base, tmp_path, name):
    edit, message = FOREIGN[name]
    folder = changed(exported, tmp_path / "foreign", edit)
    with pytest.raises(ValueError, match=message) as error:
        steady_base.load_au_adapter(folder)
    assert NAME in str(error.value) and steady_base.au_adapter is None


def test_a_file_for_another_base_is_an_error(exported):
    components = make_components(cross_attention_dim=768)
    pipe = FineFacePipeline(**components, requires_safety_checker=False)
    with pytest.raises(ValueError, match=f"width {CROSS_ATTENTION_DIM}.*but this base is Stable Diffusion 1.x"):
        pipe.load_au_adapter(exported)


def test_broken_names_are_an_error(exported, steady_base, tmp_path):
    folder = changed(exported, tmp_path / "broken", lambda t: None, {"au_names": "AU1, AU2"})
    with pytest.raises(ValueError, match="broken metadata"):
        steady_base.load_au_adapter(folder)


# The export


def test_the_card_and_its_python(exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.library_name == "diffusers" and "ip-adapter" in card.data.tags
    assert f'weight_name="{NAME}", image_encoder_folder=None' in card.text and "trust_remote_code" not in card.text
    assert "## Bias and misuse" in card.text and "<img" not in card.text
    [code] = [part.partition("```")[0] for part in card.text.split("```python\n")[1:]]
    compile(code, "README.md", "exec")


def test_pictures_need_a_base(tiny_adapter_dir, tiny_sd_dir, tmp_path, capsys):
    write_export(tiny_adapter_dir, tmp_path / "without")
    assert "no pictures, because there was no base" in capsys.readouterr().out
    options = ["--base", tiny_sd_dir, "--base-model", "user/base", "--num-inference-steps", "1", "--device", "cpu"]
    folder = write_export(tiny_adapter_dir, tmp_path / "with", *options)
    assert capsys.readouterr().out == f"{folder}\n"
    text = (folder / "README.md").read_text()
    assert 'from_pretrained("user/base", dtype' in text and 'src="images/AU12.png"' in text
    assert len(list((folder / "images").glob("*.png"))) == 17


def test_the_scale_of_the_lora_needs_no_metadata(exported):
    with safe_open(exported / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert set(file.metadata()) == {"format"}


@pytest.mark.parametrize("format", ["ip-adapter", "folded"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_type": "res_3mlp"}, "the encoder 'res_3mlp'"),
        ({"encoder_type": "individual"}, "the encoder 'individual'"),
        ({"num_tokens": 2}, "2 tokens"),
    ],
)
def test_what_is_not_affine_is_refused(format, options, message, tmp_path, capsys):
    unet = make_components()["unet"]
    write_au_adapter(tmp_path / "adapter", AUAdapter.from_unet(unet, hidden_dim=4, **options), unet, LORA_NAME)
    assert export.main([str(tmp_path / "adapter"), str(tmp_path / "out"), "--format", format]) == 2
    error = capsys.readouterr().err
    assert message in error and "Train an adapter with one token of 'none', 'mlp'" in error and "config.json" in error
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_mistakes_on_the_command_line(exported, tiny_adapter_dir, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in (
        ([tiny_adapter_dir, tmp_path / "out", "--space"], "`--space` writes a pipeline"),
        ([tiny_adapter_dir, tmp_path / "full"], "is not empty"),
        ([tiny_adapter_dir, tmp_path / "full", "--overwrite"], f"holds no {NAME}"),
        ([tiny_adapter_dir, tmp_path / "out", "--private"], "`--private`"),
        ([tiny_adapter_dir, tmp_path / "out", "--variant", "sd15"], "variant 'sd15'"),
        ([tmp_path / "full", tmp_path / "out"], "There is no AU adapter"),
        ([tmp_path / "none", tmp_path / "out"], "neither a folder nor the id"),
        ([exported, tmp_path / "out"], "numbers the layers"),
    ):
        assert export.main([*map(str, arguments), "--format", "ip-adapter"]) == 2
        assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.rglob("*")} == {"full", "file"}


# Folded


@pytest.mark.parametrize("encoder_type", ["none", "mlp", "res_mlp", "res_mlp64", "direct"])
def test_a_folded_adapter_draws_the_same(encoder_type, tmp_path):
    unet = make_components()["unet"]
    torch.manual_seed(0)
    adapter = AUAdapter.from_unet(unet, encoder_type=encoder_type, hidden_dim=HIDDEN_DIM)
    add_lora(unet, LORA_NAME)
    write_au_adapter(tmp_path / "adapter", adapter, unet, LORA_NAME)
    assert export.main([str(tmp_path / "adapter"), str(tmp_path / "folded"), "--format", "folded"]) == 0
    pictures = []
    for folder in ("adapter", "folded"):
        pipe = FineFacePipeline(**make_components(), requires_safety_checker=False)
        pipe.load_au_adapter(tmp_path / folder)
        pipe.set_progress_bar_config(disable=True)
        pictures.append(draw(pipe, prompt=[PROMPT] * 2, aus=[SMILE, "1+4"], au_guidance_scale=4.0))
    assert_same(*pictures)
    size = (tmp_path / "folded" / "au_attn_processors.safetensors").stat().st_size
    assert encoder_type == "direct" or size < (tmp_path / "adapter" / "au_attn_processors.safetensors").stat().st_size
    folded = read_au_adapter(find_adapter_files(tmp_path / "folded"))
    assert folded.config.encoder_type == "direct" and folded.to_v_au.weight.shape[1] == 13


def test_folding_again_changes_nothing(tiny_adapter_dir, tmp_path):
    once = read_au_adapter(find_adapter_files(tiny_adapter_dir)).fold()
    assert torch.equal(once.fold().to_v_au.weight, once.to_v_au.weight)
    adapter = make_adapter(make_components()["unet"])
    aus = parse_aus(["6C+12E", "1+4"])
    torch.testing.assert_close(adapter.fold()(aus)[1], adapter(aus)[1], atol=1e-5, rtol=1e-5)
