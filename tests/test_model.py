"""One loader for every family of bases."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, HIDDEN_DIM

import generate
from au_encoder import AUAdapter
from drawing.model import Weights, load_pipeline, pipeline_class_of, quiet, read_au_names
from pipeline_fineface import FineFacePipeline
from pipeline_fineface_xl import FineFaceXLPipeline


CPU = torch.device("cpu")


def test_the_base_says_which_pipeline_it_needs(tiny_sd_dir, tiny_xl_dir):
    assert pipeline_class_of(tiny_sd_dir) is FineFacePipeline
    assert pipeline_class_of(tiny_xl_dir) is FineFaceXLPipeline


def test_a_base_of_another_family_is_refused(tiny_sd_dir, tmp_path):
    base = shutil.copytree(tiny_sd_dir, tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    index |= {"_class_name": "FluxPipeline", "unet": [None, None], "transformer": ["diffusers", "FluxTransformer2D"]}
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match="is a FluxPipeline of .*transformer.* AUs have pipelines for Stable Diffusion"
    ):
        load_pipeline(Weights(str(base)), CPU, torch.float32)


def test_an_adapter_of_another_family_is_refused(tiny_xl_dir, tiny_adapter_dir):
    with pytest.raises(ValueError, match="au_attn_processors.safetensors.* fits another base model"):
        load_pipeline(Weights(tiny_xl_dir, tiny_adapter_dir), CPU, torch.float32)


def test_the_aus_of_an_adapter_beside_its_base_are_read_before_any_weights(tmp_path):
    pipe = FAMILIES["sd"].make_pipe()
    adapter = AUAdapter.from_unet(pipe.unet, hidden_dim=HIDDEN_DIM, au_names=("AU4", "AU12L", "AU12R"))
    type(pipe)(**{**pipe.components, "au_adapter": adapter}, requires_safety_checker=False).save_pretrained(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"")
    assert read_au_names(Weights(str(tmp_path))) == ("AU4", "AU12L", "AU12R")


def test_generate_draws_with_xl(tiny_xl_dir, tiny_xl_adapter_dir, tmp_path, capsys):
    options = ["--model", tiny_xl_dir, "--adapter", tiny_xl_adapter_dir, "--device", "cpu"]
    options += ["--prompt", "a boy", "--num-inference-steps", "1"]
    pictures = []
    for aus in ("12E", "neutral"):
        path = tmp_path / f"{aus}.png"
        assert generate.main([*options, "--aus", aus, "--output", str(path)]) == 0, capsys.readouterr().err
        pictures.append(path.read_bytes())
    assert pictures[0] != pictures[1]


def test_a_text_encoder_without_one_of_its_weights_is_refused(tiny_sd_dir, tmp_path):
    base = shutil.copytree(tiny_sd_dir, tmp_path / "base")
    path = base / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in sorted(tensors) if "layer_norm1.weight" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path, metadata={"format": "pt"})
    with quiet(), pytest.raises(ValueError, match=r"lacks 1 weights, such as .*layer_norm1.weight"):
        load_pipeline(Weights(str(base)), CPU, torch.float32)
    load_pipeline(Weights(str(tiny_sd_dir)), CPU, torch.float32)
