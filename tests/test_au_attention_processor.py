import copy
import inspect
import logging
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from PIL import Image
from tiny import CROSS_ATTENTION_DIM, add_lora, make_adapter, make_components, shorten

from au_attention_processor import (
    AUAttnProcessor,
    attach_au_processors,
    au_layers,
    detach_au_processors,
    pack_au_tensors,
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
    options = {"au_scale": au_scale, "lora_scale": lora_scale, "general": general}
    au_kwargs = pack_au_tensors(unet, *adapter(some_aus()), **options)
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
        au_kwargs = pack_au_tensors(unet, *adapter(some_aus()), au_scale=au_scale)
        torch.testing.assert_close(attn(hidden_states, text, **au_kwargs), attn.to_out[0](z), atol=1e-5, rtol=1e-5)


def test_doubling_the_scale_doubles_the_au_term(unet):
    au_keys, au_values = make_adapter(unet)(some_aus())
    once = pack_au_tensors(unet, au_keys, au_values, au_scale=1.0)["au_residual"]
    torch.testing.assert_close(pack_au_tensors(unet, au_keys, au_values, au_scale=2.0)["au_residual"], 2 * once)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_zero_scale_adds_exactly_nothing(unet, num_tokens):
    adapter = make_adapter(unet, num_tokens=num_tokens)
    with torch.no_grad():
        plain = call_unet(unet)
        zero = call_unet(unet, pack_au_tensors(unet, *adapter(some_aus()), au_scale=0.0))
        half = call_unet(unet, pack_au_tensors(unet, *adapter(some_aus()), au_scale=torch.tensor([0.0, 1.0])))
    assert torch.equal(zero, plain)
    assert torch.equal(half[0], plain[0]) and not torch.equal(half[1], plain[1])


def test_processors_go_on_and_off_without_a_trace():
    unet = make_components()["unet"]
    before, keys, plain = unet.attn_processors, list(unet.state_dict()), call_unet(unet)
    attributes = {name: set(vars(module)) for name, module in unet.named_modules()}
    attach_au_processors(unet)
    assert all(isinstance(processor, AUAttnProcessor) for processor in unet.attn_processors.values())
    assert list(unet.state_dict()) == keys and torch.equal(call_unet(unet), plain)
    detach_au_processors(unet)
    for name, processor in unet.attn_processors.items():
        assert processor is before[name] and type(processor) is AttnProcessor2_0
    assert {name: set(vars(module)) for name, module in unet.named_modules()} == attributes
    assert not unet._forward_pre_hooks


def test_a_processor_with_aus_is_what_it_extends(unet):
    for processor in unet.attn_processors.values():
        assert isinstance(processor, AttnProcessor2_0) and not isinstance(processor, torch.nn.Module)
        assert type(processor).__name__ == "AttnProcessor2_0WithAUs" and isinstance(
            type(processor)(), AttnProcessor2_0
        )
    unet.set_attention_slice(2)
    attach_au_processors(unet)
    processor = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2").processor
    assert isinstance(processor, SlicedAttnProcessor) and processor.slice_size == 2
    assert isinstance(type(processor)(1), SlicedAttnProcessor)
    ip_adapter = IPAdapterAttnProcessor2_0(16, 32, num_tokens=(4,), scale=0.3)
    weights = ip_adapter.state_dict()
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(ip_adapter)
    attach_au_processors(unet)
    processor = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.processor")
    assert processor is ip_adapter and isinstance(processor, torch.nn.Module) and processor.scale == [0.3]
    assert processor.state_dict().keys() == weights.keys()
    remade = type(processor)(hidden_size=16, cross_attention_dim=32, num_tokens=(4,), scale=0.5)
    assert isinstance(remade, IPAdapterAttnProcessor2_0) and remade.scale == [0.5]


def test_each_class_is_extended_once(unet):
    assert len({type(processor) for processor in unet.attn_processors.values()}) == 1
    first = unet.attn_processors
    attach_au_processors(unet)
    assert all(processor is first[name] for name, processor in unet.attn_processors.items())
    assert len(unet._forward_pre_hooks) == 1


def test_processors_that_are_set_later_take_aus_too(unet):
    """One object for all layers, as `set_attn_processor` allows."""
    adapter = make_adapter(unet)
    expected = predict(unet, adapter)
    shared = AttnProcessor2_0()
    unet.set_attn_processor(shared)
    assert torch.equal(predict(unet, adapter), expected)
    assert set(unet.attn_processors.values()) == {shared} and isinstance(shared, AUAttnProcessor)


def test_the_default_processors_of_diffusers_take_aus_too(unet):
    unet.set_default_attn_processor()
    assert all(isinstance(processor, AttnProcessor) for processor in unet.attn_processors.values())
    assert all(isinstance(processor, AUAttnProcessor) for processor in unet.attn_processors.values())
    detach_au_processors(unet)
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor}
    assert "set_default_attn_processor" not in vars(unet)


def test_a_copied_unet_keeps_its_own_processors(unet):
    adapter, other = make_adapter(unet), copy.deepcopy(unet)
    other.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(predict(other, adapter), predict(unet, adapter))
    assert all(isinstance(processor, AUAttnProcessor) for processor in other.attn_processors.values())


def test_what_no_class_can_extend_is_an_error(unet):
    with pytest.raises(TypeError, match="of the type function"):
        unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor = lambda *args: None
        attach_au_processors(unet)


def test_the_arguments_of_a_processor_stay_its_own(unet):
    class Tinted(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, tint=0.0):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask) + tint

    unet.set_attn_processor(Tinted())
    attach_au_processors(unet)
    processor = unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor
    names = ["attn", "hidden_states", "encoder_hidden_states", "attention_mask", "tint"]
    found = list(inspect.signature(processor.__call__).parameters)
    assert found == [*names, "au_residual", "au_keys", "au_values", "au_masks"]
    assert not torch.allclose(call_unet(unet, {"tint": 1.0}), call_unet(unet), atol=1e-3)


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_aus_for_another_batch_are_an_error(unet, rows, general):
    au_kwargs = pack_au_tensors(unet, *make_adapter(unet)(some_aus(rows)), general=general)
    with pytest.raises(ValueError, match=f"have {rows} rows, but this call of the UNet has 2.*`guidance_scale`"):
        call_unet(unet, au_kwargs)


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
    call_unet(unet, pack_au_tensors(unet, *adapter(some_aus()))).square().mean().backward()
    with_gradient = {name for name, p in unet.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {name for name in unet.state_dict() if ".lora_" in name}
    assert adapter.to_v_au.weight.grad.any() and adapter.encoder.intensity_proj.weight.grad.any()
    assert adapter.to_k_au.weight.grad is None or not adapter.to_k_au.weight.grad.any()


def test_keys_learn_with_more_than_one_token(unet):
    adapter = make_adapter(unet, num_tokens=3)
    call_unet(unet, pack_au_tensors(unet, *adapter(some_aus()))).square().mean().backward()
    assert adapter.to_k_au.weight.grad.any() and adapter.to_v_au.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_adapter_drives_a_half_precision_unet(unet, dtype):
    adapter = make_adapter(unet)
    au_kwargs = pack_au_tensors(unet.to(dtype=dtype), *adapter(some_aus()))
    assert au_kwargs["au_residual"].dtype == dtype


def test_weights_elsewhere_are_left_to_the_unet(unet):
    au_keys, au_values = (tensor.to("meta") for tensor in make_adapter(unet)(some_aus()))
    assert set(pack_au_tensors(unet, au_keys, au_values)) == {"au_keys", "au_values"}


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
        channels = unet.get_submodule(name).au_channels
        assert channels.stop - channels.start == width
    with torch.device("meta"):
        au_kwargs = pack_au_tensors(unet, *adapter(torch.zeros(2, 12)))
        sample, text = torch.zeros(2, 4, 64, 64), torch.zeros(2, 77, config["cross_attention_dim"])
        assert unet(sample, torch.tensor(1), text, cross_attention_kwargs=au_kwargs).sample.shape == sample.shape


SDXL_UNET = {
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}


@pytest.mark.parametrize("encoder_type", ["res_mlp64", "direct"])
def test_all_seventy_layers_of_xl_get_their_width(encoder_type):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
        layers = au_layers(unet)
        adapter = AUAdapter(layers, 2048, encoder_type=encoder_type)
        attach_au_processors(unet)
    assert len(layers) == 70 and sum(layers.values()) == 83_200
    assert adapter.to_v_au.weight.numel() == 83_200 * (13 if encoder_type == "direct" else 2048)
    for name, width in layers.items():
        channels = unet.get_submodule(name).au_channels
        assert channels.stop - channels.start == width == unet.get_submodule(name).to_v.out_features
    with torch.device("meta"):
        au_kwargs = pack_au_tensors(unet, *adapter(torch.zeros(2, 12)))
        sample, text = torch.zeros(2, 4, 128, 128), torch.zeros(2, 77, 2048)
        added = {"text_embeds": torch.zeros(2, 1280), "time_ids": torch.zeros(2, 6)}
        output = unet(sample, torch.tensor(1), text, added_cond_kwargs=added, cross_attention_kwargs=au_kwargs).sample
        assert output.shape == sample.shape


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
    unet = shorten(make_components()["unet"])
    plain = traced_calls(unet)
    attach_au_processors(unet)
    with torch.no_grad():
        au_kwargs = pack_au_tensors(unet, *make_adapter(unet)(some_aus()))
    # Of the vector that holds those of all layers, each takes its own; the cast does nothing.
    num_layers = len(au_layers(unet))
    added = traced_calls(unet, au_kwargs) - plain
    assert added.pop("add") == num_layers and added["scaled_dot_product_attention"] == added["linear"] == 0
    assert set(added) <= {"getitem", "to"}, added


# Masks: several people in one picture


def some_masks(batch: int = 2, people: int = 2, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return read_au_masks(torch.rand(batch, people, 32, 32, generator=generator), batch, size)


@torch.no_grad()
def predict_people(unet, adapter, au_masks, general=False, au_scale=1.0) -> torch.Tensor:
    rows = some_aus(au_masks.shape[0] * au_masks.shape[1])
    options = {"au_scale": au_scale, "general": general, "au_masks": au_masks}
    au_kwargs = pack_au_tensors(unet, *adapter(rows), **options)
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
        au_kwargs = pack_au_tensors(unet, *adapter(rows), au_masks=masks)
        found = attn(hidden_states, text, **au_kwargs) - plain
        expected = torch.zeros_like(plain)
        for person in range(2):
            alone = pack_au_tensors(unet, *adapter(rows[person : person + 1]))
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
