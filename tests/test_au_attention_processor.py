import inspect
import logging
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CROSS_ATTENTION_DIM, add_lora, make_adapter, make_components
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor
from PIL import Image

from au_attention_processor import (
    AUAttnProcessor,
    attach_au_processors,
    au_cross_attention_kwargs,
    au_layers,
    au_processors_detached,
    detach_au_processors,
    read_au_masks,
)
from au_encoder import AUAdapter


SD21_UNET = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SD15_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}
# Inner width of each cross-attention layer: two in each of three down blocks, three in each of three up blocks.
SD_WIDTHS = {
    **{f"down_blocks.{i}.attentions.{j}": width for i, width in enumerate((320, 640, 1280)) for j in range(2)},
    "mid_block.attentions.0": 1280,
    **{f"up_blocks.{i}.attentions.{j}": width for i, width in ((1, 1280), (2, 640), (3, 320)) for j in range(3)},
}


def some_aus(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return 5 * torch.rand(batch, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def unet() -> UNet2DConditionModel:
    unet = make_components()["unet"]
    attach_au_processors(unet)
    return unet


def call_unet(unet, au_kwargs=None, batch: int = 2, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, 16, 16, generator=generator)
    text = torch.randn(batch, 7, CROSS_ATTENTION_DIM, generator=generator)
    return unet(sample, 500, text, cross_attention_kwargs=au_kwargs, **kwargs).sample


@torch.no_grad()
def predict(unet, adapter, au_scale=1.0, general=False, **kwargs) -> torch.Tensor:
    lora_scale = kwargs.pop("lora_scale", 1.0)
    au_kwargs = au_cross_attention_kwargs(unet, *adapter(some_aus()), au_scale, lora_scale, general)
    assert set(au_kwargs) == ({"au_keys", "au_values"} if general else {"au_residual"})
    return call_unet(unet, {**au_kwargs, "scale": lora_scale}, **kwargs)


@pytest.mark.parametrize("au_scale", [1.0, -0.7, torch.tensor([0.3, 1.4])])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lora_scale", [None, 1.0, 0.4])
def test_one_token_path_equals_the_general_attention(unet, lora_scale, masked, au_scale):
    adapter = make_adapter(unet)
    options = {}
    if lora_scale is not None:
        add_lora(unet, "fineface")
        options["lora_scale"] = lora_scale
    if masked:
        options["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 0]])
    fast = predict(unet, adapter, au_scale, **options)
    general = predict(unet, adapter, au_scale, general=True, **options)
    assert (fast - call_unet(unet)).abs().max() > 0.01
    torch.testing.assert_close(fast, general, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_layer_computes_equation_2(unet, num_tokens):
    adapter = make_adapter(unet, num_tokens=num_tokens)
    add_lora(unet, "fineface")
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    attn = unet.get_submodule(name)
    generator = torch.Generator().manual_seed(3)
    hidden_states = torch.randn(2, 9, attn.query_dim, generator=generator)
    text = torch.randn(2, 7, CROSS_ATTENTION_DIM, generator=generator)
    au_scale = 0.6

    def attention(query, key, value):
        query, key, value = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value))
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        return (weights @ value).transpose(1, 2).flatten(2)

    with torch.no_grad():
        weights = adapter.attn_processors_state_dict()
        tokens = adapter.encoder(some_aus())
        query = attn.to_q(hidden_states)
        z = attention(query, attn.to_k(text), attn.to_v(text))
        z = z + au_scale * attention(
            query,
            F.linear(tokens, weights[f"{name}.processor.to_k_au.weight"]),
            F.linear(tokens, weights[f"{name}.processor.to_v_au.weight"]),
        )
        au_kwargs = au_cross_attention_kwargs(unet, *adapter(some_aus()), au_scale)
        torch.testing.assert_close(attn(hidden_states, text, **au_kwargs), attn.to_out[0](z), atol=1e-5, rtol=1e-5)


def test_doubling_the_scale_doubles_the_au_term(unet):
    au_keys, au_values = make_adapter(unet)(some_aus())
    once = au_cross_attention_kwargs(unet, au_keys, au_values, 1.0)["au_residual"]
    torch.testing.assert_close(au_cross_attention_kwargs(unet, au_keys, au_values, 2.0)["au_residual"], 2 * once)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_zero_scale_adds_exactly_nothing(unet, num_tokens):
    adapter = make_adapter(unet, num_tokens=num_tokens)
    with torch.no_grad():
        plain = call_unet(unet)
        zero = call_unet(unet, au_cross_attention_kwargs(unet, *adapter(some_aus()), 0.0))
        half = call_unet(unet, au_cross_attention_kwargs(unet, *adapter(some_aus()), torch.tensor([0.0, 1.0])))
    assert torch.equal(zero, plain)
    assert torch.equal(half[0], plain[0]) and not torch.equal(half[1], plain[1])


def test_processors_go_on_and_off_without_a_trace():
    unet = make_components()["unet"]
    before, keys, plain = unet.attn_processors, list(unet.state_dict()), call_unet(unet)
    names = [name for name, _ in unet.named_modules()]
    attach_au_processors(unet)
    assert all(isinstance(processor, AUAttnProcessor) for processor in unet.attn_processors.values())
    assert list(unet.state_dict()) == keys and torch.equal(call_unet(unet), plain)
    detach_au_processors(unet)
    assert all(processor is before[name] for name, processor in unet.attn_processors.items())
    assert [name for name, _ in unet.named_modules()] == names


def test_attaching_wraps_each_layer_once_and_only_where_needed(unet):
    first = unet.attn_processors
    attach_au_processors(unet)
    assert all(processor is first[name] for name, processor in unet.attn_processors.items())
    unet.set_attention_slice("max")
    attach_au_processors(unet)
    assert all(isinstance(processor.processor, SlicedAttnProcessor) for processor in unet.attn_processors.values())


@pytest.mark.parametrize("attached", [False, True])
def test_detaching_for_a_while_restores_what_was(unet, attached):
    if not attached:
        detach_au_processors(unet)
    with au_processors_detached(unet):
        assert all(type(processor) is AttnProcessor2_0 for processor in unet.attn_processors.values())
    assert all(isinstance(p, AUAttnProcessor) == attached for p in unet.attn_processors.values())


def test_diffusers_has_nothing_to_warn_of(unet, caplog):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    predict(unet, make_adapter(unet))
    predict(unet, make_adapter(unet), general=True)
    logger.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize("sliced", [False, True])
def test_sliced_attention_gives_the_same(unet, sliced):
    expected = predict(unet, make_adapter(unet))
    unet.set_attention_slice("max" if sliced else None)
    attach_au_processors(unet)
    torch.testing.assert_close(predict(unet, make_adapter(unet)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_encoder_values_and_lora_receive_gradients(unet, checkpointing):
    adapter = make_adapter(unet)
    unet.requires_grad_(False)
    add_lora(unet, "fineface")
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    call_unet(unet, au_cross_attention_kwargs(unet, *adapter(some_aus()))).square().mean().backward()
    with_gradient = {name for name, p in unet.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {name for name in unet.state_dict() if ".lora_" in name}
    assert adapter.to_v_au.weight.grad.any() and adapter.encoder.intensity_proj.weight.grad.any()
    assert adapter.to_k_au.weight.grad is None or not adapter.to_k_au.weight.grad.any()


def test_keys_learn_with_more_than_one_token(unet):
    adapter = make_adapter(unet, num_tokens=3)
    call_unet(unet, au_cross_attention_kwargs(unet, *adapter(some_aus()))).square().mean().backward()
    assert adapter.to_k_au.weight.grad.any() and adapter.to_v_au.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_adapter_drives_a_half_precision_unet(unet, dtype):
    adapter = make_adapter(unet)
    au_kwargs = au_cross_attention_kwargs(unet.to(dtype=dtype), *adapter(some_aus()))
    assert au_kwargs["au_residual"].dtype == dtype


def test_weights_elsewhere_are_left_to_the_unet(unet):
    au_keys, au_values = (tensor.to("meta") for tensor in make_adapter(unet)(some_aus()))
    assert set(au_cross_attention_kwargs(unet, au_keys, au_values)) == {"au_keys", "au_values"}


@pytest.mark.parametrize("config", [SD21_UNET, SD15_UNET], ids=["sd21", "sd15"])
def test_all_sixteen_layers_of_the_real_unets_get_their_width(config):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        adapter = AUAdapter(au_layers(unet), config["cross_attention_dim"])
        attach_au_processors(unet)
    assert au_layers(unet) == {f"{name}.transformer_blocks.0.attn2": width for name, width in SD_WIDTHS.items()}
    weights = adapter.attn_processors_state_dict()
    for name, width in au_layers(unet).items():
        assert weights[f"{name}.processor.to_v_au.weight"].shape == (width, config["cross_attention_dim"])
        channels = unet.get_submodule(name).processor.channels
        assert channels.stop - channels.start == width
    with torch.device("meta"):
        au_kwargs = au_cross_attention_kwargs(unet, *adapter(torch.zeros(2, 12)))
        sample, text = torch.zeros(2, 4, 64, 64), torch.zeros(2, 77, config["cross_attention_dim"])
        assert unet(sample, torch.tensor(1), text, cross_attention_kwargs=au_kwargs).sample.shape == sample.shape


def test_a_unet_without_cross_attention_is_an_error():
    unet = UNet2DConditionModel(
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        norm_num_groups=2,
    )
    with pytest.raises(ValueError, match="no cross-attention layers"):
        au_layers(unet)


def traced_calls(unet, au_kwargs=None) -> Counter:
    """What a call of the UNet consists of, by name."""
    graphs = []

    def keep_graph(graph, example_inputs):
        graphs.append(graph.graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        call_unet(torch.compile(unet, fullgraph=True, backend=keep_graph), au_kwargs)
    (graph,) = graphs
    calls = (node for node in graph.nodes if node.op in ("call_function", "call_method"))
    return Counter(getattr(node.target, "__name__", node.target) for node in calls)


def test_one_token_costs_one_addition_a_layer():
    unet = make_components()["unet"]
    plain = traced_calls(unet)
    attach_au_processors(unet)
    with torch.no_grad():
        au_kwargs = au_cross_attention_kwargs(unet, *make_adapter(unet)(some_aus()))
    # Of the vector that holds those of all layers, each takes its own; the cast does nothing.
    num_layers = len(au_layers(unet))
    added = traced_calls(unet, au_kwargs) - plain
    assert added.pop("add") == num_layers and added["scaled_dot_product_attention"] == added["linear"] == 0
    assert set(added) <= {"getitem", "to"}, added


def test_the_signature_that_each_step_asks_for_is_known_and_right():
    processor = AUAttnProcessor(Attention(8).processor)
    known = inspect.signature(processor.__call__)
    assert inspect.signature(processor.__call__) is known
    names = ["attn", "hidden_states", "encoder_hidden_states", "attention_mask", "ip_adapter_masks"]
    assert list(known.parameters) == [*names, "au_residual", "au_keys", "au_values", "au_masks"]
    code = AUAttnProcessor.__call__.__code__
    assert ("self", *known.parameters) == code.co_varnames[: code.co_argcount]


# Masks: several people in one picture


def some_masks(batch: int = 2, people: int = 2, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return read_au_masks(torch.rand(batch, people, 32, 32, generator=generator), batch, size)


@torch.no_grad()
def predict_people(unet, adapter, au_masks, general=False, au_scale=1.0) -> torch.Tensor:
    rows = some_aus(au_masks.shape[0] * au_masks.shape[1])
    au_kwargs = au_cross_attention_kwargs(unet, *adapter(rows), au_scale, general=general, au_masks=au_masks)
    return call_unet(unet, au_kwargs)


@pytest.mark.parametrize("general", [False, True])
def test_one_full_mask_is_no_mask(unet, general):
    adapter = make_adapter(unet)
    full = predict_people(unet, adapter, read_au_masks(torch.ones(1, 8, 8), 2, (16, 16)), general)
    torch.testing.assert_close(full, predict(unet, adapter, general=general), atol=1e-6, rtol=0)


@pytest.mark.parametrize("au_scale", [1.0, torch.tensor([0.3, 0.0, 1.4, 2.0])])
def test_one_token_path_equals_the_general_attention_under_masks(unet, au_scale):
    adapter = make_adapter(unet)
    fast = predict_people(unet, adapter, some_masks(), au_scale=au_scale)
    general = predict_people(unet, adapter, some_masks(), general=True, au_scale=au_scale)
    assert (fast - predict(unet, adapter)).abs().max() > 0.01
    torch.testing.assert_close(fast, general, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_layer_adds_up_the_people_where_they_are(unet, num_tokens):
    adapter = make_adapter(unet, num_tokens=num_tokens)
    attn = unet.get_submodule("up_blocks.1.attentions.0.transformer_blocks.0.attn2")
    generator = torch.Generator().manual_seed(3)
    # 3×5 queries of latents 5×9, as the UNet's downsampling rounds.
    hidden_states = torch.randn(1, 15, attn.query_dim, generator=generator)
    text = torch.randn(1, 7, CROSS_ATTENTION_DIM, generator=generator)
    rows = some_aus(2)
    masks = torch.zeros(1, 2, 5, 9)
    masks[:, 0, :, :4], masks[:, 1, :, 4:] = 1, 0.5
    weights = F.adaptive_avg_pool2d(masks, (3, 5)).flatten(2)  # (1, people, queries)
    with torch.no_grad():
        plain = attn(hidden_states, text)
        au_kwargs = au_cross_attention_kwargs(unet, *adapter(rows), au_masks=masks)
        found = attn(hidden_states, text, **au_kwargs) - plain
        expected = torch.zeros_like(plain)
        for person in range(2):
            alone = au_cross_attention_kwargs(unet, *adapter(rows[person : person + 1]))
            expected += weights[:, person, :, None] * (attn(hidden_states, text, **alone) - plain)
    assert 0 < weights[0, 0].sum() < 15
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_outside_all_masks_is_the_base(unet, num_tokens):
    adapter = make_adapter(unet, num_tokens=num_tokens)
    with torch.no_grad():
        assert torch.equal(predict_people(unet, adapter, torch.zeros(2, 3, 16, 16)), call_unet(unet))


def test_masks_of_another_size_than_the_picture_are_an_error(unet):
    with pytest.raises(ValueError, match="not the size of the picture"):
        predict_people(unet, make_adapter(unet), some_masks(size=(24, 24)))


def test_masks_come_in_every_form():
    left, right = torch.zeros(32, 64), torch.zeros(32, 64)
    left[:, :32] = right[:, 32:] = 1
    pictures = [Image.fromarray((255 * mask).byte().numpy()) for mask in (left, right)]
    expected = torch.zeros(3, 2, 4, 8)
    expected[:, 0, :, :4] = expected[:, 1, :, 4:] = 1
    for masks in (
        torch.stack([left, right]),
        torch.stack([left, right])[None],
        torch.stack([left, right])[None].expand(3, -1, -1, -1),
        np.stack([left, right]).astype(bool),
        [left, right],
        pictures,
        [picture.convert("1") for picture in pictures],
        [pictures] * 3,
    ):
        assert torch.equal(read_au_masks(masks, 3, (4, 8)), expected)
    assert torch.equal(read_au_masks(pictures[0], 1, (4, 8)), expected[:1, :1])
    # The edge lies within the second of five columns.
    edge = torch.zeros(2, 4)
    edge[:, :1] = 1
    assert read_au_masks(edge, 1, (1, 2)).tolist() == [[[[0.5, 0.0]]]]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(4), "shape \\(4,\\)"),
        (torch.zeros(1, 0, 8, 8), "shape"),
        (torch.zeros(3, 1, 8, 8), "3 pictures, but there are 2 prompts"),
        (torch.full((1, 8, 8), 255.0), "goes from 255 to 255"),
        (torch.full((1, 8, 8), float("nan")), "goes from nan"),
        (torch.zeros(1, 8, 16), "16×8 wide and high"),
        ([torch.zeros(8, 8), torch.zeros(8, 9)], "\\(8, 8\\), \\(8, 9\\)"),
        ([], "an empty list"),
        (["left"], "a str"),
        (None, "a NoneType"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_mask_is_an_error(masks, message):
    with pytest.raises(ValueError, match=message):
        read_au_masks(masks, 2, (16, 16))
