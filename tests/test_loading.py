"""The pipeline file loads from a clone and through diffusers, from anywhere and in silence."""

import ast
import importlib
import json
import shutil
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from tiny import make_adapter


ROOT = Path(__file__).resolve().parents[1]
PIPELINE = ROOT / "pipeline_fineface.py"
XL_PIPELINE = ROOT / "pipeline_fineface_xl.py"
PIPELINES = {PIPELINE: "FineFacePipeline", XL_PIPELINE: "FineFaceXLPipeline"}
LEAVES = {"action_units", "au_attention_processor", "au_encoder"}
MIXIN = "au_pipeline_mixin"

# It runs outside the clone, with a cache of its own: neither a sibling nor an old copy can help.
LOAD_AND_DRAW = """
import importlib.util
import sys
import torch
from diffusers import DiffusionPipeline

assert importlib.util.find_spec("au_encoder") is None
pipeline_file, base, adapter = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=pipeline_file, trust_remote_code=True)
pipe.load_au_adapter(adapter)
pipe.set_progress_bar_config(disable=True)
options = {"num_inference_steps": 1, "output_type": "latent"}
smile, plain = (
    pipe("a boy", aus=aus, generator=torch.Generator().manual_seed(0), **options).images for aus in ("12E", None)
)
assert pipe.__class__.__module__.startswith("diffusers_modules.")
assert not torch.equal(smile, plain)
# Its components make another pipeline of its class, as diffusers does with those from the Hub.
again = pipe.__class__(**pipe.components, **pipe.parameters)
again.set_progress_bar_config(disable=True)
assert torch.equal(again("a boy", aus="12E", generator=torch.Generator().manual_seed(0), **options).images, smile)
"""

LOAD_IN_ONE_LINE = """
import sys
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
options = {"num_inference_steps": 1, "output_type": "latent"}
smile, plain = (
    pipe("a boy", aus=aus, generator=torch.Generator().manual_seed(0), **options).images for aus in ("12E", None)
)
assert not torch.equal(smile, plain)
"""


def assert_silent(stderr: str) -> None:
    for warning in ("pip install", "Expected types", "not expected", "ignored", "eyword arguments", "not initialized"):
        assert warning not in stderr, stderr


def test_diffusers_copies_every_sibling():
    for pipeline in PIPELINES:
        assert set(get_relative_imports(pipeline)) == LEAVES | {MIXIN}
    for leaf in LEAVES:
        assert get_relative_imports(ROOT / f"{leaf}.py") == []


def test_the_leaves_import_no_sibling():
    for leaf in LEAVES:
        tree = ast.parse((ROOT / f"{leaf}.py").read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & (LEAVES | {"pipeline_fineface"})


def test_both_ways_of_importing_bring_the_same_names():
    # A pipeline names these only because diffusers copies the files that it names.
    for_copying = {"AU_NAMES", "AUAttnProcessor", "AUAdapter"}
    for path in PIPELINES:
        in_package, block = import_block(path)
        in_clone = {node.targets[0].id for node in block if isinstance(node, ast.Assign)}
        assert in_package == in_clone | for_copying and not in_clone & for_copying
    # The mixin calls what it needs by its module, and a pipeline names all of these.
    in_package, block = import_block(ROOT / f"{MIXIN}.py")
    assert in_package == {alias.name for node in block for alias in node.names} == LEAVES


def import_block(path: Path) -> tuple[set[str], list[ast.stmt]]:
    """What a file imports in a copy inside a package, and the statements that do the same in a clone."""
    block = next(node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If))
    return {alias.name for node in block.body for alias in node.names}, block.orelse


@pytest.mark.parametrize("path", PIPELINES)
def test_there_is_one_pipeline_class(path):
    classes = [
        value
        for value in vars(importlib.import_module(path.stem)).values()
        if isinstance(value, type) and issubclass(value, DiffusionPipeline)
        if not value.__module__.startswith("diffusers")
    ]
    assert [value.__name__ for value in classes] == [PIPELINES[path]]


@pytest.mark.parametrize("path", PIPELINES)
def test_custom_pipeline_loads_from_anywhere_without_warnings(processes, path, request):
    names = ("tiny_sd_dir", "tiny_adapter_dir") if path == PIPELINE else ("tiny_xl_dir", "tiny_xl_adapter_dir")
    (answer,) = processes({"code": LOAD_AND_DRAW, "arguments": [path, *map(request.getfixturevalue, names)]})
    assert answer["status"] == 0, answer
    assert_silent(answer["messages"])


def test_an_exported_folder_loads_in_one_line(processes, tiny_components, tmp_path):
    """With the code beside the weights and the adapter as a component, nobody needs to know our class."""
    StableDiffusionPipeline(**tiny_components, requires_safety_checker=False).save_pretrained(tmp_path)
    make_adapter(tiny_components["unet"]).save_pretrained(tmp_path / "au_adapter")
    for module in (PIPELINE.stem, MIXIN, *LEAVES):
        shutil.copy(ROOT / f"{module}.py", tmp_path)
    shutil.copy(ROOT / "au_encoder.py", tmp_path / "au_adapter")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"_class_name": [PIPELINE.stem, "FineFacePipeline"], "au_adapter": ["au_encoder", "AUAdapter"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (answer,) = processes({"code": LOAD_IN_ONE_LINE, "arguments": [tmp_path]})
    assert answer["status"] == 0, answer
    assert_silent(answer["messages"])
