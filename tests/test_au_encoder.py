import pytest
import torch
from tiny import make_adapter, make_components
from torch import nn

from au_encoder import ENCODER_TYPES, KV_INITS, AUAdapter, AUEncoder, copy_checked


LAYERS = {"up_blocks.1.attn2": 4, "mid_block.attn2": 6, "down_blocks.0.attn2": 2}


def some_aus(batch: int = 3, num_aus: int = 12) -> torch.Tensor:
    return 5 * torch.rand(batch, num_aus, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("num_aus", [5, 12])
@pytest.mark.parametrize("encoder_type", [name for name in ENCODER_TYPES if name != "direct"])
def test_tokens_are_as_wide_as_the_text(encoder_type, num_aus, num_tokens):
    encoder = AUEncoder(num_aus, 40, encoder_type, num_tokens, hidden_dim=16)
    assert encoder(some_aus(3, num_aus)).shape == (3, num_tokens, 40)


def test_a_direct_token_is_the_intensities_and_a_one():
    encoder = AUEncoder(5, 40, "direct")
    tokens = encoder(some_aus(3, 5))
    assert not list(encoder.parameters()) and encoder.token_dim == 6
    assert torch.equal(tokens, torch.cat([some_aus(3, 5), torch.ones(3, 1)], dim=1)[:, None])
    with pytest.raises(ValueError, match="'direct' has one token"):
        AUEncoder(5, 40, "direct", num_tokens=2)


def test_each_side_has_a_token_that_shows_it_on_both_sides():
    names = ["AU1L", "AU1R", "AU10"]
    encoder = AUEncoder(None, 40, hidden_dim=16, au_names=names, side_tokens=True)
    encoder.side_embedding.data[0] = 1.0
    one = AUEncoder(None, 40, hidden_dim=16, au_names=names)
    one.load_state_dict({name: tensor for name, tensor in encoder.state_dict().items() if name != "side_embedding"})
    left, right, lip = some_aus(3, 3).T
    tokens = encoder(torch.stack([left, right, lip], 1))
    assert tokens.shape == (3, 2, 40)
    torch.testing.assert_close(tokens[:, :1] - 1, one(torch.stack([left, left, lip], 1)))
    torch.testing.assert_close(tokens[:, 1:], one(torch.stack([right, right, lip], 1)))
    assert AUAdapter(LAYERS, 40, hidden_dim=16, au_names=names, side_tokens=True)(some_aus(3, 3))[1].shape == (
        3,
        2,
        12,
    )
    for wrong in ({"au_names": ["AU12", "AU26"]}, {}, {"au_names": names, "encoder_type": "direct"}):
        with pytest.raises(ValueError, match="`side_tokens` need `au_names` with both sides"):
            AUEncoder(None, 40, hidden_dim=16, side_tokens=True, **wrong)


@pytest.mark.parametrize("kv_init", KV_INITS)
def test_a_direct_adapter_starts_where_the_paper_s_does(kv_init):
    """As the fold of a new adapter with the same random numbers."""
    unet, aus = make_components()["unet"], some_aus()
    torch.manual_seed(0)
    direct = AUAdapter.from_unet(unet, encoder_type="direct", hidden_dim=8, kv_init=kv_init)
    assert direct.to_k_au is None and sum(p.numel() for p in direct.parameters()) == 13 * sum(direct.layers.values())
    keys, values = direct(aus)
    assert keys.shape == values.shape == (3, 1, sum(direct.layers.values())) and not keys.any()
    if kv_init == "zero":
        assert not values.any()
        return
    assert (values[0] - values[1]).abs().max() > 0.01
    if kv_init == "text":
        torch.manual_seed(0)
        AUAdapter(direct.layers, unet.config.cross_attention_dim, encoder_type="direct")
        encoder = AUEncoder(12, unet.config.cross_attention_dim, "res_mlp64", hidden_dim=8)
        layer = next(iter(direct.layers))
        expected = unet.get_submodule(layer).to_v(encoder(aus))
        torch.testing.assert_close(values[..., : direct.layers[layer]], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoder_type", ["none", "res_mlp", "res_mlp64", "res_3mlp"])
def test_residual_tokens_begin_with_the_intensities(encoder_type):
    tokens = AUEncoder(12, 40, encoder_type, num_tokens=2, hidden_dim=16)(some_aus())
    assert torch.equal(tokens[:, 0, :12], some_aus()) and torch.equal(tokens[:, 1, :12], some_aus())


def test_default_token_is_intensities_64_linear_features_and_zeros():
    encoder = AUEncoder()
    tokens = encoder(some_aus())
    assert encoder.config.encoder_type == "res_mlp64" and encoder.intensity_proj.weight.shape == (64, 12)
    torch.testing.assert_close(tokens[:, 0, 12:76], encoder.intensity_proj(some_aus()))
    assert tokens.shape == (3, 1, 1024) and not tokens[..., 76:].any()


def test_res_mlp_fills_the_token_without_zeros():
    encoder = AUEncoder(12, 768, "res_mlp")
    assert encoder.intensity_proj.weight.shape == (756, 12)
    assert encoder(some_aus())[..., 12:].all()


def test_no_encoding_is_intensities_and_zeros():
    encoder = AUEncoder(12, 1024, "none")
    assert not list(encoder.parameters()) and not encoder(some_aus())[..., 12:].any()


def test_mlp_is_one_linear_layer():
    encoder = AUEncoder(12, 40, "mlp")
    torch.testing.assert_close(encoder(some_aus())[:, 0], encoder.intensity_proj(some_aus()))


def test_res_3mlp_has_three_layers_with_norm_and_leaky_relu():
    kinds = [type(module) for module in AUEncoder(12, 40, "res_3mlp").intensity_proj]
    block = [nn.Linear, nn.LayerNorm, nn.LeakyReLU]
    assert kinds == [*block, *block, nn.Linear]


def test_individual_encoding_sums_one_mlp_per_au_and_one_for_all():
    encoder = AUEncoder(12, 40, "individual", hidden_dim=16)
    aus = some_aus()
    expected = encoder.intensity_proj(aus)
    for index in range(12):
        expected = expected + encoder.individual_proj[index](aus[:, index : index + 1])
    torch.testing.assert_close(encoder(aus)[:, 0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_encoder_takes_float32_aus_in_any_dtype(dtype):
    assert AUEncoder(12, 40, "res_mlp").to(dtype=dtype)(some_aus()).dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_type": "res_mlp", "cross_attention_dim": 12}, "12 AU intensities and at least 1 features"),
        ({"encoder_type": "res_mlp64", "cross_attention_dim": 75}, "at least 64 features"),
        ({"encoder_type": "none", "cross_attention_dim": 11}, "`cross_attention_dim` is 11"),
        ({"encoder_type": "mlp64"}, "none, mlp, res_mlp, res_mlp64, res_3mlp, individual, direct, but is 'mlp64'"),
        ({"num_tokens": 0}, "`num_tokens` has to be a positive integer, but is 0"),
        ({"hidden_dim": 1.5}, "`hidden_dim` has to be a positive integer, but is 1.5"),
    ],
)
def test_impossible_sizes_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        AUEncoder(**options)


def test_names_say_how_many_aus_there_are():
    assert AUEncoder(cross_attention_dim=40, hidden_dim=8).config.num_aus == 12
    encoder = AUEncoder(cross_attention_dim=40, hidden_dim=8, au_names=("AU4", "AU12L", "AU12R"))
    assert encoder.config.num_aus == 3 and encoder.config.au_names == ["AU4", "AU12L", "AU12R"]
    assert encoder(some_aus(2, 3)).shape == (2, 1, 40)
    adapter = AUAdapter(LAYERS, 40, hidden_dim=8, au_names=["AU4", "AU12"])
    assert adapter.config.num_aus == adapter.encoder.config.num_aus == 2
    assert adapter.config.au_names == adapter.encoder.config.au_names == ["AU4", "AU12"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_aus": 12, "au_names": ["AU4"]}, "`num_aus` is 12, but `au_names` has 1: AU4"),
        ({"au_names": "AU4"}, "has to be a list of different names such as 'AU12', but is 'AU4'"),
        ({"au_names": ["AU4", "AU4"]}, "different names"),
        ({"au_names": [4]}, "different names"),
        ({"au_names": []}, "`num_aus` has to be a positive integer, but is 0"),
    ],
)
def test_names_that_do_not_fit_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        AUEncoder(cross_attention_dim=40, hidden_dim=8, **options)


@pytest.mark.parametrize("encoder_type", ENCODER_TYPES)
def test_a_saved_encoder_comes_back(encoder_type, tmp_path):
    encoder = AUEncoder(12, 40, encoder_type, num_tokens=1 if encoder_type == "direct" else 2, hidden_dim=16).eval()
    encoder.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert torch.equal(AUEncoder.from_pretrained(tmp_path)(some_aus()), encoder(some_aus()))


def test_keys_and_values_are_packed_by_layer_name():
    adapter = AUAdapter(LAYERS, 40, hidden_dim=8)
    assert list(adapter.layers.items()) == sorted(LAYERS.items())
    state_dict = adapter.attn_processors_state_dict()
    tokens = adapter.encoder(some_aus())
    keys, values = adapter(some_aus())
    assert keys.shape == values.shape == (3, 1, 12)
    torch.testing.assert_close(keys[..., 2:8], tokens @ state_dict["mid_block.attn2.processor.to_k_au.weight"].T)
    torch.testing.assert_close(values[..., 8:], tokens @ state_dict["up_blocks.1.attn2.processor.to_v_au.weight"].T)


def test_splitting_the_weights_copies_nothing():
    adapter = AUAdapter(LAYERS, 40, hidden_dim=8)
    first = adapter.attn_processors_state_dict()["down_blocks.0.attn2.processor.to_v_au.weight"]
    assert first.data_ptr() == adapter.to_v_au.weight.data_ptr()


def test_a_saved_adapter_comes_back_with_its_layers_in_order(tmp_path):
    adapter = AUAdapter(LAYERS, 40, num_tokens=2, hidden_dim=8, au_names=[f"AU{n}" for n in range(1, 13)]).eval()
    adapter.save_pretrained(tmp_path)
    loaded = AUAdapter.from_pretrained(tmp_path)
    assert loaded.layers == adapter.layers and loaded.config.au_names == adapter.config.au_names
    for ours, theirs in zip(adapter(some_aus()), loaded(some_aus()), strict=True):
        assert torch.equal(ours, theirs)


def test_a_new_adapter_starts_from_the_keys_and_values_of_the_text(tiny_components):
    unet = tiny_components["unet"]
    state_dict = AUAdapter.from_unet(unet, hidden_dim=8).attn_processors_state_dict()
    for name, attn in unet.named_modules():
        if name.endswith("attn2"):
            assert torch.equal(state_dict[f"{name}.processor.to_k_au.weight"], attn.to_k.weight)
            assert torch.equal(state_dict[f"{name}.processor.to_v_au.weight"], attn.to_v.weight)


def test_keys_and_values_can_start_without_the_text(tiny_components):
    unet = tiny_components["unet"]
    text, random, zero = (AUAdapter.from_unet(unet, hidden_dim=8, kv_init=kind) for kind in ("text", "random", "zero"))
    assert random.to_v_au.weight.any() and not torch.equal(random.to_v_au.weight, text.to_v_au.weight)
    assert not zero(some_aus())[1].any() and zero.to_k_au.weight.any()
    with pytest.raises(ValueError, match="text, random, zero"):
        AUAdapter.from_unet(unet, kv_init="ones")


def test_split_weights_join_again(tiny_components):
    ours = make_adapter(tiny_components["unet"], seed=1)
    theirs = make_adapter(tiny_components["unet"], seed=2)
    copy_checked(ours.attn_processors_state_dict(), theirs.attn_processors_state_dict(), "ours")
    assert torch.equal(ours.to_k_au.weight, theirs.to_k_au.weight)
    assert torch.equal(ours.to_v_au.weight, theirs.to_v_au.weight)


def test_joining_refuses_what_does_not_fit(tiny_components):
    adapter = make_adapter(tiny_components["unet"])
    state_dict = adapter.attn_processors_state_dict()
    key = next(iter(state_dict))
    for wrong, message in (
        ({name: tensor for name, tensor in state_dict.items() if name != key}, "misses"),
        ({**state_dict, "other.weight": torch.zeros(1)}, "unexpected other.weight"),
        ({**state_dict, key: state_dict[key][:-1]}, "but the base model needs"),
        ({**state_dict, key: state_dict[key].int()}, "int32"),
        ({**state_dict, key: torch.full_like(state_dict[key], torch.nan)}, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            copy_checked(wrong, make_adapter(tiny_components["unet"]).attn_processors_state_dict(), "ours")


def test_an_adapter_without_layers_is_an_error():
    with pytest.raises(ValueError, match="`layers` is empty"):
        AUAdapter({}, 40, hidden_dim=8)
