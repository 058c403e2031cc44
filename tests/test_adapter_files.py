"""Loading and saving of adapters: what comes back, and what broken or foreign files say."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_au_attention_processor import SD15_UNET, SD21_UNET, SD_WIDTHS
from tiny import CROSS_ATTENTION_DIM, FAMILIES, HIDDEN_DIM, add_lora, make_adapter, make_components

from action_units import AU_NAMES
from au_attention_processor import AUAttnProcessor, au_layers
from au_encoder import (
    AUAdapter,
    AUEncoder,
    find_adapter_files,
    read_au_adapter,
    read_tensors,
    write_au_adapter,
)
from pipeline_fineface import LORA_NAME, FineFacePipeline


ENCODER = "au_encoder/diffusion_pytorch_model.safetensors"
ENCODER_CONFIG = "au_encoder/config.json"
ATTN_PROCESSORS = "au_attn_processors.safetensors"
LORA = "pytorch_lora_weights.safetensors"


def draw(pipe, **kwargs):
    kwargs = {"prompt": "a boy in a park", "num_inference_steps": 2, "output_type": "latent", **kwargs}
    return pipe(generator=torch.Generator().manual_seed(0), **kwargs).images


def state(pipe) -> dict:
    """Everything about a pipeline that loading may change."""
    tensors = dict(pipe.unet.state_dict())
    if pipe.au_adapter is not None:
        tensors |= {f"au_adapter.{name}": tensor for name, tensor in pipe.au_adapter.state_dict().items()}
    return {
        "tensors": {name: tensor.clone() for name, tensor in tensors.items()},
        "processors": pipe.unet.attn_processors,
        "modules": [type(module) for module in pipe.unet.modules()],
        "loras": pipe._active_loras(),
        "config": dict(pipe.config),
    }


def assert_same_state(ours: dict, theirs: dict) -> None:
    tensors, other_tensors = ours.pop("tensors"), theirs.pop("tensors")
    assert ours == theirs
    assert tensors.keys() == other_tensors.keys()
    assert all(torch.equal(tensor, other_tensors[name]) for name, tensor in tensors.items())


@pytest.fixture
def copy_dir(tiny_adapter_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_adapter_dir, tmp_path / "adapter"))


def write_original(folder: Path, adapter: AUAdapter, prefix: str = "") -> None:
    """An adapter in the layout that the paper's authors published."""
    folder.mkdir(exist_ok=True)
    tensors = adapter.attn_processors_state_dict()
    tensors = {k.replace("to_k_au", "au_to_k").replace("to_v_au", "au_to_v"): v.clone() for k, v in tensors.items()}
    torch.save(tensors, folder / f"{prefix}attn_processors.ckpt")
    encoder = {k.replace("intensity_proj", "au_encoder"): v for k, v in adapter.encoder.state_dict().items()}
    torch.save(encoder, folder / f"{prefix}au_encoder.ckpt")


# What comes back


def test_a_saved_adapter_has_the_files_of_the_contract(tiny_adapter_dir):
    files = {str(path.relative_to(tiny_adapter_dir)) for path in Path(tiny_adapter_dir).rglob("*") if path.is_file()}
    assert files == {ENCODER, ENCODER_CONFIG, ATTN_PROCESSORS, LORA}
    keys = set(load_file(Path(tiny_adapter_dir) / ATTN_PROCESSORS))
    layers = au_layers(make_components()["unet"])
    assert keys == {f"{layer}.processor.{name}.weight" for layer in layers for name in ("to_k_au", "to_v_au")}


def test_a_saved_adapter_comes_back(steady_pipe, tmp_path):
    steady_pipe.save_au_adapter(tmp_path / "new" / "folder")
    pipe = FineFacePipeline(**make_components(), requires_safety_checker=False)
    pipe.load_au_adapter(tmp_path / "new" / "folder")
    assert torch.equal(draw(pipe, aus="12"), draw(steady_pipe, aus="12"))


def test_an_adapter_knows_its_own_aus(tiny_components, tmp_path):
    au_names = ("AU4", "AU12L", "AU12R", "AU43L", "AU43R")
    adapter = AUAdapter.from_unet(tiny_components["unet"], hidden_dim=HIDDEN_DIM, au_names=au_names)
    with torch.no_grad():
        adapter.to_v_au.weight.normal_(generator=torch.Generator().manual_seed(0))
    ours = FineFacePipeline(**tiny_components, requires_safety_checker=False, au_adapter=adapter.eval())
    ours.save_au_adapter(tmp_path)
    pipe = FineFacePipeline(**make_components(), requires_safety_checker=False)
    assert pipe.au_names == AU_NAMES
    pipe.load_au_adapter(tmp_path)
    assert pipe.au_names == au_names and pipe.au_adapter.config.num_aus == 5
    assert json.loads((tmp_path / ENCODER_CONFIG).read_text())["au_names"] == list(au_names)
    for aus in ("AU12L=3", "smirk"):
        assert torch.equal(draw(pipe, aus=aus), draw(ours, aus=aus))
    left, right, both = (draw(pipe, aus=aus) for aus in ("L12D", "R12D", "12D"))
    assert not torch.equal(left, right) and torch.equal(both, draw(pipe, aus="AU12L=4 AU12R=4"))
    assert torch.equal(left, draw(pipe, prompt="a boy in a park <AU12L=4>"))
    for aus, message in (
        ("26C", "It knows AU4, AU12L, AU12R, AU43L, AU43R"),
        ("wink", "the preset 'wink', which needs AU6"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(pipe, aus=aus)
    pipe.unload_au_adapter()
    assert pipe.au_names == AU_NAMES


def test_files_without_names_have_the_papers_aus(copy_dir, tiny_base):
    config = json.loads((copy_dir / ENCODER_CONFIG).read_text())
    config.pop("au_names", None)
    (copy_dir / ENCODER_CONFIG).write_text(json.dumps(config))
    tiny_base.load_au_adapter(copy_dir)
    assert tiny_base.au_names == AU_NAMES


def test_the_scale_of_the_lora_comes_back(steady_pipe):
    scales = {m.scaling[LORA_NAME] for m in steady_pipe.unet.modules() if LORA_NAME in getattr(m, "scaling", {})}
    assert scales == {2.0}  # alpha 8 over rank 4


def test_saving_over_an_adapter_replaces_all_of_it(copy_dir, tiny_base):
    unet = tiny_base.unet
    adapter = make_adapter(unet, seed=7)
    write_au_adapter(copy_dir, adapter, unet, LORA_NAME)
    assert not (copy_dir / LORA).exists()
    tiny_base.load_au_adapter(copy_dir)
    assert torch.equal(tiny_base.au_adapter.to_v_au.weight, adapter.to_v_au.weight)
    assert {path.name for path in copy_dir.parent.iterdir()} == {"adapter"}


def test_an_interrupted_save_never_leaves_a_mixture(copy_dir, steady_pipe, steady_base, monkeypatch):
    renamed = []

    def replace_once(source, target):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(target)
        shutil.move(source, target)

    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(KeyboardInterrupt):
        steady_pipe.save_au_adapter(copy_dir)
    with pytest.raises(OSError, match="not complete"):
        steady_base.load_au_adapter(copy_dir)


def test_a_save_that_cannot_be_written_leaves_the_old_adapter(copy_dir, steady_pipe, monkeypatch):
    before = {path: path.read_bytes() for path in copy_dir.rglob("*") if path.is_file()}

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("au_encoder.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        steady_pipe.save_au_adapter(copy_dir)
    assert {path: path.read_bytes() for path in copy_dir.rglob("*") if path.is_file()} == before


def test_saving_into_a_file_is_an_error(steady_pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="`save_directory` has to be a folder"):
        steady_pipe.save_au_adapter(tmp_path / "file")


def test_saving_without_an_adapter_is_an_error(steady_base, tmp_path):
    with pytest.raises(ValueError, match="no AU adapter to save"):
        steady_base.save_au_adapter(tmp_path)


def test_loading_a_second_adapter_replaces_the_first(tiny_pipe, tmp_path):
    unet = make_components()["unet"]
    write_au_adapter(tmp_path, make_adapter(unet, seed=7), unet, LORA_NAME)
    tiny_pipe.load_au_adapter(tmp_path)
    pipe = FineFacePipeline(**make_components(), requires_safety_checker=False)
    pipe.load_au_adapter(tmp_path)
    assert torch.equal(draw(tiny_pipe, aus="12"), draw(pipe, aus="12"))


def test_unloading_gives_the_base_back_bit_for_bit(tiny_base, tiny_adapter_dir):
    before, picture = state(tiny_base), draw(tiny_base)
    tiny_base.load_au_adapter(tiny_adapter_dir)
    assert not torch.equal(draw(tiny_base), picture)
    tiny_base.unload_au_adapter()
    assert_same_state(state(tiny_base), before)
    assert torch.equal(draw(tiny_base), picture)
    tiny_base.unload_au_adapter()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_takes_the_dtype_of_the_pipeline(tiny_base, tiny_adapter_dir, dtype):
    tiny_base.unet.to(dtype=dtype)
    tiny_base.load_au_adapter(tiny_adapter_dir)
    assert tiny_base.au_adapter.dtype == dtype
    assert {parameter.dtype for parameter in tiny_base.unet.parameters()} == {dtype}


def test_the_lora_is_loaded_in_place(tiny_adapter_dir, tiny_base):
    tiny_base.load_au_adapter(tiny_adapter_dir)
    assert not any(tensor.is_meta for tensor in tiny_base.unet.state_dict().values())
    saved = load_file(Path(tiny_adapter_dir) / LORA)
    loaded = {k: v for k, v in tiny_base.unet.state_dict().items() if ".lora_" in k}
    assert len(saved) == len(loaded)
    assert all(torch.equal(saved[f"unet.{k.replace(f'.{LORA_NAME}.', '.')}"], v) for k, v in loaded.items())


# Beside other LoRAs


@pytest.fixture
def style_dir(tmp_path) -> str:
    unet = make_components()["unet"]
    add_lora(unet, "style", seed=9, rank=2)
    layers = {k.replace(".style.", "."): v for k, v in unet.state_dict().items() if ".lora_" in k}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "style", unet_lora_layers=layers)
    return str(tmp_path / "style")


def test_a_lora_of_the_user_works_before_and_after(tiny_pipe, tiny_adapter_dir, style_dir):
    pipe = FineFacePipeline(**make_components(), requires_safety_checker=False)
    pipe.load_lora_weights(style_dir, adapter_name="style")
    style = draw(pipe)
    pipe.load_au_adapter(tiny_adapter_dir)
    only_au = draw(tiny_pipe, aus="12")
    tiny_pipe.load_lora_weights(style_dir, adapter_name="style")
    both = draw(tiny_pipe, aus="12")
    assert set(pipe._active_loras()) == set(tiny_pipe._active_loras()) == {"style", LORA_NAME}
    torch.testing.assert_close(both, draw(pipe, aus="12"), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(both, only_au)
    pipe.unload_au_adapter()
    assert torch.equal(draw(pipe), style)
    tiny_pipe.delete_adapters("style")
    assert torch.equal(draw(tiny_pipe, aus="12"), only_au)


def test_a_user_lora_keeps_its_weight(tiny_base, tiny_adapter_dir, style_dir):
    tiny_base.load_lora_weights(style_dir, adapter_name="style")
    tiny_base.set_adapters(["style"], [0.5])
    tiny_base.load_au_adapter(tiny_adapter_dir)
    scales = {m.scaling["style"] for m in tiny_base.unet.modules() if "style" in getattr(m, "scaling", {})}
    assert scales == {0.5}


def test_fused_loras_give_the_same_picture_and_can_be_unloaded(tiny_base, tiny_adapter_dir):
    plain = draw(tiny_base)
    tiny_base.load_au_adapter(tiny_adapter_dir)
    expected = draw(tiny_base, aus="12")
    tiny_base.fuse_lora()
    torch.testing.assert_close(draw(tiny_base, aus="12"), expected, atol=1e-4, rtol=1e-4)
    tiny_base.unload_au_adapter()
    torch.testing.assert_close(draw(tiny_base), plain, atol=1e-4, rtol=1e-4)


def test_a_fused_lora_does_not_swallow_that_of_the_adapter(tiny_base, tiny_adapter_dir, style_dir):
    tiny_base.load_lora_weights(style_dir, adapter_name="style")
    tiny_base.fuse_lora()
    tiny_base.load_au_adapter(tiny_adapter_dir)
    fused_before = draw(tiny_base, aus="12")
    pipe = FineFacePipeline(**make_components(), requires_safety_checker=False)
    pipe.load_lora_weights(style_dir, adapter_name="style")
    pipe.load_au_adapter(tiny_adapter_dir)
    torch.testing.assert_close(fused_before, draw(pipe, aus="12"), atol=1e-4, rtol=1e-4)


# Whole pipelines


def test_a_saved_pipeline_is_a_base_with_an_adapter_beside_it(tiny_base, tiny_adapter_dir, tmp_path):
    plain = draw(tiny_base)
    tiny_base.load_au_adapter(tiny_adapter_dir)
    tiny_base.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    pipe = FineFacePipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(pipe, aus="12"), draw(tiny_base, aus="12"))
    assert torch.equal(draw(StableDiffusionPipeline.from_pretrained(tmp_path)), plain)
    assert torch.equal(draw(FineFacePipeline.from_pretrained(tmp_path, au_adapter=None)), plain)


def test_a_pipeline_without_adapter_saves_as_the_base(tiny_base, tiny_sd_dir, tmp_path):
    tiny_base.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in Path(tiny_sd_dir).iterdir()}


def test_a_pipeline_with_a_fused_lora_cannot_be_saved(tiny_pipe, tmp_path):
    tiny_pipe.fuse_lora()
    with pytest.raises(ValueError, match="unfuse_lora"):
        tiny_pipe.save_pretrained(tmp_path)


def test_an_adapter_given_as_a_component_is_on(tiny_pipe):
    pipe = FineFacePipeline(**tiny_pipe.components, requires_safety_checker=False)
    assert torch.equal(draw(pipe, aus="12"), draw(tiny_pipe, aus="12"))


def test_a_component_for_another_unet_is_refused(tiny_components):
    other = UNet2DConditionModel(
        block_out_channels=(8,),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=CROSS_ATTENTION_DIM,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    adapter = AUAdapter(au_layers(other), CROSS_ATTENTION_DIM, hidden_dim=HIDDEN_DIM)
    with pytest.raises(ValueError, match="Use the adapter that was trained on this base"):
        FineFacePipeline(**tiny_components, requires_safety_checker=False, au_adapter=adapter)
    adapter = AUAdapter(au_layers(tiny_components["unet"]), CROSS_ATTENTION_DIM, num_aus=5, hidden_dim=HIDDEN_DIM)
    with pytest.raises(ValueError, match="trained for 5 AUs and does not name them"):
        FineFacePipeline(**tiny_components, requires_safety_checker=False, au_adapter=adapter)


# Offloading. Model offloading of diffusers runs on the CPU as well.


def offload_sequentially(pipe, monkeypatch):
    """As `enable_sequential_cpu_offload`, but without the device index, which accelerate takes for no CPU."""
    import accelerate

    def enable(device=None):
        pipe.remove_all_hooks()
        pipe._offload_device = torch.device("cpu")
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                accelerate.cpu_offload(component, torch.device("cpu"), offload_buffers=len(component._parameters) > 0)

    monkeypatch.setattr(pipe, "enable_sequential_cpu_offload", enable)
    pipe.enable_sequential_cpu_offload()


@pytest.mark.parametrize("offload", ["model", "sequential"])
@pytest.mark.parametrize("loaded_first", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_offloading_works_before_and_after_loading(family, request, offload, loaded_first, monkeypatch, tmp_path):
    tiny_base = FAMILIES[family].make_pipe()
    tiny_adapter_dir = request.getfixturevalue("tiny_adapter_dir" if family == "sd" else "tiny_xl_adapter_dir")
    plain = draw(tiny_base, num_inference_steps=1)
    tiny_base.load_au_adapter(tiny_adapter_dir)
    expected = draw(tiny_base, aus="12", num_inference_steps=1)
    if not loaded_first:
        tiny_base.unload_au_adapter()
    if offload == "model":
        tiny_base.enable_model_cpu_offload(device="cpu")
    else:
        offload_sequentially(tiny_base, monkeypatch)
    if not loaded_first:
        tiny_base.load_au_adapter(tiny_adapter_dir)
    assert hasattr(tiny_base.au_adapter, "_hf_hook")
    assert torch.equal(draw(tiny_base, aus="12", num_inference_steps=1), expected)
    assert torch.equal(draw(tiny_base, aus="12", num_inference_steps=1), expected)
    tiny_base.save_au_adapter(tmp_path)
    assert torch.equal(draw(tiny_base, aus="12", num_inference_steps=1), expected)
    tiny_base.unload_au_adapter()
    assert torch.equal(draw(tiny_base, num_inference_steps=1), plain)


# The published original


@pytest.mark.parametrize("variant", [None, "sd15"])
def test_the_original_layout_loads(tiny_base, tmp_path, variant):
    # The SD 1.5 encoder has no zeros behind its features, the other one has.
    hidden_dim = HIDDEN_DIM if variant is None else CROSS_ATTENTION_DIM - 12
    torch.manual_seed(0)
    adapter = AUAdapter(au_layers(tiny_base.unet), CROSS_ATTENTION_DIM, hidden_dim=hidden_dim).eval()
    write_original(tmp_path, adapter, "" if variant is None else f"{variant}_")
    tiny_base.load_au_adapter(tmp_path, variant=variant)
    assert tiny_base.au_adapter.config.encoder_type == ("res_mlp64" if variant is None else "res_mlp")
    aus = torch.rand(2, 12)
    for ours, theirs in zip(tiny_base.au_adapter(aus), adapter(aus), strict=True):
        assert torch.equal(ours, theirs)
    assert tiny_base._active_loras() == []


def test_the_original_layout_brings_its_lora(tiny_base, copy_dir, tmp_path):
    write_original(tmp_path / "original", make_adapter(tiny_base.unet))
    # As diffusers 0.27 wrote it: other names, no metadata.
    lora = load_file(copy_dir / LORA)
    lora = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in lora.items()}
    save_file(lora, tmp_path / "original" / LORA)
    tiny_base.load_au_adapter(tmp_path / "original")
    assert tiny_base._active_loras() == [LORA_NAME]
    pipe = FineFacePipeline(**make_components(), requires_safety_checker=False)
    pipe.load_lora_weights(str(tmp_path / "original"), weight_name=LORA)
    assert torch.equal(draw(pipe), draw(tiny_base))


@pytest.mark.parametrize("variant", [None, "sd15"])
def test_the_published_key_sets_load_onto_the_real_unets(tmp_path, variant):
    config = SD21_UNET if variant is None else SD15_UNET
    width, prefix = config["cross_attention_dim"], "" if variant is None else "sd15_"
    features = 64 if variant is None else 756
    published = {
        f"{layer}.transformer_blocks.0.attn2.processor.au_to_{name}.weight": torch.zeros(out, width).half()
        for layer, out in SD_WIDTHS.items()
        for name in "kv"
    }
    assert len(published) == 2 * 16
    torch.save(published, tmp_path / f"{prefix}attn_processors.ckpt")
    encoder = {"au_encoder.weight": torch.zeros(features, 12), "au_encoder.bias": torch.zeros(features)}
    torch.save(encoder, tmp_path / f"{prefix}au_encoder.ckpt")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).to(dtype=torch.float16)
    adapter = read_au_adapter(find_adapter_files(tmp_path, variant=variant), unet, au_layers(unet))
    assert adapter.to_k_au.weight.shape == (12480, width) and adapter.dtype == torch.float16
    assert adapter.encoder.intensity_proj.weight.shape == (features, 12)


# Failures. Each leaves the pipeline as it was.


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path: Path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def drop_one(tensors):
    tensors.pop(sorted(tensors)[0])


def add_one(tensors):
    tensors["something.else"] = torch.zeros(2, CROSS_ATTENTION_DIM)


def cut_one(tensors):
    key = sorted(tensors)[0]
    tensors[key] = tensors[key][:-1].clone()


def poison_one(tensors):
    tensors[sorted(tensors)[0]].view(-1)[0] = torch.nan


def widen_all(tensors):
    for key, tensor in tensors.items():
        tensors[key] = torch.zeros(len(tensor), 1024)


def edit_metadata(path: Path, **changes) -> None:
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    save_file(load_file(path), path, metadata={"lora_adapter_metadata": json.dumps({**metadata, **changes})})


def edit_config(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BREAKAGES = {
    "truncated values": (ATTN_PROCESSORS, truncate, ["truncated"]),
    "truncated encoder": (ENCODER, truncate, ["truncated"]),
    "truncated lora": (LORA, truncate, ["truncated"]),
    "values for SD 2.x": (ATTN_PROCESSORS, lambda p: change(p, widen_all), ["Stable Diffusion 2.x", "1024", "32"]),
    "encoder for SD 1.x": (
        ENCODER_CONFIG,
        lambda p: edit_config(p, cross_attention_dim=768),
        ["Stable Diffusion 1.x"],
    ),
    "missing values": (ATTN_PROCESSORS, lambda p: change(p, drop_one), ["misses", "attn2.processor.to_k_au"]),
    "missing encoder weight": (ENCODER, lambda p: change(p, drop_one), ["misses intensity_proj.bias"]),
    "missing half of a lora": (LORA, lambda p: change(p, drop_one), ["unexpected", "lora_B"]),
    "unexpected values": (ATTN_PROCESSORS, lambda p: change(p, add_one), ["unexpected something.else"]),
    "unexpected lora": (LORA, lambda p: change(p, add_one), ["unexpected something.else"]),
    "misshapen values": (ATTN_PROCESSORS, lambda p: change(p, cut_one), ["shape (7, 32)", "shape (8, 32)"]),
    "misshapen encoder": (ENCODER, lambda p: change(p, cut_one), ["shape (7,)", "shape (8,)"]),
    "misshapen lora": (LORA, lambda p: change(p, cut_one), ["shape (8, 4)", "shape (8, 3)"]),
    "lora of another rank": (LORA, lambda p: edit_metadata(p, **{"unet.r": 8}), ["rank [4]", "say 8"]),
    "lora without a scale": (LORA, lambda p: edit_metadata(p, **{"unet.lora_alpha": None}), ["broken metadata"]),
    "lora with a scale that is not a number": (
        LORA,
        lambda p: edit_metadata(p, **{"unet.lora_alpha": float("nan")}),
        ["broken metadata", "lora_alpha", "nan"],
    ),
    "lora with a huge scale": (LORA, lambda p: edit_metadata(p, **{"unet.lora_alpha": 1e300}), ["1e+300"]),
    "lora of infinite rank": (LORA, lambda p: edit_metadata(p, **{"unet.r": float("inf")}), ["broken metadata"]),
    "lora of rank 3.5": (LORA, lambda p: edit_metadata(p, **{"unet.r": 3.5}), ["a positive integer", "3.5"]),
    "lora with a broken pattern": (
        LORA,
        lambda p: edit_metadata(p, **{"unet.rank_pattern": {"to_q(": 4}}),
        ["broken metadata", "position"],
    ),
    "not a number in values": (ATTN_PROCESSORS, lambda p: change(p, poison_one), ["not finite"]),
    "not a number in encoder": (ENCODER, lambda p: change(p, poison_one), ["not finite"]),
    "not a number in lora": (LORA, lambda p: change(p, poison_one), ["not finite"]),
    "broken config": (ENCODER_CONFIG, lambda p: p.write_text("{"), ["not the config of an AU encoder"]),
    "config without a value": (ENCODER_CONFIG, lambda p: p.write_text("{}"), ["num_aus"]),
    "impossible config": (ENCODER_CONFIG, lambda p: edit_config(p, hidden_dim=30), ["at least 30 features"]),
    "other AUs": (ENCODER_CONFIG, lambda p: edit_config(p, num_aus=5), []),
    "names of fewer AUs": (
        ENCODER_CONFIG,
        lambda p: edit_config(p, au_names=["AU1", "AU2"]),
        ["`num_aus` is 12, but `au_names` has 2: AU1, AU2"],
    ),
    "no list of names": (ENCODER_CONFIG, lambda p: edit_config(p, au_names="AU12"), ["`au_names` has to be a list"]),
    "names that FACS has not": (
        ENCODER_CONFIG,
        lambda p: edit_config(p, au_names=[f"AU{number}" for number in range(1, 13)]),
        ["`au_names` holds 'AU3', which is no AU of FACS"],
    ),
    "one side alone": (
        ENCODER_CONFIG,
        lambda p: edit_config(p, au_names=[*AU_NAMES[:11], "AU43L"]),
        ["both AU43L and AU43R"],
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_file_is_named_and_nothing_changes(breakage, copy_dir, steady_pipe):
    name, damage, messages = BREAKAGES[breakage]
    before = state(steady_pipe)
    damage(copy_dir / name)
    with pytest.raises(ValueError) as error:
        steady_pipe.load_au_adapter(copy_dir)
    for message in messages:
        assert message in str(error.value)
    if breakage != "other AUs":
        assert str(copy_dir / name) in str(error.value)
    assert_same_state(state(steady_pipe), before)


class Exploit:
    def __reduce__(self):
        return os.system, ("echo exploited",)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", ["attn_processors.ckpt", "au_encoder.ckpt"])
def test_a_pickle_with_code_is_refused_and_not_run(name, legacy, steady_pipe, tmp_path, capfd):
    write_original(tmp_path, make_adapter(make_components()["unet"]))
    if legacy:
        (tmp_path / name).write_bytes(pickle.dumps({"au_encoder.weight": Exploit()}))
    else:
        torch.save({"au_encoder.weight": Exploit()}, tmp_path / name)
    before = state(steady_pipe)
    with pytest.raises(ValueError, match=f"{name}' .*carr(y|ies) code") as error:
        steady_pipe.load_au_adapter(tmp_path)
    # PyTorch's own error tells how to run the code all the same.
    assert error.value.__cause__ is None and (error.value.__suppress_context__ or legacy)
    assert "exploited" not in capfd.readouterr().out
    assert_same_state(state(steady_pipe), before)


@pytest.mark.parametrize("content", ["half", "text", "empty", "list"])
def test_a_pickle_that_is_none_is_refused(content, steady_base, tmp_path):
    write_original(tmp_path, make_adapter(steady_base.unet))
    path = tmp_path / "attn_processors.ckpt"
    if content == "half":
        truncate(path)
    elif content == "list":
        torch.save([torch.zeros(2)], path)
    else:
        path.write_text("a web page, not a checkpoint" if content == "text" else "")
    with pytest.raises(ValueError, match="attn_processors.ckpt'"):
        steady_base.load_au_adapter(tmp_path)


def test_an_original_encoder_of_another_kind_is_refused(steady_base, tmp_path):
    write_original(tmp_path, make_adapter(steady_base.unet))
    torch.save({"mlp.weight": torch.zeros(2, 2)}, tmp_path / "au_encoder.ckpt")
    with pytest.raises(ValueError, match="au_encoder.ckpt' misses the matrix au_encoder.weight. It holds mlp.weight"):
        steady_base.load_au_adapter(tmp_path)


@pytest.mark.parametrize("name", [ENCODER, ENCODER_CONFIG, ATTN_PROCESSORS])
def test_an_absent_file_is_named(name, copy_dir, steady_base):
    (copy_dir / name).unlink()
    with pytest.raises(OSError, match=f"not complete: there is .*, but no {name}"):
        steady_base.load_au_adapter(copy_dir)


def test_a_folder_without_an_adapter_is_an_error(steady_base, tmp_path):
    with pytest.raises(OSError, match="There is no AU adapter in"):
        steady_base.load_au_adapter(tmp_path)
    with pytest.raises(OSError, match="no AU adapter of the variant 'sd15' in the folder"):
        steady_base.load_au_adapter(tmp_path, variant="sd15")


def test_a_path_that_does_not_exist_is_an_error(steady_base, tmp_path):
    with pytest.raises(OSError, match="neither a folder nor the id of a Hub repository"):
        steady_base.load_au_adapter(tmp_path / "nowhere")


def test_a_hub_repository_that_is_not_there_offline_is_an_error(steady_base, tmp_path):
    with pytest.raises(OSError, match="cache for the Hub repository .no folder. 'some/repository', and the Hub"):
        steady_base.load_au_adapter("some/repository", cache_dir=tmp_path, local_files_only=True)


def test_a_cached_hub_repository_loads(tiny_base, steady_pipe, tiny_adapter_dir, tmp_path):
    commit = "0" * 40
    repository = tmp_path / "models--some--repository"
    shutil.copytree(tiny_adapter_dir, repository / "snapshots" / commit / "sub")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    tiny_base.load_au_adapter("some/repository", subfolder="sub", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(draw(tiny_base, aus="12"), draw(steady_pipe, aus="12"))


def test_a_subfolder_loads(tiny_base, tiny_adapter_dir):
    folder = Path(tiny_adapter_dir)
    tiny_base.load_au_adapter(folder.parent, subfolder=folder.name)
    assert all(isinstance(processor, AUAttnProcessor) for processor in tiny_base.unet.attn_processors.values())


def test_a_compiled_unet_takes_and_gives_an_adapter(tiny_base, tiny_adapter_dir, tmp_path):
    tiny_base.unet = torch.compile(tiny_base.unet)
    tiny_base.load_au_adapter(tiny_adapter_dir)
    tiny_base.save_pretrained(tmp_path)
    for name in (ATTN_PROCESSORS, LORA):
        ours, theirs = load_file(tmp_path / name), load_file(Path(tiny_adapter_dir) / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert StableDiffusionPipeline.from_pretrained(tmp_path).unet.dtype == torch.float32


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"a": torch.zeros(10_000)}, tmp_path / "stored.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "stored.ckpt") as stored,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in stored.namelist():
            bomb.writestr(entry, stored.read(entry))
    assert read_tensors(tmp_path / "stored.ckpt")["a"].shape == (10_000,)
    with pytest.raises(ValueError, match=r"bomb.ckpt' holds compressed data, 4\d,\d{3} bytes when unpacked"):
        read_tensors(tmp_path / "bomb.ckpt")


@pytest.mark.parametrize("sizes", [{"num_aus": 20_000}, {"num_tokens": 20_000}, {"hidden_dim": 10**9}])
def test_a_config_of_absurd_sizes_is_refused_before_anything_is_made(sizes):
    with pytest.raises(ValueError, match="goes up to"):
        AUEncoder(cross_attention_dim=32, encoder_type="mlp", **sizes)


def test_the_files_of_an_adapter_can_be_read_by_whom_the_umask_lets(tmp_path):
    unet = make_components()["unet"]
    add_lora(unet, LORA_NAME)
    write_au_adapter(tmp_path, make_adapter(unet), unet, LORA_NAME)
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4 and {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
