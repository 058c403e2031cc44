"""An IP-Adapter beside the AUs (paper Eq. 5), by diffusers' own calls."""

import copy

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.image_processor import IPAdapterMaskProcessor
from tiny import CROSS_ATTENTION_DIM, make_adapter, make_components
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from action_units import parse_aus
from au_attention_processor import AUAttnProcessor, attach_au_processors, au_layers, pack_au_tensors
from pipeline_fineface import LORA_NAME, FineFacePipeline


PROMPT = "a boy in a park"
SMILE = {"AU6": 2.5, "AU12": 5}
IMAGE_DIM = 20
NUM_TOKENS = 4


def make_image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=20,
        projection_dim=IMAGE_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config).eval()


def make_ip_adapter(unet, seed: int = 5, lora: bool = False) -> dict:
    """The weights of an IP-Adapter as they are published: image projection, and keys and values by layer number."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape):
        return 0.5 * torch.randn(*shape, generator=generator)

    names = list(unet.attn_processors)
    widths = {f"{name}.processor": width for name, width in au_layers(unet).items()}
    layers = {}
    for number, name in enumerate(names):
        if name in widths:
            layers[f"{number}.to_k_ip.weight"] = weight(widths[name], unet.config.cross_attention_dim)
            layers[f"{number}.to_v_ip.weight"] = weight(widths[name], unet.config.cross_attention_dim)
    if lora:
        for number, name in enumerate(names):
            attn = unet.get_submodule(name.removesuffix(".processor"))
            for proj in ("to_q", "to_k", "to_v", "to_out"):
                linear = attn.to_out[0] if proj == "to_out" else getattr(attn, proj)
                layers[f"{number}.{proj}_lora.down.weight"] = weight(2, linear.in_features)
                layers[f"{number}.{proj}_lora.up.weight"] = weight(linear.out_features, 2)
    image_proj = {
        "proj.weight": weight(NUM_TOKENS * CROSS_ATTENTION_DIM, IMAGE_DIM),
        "proj.bias": weight(NUM_TOKENS * CROSS_ATTENTION_DIM),
        "norm.weight": torch.ones(CROSS_ATTENTION_DIM),
        "norm.bias": torch.zeros(CROSS_ATTENTION_DIM),
    }
    return {"image_proj": image_proj, "ip_adapter": layers}


def add_ip_adapter(pipe, *state_dicts: dict) -> None:
    names = [""] * len(state_dicts)
    pipe.load_ip_adapter(list(state_dicts), subfolder=names, weight_name=names, image_encoder_folder=None)


def make_pipe(pipeline_class=FineFacePipeline):
    components = make_components()
    components["image_encoder"] = make_image_encoder()
    components["feature_extractor"] = CLIPImageProcessor(size=32, crop_size=32)
    pipe = pipeline_class(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def some_face(seed: int = 0) -> PIL.Image.Image:
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return PIL.Image.fromarray(pixels.numpy())


def draw(pipe, image=None, **kwargs) -> torch.Tensor:
    kwargs = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "latent", **kwargs}
    if "ip_adapter_image_embeds" not in kwargs:
        kwargs["ip_adapter_image"] = image or some_face()
    return pipe(generator=torch.Generator().manual_seed(0), **kwargs).images


@pytest.fixture
def both(tiny_adapter_dir) -> FineFacePipeline:
    """AUs first, IP-Adapter second."""
    pipe = make_pipe()
    pipe.load_au_adapter(tiny_adapter_dir)
    add_ip_adapter(pipe, make_ip_adapter(pipe.unet))
    return pipe


def test_a_layer_computes_equation_5(both):
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    attn = both.unet.get_submodule(name)
    both.set_ip_adapter_scale(0.7)
    attach_au_processors(both.unet)  # as a call of the UNet does
    generator = torch.Generator().manual_seed(3)
    hidden_states = torch.randn(1, 9, attn.query_dim, generator=generator)
    text = torch.randn(1, 7, CROSS_ATTENTION_DIM, generator=generator)
    image = torch.randn(1, 1, NUM_TOKENS, CROSS_ATTENTION_DIM, generator=generator)

    def attention(query, key, value):
        query, key, value = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value))
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        return (weights @ value).transpose(1, 2).flatten(2)

    with torch.no_grad():
        ip_adapter = attn.processor
        weights = both.au_adapter.attn_processors_state_dict()
        tokens = both.au_adapter.encoder(parse_aus(SMILE))
        query = attn.to_q(hidden_states)
        z = attention(query, attn.to_k(text), attn.to_v(text))
        z = z + 0.7 * attention(query, ip_adapter.to_k_ip[0](image[:, 0]), ip_adapter.to_v_ip[0](image[:, 0]))
        z = z + 0.6 * attention(
            query,
            F.linear(tokens, weights[f"{name}.processor.to_k_au.weight"]),
            F.linear(tokens, weights[f"{name}.processor.to_v_au.weight"]),
        )
        expected = attn.to_out[0](z)
        for general in (False, True):
            au_kwargs = pack_au_tensors(both.unet, *both.au_adapter(parse_aus(SMILE)), au_scale=0.6, general=general)
            torch.testing.assert_close(attn(hidden_states, (text, [image]), **au_kwargs), expected, atol=1e-5, rtol=0)


def test_the_order_of_loading_does_not_matter(both, tiny_adapter_dir):
    pipe = make_pipe()
    add_ip_adapter(pipe, make_ip_adapter(pipe.unet))
    pipe.load_au_adapter(tiny_adapter_dir)
    expected = draw(both, aus=SMILE)
    assert torch.equal(draw(pipe, aus=SMILE), expected)
    assert not torch.allclose(draw(both, aus=SMILE, image=some_face(1)), expected, atol=1e-3)
    assert not torch.allclose(draw(both), expected, atol=1e-3)


def test_without_aus_it_is_an_ip_adapter(both):
    plain = make_pipe(StableDiffusionPipeline)
    add_ip_adapter(plain, make_ip_adapter(plain.unet))
    both.unload_au_adapter()
    assert torch.equal(draw(both), draw(plain))


def test_scales_are_set_with_the_aus_on(both):
    full = draw(both, aus=SMILE)
    both.set_ip_adapter_scale(0.0)
    assert torch.equal(draw(both, aus=SMILE), draw(both, aus=SMILE, image=some_face(1)))
    both.set_ip_adapter_scale({"up": 1.0})
    assert not torch.allclose(draw(both, aus=SMILE), full, atol=1e-3)
    both.set_ip_adapter_scale(1.0)
    assert torch.equal(draw(both, aus=SMILE), full)


def test_unloading_the_ip_adapter_leaves_the_aus(both, tiny_adapter_dir):
    both.unload_ip_adapter()
    pipe = make_pipe()
    pipe.load_au_adapter(tiny_adapter_dir)
    options = {"prompt": PROMPT, "aus": SMILE, "num_inference_steps": 2, "output_type": "latent"}
    ours, theirs = (p(generator=torch.Generator().manual_seed(0), **options).images for p in (both, pipe))
    assert torch.equal(ours, theirs)


def test_unloading_the_aus_leaves_the_ip_adapter(both, tiny_adapter_dir):
    expected = draw(both, aus=SMILE)
    both.unload_au_adapter()
    both.load_au_adapter(tiny_adapter_dir)
    assert torch.equal(draw(both, aus=SMILE), expected)


def masks_for(*faces: int) -> list[torch.Tensor]:
    """For each IP-Adapter, one vertical strip of the picture for each of its faces."""
    masks = []
    for count in faces:
        strips = torch.zeros(count, 32, 32)
        for index, strip in enumerate(strips):
            strip[:, index * 32 // count : (index + 1) * 32 // count] = 1
        masks.append(IPAdapterMaskProcessor().preprocess(list(strips)).reshape(1, count, 32, 32))
    return masks


def test_masks_and_several_adapters(tiny_adapter_dir):
    pipe = make_pipe()
    pipe.load_au_adapter(tiny_adapter_dir)
    add_ip_adapter(pipe, make_ip_adapter(pipe.unet, seed=5), make_ip_adapter(pipe.unet, seed=6))
    pipe.set_ip_adapter_scale([[0.7, 0.5], 0.4])
    images = [[some_face(0), some_face(1)], some_face(2)]
    masked = draw(pipe, image=images, aus=SMILE, cross_attention_kwargs={"ip_adapter_masks": masks_for(2, 1)})
    full = draw(
        pipe, image=images, aus=SMILE, cross_attention_kwargs={"ip_adapter_masks": [m * 0 for m in masks_for(2, 1)]}
    )
    assert not torch.allclose(masked, full, atol=1e-3)
    pipe.unload_au_adapter()
    plain = make_pipe(StableDiffusionPipeline)
    add_ip_adapter(plain, make_ip_adapter(plain.unet, seed=5), make_ip_adapter(plain.unet, seed=6))
    plain.set_ip_adapter_scale([[0.7, 0.5], 0.4])
    options = {"image": images, "cross_attention_kwargs": {"ip_adapter_masks": masks_for(2, 1)}}
    assert torch.equal(draw(pipe, **options), draw(plain, **options))


def test_masks_do_not_reach_the_aus(both):
    """With the mask at 0 everywhere only the image falls away."""
    none = {"ip_adapter_masks": [mask * 0 for mask in masks_for(1)]}
    masked = draw(both, aus=SMILE, cross_attention_kwargs=none)
    both.set_ip_adapter_scale(0.0)
    assert torch.equal(masked, draw(both, aus=SMILE))


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 1.0}, {"au_guidance_scale": 3.0}])
def test_embeddings_equal_the_image(both, guidance):
    embeds = both.prepare_ip_adapter_image_embeds([some_face()], None, "cpu", 1, "guidance_scale" not in guidance)
    ours = draw(both, aus=SMILE, ip_adapter_image_embeds=embeds, **guidance)
    assert torch.equal(ours, draw(both, aus=SMILE, **guidance))


def test_au_guidance_keeps_the_image_in_both_branches(both):
    joint = draw(both, aus=SMILE, guidance_scale=4.0)
    torch.testing.assert_close(
        draw(both, aus=SMILE, guidance_scale=4.0, au_guidance_scale=4.0), joint, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("aus_first", [True, False])
def test_an_ip_adapter_with_a_lora_leaves_that_of_the_aus_on(tiny_adapter_dir, aus_first):
    pipe = make_pipe()
    weights = make_ip_adapter(pipe.unet, lora=True)
    if aus_first:
        pipe.load_au_adapter(tiny_adapter_dir)
    add_ip_adapter(pipe, weights)
    if not aus_first:
        pipe.load_au_adapter(tiny_adapter_dir)
    assert set(pipe._active_loras()) == {LORA_NAME, "faceid_0"}
    assert not torch.allclose(draw(pipe, aus=SMILE), draw(pipe), atol=1e-3)


# Another pipeline that shares the UNet


def draw_by_image(other, pipe, aus=SMILE, image=None) -> torch.Tensor:
    options = {"strength": 0.7, "num_inference_steps": 4, "output_type": "latent"}
    if aus is not None:
        options["cross_attention_kwargs"] = pipe.au_cross_attention_kwargs(aus)
    if image is not None:
        options["ip_adapter_image"] = image
    return other(PROMPT, some_face(9), generator=torch.Generator().manual_seed(0), **options).images


def make_image_to_image(pipe) -> StableDiffusionImg2ImgPipeline:
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=pipe.dtype)
    other.set_progress_bar_config(disable=True)
    return other


def test_another_pipeline_sets_the_scale_of_the_ip_adapter(both):
    other = make_image_to_image(both)
    pictures = []
    for scale in (1.0, 0.0):
        other.set_ip_adapter_scale(scale)
        pictures += [draw_by_image(other, both, image=some_face(seed)) for seed in (0, 1)]
    assert not torch.allclose(pictures[0], pictures[1], atol=1e-3)
    assert torch.equal(pictures[2], pictures[3]) and not torch.allclose(pictures[0], pictures[2], atol=1e-3)


def test_another_pipeline_loads_and_unloads_an_ip_adapter(tiny_adapter_dir):
    pipe = make_pipe()
    pipe.load_au_adapter(tiny_adapter_dir)
    other = make_image_to_image(pipe)
    expected = {aus: draw_by_image(other, pipe, aus) for aus in ("6+12E", "1+4", None)}
    add_ip_adapter(other, make_ip_adapter(pipe.unet))
    smile, frown, plain = (draw_by_image(other, pipe, aus, some_face()) for aus in expected)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in ((smile, frown), (smile, plain), (frown, plain)))
    assert not torch.allclose(draw_by_image(other, pipe, "6+12E", some_face(1)), smile, atol=1e-3)
    other.unload_ip_adapter()
    for aus, picture in expected.items():
        assert torch.equal(draw_by_image(other, pipe, aus), picture)
    pipe.unload_au_adapter()
    assert torch.equal(draw_by_image(other, pipe, None), draw_by_image(make_image_to_image(make_pipe()), pipe, None))


def test_the_aus_are_attached_to_layers_of_the_unet_only(both):
    assert not any(isinstance(module, AUAttnProcessor) for module in both.unet.encoder_hid_proj.modules())


def test_a_pipeline_with_both_saves_the_base_and_the_aus(both, tmp_path):
    both.save_pretrained(tmp_path)
    pipe = FineFacePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    add_ip_adapter(pipe, make_ip_adapter(pipe.unet))
    assert torch.equal(draw(pipe, aus=SMILE), draw(both, aus=SMILE))


# FaceID: embeddings of faces, from a face recognition model, in place of images


FACE_DIM = 512
FACE_TOKENS = 16


def make_faceid_portrait(unet, seed: int = 7) -> dict:
    """
    `ip-adapter-faceid-portrait-v11_sd15.bin`: two layers from 512 over 1024 to 16 tokens for each face, a norm, and
    keys and values, as wide as the text of the UNet.
    """
    generator = torch.Generator().manual_seed(seed)
    dim = unet.config.cross_attention_dim
    return {
        "image_proj": {
            "proj.0.weight": 0.05 * torch.randn(2 * FACE_DIM, FACE_DIM, generator=generator),
            "proj.0.bias": torch.zeros(2 * FACE_DIM),
            "proj.2.weight": 0.05 * torch.randn(FACE_TOKENS * dim, 2 * FACE_DIM, generator=generator),
            "proj.2.bias": torch.zeros(FACE_TOKENS * dim),
            "norm.weight": torch.ones(dim),
            "norm.bias": torch.zeros(dim),
        },
        "ip_adapter": make_ip_adapter(unet, seed)["ip_adapter"],
    }


def some_id_embeds(num_faces: int, guided: bool = True, seed: int = 0) -> list[torch.Tensor]:
    """`(1, num_faces, 512)`, and zeros before it with guidance, as diffusers wants them."""
    embeds = torch.randn(1, num_faces, FACE_DIM, generator=torch.Generator().manual_seed(seed))
    return [torch.cat([torch.zeros_like(embeds), embeds]) if guided else embeds]


@pytest.fixture(scope="module")
def faceid_pipes(tiny_adapter_dir) -> list[FineFacePipeline]:
    """One to which the AUs came first, and one to which they came last, for tests that only draw."""
    pipes = [make_pipe(), make_pipe()]
    pipes[0].load_au_adapter(tiny_adapter_dir)
    for pipe in pipes:
        add_ip_adapter(pipe, make_faceid_portrait(pipe.unet))
    pipes[1].load_au_adapter(tiny_adapter_dir)
    return pipes


@pytest.mark.parametrize("num_faces", [1, 5])
@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 1.0}, {"au_guidance_scale": 3.0}])
def test_faceid_portrait_takes_faces_and_aus(faceid_pipes, num_faces, guidance):
    pipe, aus_last = faceid_pipes
    embeds = some_id_embeds(num_faces, "guidance_scale" not in guidance)
    assert pipe.unet.encoder_hid_proj([embeds[0][-1:]])[0].shape == (1, num_faces, FACE_TOKENS, CROSS_ATTENTION_DIM)
    smile = draw(pipe, aus=SMILE, ip_adapter_image_embeds=embeds, **guidance)
    other_face = some_id_embeds(num_faces, "guidance_scale" not in guidance, seed=1)
    for options in ({"aus": "1+4"}, {"aus": None}, {"aus": SMILE, "ip_adapter_image_embeds": other_face}):
        options = {"ip_adapter_image_embeds": embeds, **options, **guidance}
        assert not torch.allclose(draw(pipe, **options), smile, atol=1e-3)
    assert torch.equal(draw(aus_last, aus=SMILE, ip_adapter_image_embeds=embeds, **guidance), smile)


def test_faceid_portrait_in_the_widths_of_stable_diffusion_1_5():
    """Only the layers of the UNet are fewer and narrower."""
    components = make_components(cross_attention_dim=768)
    pipe = FineFacePipeline(**components, au_adapter=make_adapter(components["unet"]), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    portrait = make_faceid_portrait(pipe.unet)
    assert {name: tuple(weight.shape) for name, weight in portrait["image_proj"].items() if weight.ndim == 2} == {
        "proj.0.weight": (1024, 512),
        "proj.2.weight": (16 * 768, 1024),
    }
    before = draw(pipe, aus=SMILE, ip_adapter_image_embeds=None, ip_adapter_image=None)
    add_ip_adapter(pipe, portrait)
    options = {"ip_adapter_image_embeds": some_id_embeds(2)}
    smile, frown = draw(pipe, aus=SMILE, **options), draw(pipe, aus="1+4", **options)
    assert smile.shape == before.shape and not torch.allclose(smile, before, atol=1e-3)
    assert not torch.allclose(smile, frown, atol=1e-3)


def test_each_of_two_people_has_a_face_and_aus(faceid_pipes):
    """The masks of both kinds, for faces and for AUs, side by side."""
    pipe = copy.deepcopy(faceid_pipes[0])
    left, right = masks_for(2)[0][0]
    options = {
        "ip_adapter_image_embeds": some_id_embeds(2),
        "cross_attention_kwargs": {"ip_adapter_masks": masks_for(2)},
        "au_masks": [left, right],
    }
    both = draw(pipe, aus=[SMILE, "1+4"], **options)
    assert not torch.allclose(draw(pipe, aus=["1+4", SMILE], **options), both, atol=1e-3)
    swapped = {**options, "ip_adapter_image_embeds": [embeds.flip(1) for embeds in some_id_embeds(2)]}
    assert not torch.allclose(draw(pipe, aus=[SMILE, "1+4"], **swapped), both, atol=1e-3)
    pipe.set_ip_adapter_scale(0.0)
    assert torch.equal(draw(pipe, aus=[SMILE, "1+4"], **options), draw(pipe, aus=[SMILE, "1+4"], **swapped))
