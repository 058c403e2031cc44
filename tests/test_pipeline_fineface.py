import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import EulerDiscreteScheduler, LCMScheduler, PNDMScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.models.attention_processor import AttnProcessor2_0
from test_ip_adapter import IMAGE_DIM, make_ip_adapter
from tiny import CROSS_ATTENTION_DIM, FAMILIES, HIDDEN_DIM, Family, add_lora, make_adapter, shorten

from action_units import AU_NAMES, parse_aus
from au_attention_processor import pack_au_tensors
from au_encoder import ATTN_PROCESSORS_NAME, find_adapter_beside
from pipeline_fineface import LORA_NAME, FineFacePipeline
from pipeline_fineface_xl import FineFaceXLPipeline


PROMPT = "a boy in a park"
SMILE = {"AU6": 2.5, "AU12": 5}


# Each promise is held on every family of bases.


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def tiny_components(family) -> dict:
    return family.make_components()


@pytest.fixture
def tiny_base(family, tiny_components):
    return family.make_pipe(**tiny_components)


@pytest.fixture
def tiny_adapter_dir(family, tiny_adapter_dir, tiny_xl_adapter_dir) -> str:
    return tiny_adapter_dir if family is FAMILIES["sd"] else tiny_xl_adapter_dir


@pytest.fixture
def plain_sd(family):
    return family.make_plain_pipe()


@pytest.fixture(scope="module")
def shared() -> dict:
    return {}


@pytest.fixture
def steady_pipe(family, shared, tiny_adapter_dir):
    """A pipeline with the adapter and its LoRA on, for all tests that only draw with it: making it takes longer."""
    if family.pipeline_class not in shared:
        shared[family.pipeline_class] = family.make_pipe()
        shared[family.pipeline_class].load_au_adapter(tiny_adapter_dir)
    return shared[family.pipeline_class]


@pytest.fixture
def steady_bases(family, shared) -> tuple:
    """Our pipeline and the plain one, without an adapter, for all tests that only draw with them."""
    if family.plain_class not in shared:
        shared[family.plain_class] = family.make_pipe(), family.make_plain_pipe()
    return shared[family.plain_class]


def draw(pipe, prompt=PROMPT, seed=0, **kwargs) -> torch.Tensor:
    kwargs = {"num_inference_steps": 2, "output_type": "latent", **kwargs}
    generator = kwargs.pop("generator", None) or torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, **kwargs).images


def assert_close(ours, theirs, tolerance=5e-5):
    # Latents go to about 5; batches and threads add up in another order.
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


# The contract of AUs


def test_aus_change_the_picture_and_a_seed_repeats_it(steady_pipe):
    smile = draw(steady_pipe, aus=SMILE)
    assert torch.equal(draw(steady_pipe, aus=SMILE), smile)
    for other in ({"AU12": 5}, {}, None):
        assert not torch.allclose(draw(steady_pipe, aus=other), smile, atol=1e-3)
    assert not torch.allclose(draw(steady_pipe, aus=SMILE, seed=1), smile, atol=1e-3)


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 1.0}, {"au_guidance_scale": 3.0}])
def test_zero_scale_is_the_same_as_no_aus(steady_pipe, guidance):
    assert torch.equal(draw(steady_pipe, aus=SMILE, au_scale=0, **guidance), draw(steady_pipe, **guidance))


def test_zero_aus_are_the_neutral_face_which_is_not_no_aus(steady_pipe):
    assert torch.equal(draw(steady_pipe, aus={}), draw(steady_pipe, aus=torch.zeros(12)))
    assert not torch.allclose(draw(steady_pipe, aus={}), draw(steady_pipe), atol=1e-3)


@pytest.mark.parametrize(
    "aus",
    ["AU6=2.5 AU12=5", torch.tensor([0, 0, 0, 0, 2.5, 0, 5, 0, 0, 0, 0, 0]), [SMILE], [0] * 4 + [2.5, 0, 5] + [0] * 5],
)
def test_every_form_of_the_same_aus_gives_the_same_picture(steady_pipe, aus):
    assert torch.equal(draw(steady_pipe, aus=aus), draw(steady_pipe, aus=SMILE))


def test_a_tag_in_the_prompt_is_the_same_as_the_argument(steady_pipe):
    assert torch.equal(draw(steady_pipe, "a boy in a park <AU6=2.5 AU12=5>"), draw(steady_pipe, aus=SMILE))


def test_only_prompts_with_a_tag_get_aus(steady_pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = draw(steady_pipe, ["a boy <AU6=2.5 AU12=5>", "a girl"], generator=generators)
    assert_close(both[:1], draw(steady_pipe, "a boy", aus=SMILE))
    assert_close(both[1:], draw(steady_pipe, "a girl", seed=1))


# Batches


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 1.0}, {"au_guidance_scale": 3.0}])
def test_a_batch_equals_its_singles(steady_pipe, guidance):
    prompts, aus = ["a boy", "a girl in red", "an old man"], [SMILE, None, "1+4"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    batch = draw(steady_pipe, prompts, aus=aus, generator=generators, **guidance)
    singles = [
        draw(steady_pipe, p, aus=a, seed=seed, **guidance)
        for seed, (p, a) in enumerate(zip(prompts, aus, strict=True))
    ]
    assert_close(batch, torch.cat(singles))


def test_one_expression_serves_all_prompts(steady_pipe):
    prompts = ["a boy", "a girl"]
    assert torch.equal(draw(steady_pipe, prompts, aus=SMILE), draw(steady_pipe, prompts, aus=[SMILE, SMILE]))


@pytest.mark.parametrize("guidance", [{}, {"au_guidance_scale": 3.0}])
def test_images_per_prompt_equal_separate_calls(steady_pipe, guidance):
    prompts, aus = ["a boy", "a girl"], [SMILE, "1+4"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    images = draw(steady_pipe, prompts, aus=aus, num_images_per_prompt=2, generator=generators, **guidance)
    for index, image in enumerate(images):
        single = draw(steady_pipe, prompts[index // 2], aus=aus[index // 2], seed=index, **guidance)
        assert_close(image, single[0])


# Guidance


def embeddings(pipe, prompt) -> dict[str, torch.Tensor]:
    """What `encode_prompt` makes, by the names of the arguments of the call."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    encoded = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    return dict(zip(names, encoded, strict=False))


def by_hand(pipe, prompt, aus, combine, negative_aus=None, steps=2) -> torch.Tensor:
    """The denoising loop with each branch of guidance in a UNet call of its own."""
    pipe.scheduler.set_timesteps(steps)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        encoded = embeddings(pipe, prompt)
        conditions = []
        for branch in ("", "negative_"):
            added = None
            if f"{branch}pooled_prompt_embeds" in encoded:
                time_ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
                added = {"text_embeds": encoded[f"{branch}pooled_prompt_embeds"], "time_ids": time_ids}
            conditions.append((encoded[f"{branch}prompt_embeds"], added))
        text, empty = conditions
        for t in pipe.scheduler.timesteps:

            def predict(condition, aus, t=t, latents=latents):
                embeds, added = condition
                au_kwargs = pack_au_tensors(pipe.unet, *pipe.au_adapter(parse_aus(aus)))
                return pipe.unet(latents, t, embeds, added_cond_kwargs=added, cross_attention_kwargs=au_kwargs).sample

            neutral = {} if negative_aus is None else negative_aus
            noise = combine(predict(empty, neutral), predict(text, neutral), predict(text, aus))
            latents = pipe.scheduler.step(noise, t, latents).prev_sample
    return latents


def test_guidance_leads_away_from_the_neutral_face(steady_pipe):
    expected = by_hand(steady_pipe, PROMPT, SMILE, lambda empty, text, full: empty + 4.0 * (full - empty))
    assert_close(draw(steady_pipe, aus=SMILE, guidance_scale=4.0), expected)


@pytest.mark.parametrize("negative_aus", [None, "AU4=5"])
def test_au_guidance_is_a_third_branch(steady_pipe, negative_aus):
    def combine(empty, text, full):
        return empty + 4.0 * (text - empty) + 6.0 * (full - text)

    expected = by_hand(steady_pipe, PROMPT, SMILE, combine, negative_aus)
    options = {"guidance_scale": 4.0, "au_guidance_scale": 6.0, "negative_aus": negative_aus}
    assert_close(draw(steady_pipe, aus=SMILE, **options), expected)


def test_au_guidance_without_text_guidance(steady_pipe):
    expected = by_hand(steady_pipe, PROMPT, SMILE, lambda empty, text, full: text + 6.0 * (full - text))
    assert_close(draw(steady_pipe, aus=SMILE, guidance_scale=1.0, au_guidance_scale=6.0), expected)


def test_equal_scales_are_joint_guidance(steady_pipe):
    joint = draw(steady_pipe, aus=SMILE, guidance_scale=4.0)
    assert_close(draw(steady_pipe, aus=SMILE, guidance_scale=4.0, au_guidance_scale=4.0), joint)


def test_no_guidance_is_one_prediction_with_aus(steady_pipe):
    expected = by_hand(steady_pipe, PROMPT, SMILE, lambda empty, text, full: full)
    assert_close(draw(steady_pipe, aus=SMILE, guidance_scale=1.0), expected)


def test_negative_aus_are_led_away_from(steady_pipe):
    neutral = draw(steady_pipe, aus=SMILE)
    assert torch.equal(draw(steady_pipe, aus=SMILE, negative_aus={}), neutral)
    assert not torch.allclose(draw(steady_pipe, aus=SMILE, negative_aus="AU4=5"), neutral, atol=1e-3)


def test_the_lora_scale_reaches_the_aus(tiny_pipe):
    """`scale` in `cross_attention_kwargs` also weighs the LoRA on the output projection of the AU term."""
    halved = draw(tiny_pipe, aus=SMILE, cross_attention_kwargs={"scale": 0.5})
    for module in tiny_pipe.unet.modules():
        if hasattr(module, "lora_A"):
            module.scale_layer(0.5)
    assert_close(halved, draw(tiny_pipe, aus=SMILE))


def test_more_than_one_token(family, tiny_base):
    adapter = make_adapter(tiny_base.unet, num_tokens=3)
    pipe = family.make_pipe(**tiny_base.components | {"au_adapter": adapter})
    assert not torch.allclose(draw(pipe, aus=SMILE), draw(pipe), atol=1e-3)
    assert torch.equal(draw(pipe, aus=SMILE, au_scale=0), draw(pipe))
    batch = draw(pipe, ["a boy"] * 2, aus=[SMILE, None], generator=[torch.Generator().manual_seed(0) for _ in "ab"])
    assert_close(batch, torch.cat([draw(pipe, "a boy", aus=SMILE), draw(pipe, "a boy")]))


# Several people in one picture


WIDE = {"height": 32, "width": 64}


def halves() -> list[PIL.Image.Image]:
    masks = torch.zeros(2, 32, 64, dtype=torch.uint8)
    masks[0, :, :32] = masks[1, :, 32:] = 255
    return [PIL.Image.fromarray(mask.numpy()) for mask in masks]


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 1.0}, {"au_guidance_scale": 3.0}])
def test_one_full_mask_is_no_mask(steady_pipe, guidance):
    masked = draw(steady_pipe, aus=SMILE, au_masks=torch.ones(1, 32, 32), **guidance)
    assert_close(masked, draw(steady_pipe, aus=SMILE, **guidance))


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_each_person_has_aus_of_their_own(family, tiny_base, num_tokens):
    adapter = make_adapter(tiny_base.unet, num_tokens=num_tokens)
    pipe = family.make_pipe(**tiny_base.components | {"au_adapter": adapter})
    options = {**WIDE, "num_inference_steps": 1, "guidance_scale": 1.0, "au_masks": halves()}
    both = draw(pipe, aus=[SMILE, "1+4"], **options)
    left_only, swapped = draw(pipe, aus=[SMILE, None], **options), draw(pipe, aus=["1+4", SMILE], **options)
    assert not torch.allclose(both, swapped, atol=1e-3)
    change = (both - left_only).abs().mean(dim=(0, 1, 2))
    # Convolutions, self-attention and group norms carry some of it over.
    assert change[16:].mean() > 1.2 * change[:16].mean()


def test_lists_of_people_serve_one_prompt_or_all(steady_pipe):
    prompts = ["two boys", "two girls"]

    def fresh() -> dict:
        return {**WIDE, "generator": [torch.Generator().manual_seed(seed) for seed in (0, 1)]}

    same = draw(steady_pipe, prompts, aus=[SMILE, None], au_masks=halves(), **fresh())
    nested = draw(steady_pipe, prompts, aus=[[SMILE, None]] * 2, au_masks=[halves()] * 2, **fresh())
    assert torch.equal(same, nested)
    aus = [[SMILE, None], [None, "1+4"]]
    batch = draw(steady_pipe, prompts, aus=aus, au_masks=halves(), negative_aus=[["4"] * 2, ["12"] * 2], **fresh())
    for seed, (prompt, people) in enumerate(zip(prompts, aus, strict=True)):
        negative_aus = ("4", "12")[seed]
        single = draw(steady_pipe, prompt, seed, aus=people, au_masks=halves(), negative_aus=negative_aus, **WIDE)
        assert_close(batch[seed], single[0])
    tensor = torch.stack([parse_aus([SMILE, "1+4"])] * 2)
    by_tensor = draw(steady_pipe, prompts, aus=tensor, au_masks=halves(), **fresh())
    assert torch.equal(by_tensor, draw(steady_pipe, prompts, aus=[SMILE, "1+4"], au_masks=halves(), **fresh()))


def test_images_per_prompt_keep_their_masks(steady_pipe):
    flipped = halves()[::-1]
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    options = {**WIDE, "aus": [SMILE, "1+4"], "num_inference_steps": 1}
    masks = [halves(), flipped]
    images = draw(steady_pipe, ["a", "b"], au_masks=masks, num_images_per_prompt=2, generator=generators, **options)
    for index, image in enumerate(images):
        assert_close(image, draw(steady_pipe, "ab"[index // 2], index, au_masks=masks[index // 2], **options)[0])


# Everything that Stable Diffusion does


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"negative_prompt": "ugly"},
        {"num_images_per_prompt": 2},
        {"height": 16, "width": 32},
        {"eta": 0.5},
        {"timesteps": None, "num_inference_steps": 4},
        {"latents": torch.ones(1, 4, 16, 16)},
        {"output_type": "np"},
        {"output_type": "pt"},
    ],
    ids=str,
)
def test_without_an_adapter_it_is_stable_diffusion(steady_bases, options):
    ours, theirs = (draw(pipe, **options) for pipe in steady_bases)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_the_signature_begins_as_that_of_stable_diffusion(family):
    import inspect

    for name in ("__init__", "__call__"):
        ours = list(inspect.signature(getattr(family.pipeline_class, name)).parameters)
        theirs = [p for p in inspect.signature(getattr(family.plain_class, name)).parameters if p != "kwargs"]
        assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, LCMScheduler])
def test_other_schedulers(tiny_pipe, plain_sd, scheduler):
    for pipe in (tiny_pipe, plain_sd):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    assert draw(tiny_pipe, aus=SMILE).isfinite().all()
    tiny_pipe.unload_au_adapter()
    assert torch.equal(draw(tiny_pipe), draw(plain_sd))


def test_precomputed_embeddings_equal_the_prompt(steady_pipe):
    prompts, aus = ["a boy", "a girl"], [SMILE, "1+4"]
    options = {**embeddings(steady_pipe, prompts), "aus": aus}
    assert torch.equal(draw(steady_pipe, None, **options), draw(steady_pipe, prompts, aus=aus))


@pytest.mark.parametrize("family", ["sd"], indirect=True)  # diffusers does without that norm for SDXL
def test_clip_skip_takes_an_earlier_layer_of_the_text_encoder(tiny_pipe):
    _, negative_embeds = tiny_pipe.encode_prompt(PROMPT, "cpu", 1, True)
    ids = tiny_pipe.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    layers = tiny_pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    embeds = tiny_pipe.text_encoder.final_layer_norm(layers[-2])
    expected = draw(tiny_pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative_embeds, aus=SMILE)
    modules = list(tiny_pipe.text_encoder.named_modules())
    assert torch.equal(draw(tiny_pipe, aus=SMILE, clip_skip=1), expected)
    assert list(tiny_pipe.text_encoder.named_modules()) == modules
    assert not hasattr(tiny_pipe.text_encoder, "text_model")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tiny_pipe, dtype):
    full = draw(tiny_pipe, aus=SMILE, guidance_scale=1.0)
    tiny_pipe.to(dtype=dtype)
    half = draw(tiny_pipe, aus=SMILE, guidance_scale=1.0, au_guidance_scale=1.0)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), full, atol=0.3, rtol=0.3)
    assert torch.equal(draw(tiny_pipe, aus=SMILE, au_scale=0), draw(tiny_pipe))


def test_output_types(steady_pipe):
    options = {"num_inference_steps": 1, "aus": SMILE}
    assert isinstance(draw(steady_pipe, output_type="pil", **options)[0], PIL.Image.Image)
    assert draw(steady_pipe, output_type="np", **options).shape == (1, 32, 32, 3)
    assert draw(steady_pipe, output_type="pt", **options).shape == (1, 3, 32, 32)
    images, *nsfw = steady_pipe(PROMPT, return_dict=False, **options)
    assert isinstance(images[0], PIL.Image.Image) and nsfw in ([], [None])


def test_vae_slicing_gives_the_same_pictures(tiny_pipe):
    options = {"aus": SMILE, "output_type": "pt", "num_images_per_prompt": 2}
    expected = draw(tiny_pipe, **options)
    tiny_pipe.vae.enable_slicing()
    assert_close(draw(tiny_pipe, **options), expected)


@pytest.mark.parametrize("options", [{}, {"au_guidance_scale": 3.0}])
def test_callbacks_see_and_change_the_tensors(steady_pipe, options):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        return {"latents": torch.zeros_like(tensors["latents"])}

    text, pooled = (16, CROSS_ATTENTION_DIM), (2, 16)
    shapes = {"latents": (1, 4, 16, 16), "prompt_embeds": (2, *text), "negative_prompt_embeds": (1, *text)}
    shapes |= {"add_text_embeds": pooled, "add_time_ids": (2, 6)}
    names = [name for name in steady_pipe._callback_tensor_inputs if name in shapes]
    latents = draw(
        steady_pipe, aus=SMILE, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, **options
    )
    shapes = {name: shapes[name] for name in names}
    assert seen == [(0, shapes), (1, shapes)]
    assert not latents.any()


def test_a_callback_can_interrupt(tiny_pipe):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = True
        return tensors

    draw(tiny_pipe, aus=SMILE, num_inference_steps=4, callback_on_step_end=callback)
    assert steps == [0]


@pytest.mark.parametrize("options", [{}, {"au_guidance_scale": 3.0}])
def test_guidance_can_be_cut_off_on_the_way(steady_pipe, options):
    callback = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    cut = draw(steady_pipe, aus=SMILE, num_inference_steps=4, callback_on_step_end=callback, **options)
    assert not torch.allclose(cut, draw(steady_pipe, aus=SMILE, num_inference_steps=4, **options), atol=1e-3)


def test_what_replaces_the_processors_does_not_lose_the_aus(tiny_pipe):
    expected = draw(tiny_pipe, aus=SMILE)
    tiny_pipe.enable_attention_slicing()
    assert_close(draw(tiny_pipe, aus=SMILE), expected, 1e-4)
    tiny_pipe.disable_attention_slicing()
    assert_close(draw(tiny_pipe, aus=SMILE), expected, 1e-4)
    tiny_pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(draw(tiny_pipe, aus=SMILE), expected)
    tiny_pipe.fuse_lora()  # diffusers fuses the projections without any LoRA that is not
    tiny_pipe.fuse_qkv_projections(vae=False)
    assert_close(draw(tiny_pipe, aus=SMILE), expected, 1e-4)


def test_a_guidance_distilled_unet(family, tiny_components, tiny_adapter_dir):
    config = {**tiny_components["unet"].config, "time_cond_proj_dim": 8}
    tiny_components["unet"] = type(tiny_components["unet"]).from_config(config).eval()
    pipe = family.make_pipe(**tiny_components)
    pipe.load_au_adapter(tiny_adapter_dir)
    assert not torch.allclose(draw(pipe, aus=SMILE), draw(pipe, aus=SMILE, au_guidance_scale=3.0), atol=1e-3)


def test_a_pipeline_made_from_another(plain_sd, tiny_adapter_dir, steady_pipe):
    pipe = type(steady_pipe).from_pipe(plain_sd)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_au_adapter(tiny_adapter_dir)
    assert torch.equal(draw(pipe, aus=SMILE), draw(steady_pipe, aus=SMILE))


def test_a_pipeline_made_from_one_with_an_adapter_has_it_too(tiny_pipe, tmp_path, caplog):
    expected = draw(tiny_pipe, aus=SMILE)
    pipe = type(tiny_pipe).from_pipe(tiny_pipe)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.au_adapter is tiny_pipe.au_adapter and "not switched over" not in caplog.text
    assert torch.equal(draw(pipe, aus=SMILE), expected)
    assert type(tiny_pipe).from_pipe(tiny_pipe, au_adapter=None).au_adapter is None


def test_saving_without_an_adapter_leaves_none_in_the_folder(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path)
    assert type(tiny_pipe).from_pretrained(tmp_path).au_adapter is not None
    tiny_pipe.unload_au_adapter()
    tiny_pipe.save_pretrained(tmp_path)
    assert type(tiny_pipe).from_pretrained(tmp_path).au_adapter is None
    assert not (tmp_path / "au_encoder").exists() and not list(tmp_path.glob("*.safetensors"))


def test_a_hub_that_is_not_reached_is_said(tmp_path, caplog):
    where = {"cache_dir": tmp_path, "local_files_only": True}
    assert find_adapter_beside("someone/base", **where) is None
    assert "Whether there is an AU adapter beside 'someone/base' is not known" in caplog.text
    # What huggingface_hub leaves in its cache when it has asked for a file that is not there.
    repository = tmp_path / "models--someone--base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / ".no_exist" / ("0" * 40)).mkdir(parents=True)
    (repository / ".no_exist" / ("0" * 40) / ATTN_PROCESSORS_NAME).touch()
    caplog.clear()
    assert find_adapter_beside("someone/base", **where) is None and not caplog.records


@pytest.fixture
def make_short_pipe(family, tiny_components):
    """A pipeline with a short UNet, an adapter and its LoRA."""

    def make_short_pipe(num_tokens: int):
        unet = shorten(tiny_components["unet"])
        adapter = make_adapter(unet, num_tokens=num_tokens)
        add_lora(unet, LORA_NAME)
        return family.make_pipe(unet=unet, au_adapter=adapter)

    return make_short_pipe


@pytest.mark.parametrize(
    ("family", "num_tokens", "fused"),
    [
        ("sd", 1, False),
        ("sdxl", 1, False),
        ("sd", 4, False),
        pytest.param("sd", 1, True, marks=pytest.mark.slow),
    ],
    indirect=["family"],
)
def test_a_compiled_unet_is_compiled_once(make_short_pipe, num_tokens, fused):
    pipe = make_short_pipe(num_tokens)
    if fused:
        pipe.fuse_lora(components=["unet"])
    calls = {
        "smile": {"aus": SMILE},
        "frown": {"aus": "1+4"},
        "weak": {"aus": SMILE, "au_scale": 0.5},
        "strong": {"aus": SMILE, "au_scale": 1.7},
        "off": {"aus": SMILE, "au_scale": 0},
        "none": {},
        "neutral": {"aus": {}},
        "away from a frown": {"aus": SMILE, "negative_aus": "4D"},
        "other": {"prompt": "a girl", "aus": SMILE, "guidance_scale": 3.0},
        "longer": {"aus": SMILE, "num_inference_steps": 2},
    }
    check_compiled_once(pipe, calls)


@pytest.mark.parametrize(("family", "num_tokens"), [("sd", 3), ("sdxl", 1)], indirect=["family"])
def test_with_masks_it_is_compiled_once_too(make_short_pipe, num_tokens):
    calls = {
        "both": {"aus": [SMILE, "1+4"], "au_masks": halves()},
        "one": {"aus": [SMILE, None], "au_masks": halves()[::-1]},
        "weak": {"prompt": "two girls", "aus": [SMILE, "1+4"], "au_masks": torch.rand(2, 16, 32), "au_scale": 0.5},
    }
    check_compiled_once(make_short_pipe(num_tokens), {name: {**WIDE, **options} for name, options in calls.items()})


def check_compiled_once(pipe, calls: dict[str, dict]) -> None:
    from torch._dynamo.utils import counters

    calls = {name: {"num_inference_steps": 1, **options} for name, options in calls.items()}
    expected = {name: draw(pipe, **options) for name, options in calls.items()}
    torch._dynamo.reset()
    counters.clear()
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name, options in calls.items():
            assert_close(draw(pipe, **options), expected[name])
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


# Bad input. No model runs before the error.


@pytest.fixture
def still_pipe(steady_pipe, monkeypatch):
    def ran(*args, **kwargs):
        raise AssertionError("a model ran before the input was checked")

    for name in ("unet", "text_encoder", "vae", "au_adapter"):
        monkeypatch.setattr(getattr(steady_pipe, name), "forward", ran)
    return steady_pipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aus": {"AU7": 1}}, "AU7"),
        ({"aus": {"AU6": float("nan")}}, "AU6"),
        ({"aus": {"AU6": float("inf")}}, "AU6"),
        ({"aus": {"AU6": 11}}, "AU6"),
        ({"aus": torch.zeros(13)}, "13"),
        ({"aus": "hapy"}, "happy"),
        ({"aus": "6G"}, "the grade 'G'"),
        ({"aus": [SMILE, SMILE]}, "`aus` has 2 expressions, but there are 1 prompts"),
        ({"prompt": ["a", "b", "c"], "aus": [SMILE, None]}, "2 expressions, but there are 3 prompts"),
        ({"prompt": ["a", "b", "c"], "aus": torch.zeros(2, 12)}, "2 expressions, but there are 3 prompts"),
        ({"aus": SMILE, "negative_aus": [SMILE, SMILE]}, "`negative_aus` has 2 expressions"),
        ({"aus": SMILE, "negative_aus": "hapy"}, "negative_aus"),
        ({"negative_aus": SMILE}, "there are no `aus`"),
        ({"au_masks": torch.ones(1, 8, 8)}, "there are no `aus`"),
        ({"aus": [SMILE, None, None], "au_masks": torch.ones(2, 8, 8)}, "3 expressions, but there are 2 masks"),
        ({"aus": [[SMILE, None, None]], "au_masks": torch.ones(2, 8, 8)}, "`aus\\[0\\]` has 3 expressions"),
        ({"aus": [[SMILE], [SMILE]], "au_masks": torch.ones(1, 8, 8)}, "for 2 pictures, but there are 1 prompts"),
        ({"aus": [SMILE, "AU7"], "au_masks": torch.ones(2, 8, 8)}, "AU7"),
        ({"aus": SMILE, "au_masks": torch.ones(2, 8, 16)}, "the picture has another shape"),
        ({"prompt": "a boy <AU12>", "aus": SMILE}, "Write them in one of the two"),
        ({"prompt": "a boy <AU7>"}, "AU7"),
        ({"prompt": ["a boy", "a girl <AU7>"]}, "`prompt\\[1\\]`"),
        ({"prompt": []}, "a list of at least one string, but is \\[\\]"),
        ({"prompt": ["a boy", 3]}, "has to be a string or a list"),
        ({"au_scale": 1e30}, "`au_scale` goes from -100 to 100, but is 1e\\+30"),
        ({"guidance_scale": 1e30}, "`guidance_scale` goes from -100 to 100"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` has to be a finite number"),
        ({"aus": SMILE, "au_guidance_scale": -1e3}, "`au_guidance_scale` goes from -100 to 100"),
        ({"prompt": 3}, "`prompt` has to be of type"),
        ({"prompt": None}, "Provide either `prompt` or `prompt_embeds`"),
        ({"num_inference_steps": 0}, "`num_inference_steps` has to be a whole number from 1 on, but is 0"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps`"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt`"),
        ({"au_scale": float("nan")}, "`au_scale` has to be a finite number, but is nan"),
        ({"au_scale": None}, "`au_scale` has to be a finite number, but is None"),
        ({"au_scale": "1"}, "`au_scale` has to be a finite number, but is '1'"),
        ({"au_guidance_scale": float("inf")}, "`au_guidance_scale` has to be a finite number, but is inf"),
        ({"height": 33}, "divisible by 8"),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt` has 2 entries, but `prompt` has 1"),
        ({"generator": [torch.Generator()] * 2}, "`generator` is a list of 2, but the call makes 1 images"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs"),
    ],
    ids=lambda value: str(value).partition(" object at ")[0][:60],  # an address differs from process to process
)
def test_bad_input_is_an_error_before_any_model_runs(still_pipe, options, message):
    with pytest.raises(ValueError, match=message):
        draw(still_pipe, **options)


def test_aus_without_an_adapter_are_an_error(tiny_base):
    with pytest.raises(ValueError, match="load_au_adapter"):
        draw(tiny_base, aus=SMILE)


# Numbers that are not finite


@pytest.mark.parametrize(
    ("component", "cause"),
    [
        ("text_encoder", "text encoder"),
        ("au_adapter", "AU adapter"),
        ("unet", "denoising: .* DDIMScheduler or the weights of the UNet"),
        ("vae", "VAE"),
    ],
)
def test_a_picture_that_is_not_finite_names_the_cause(tiny_pipe, component, cause):
    model = getattr(tiny_pipe, component)
    # The output projections of the UNet also make the AU tensors.
    for parameter in (model.conv_in if component == "unet" else model).parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    with pytest.raises(ValueError, match=f"not finite. They come from (the )?{cause}"):
        draw(tiny_pipe, aus=SMILE, output_type="pil")


# Mixed precision


def test_components_of_mixed_precision_draw(tiny_pipe):
    options = {"aus": SMILE, "output_type": "pt", "guidance_scale": 2.0}
    expected = draw(tiny_pipe, **options)
    tiny_pipe.text_encoder.half()
    tiny_pipe.vae.bfloat16()
    torch.testing.assert_close(draw(tiny_pipe, **options).float(), expected, atol=0.05, rtol=0)


def test_models_are_loaded_in_the_dtype_of_the_unet(family, tiny_components, tmp_path):
    """transformers takes the dtype of a file, diffusers float32."""
    tiny_components["text_encoder"].half()
    family.make_plain_pipe(**tiny_components).save_pretrained(tmp_path)
    pipe = family.pipeline_class.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.text_encoder.dtype, pipe.unet.dtype, pipe.vae.dtype} == {torch.float32}
    others = {name: component for name, component in pipe.components.items() if name != "au_adapter"}
    neighbour = family.make_plain_pipe(**others)
    assert torch.equal(draw(pipe, output_type="pt"), draw(neighbour, output_type="pt"))
    assert family.pipeline_class.from_pretrained(tmp_path, dtype=torch.bfloat16).text_encoder.dtype == torch.bfloat16


# Prompts


@pytest.mark.parametrize("prompt", ["", "   ", ["a boy", ""]])
def test_an_empty_prompt_is_a_prompt(steady_pipe, steady_bases, prompt):
    latents = torch.ones(1 if isinstance(prompt, str) else 2, 4, 16, 16)
    assert draw(steady_pipe, prompt, aus=SMILE, latents=latents).isfinite().all()
    assert torch.equal(*(draw(pipe, prompt) for pipe in steady_bases))


def test_a_tag_alone_is_an_expression_without_words(steady_pipe):
    assert torch.equal(draw(steady_pipe, "<AU6=2.5 AU12=5>"), draw(steady_pipe, "", aus=SMILE))


@pytest.mark.parametrize("family", ["sd"], indirect=True)  # one call teaches one text encoder
def test_a_token_that_the_tokenizer_was_taught_is_no_tag(tiny_pipe):
    happy = draw(tiny_pipe, "a dog", aus="happy")
    assert torch.equal(draw(tiny_pipe, "a <happy> dog"), happy)
    tiny_pipe.load_textual_inversion({"<happy>": torch.ones(CROSS_ATTENTION_DIM)}, token="<happy>")
    taught = draw(tiny_pipe, "a <happy> dog")
    assert not torch.allclose(taught, happy, atol=1e-3)
    assert not torch.allclose(draw(tiny_pipe, "a <happy> dog <AU12=5>"), taught, atol=1e-3)
    assert torch.equal(draw(tiny_pipe, "a <happy> dog <AU12=5>"), draw(tiny_pipe, "a <happy> dog", aus="AU12=5"))


def test_without_an_adapter_the_name_of_a_preset_is_a_word(tiny_base, plain_sd):
    assert torch.equal(draw(tiny_base, "a <happy> dog"), draw(plain_sd, "a <happy> dog"))
    with pytest.raises(ValueError, match="`aus` need an AU adapter"):
        draw(tiny_base, "a dog <AU12>")


# The LoRA of the adapter


def load_style(pipe, folder) -> None:
    unet = type(pipe.unet).from_config(pipe.unet.config)
    add_lora(unet, "style", seed=8)
    layers = {name.replace(".style.", "."): weight for name, weight in unet.state_dict().items() if ".lora_" in name}
    pipe.base_class.save_lora_weights(folder, unet_lora_layers=layers)
    pipe.load_lora_weights(folder, adapter_name="style")


def test_an_adapter_on_top_of_a_fused_one_is_refused(tiny_pipe, tiny_adapter_dir, tmp_path):
    expected = draw(tiny_pipe, aus=SMILE)
    tiny_pipe.fuse_lora()
    tiny_pipe.unload_lora_weights()
    assert_close(draw(tiny_pipe, aus=SMILE), expected)
    for pipe in (tiny_pipe, type(tiny_pipe).from_pipe(tiny_pipe)):
        with pytest.raises(ValueError, match="Load the base model anew"):
            pipe.load_au_adapter(tiny_adapter_dir)
        with pytest.raises(ValueError, match="no longer on the UNet, so it cannot be saved"):
            pipe.save_au_adapter(tmp_path)
    assert_close(draw(tiny_pipe, aus=SMILE), expected)


def test_another_lora_fused_alone_is_refused(tiny_pipe, tmp_path):
    load_style(tiny_pipe, tmp_path)
    expected = draw(tiny_pipe, aus=SMILE)
    tiny_pipe.fuse_lora(adapter_names=["style"])
    with pytest.raises(ValueError, match="style is fused into the UNet, which switches the LoRA 'fineface'"):
        draw(tiny_pipe, aus=SMILE)
    tiny_pipe.unfuse_lora()
    tiny_pipe.fuse_lora(adapter_names=["style", LORA_NAME])
    assert_close(draw(tiny_pipe, aus=SMILE), expected, 1e-3)


def test_a_lora_that_is_off_is_said_once(tiny_pipe, tmp_path, caplog):
    load_style(tiny_pipe, tmp_path)
    others = tiny_pipe.base_class.from_pipe(tiny_pipe)

    def warnings() -> list[str]:
        caplog.clear()
        for _ in range(2):
            draw(tiny_pipe, aus=SMILE, num_inference_steps=1)
        return [record.getMessage() for record in caplog.records if LORA_NAME in record.getMessage()]

    assert not warnings()
    tiny_pipe.set_adapters("style")
    (message,) = warnings()
    assert "is switched off. `set_adapters`" in message
    tiny_pipe.set_adapters(["style", LORA_NAME])
    assert not warnings()
    others.set_adapters("style")
    assert len(warnings()) == 1
    tiny_pipe.unload_lora_weights()
    (message,) = warnings()
    assert "is not on the UNet" in message


# Concurrent calls


def test_concurrent_calls_take_turns(tiny_pipe):
    """A scheduler with a memory of its steps would mix them up."""
    tiny_pipe.scheduler = PNDMScheduler.from_config(tiny_pipe.scheduler.config, skip_prk_steps=True)
    sharing = type(tiny_pipe).from_pipe(tiny_pipe)
    sharing.set_progress_bar_config(disable=True)
    calls = [(pipe, seed) for pipe in (tiny_pipe, sharing) for seed in range(2)]

    def draw_one(call) -> torch.Tensor:
        return draw(call[0], aus=SMILE, seed=call[1], num_inference_steps=4)

    expected = [draw_one(call) for call in calls]
    with ThreadPoolExecutor(len(calls)) as threads:
        found = list(threads.map(draw_one, calls))
    assert all(map(torch.equal, found, expected))


def test_a_call_from_its_own_callback_is_refused(steady_pipe):
    def callback(pipe, step, timestep, tensors):
        draw(pipe)

    with pytest.raises(RuntimeError, match="called by a callback of its own call"):
        draw(steady_pipe, callback_on_step_end=callback)
    assert draw(steady_pipe).isfinite().all()


def test_a_call_that_another_thread_interrupts_ends(steady_pipe):
    started, stopped, steps = threading.Event(), threading.Event(), []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        started.set()
        stopped.wait(60)
        return tensors

    with ThreadPoolExecutor(2) as threads:
        cancelled = threads.submit(draw, steady_pipe, num_inference_steps=50, callback_on_step_end=callback)
        assert started.wait(60)
        steady_pipe._interrupt = True
        waiting = threads.submit(draw, steady_pipe, seed=1, aus=SMILE)
        stopped.set()
        cancelled.result(), waiting.result()
    assert steps == [0] and torch.equal(waiting.result(), draw(steady_pipe, seed=1, aus=SMILE))


def test_an_unknown_argument_is_an_error(steady_pipe):
    with pytest.raises(TypeError, match="au_scales"):
        steady_pipe(PROMPT, au_scales=1.0)


def test_the_adapter_knows_the_aus_of_the_pipeline(steady_pipe):
    assert steady_pipe.au_adapter.config.num_aus == len(AU_NAMES)
    assert steady_pipe.au_adapter.config.hidden_dim == HIDDEN_DIM


# Families


def test_a_base_of_another_family_is_an_error(tiny_sd_dir, tiny_xl_dir, tiny_xl_adapter_dir):
    with pytest.raises(ValueError, match="The UNet belongs to Stable Diffusion XL.*Use `FineFaceXLPipeline`"):
        FineFacePipeline.from_pretrained(tiny_xl_dir)
    components = {**FAMILIES["sdxl"].make_components(), "unet": FAMILIES["sd"].make_components()["unet"]}
    with pytest.raises(ValueError, match="none of Stable Diffusion XL. .*use `FineFacePipeline`"):
        FineFaceXLPipeline(**components)
    # An adapter of the same width, for other layers.
    pipe = FineFacePipeline.from_pretrained(tiny_sd_dir)
    with pytest.raises(ValueError, match="fits another base model"):
        pipe.load_au_adapter(tiny_xl_adapter_dir)


XL_ONLY = {
    "two prompts": {"prompt_2": "a painting"},
    "two negative prompts": {"negative_prompt": "ugly", "negative_prompt_2": "dark"},
    "sizes": {"original_size": (64, 48), "crops_coords_top_left": (8, 4), "target_size": (32, 32)},
    "negative sizes": {"negative_original_size": (8, 8), "negative_target_size": (32, 32)},
    "the first part": {"denoising_end": 0.5, "num_inference_steps": 4},
    "an earlier layer": {"clip_skip": 1},
}


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
@pytest.mark.parametrize("name", XL_ONLY)
def test_what_only_xl_takes_keeps_its_meaning(steady_bases, steady_pipe, name):
    ours, theirs = steady_bases
    options = XL_ONLY[name]
    plain = draw(theirs, **options)
    assert torch.equal(draw(ours, **options), plain)
    assert not torch.allclose(draw(theirs, num_inference_steps=options.get("num_inference_steps", 2)), plain)
    smile = draw(steady_pipe, aus=SMILE, **options)
    assert not torch.allclose(smile, draw(steady_pipe, aus="1+4", **options), atol=1e-3)
    # With guidance of its own, all is one branch more.
    joint = draw(steady_pipe, aus=SMILE, au_guidance_scale=5.0, **options)
    assert_close(joint, smile)


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_a_refiner_goes_on_from_where_the_pipeline_stopped(tiny_pipe):
    from diffusers import StableDiffusionXLImg2ImgPipeline

    whole = draw(tiny_pipe, num_inference_steps=4, aus=SMILE)
    half = draw(tiny_pipe, num_inference_steps=4, aus=SMILE, denoising_end=0.5)
    parts = {name: part for name, part in tiny_pipe.components.items() if name != "au_adapter"}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    au_kwargs = tiny_pipe.au_cross_attention_kwargs(SMILE, guidance_scale=5.0)
    options = {"denoising_start": 0.5, "num_inference_steps": 4, "output_type": "latent", "guidance_scale": 5.0}
    found = refiner(PROMPT, image=half, cross_attention_kwargs=au_kwargs, **options).images
    assert_close(found, whole, 1e-3)


def test_an_ip_adapter_beside_the_aus(tiny_pipe):
    alone = draw(tiny_pipe, aus=SMILE)
    weights = make_ip_adapter(tiny_pipe.unet)
    tiny_pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    embeds = [torch.randn(2, 1, IMAGE_DIM, generator=torch.Generator().manual_seed(0))]
    both = draw(tiny_pipe, aus=SMILE, ip_adapter_image_embeds=embeds)
    for options in ({"aus": "1+4"}, {"ip_adapter_image_embeds": [embeds[0].flip(0)]}, {"aus": None}):
        options = {"aus": SMILE, "ip_adapter_image_embeds": embeds, **options}
        assert not torch.allclose(draw(tiny_pipe, **options), both, atol=1e-3)
    joint = draw(tiny_pipe, aus=SMILE, ip_adapter_image_embeds=embeds, guidance_scale=4.0, au_guidance_scale=4.0)
    assert_close(joint, draw(tiny_pipe, aus=SMILE, ip_adapter_image_embeds=embeds, guidance_scale=4.0))
    tiny_pipe.set_ip_adapter_scale(0.0)
    assert_close(draw(tiny_pipe, aus=SMILE, ip_adapter_image_embeds=embeds), alone)


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
@pytest.mark.parametrize("force_upcast", [True, False])
def test_the_vae_of_xl_decodes_in_single_precision_unless_it_is_a_fixed_one(tiny_pipe, force_upcast, monkeypatch):
    tiny_pipe.to(dtype=torch.float16)
    tiny_pipe.vae.register_to_config(force_upcast=force_upcast)
    seen, decode = [], tiny_pipe.vae.decode
    monkeypatch.setattr(tiny_pipe.vae, "decode", lambda z, **kwargs: seen.append(z.dtype) or decode(z, **kwargs))
    assert draw(tiny_pipe, aus=SMILE, output_type="pt").isfinite().all()
    assert seen == [torch.float32 if force_upcast else torch.float16]
    assert tiny_pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 16, 768), "pooled_prompt_embeds": torch.zeros(1, 16)},
            "`prompt_embeds` is 768 wide, but this base needs 32. Embeddings of Stable Diffusion 1.x",
        ),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 16, 32), "pooled_prompt_embeds": torch.zeros(1, 8)},
            "`pooled_prompt_embeds` is 8 wide, but this base needs 16",
        ),
        ({"prompt_2": ["a", "b"]}, "`prompt_2` has 2 entries, but `prompt` has 1"),
        ({"negative_prompt_2": ["a", "b"]}, "`negative_prompt_2` has 2 entries"),
        ({"denoising_end": 1.5}, "`denoising_end` is the share"),
    ],
)
def test_bad_input_of_xl_is_an_error(still_pipe, options, message):
    with pytest.raises(ValueError, match=message):
        draw(still_pipe, **options)
