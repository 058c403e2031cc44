"""The Hub: what is exported loads in each of the promised ways, over HTTP, from a process that knows no clone."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers.utils.dynamic_modules_utils as dynamic_modules_utils
import huggingface_hub
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from hub_server import TOKEN, HubRequestHandler, running_hub
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from test_adapter_files import ATTN_PROCESSORS, ENCODER, ENCODER_CONFIG, LORA, Exploit, draw, write_original
from test_loading import assert_silent
from tiny import CROSS_ATTENTION_DIM, FAMILIES, HIDDEN_DIM, add_lora, make_adapter, make_components

from action_units import action_units_of, au_image_embeds
from au_attention_processor import au_layers
from au_encoder import AUAdapter, write_au_adapter
from drawing.files import read_metadata
from hub import bundle, convert_original, export
from hub.bundle import leaf_modules
from hub.handler import PARAMETERS, EndpointHandler
from pipeline_fineface import LORA_NAME, FineFacePipeline


ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a boy in a park"

LOAD_IN_EVERY_WAY = """
import importlib.util
import sys
import warnings
import torch
from diffusers import DiffusionPipeline

clone, bundle, folder = sys.argv[1:]
assert importlib.util.find_spec("pipeline_fineface") is None

def draw(pipe, aus="12E"):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "output_type": "latent"}
    return pipe("a boy in a park", aus=aus, generator=generator, **options).images

pictures = {}
pipe = DiffusionPipeline.from_pretrained("user/fineface", trust_remote_code=True)
assert pipe.__class__.__module__.startswith("diffusers_modules.")
pictures["one line"], pictures["without AUs"] = draw(pipe), draw(pipe, None)

pictures["one line, a folder"] = draw(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True))

pipe = DiffusionPipeline.from_pretrained("user/base", custom_pipeline="user/fineface", trust_remote_code=True)
pipe.load_au_adapter("user/fineface")
pictures["base, code and adapter"] = draw(pipe)

pipe = DiffusionPipeline.from_pretrained("user/base", custom_pipeline=bundle, trust_remote_code=True)
assert pipe.__class__.__module__.endswith(".fineface")
pipe.load_au_adapter("user/fineface")
pictures["bundle"] = draw(pipe)

sys.path.insert(0, clone)
from pipeline_fineface import FineFacePipeline

pictures["the clone's class"] = draw(FineFacePipeline.from_pretrained("user/fineface", trust_remote_code=True))
pipe = FineFacePipeline.from_pretrained("user/base")
pipe.load_au_adapter("user/fineface")
pictures["the clone's class, base and adapter"] = draw(pipe)
torch.save(pictures, "pictures.pt")
"""


@pytest.fixture(scope="module")
def hub():
    with running_hub() as server:
        yield server
        assert server.not_understood == []


@pytest.fixture(scope="module")
def logged_in(hub):
    """This process talks to `hub` in place of the real Hub, as somebody who may write to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        # Its storage protocol is a matter of its own, in a library of its own. Without, files go by Git LFS.
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        yield


@pytest.fixture(scope="module")
def exported(hub, logged_in, tmp_path_factory, tiny_sd_dir, tiny_adapter_dir) -> Path:
    """A repository folder, which is also `user/fineface` on the Hub; its base is `user/base`."""
    hub.add_folder("user/base", tiny_sd_dir)
    folder = tmp_path_factory.mktemp("hub") / "repository"
    options = ["--base", tiny_sd_dir, "--base-model", "user/base", "--push", "user/fineface", "--device", "cpu"]
    options += ["--num-inference-steps", "1", "--datasets", "user/faces"]
    assert export.main([tiny_adapter_dir, str(folder), *options]) == 0
    return folder


# Loading


@pytest.fixture(scope="module")
def loaded(hub, exported, processes, tmp_path_factory) -> tuple[dict[str, torch.Tensor], str]:
    """Pictures from each way of loading, and what was printed, by a process in an empty folder with an empty cache."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    bundled = tmp_path_factory.mktemp("bundle") / "fineface.py"
    assert bundle.main([str(bundled)]) == 0
    arguments = [ROOT, bundled, exported]
    run = {"code": LOAD_IN_EVERY_WAY, "arguments": arguments, "folder": elsewhere, "hub": hub.url}
    (answer,) = processes(run)
    assert answer["status"] == 0, answer["messages"]
    return torch.load(elsewhere / "pictures.pt", weights_only=True), answer["messages"]


@pytest.fixture(scope="module")
def expected(tiny_sd_dir, tiny_adapter_dir) -> torch.Tensor:
    pipe = FineFacePipeline.from_pretrained(tiny_sd_dir)
    pipe.load_au_adapter(tiny_adapter_dir)
    return draw(pipe, aus="12E")


@pytest.mark.parametrize("way", ["base, code and adapter", "bundle", "the clone's class, base and adapter"])
def test_base_and_adapter_from_the_hub_draw_what_the_clone_draws(way, loaded, expected):
    assert torch.equal(loaded[0][way], expected)


@pytest.mark.parametrize("way", ["one line", "one line, a folder", "the clone's class"])
def test_the_whole_repository_draws_what_the_clone_draws(way, loaded, expected):
    # Fusing the LoRA rounds.
    torch.testing.assert_close(loaded[0][way], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(loaded[0]["without AUs"], expected, atol=1e-2)


def test_no_way_of_loading_prints_warnings(loaded):
    assert_silent(loaded[1])
    # Bars, and what transformers says to whoever has no torchvision.
    lines = [line for part in loaded[1].splitlines() for line in part.split("\r")]
    assert [line for line in lines if line.strip() and "%|" not in line and "torchvision" not in line] == []


# What is exported


def test_an_export_has_the_files_of_the_adapter_and_the_code(exported, tiny_adapter_dir, hub):
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert {ENCODER, ENCODER_CONFIG, ATTN_PROCESSORS, LORA, "au_adapter/au_encoder.py", "handler.py"} <= files
    assert {"README.md", "LICENSE", "requirements.txt", "pipeline.py", "pipeline_fineface.py"} <= files
    assert {f"{leaf}.py" for leaf in leaf_modules()} <= files
    for name in (ENCODER, ATTN_PROCESSORS, LORA):
        ours, theirs = load_file(exported / name), load_file(Path(tiny_adapter_dir) / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {p: (exported / p).read_bytes() for p in files} == hub.repositories["model", "user/fineface"].files


def test_an_export_serves_plain_diffusers_too(exported, tiny_sd_dir, expected):
    """On the plain base, with nothing of the code that lies beside it."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_dir)
    pipe.load_lora_weights(str(exported))
    pipe.load_ip_adapter(
        str(exported), subfolder="", weight_name="au_ip_adapter.safetensors", image_encoder_folder=None
    )
    pipe.set_progress_bar_config(disable=True)
    embeds = au_image_embeds("12E")
    generator, options = torch.Generator().manual_seed(0), {"num_inference_steps": 2, "output_type": "latent"}
    found = pipe(PROMPT, ip_adapter_image_embeds=embeds, generator=generator, **options).images
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert 'load_ip_adapter("user/fineface"' in (exported / "README.md").read_text()


def test_an_adapter_without_a_place_in_an_ip_adapter_says_so(tiny_sd_dir, tmp_path):
    unet = make_components()["unet"]
    write_au_adapter(tmp_path / "two", make_adapter(unet, num_tokens=2), unet, LORA_NAME)
    options = ["--base", tiny_sd_dir, "--no-pictures"]
    assert export.main([str(tmp_path / "two"), str(tmp_path / "out"), *options]) == 0
    assert export.NO_PLAIN_USE in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "au_ip_adapter.safetensors").exists()


def test_the_requirements_are_those_of_the_clone(exported):
    lines = (exported / "requirements.txt").read_text().splitlines()
    assert set(lines) <= set((ROOT / "requirements.txt").read_text().splitlines())
    assert [re.split("[<>=]", line)[0] for line in lines] == list(export.ENDPOINT_REQUIREMENTS)


def test_nothing_exported_tells_of_this_machine(exported, tiny_sd_dir, tiny_adapter_dir):
    for path in exported.rglob("*"):
        if path.suffix in (".json", ".md", ".txt"):
            text = path.read_text()
            assert tiny_sd_dir not in text and tiny_adapter_dir not in text and str(ROOT) not in text, path


def test_pushing_again_replaces_what_was_there(hub, logged_in, tiny_sd_dir, tiny_adapter_dir, tmp_path):
    arguments = [tiny_adapter_dir, str(tmp_path / "out"), "--base", tiny_sd_dir, "--push", "user/twice"]
    arguments += ["--no-pictures", "--overwrite"]
    assert export.main(arguments) == 0
    files = hub.repositories["model", "user/twice"].files
    files["old.bin"] = b""
    assert export.main(arguments) == 0
    assert "old.bin" not in files and "model_index.json" in files


def test_a_repository_of_somebody_else_is_left_alone(hub, logged_in, tiny_sd_dir, tiny_adapter_dir, tmp_path, capsys):
    hub.add_folder("user/precious", tiny_adapter_dir)
    before = dict(hub.repositories["model", "user/precious"].files)
    arguments = [tiny_adapter_dir, str(tmp_path / "out"), "--base", tiny_sd_dir, "--push", "user/precious"]
    fails_with(export, arguments, "holds files that this program has not written", capsys)
    assert hub.repositories["model", "user/precious"].files == before and list(tmp_path.iterdir()) == []


def test_half_precision_is_rounded_once(tiny_pipe, tmp_path):
    unet = make_components()["unet"]
    add_lora(unet, LORA_NAME)
    unet.fuse_lora(adapter_names=[LORA_NAME])
    unet.unload_lora()
    export.write_weights(tiny_pipe, tmp_path, torch.float16)
    weights = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    state_dict = unet.state_dict()
    assert weights.keys() == state_dict.keys()
    assert all(torch.equal(weights[key], state_dict[key].half()) for key in weights)
    assert load_file(tmp_path / LORA).popitem()[1].dtype == torch.float16


def test_an_adapter_without_a_lora_leaves_the_base_alone(tiny_base, tmp_path):
    tiny_base.register_modules(au_adapter=make_adapter(tiny_base.unet))
    export.write_weights(tiny_base, tmp_path, torch.float32)
    assert not (tmp_path / LORA).exists()
    weights, base = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors"), make_components()["unet"]
    assert all(torch.equal(weights[key], tensor) for key, tensor in base.state_dict().items())


# The model card


def test_the_card_is_one_that_the_hub_takes(exported):
    card = ModelCard.load(exported / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "apache-2.0",
        "diffusers",
        "text-to-image",
    )
    assert (data["base_model"], data["base_model_relation"]) == ("user/base", "adapter")
    assert data["datasets"] == ["user/faces"] and "action-units" in data["tags"]
    for example in data["widget"]:
        assert re.search("<[^<>]+>", example["text"])
        metadata = read_metadata(exported / example["output"]["url"])
        assert metadata["aus"] is not None and metadata["model"] == "user/fineface"
    assert 'from_pretrained("user/fineface", trust_remote_code=True)' in card.text
    assert not re.search(r"\$[a-z_]", card.text)


def test_the_card_shows_every_au(exported):
    text = (exported / "README.md").read_text()
    for unit in action_units_of():
        row = next(line for line in text.splitlines() if line.startswith(f"| {unit.name} |"))
        assert unit.facs_name in row and unit.muscles in row and unit.hint in row
        assert read_metadata(exported / re.search('src="([^"]+)"', row)[1])["aus"] == f"{unit.name}=5"


FACTS = {"license": "mit", "base_model": None, "datasets": None, "training": "a", "evaluation": "b"}


def test_the_card_has_the_aus_of_the_adapter():
    au_names = ["AU4", "AU6", "AU12L", "AU12R"]
    jobs = export.picture_jobs({"num_inference_steps": 1}, au_names)
    assert {name: job.aus for name, job in jobs.items()} == {
        "images/neutral.png": "neutral",
        "images/AU4.png": "AU4=5",
        "images/AU6.png": "AU6=5",
        "images/AU12.png": "AU12=5",
        "images/example_1.png": "AU6=3 AU12=4",
    }
    text = export.fill_card(FACTS, "me/mine", {}, True, au_names)
    assert "# FineFace: a prompt and 3 facial muscles" in text and "| AU1 |" not in text
    assert 'a smile; AU12L and AU12R move one side | <img src="images/AU12.png"' in text
    assert 'aus={"AU6": 2.5, "AU12": 5.0}' in text and "Left and right are the person's own" in text
    for names, aus in ((["AU4", "AU12"], '{"AU12": 5.0}'), (["AU43L", "AU43R"], '{"AU43": 5.0}')):
        text = export.fill_card(FACTS, "me/mine", {}, True, names)
        assert f'in a park", aus={aus}' in text and f"smile = {aus}" in text


def test_the_code_of_the_card_is_python(exported):
    for block in re.findall("```python\n(.*?)```", (exported / "README.md").read_text(), flags=re.DOTALL):
        ast.parse(block)


def test_the_template_is_a_card_of_the_published_weights():
    data = ModelCard.load(ROOT / "model_card.md").data.to_dict()
    assert data["base_model"].endswith("stable-diffusion-2-1-base") and data["datasets"] == ["DISFA", "AffectNet"]
    assert yaml.safe_load(yaml.safe_dump(data)) == data


def test_a_card_says_what_is_known(tiny_sd_dir, tiny_adapter_dir, tmp_path):
    adapter = Path(shutil.copytree(tiny_adapter_dir, tmp_path / "adapter"))
    config = {"pretrained_model_name_or_path": "some/base", "output_dir": "/home/me/secret", "max_train_steps": 7}
    (adapter / "train_config.json").write_text(json.dumps(config | {"dataset_name": "some/faces"}))
    (adapter / "REPORT.md").write_text("# My report\n\nAU MSE 0.5\n")
    (adapter / "README.md").write_text("---\nlicense: mit\n---\nthe card of the base")
    arguments = [str(adapter), str(tmp_path / "out"), "--base", tiny_sd_dir, "--no-pictures"]
    assert export.main(arguments) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.datasets) == ("some/base", ["some/faces"])
    assert "### My report" in card.text and "| `max_train_steps` | 7 |" in card.text and "secret" not in card.text
    assert "the card of the base" not in card.text
    assert all("output" not in example for example in card.data.widget) and "<img" not in card.text


def test_a_card_says_nothing_that_is_private(tiny_sd_dir, tiny_adapter_dir, tmp_path):
    """Also of a base that was a folder and is gone by now."""
    adapter = Path(shutil.copytree(tiny_adapter_dir, tmp_path / "adapter"))
    private = {"pretrained_model_name_or_path": "/gone/secret/base", "dataset_name": "C:\\secret\\faces"}
    private |= {"validation_prompt": ["my secret neighbour"], "train_data_dir": "secret", "cache_dir": "secret"}
    (adapter / "train_config.json").write_text(json.dumps(private | {"max_train_steps": 7}))
    assert export.main([str(adapter), str(tmp_path / "out"), "--base", tiny_sd_dir, "--no-pictures"]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None and not card.data.datasets
    assert "secret" not in card.content and "| `max_train_steps` | 7 |" in card.text


@pytest.mark.parametrize("text", ["[1, 2]", "{", "[" * 100_000])
def test_broken_settings_beside_the_weights_are_named(text, tiny_sd_dir, tiny_adapter_dir, tmp_path, capsys):
    adapter = Path(shutil.copytree(tiny_adapter_dir, tmp_path / "adapter"))
    (adapter / "train_config.json").write_text(text)
    arguments = [str(adapter), str(tmp_path / "out"), "--base", tiny_sd_dir, "--no-pictures"]
    fails_with(export, arguments, "train_config.json: this is no JSON", capsys)
    assert not (tmp_path / "out").exists()


def test_notes_beside_the_weights_become_the_text_on_the_training(tmp_path):
    notes = tmp_path / "README.md"
    notes.write_text("# Made by hand\n\nWith [this](../this.py) and [that](https://that.org).\n")
    text = export._training_text(None, {}, notes)
    assert text == "### Made by hand\n\nWith this and [that](https://that.org)."
    assert export._training_text(None, {}, tmp_path / "none.md") == export.NOT_RECORDED


# A Space


def test_a_space_has_the_app_and_all_that_it_imports(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "fineface.json").write_text('{"num_inference_steps": 1}')
    space = tmp_path / "space"
    assert export.main([str(tmp_path / "model"), str(space), "--space", "--license", "openrail++"]) == 0
    metadata = yaml.safe_load((space / "README.md").read_text().split("---\n")[1])
    assert metadata["short_description"] == "Faces from text and twelve facial muscles"
    assert metadata["sdk"] == "gradio" and metadata["license"] == "openrail++"
    assert (space / metadata["app_file"]).is_file() and "gradio" not in (space / "requirements.txt").read_text()
    for path in space.rglob("*.py"):
        assert path.read_bytes() == (ROOT / path.relative_to(space)).read_bytes()
    # Whatever of ours is imported in there is there.
    ours = {path.stem for path in ROOT.glob("*.py")}
    for path in space.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert all((space / f"{name}.py").is_file() for name in names & ours)
    weights = space / "toy_faces" / "weights"
    assert torch.equal(draw(FineFacePipeline.from_pretrained(weights), aus="12"), draw(tiny_pipe, aus="12"))
    assert (weights / "fineface.json").is_file()


# An Inference Endpoint


@pytest.fixture(scope="module")
def endpoint(exported, tmp_path_factory) -> EndpointHandler:
    with pytest.MonkeyPatch.context() as patch:
        # Copies of code that diffusers makes do not belong into the home of whoever runs the tests.
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        yield EndpointHandler(str(exported), max_steps=4, max_pixels=64 * 64)


def ask(endpoint, inputs=PROMPT, **parameters):
    return endpoint({"inputs": inputs, "parameters": {"num_inference_steps": 1, "seed": 0, **parameters}})


def test_an_endpoint_answers_with_the_picture_of_the_pipeline(endpoint):
    image = ask(endpoint, aus={"AU12": 5}, width=48, height=32, guidance_scale=3.0, negative_prompt="snow")
    options = {"num_inference_steps": 1, "guidance_scale": 3.0, "negative_prompt": "snow", "width": 48, "height": 32}
    expected = endpoint.pipeline(PROMPT, aus="12E", generator=torch.Generator().manual_seed(0), **options).images[0]
    assert image.size == (48, 32) and image.tobytes() == expected.tobytes()


def test_an_endpoint_takes_every_form_of_aus(endpoint):
    expected = ask(endpoint, aus="12E").tobytes()
    forms = ["AU12=5", {"AU12": 5}, {"12": 5.0}, [0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0]]
    assert all(ask(endpoint, aus=aus).tobytes() == expected for aus in forms)
    assert ask(endpoint, inputs=f"{PROMPT} <AU12=5>").tobytes() == expected
    assert ask(endpoint, aus="12E", negative_aus="15", au_scale=0.5, au_guidance_scale=2).tobytes() != expected
    assert ask(endpoint).tobytes() != expected


def test_an_endpoint_takes_text_alone_and_defaults_for_none(endpoint, monkeypatch):
    monkeypatch.setattr(endpoint, "defaults", {"num_inference_steps": 2, "width": 32, "height": 32})
    assert isinstance(endpoint({"inputs": PROMPT}), Image.Image)
    assert isinstance(endpoint({"inputs": PROMPT, "parameters": None}), Image.Image)
    assert isinstance(endpoint({"inputs": PROMPT, "parameters": dict.fromkeys(PARAMETERS)}), Image.Image)


BAD_REQUESTS = {
    "no object": (["a boy"], "request"),
    "no text": ({"parameters": {}}, "`inputs`"),
    "an empty text": ({"inputs": "  "}, "empty"),
    "only a tag": ({"inputs": "<AU12=5>"}, "prompt"),
    "a number for a text": ({"inputs": 3}, "`inputs`"),
    "a list of texts": ({"inputs": ["a", "b"]}, "`inputs`"),
    "half a character": ({"inputs": "a \ud800"}, "Unicode"),
    "a very long text": ({"inputs": "a" * 10_000}, "characters"),
    "an unknown key": ({"inputs": "a", "options": {}}, "'options' is unknown"),
    "parameters of another kind": ({"inputs": "a", "parameters": [1]}, "`parameters`"),
    "an unknown parameter": ({"inputs": "a", "parameters": {"sead": 1}}, "'sead' is unknown"),
    "a parameter that is no text": ({"inputs": "a", "parameters": {3: 1}}, "3 is unknown"),
    "too many steps": ({"inputs": "a", "parameters": {"num_inference_steps": 5}}, "from 1 to 4"),
    "no steps": ({"inputs": "a", "parameters": {"num_inference_steps": 0}}, "from 1 to 4"),
    "half a step": ({"inputs": "a", "parameters": {"num_inference_steps": 1.5}}, "whole number"),
    "true steps": ({"inputs": "a", "parameters": {"num_inference_steps": True}}, "whole number"),
    "too many pixels": (
        {"inputs": "a", "parameters": {"width": 128, "height": 64}},
        "more than the 4096",
    ),
    "too wide": ({"inputs": "a", "parameters": {"width": 10**9}}, "`width`"),
    "an odd width": ({"inputs": "a", "parameters": {"width": 33}}, "multiple of 8"),
    "a negative seed": ({"inputs": "a", "parameters": {"seed": -1}}, "`seed`"),
    "an endless seed": ({"inputs": "a", "parameters": {"seed": 10**5000}}, "a very large number"),
    "a text for a number": ({"inputs": "a", "parameters": {"guidance_scale": "7"}}, "`guidance_scale`"),
    "not a number": ({"inputs": "a", "parameters": {"au_scale": float("nan")}}, "`au_scale`"),
    "infinite": ({"inputs": "a", "parameters": {"guidance_scale": float("inf")}}, "`guidance_scale`"),
    "an endless number": ({"inputs": "a", "parameters": {"au_guidance_scale": 10**400}}, "`au_guidance_scale`"),
    "a negative prompt that is none": ({"inputs": "a", "parameters": {"negative_prompt": {}}}, "`negative_prompt`"),
    "an unknown AU": ({"inputs": "a", "parameters": {"aus": {"AU99": 1}}}, "AU99"),
    "an unknown preset": ({"inputs": "a", "parameters": {"aus": "hapy"}}, "hapy"),
    "too strong": ({"inputs": "a", "parameters": {"aus": {"AU12": 50}}}, "50"),
    "an AU that is not a number": ({"inputs": "a", "parameters": {"aus": {"AU12": float("nan")}}}, "`aus`"),
    "an AU that is endless": ({"inputs": "a", "parameters": {"aus": {"AU12": 10**400}}}, "`aus`"),
    "an AU that is a text": ({"inputs": "a", "parameters": {"aus": {"AU12": "5"}}}, "`aus`"),
    "an AU that is true": ({"inputs": "a", "parameters": {"aus": {"AU12": True}}}, "AU12"),
    "too few AUs": ({"inputs": "a", "parameters": {"aus": [1, 2, 3]}}, "3"),
    "no AUs": ({"inputs": "a", "parameters": {"aus": []}}, "`aus`"),
    "two expressions": ({"inputs": "a", "parameters": {"aus": ["happy", "sad"]}}, "`aus`"),
    "AUs that are a number": ({"inputs": "a", "parameters": {"aus": 12}}, "`aus`"),
    "AUs twice": ({"inputs": "a <AU12=5>", "parameters": {"aus": "12"}}, "one of the two"),
    "a tag without an end": ({"inputs": "a <AU12=5"}, "never closes"),
    "an expression to leave without one to go to": ({"inputs": "a", "parameters": {"negative_aus": "12"}}, "aus"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_an_endpoint_says_what_is_wrong(name, endpoint, monkeypatch):
    def must_not_run(*args, **kwargs):
        raise AssertionError("a model ran")

    monkeypatch.setattr(endpoint.pipeline.unet, "forward", must_not_run)
    request, message = BAD_REQUESTS[name]
    answer = endpoint(request)
    assert answer["error_type"] == "invalid_request" and message in answer["error"]
    assert len(json.dumps(answer)) < 3000


def test_an_endpoint_outlives_a_lack_of_memory(endpoint, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(endpoint.pipeline.unet, "forward", fail)
        assert ask(endpoint)["error_type"] == "out_of_memory"
    assert isinstance(ask(endpoint), Image.Image)


# The published files


def published(folder: Path, variant: str | None, dtype=torch.float16) -> Path:
    unet = make_components()["unet"]
    torch.manual_seed(0)
    # The SD 1.5 encoder has no zeros behind its features, the other one has.
    hidden_dim = HIDDEN_DIM if variant is None else CROSS_ATTENTION_DIM - 12
    adapter = AUAdapter(au_layers(unet), CROSS_ATTENTION_DIM, hidden_dim=hidden_dim).to(dtype=dtype)
    write_original(folder, adapter, "" if variant is None else f"{variant}_")
    if variant is None:
        lora = {
            f"unet.{layer.removesuffix('.attn2')}.attn1.to_q.lora.down.weight": torch.rand(2, 3)
            for layer in au_layers(unet)
        }
        save_file(lora, folder / LORA)
    return folder


@pytest.mark.parametrize("variant", [None, "sd15"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_published_files_come_back_to_the_bit(variant, dtype, tmp_path):
    original = published(tmp_path / "original", variant, dtype)
    options = [] if variant is None else ["--variant", variant]
    assert convert_original.main([str(original), str(tmp_path / "ours"), *options]) == 0
    assert convert_original.main([str(tmp_path / "ours"), str(tmp_path / "back"), *options]) == 0
    assert {path.name for path in (tmp_path / "back").iterdir()} == {path.name for path in original.iterdir()}
    for path in original.glob("*.ckpt"):
        before, after = (torch.load(f / path.name, weights_only=True) for f in (original, tmp_path / "back"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    if variant is None:
        assert (tmp_path / "back" / LORA).read_bytes() == (original / LORA).read_bytes()


@pytest.mark.parametrize("variant", [None, "sd15"])
def test_converted_files_are_the_same_adapter(variant, tiny_base, tmp_path):
    original = published(tmp_path / "original", variant, torch.float32)
    (original / LORA).unlink(missing_ok=True)
    options = [] if variant is None else ["--variant", variant]
    assert convert_original.main([str(original), str(tmp_path / "ours"), *options]) == 0
    tiny_base.load_au_adapter(original, variant=variant)
    expected = draw(tiny_base, aus="12")
    tiny_base.load_au_adapter(tmp_path / "ours")
    assert torch.equal(draw(tiny_base, aus="12"), expected)


def test_our_files_come_back_to_the_bit(tiny_adapter_dir, tmp_path):
    (tmp_path / "adapter").mkdir()
    unet = make_components()["unet"]
    add_lora(unet, LORA_NAME, rank=4, alpha=4)
    write_au_adapter(tmp_path / "adapter", make_adapter(unet), unet, LORA_NAME)
    assert convert_original.main([str(tmp_path / "adapter"), str(tmp_path / "original")]) == 0
    assert convert_original.main([str(tmp_path / "original"), str(tmp_path / "back")]) == 0
    for name in (ENCODER, ATTN_PROCESSORS, LORA):
        before, after = load_file(tmp_path / "adapter" / name), load_file(tmp_path / "back" / name)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((tmp_path / name / ENCODER_CONFIG).read_text()) for name in ("adapter", "back")]
    assert configs[0] == configs[1]


def test_a_lora_with_a_scale_keeps_its_effect_where_no_scale_is_read(tiny_adapter_dir, tiny_pipe, tmp_path):
    assert convert_original.main([tiny_adapter_dir, str(tmp_path / "original")]) == 0
    expected = draw(tiny_pipe, aus="12")
    tiny_pipe.load_au_adapter(tmp_path / "original")
    scales = {m.scaling[LORA_NAME] for m in tiny_pipe.unet.modules() if LORA_NAME in getattr(m, "scaling", {})}
    assert scales == {1.0}
    torch.testing.assert_close(draw(tiny_pipe, aus="12"), expected, atol=1e-5, rtol=1e-5)


def edited(folder: Path, name: str, edit) -> Path:
    tensors = torch.load(folder / name, weights_only=True)
    edit(tensors)
    torch.save(tensors, folder / name)
    return folder


BROKEN = {
    "code": ("au_encoder.ckpt", lambda t: t.update({"au_encoder.bias": Exploit()}), "code"),
    "another key": ("attn_processors.ckpt", lambda t: t.update(x=torch.zeros(2, 2)), "has the unexpected x"),
    "a missing key": ("attn_processors.ckpt", lambda t: t.popitem(), "misses"),
    "a missing bias": ("au_encoder.ckpt", lambda t: t.pop("au_encoder.bias"), "misses intensity_proj.bias"),
    "another bias": ("au_encoder.ckpt", lambda t: t.update({"au_encoder.bias": torch.zeros(3)}), "shape (3,)"),
    "not a number": ("au_encoder.ckpt", lambda t: t["au_encoder.bias"].fill_(torch.nan), "not finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_published_files_are_refused(name, tmp_path, capsys):
    file, edit, message = BROKEN[name]
    original = edited(published(tmp_path / "original", None), file, edit)
    fails_with(convert_original, [str(original), str(tmp_path / "out")], f"{file}'", capsys)
    fails_with(convert_original, [str(original), str(tmp_path / "out")], message, capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"original"}


def test_adapters_without_a_place_in_the_original_layout_are_refused(tiny_adapter_dir, tmp_path, capsys):
    fails_with(convert_original, [tiny_adapter_dir, str(tmp_path / "out"), "--variant", "sd15"], "no place", capsys)
    unet = make_components()["unet"]
    write_au_adapter(tmp_path / "two", make_adapter(unet, num_tokens=2), unet, LORA_NAME)
    fails_with(convert_original, [str(tmp_path / "two"), str(tmp_path / "out")], "2 token(s)", capsys)
    named = AUAdapter.from_unet(unet, hidden_dim=8, au_names=["AU12L", "AU12R"])
    write_au_adapter(tmp_path / "sided", named, unet, LORA_NAME)
    fails_with(convert_original, [str(tmp_path / "sided"), str(tmp_path / "out")], "names the AUs AU12L", capsys)
    assert not (tmp_path / "out").exists()


# One file


@pytest.mark.parametrize("options", [[], ["--xl"]])
def test_the_bundle_passes_what_diffusers_asks_of_a_community_pipeline(options, tmp_path):
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    path = tmp_path / "fineface.py"
    assert bundle.main([str(path), *options]) == 0
    options = ["--isolated", "--line-length", "119"]
    checks = ["--select", "E,F,I,W", "--config", "lint.isort.lines-after-imports=2"]
    for command in (["check", *options, *checks], ["format", "--check", *options]):
        result = subprocess.run([ruff, *command, str(path)], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"fineface.py"}


@pytest.mark.parametrize(
    ("pipeline", "base"),
    [(bundle.PIPELINE, "StableDiffusionPipeline"), (bundle.XL_PIPELINE, "StableDiffusionXLPipeline")],
)
def test_the_bundle_has_one_pipeline_and_an_example(pipeline, base):
    tree = ast.parse(bundle.bundle(pipeline=pipeline))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    bases = [ast.unparse(base) for node in classes for base in node.bases]
    assert [name for name in bases if name.endswith("Pipeline")] == [base]
    source, name = ast.unparse(tree), pipeline.removeprefix("pipeline_")
    assert f'custom_pipeline="{name}"' in source and "from pipeline_fineface" not in source


def test_the_bundle_needs_different_names(tmp_path):
    for module in (*leaf_modules(), "pipeline_fineface"):
        shutil.copy(ROOT / f"{module}.py", tmp_path)
    with open(tmp_path / "au_encoder.py", "a") as file:
        file.write("\n\nAU_NAMES = ()\n")
    with pytest.raises(ValueError, match="action_units.py and au_encoder.py both define AU_NAMES"):
        bundle.bundle(tmp_path)


# Mistakes on the command line


def fails_with(program, arguments: list[str], message: str, capsys) -> None:
    assert program.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["{adapter}", "{out}", "--dtyp", "float16"], "--dtyp"),
        (["{adapter}", "{out}"], "Name its base with `--base`"),
        (["{tmp}/nowhere", "{out}"], "neither a folder nor the id"),
        (["{adapter}", "{out}", "--base", "{tmp}/nowhere"], "neither a folder nor the id"),
        (["{adapter}", "{out}", "--base", "{adapter}"], "no model. Name one"),
        (["{base}", "{out}"], "There is no AU adapter in"),
        (["{adapter}", "{adapter}", "--base", "{base}", "--overwrite"], "is the source or the base"),
        (["{adapter}", "{full}", "--base", "{base}"], "is not empty"),
        (["{adapter}", "{full}", "--base", "{base}", "--overwrite"], "has not written it"),
        (["{adapter}", "{full}/file", "--base", "{base}"], "is a file"),
        (["{adapter}", "{full}/file/out", "--base", "{base}"], "cannot be written"),
        (["{adapter}", "{out}", "--base", "{base}", "--adapter-variant", "sd15"], "of the variant 'sd15'"),
        (["{base}", "{out}", "--adapter-variant", "sd15"], "Name its base"),
        (["{adapter}", "{out}", "--base", "{base}", "--push", "a/b/c"], "no repository id"),
        (["{adapter}", "{out}", "--base", "{base}", "--push", "user/new"], "hf auth login"),
        (["{adapter}", "{out}", "--base", "{base}", "--private"], "`--push`"),
        (["{adapter}", "{out}", "--base", "{base}", "--base-model", "../some/base"], "no id of a Hub repository"),
        (["{adapter}", "{out}", "--base", "{base}", "--num-inference-steps", "0"], "num_inference_steps"),
        (["{adapter}", "{out}", "--base", "{base}", "--seed", "-1"], "seed"),
        (["{adapter}", "{out}", "--base", "{base}", "--device", "abacus"], "abacus"),
        (["{adapter}", "{out}", "--base", "{base}", "--training", "{tmp}/none.md"], "none.md"),
    ],
)
def test_export_refuses_mistakes(arguments, message, tiny_sd_dir, tiny_adapter_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    places = {"adapter": tiny_adapter_dir, "base": tiny_sd_dir, "tmp": tmp_path, "out": tmp_path / "out"}
    places["full"] = tmp_path / "full"
    fails_with(export, [argument.format(**places) for argument in arguments], message, capsys)
    assert {path.name for path in tmp_path.rglob("*")} == {"full", "file"}


def test_export_refuses_an_export(exported, tmp_path, capsys):
    fails_with(export, [str(exported), str(tmp_path / "out")], "exported repository already", capsys)


def push_arguments(tiny_sd_dir, tiny_adapter_dir, folder) -> list[str]:
    return [tiny_adapter_dir, str(folder), "--base", tiny_sd_dir, "--no-pictures", "--push", "user/new"]


def test_export_writes_nothing_for_a_hub_that_takes_nothing(
    logged_in, tiny_sd_dir, tiny_adapter_dir, tmp_path, capsys, monkeypatch
):
    arguments = push_arguments(tiny_sd_dir, tiny_adapter_dir, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_wrong")
        fails_with(export, arguments, "does not take the token", capsys)
    # A port of this machine that nobody listens on.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    fails_with(export, arguments, "cannot be reached", capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_upload_says_how_to_go_on(logged_in, tiny_sd_dir, tiny_adapter_dir, tmp_path, capsys, monkeypatch):
    def refuse(handler, *args):
        handler.send_json({"error": "You are over your quota."}, 403)

    monkeypatch.setattr(HubRequestHandler, "make_commit", refuse)
    arguments = push_arguments(tiny_sd_dir, tiny_adapter_dir, tmp_path / "out")
    assert export.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "over your quota" in error and f"hf upload user/new {tmp_path / 'out'}" in error
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_a_failing_export_leaves_what_was_there(exported, tiny_sd_dir, tiny_adapter_dir, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(exported, tmp_path / "out"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "fill_card", interrupt)
    assert export.main([tiny_adapter_dir, str(folder), "--base", tiny_sd_dir, "--overwrite"]) == 130
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (convert_original, ["{tmp}", "{tmp}/out"], "There is no AU adapter in"),
        (convert_original, ["{adapter}", "{adapter}"], "the same folder"),
        (convert_original, ["{adapter}", "{tmp}", "--overwrite"], "has not written it"),
        (convert_original, ["{adapter}"], "required"),
        (bundle, ["{tmp}/fineface"], "ending .py"),
        (bundle, [str(ROOT / "au_encoder.py")], "one of the sources"),
        (bundle, ["{tmp}/file/fineface.py"], "cannot be written"),
    ],
)
def test_the_other_programs_refuse_mistakes(program, arguments, message, tiny_adapter_dir, tmp_path, capsys):
    (tmp_path / "file").touch()
    fails_with(program, [a.format(tmp=tmp_path, adapter=tiny_adapter_dir) for a in arguments], message, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Another family


@pytest.fixture(scope="module")
def exported_xl(tmp_path_factory, tiny_xl_dir, tiny_xl_adapter_dir) -> Path:
    folder = tmp_path_factory.mktemp("xl") / "repository"
    options = ["--base", tiny_xl_dir, "--base-model", "user/xl", "--device", "cpu", "--num-inference-steps", "1"]
    assert export.main([tiny_xl_adapter_dir, str(folder), *options]) == 0
    return folder


LOAD_XL = """
import sys
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

folder, base, bundle = sys.argv[1:]

def draw(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe("a boy in a park", **options, **kwargs).images

pictures = {"one line": draw(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True), aus="12E")}
pipe = DiffusionPipeline.from_pretrained(
    base, custom_pipeline=f"{folder}/pipeline_fineface_xl.py", trust_remote_code=True
)
pipe.load_au_adapter(folder)
pictures["base, code and adapter"] = draw(pipe, aus="12E")
pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=bundle, trust_remote_code=True)
assert pipe.__class__.__module__.endswith(".fineface_xl")
pipe.load_au_adapter(folder)
pictures["bundle"] = draw(pipe, aus="12E")
pipe = StableDiffusionXLPipeline.from_pretrained(base)
pipe.load_lora_weights(folder)
pipe.load_ip_adapter(folder, subfolder="", weight_name="au_ip_adapter.safetensors", image_encoder_folder=None)
aus = torch.zeros(1, 1, 12)
aus[..., 6] = 5
pictures["plain"] = draw(pipe, ip_adapter_image_embeds=[torch.cat([torch.zeros_like(aus), aus])])
torch.save(pictures, "pictures.pt")
"""


def test_an_export_of_xl_loads_in_each_way(processes, exported_xl, tiny_xl_dir, tiny_xl_adapter_dir, tmp_path):
    bundled = tmp_path / "fineface_xl.py"
    assert bundle.main([str(bundled), "--xl"]) == 0
    (answer,) = processes({"code": LOAD_XL, "arguments": [exported_xl, tiny_xl_dir, bundled], "folder": tmp_path})
    assert answer["status"] == 0, answer
    pipe = FAMILIES["sdxl"].make_pipe()
    pipe.load_au_adapter(tiny_xl_adapter_dir)
    expected = draw(pipe, aus="12E")
    for found in torch.load(tmp_path / "pictures.pt", weights_only=True).values():
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_card_of_xl_names_its_classes(exported_xl):
    text = (exported_xl / "README.md").read_text()
    assert "from pipeline_fineface_xl import FineFaceXLPipeline" in text and "StableDiffusionXLPipeline" in text
    assert not re.search(r"\b(pipeline_fineface|FineFacePipeline|StableDiffusionPipeline)\b", text)


@pytest.mark.parametrize("format", ["ip-adapter", "folded"])
def test_an_adapter_of_xl_alone(format, tiny_xl_dir, tiny_xl_adapter_dir, tmp_path):
    options = ["--format", format, "--base", tiny_xl_dir, "--no-pictures"]
    assert export.main([tiny_xl_adapter_dir, str(tmp_path / "out"), *options]) == 0
    pictures = []
    for folder in (tiny_xl_adapter_dir, tmp_path / "out"):
        pipe = FAMILIES["sdxl"].make_pipe()
        pipe.load_au_adapter(folder)
        pictures.append(draw(pipe, aus="12E"))
    torch.testing.assert_close(*pictures, atol=1e-4, rtol=1e-4)
    if format == "ip-adapter":
        assert "StableDiffusionXLPipeline.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
