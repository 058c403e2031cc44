"""The recipes run as they stand, with tiny models under the names of the published ones."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from test_ip_adapter import FACE_DIM, make_faceid_portrait, make_image_encoder, make_ip_adapter
from tiny import add_lora, make_components

import examples.edit_expression
import generate
import hub.export
from action_units import AU_NAMES


ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall("```python\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [
    shlex.split(line)
    for block in re.findall("```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


def write_lora(folder: Path) -> None:
    unet = make_components()["unet"]
    add_lora(unet, "other", seed=8)
    layers = {name.replace(".other.", "."): weight for name, weight in unet.state_dict().items() if ".lora_" in name}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def write_ip_adapters(folder: Path) -> None:
    unet = make_components()["unet"]
    parts = make_ip_adapter(unet)
    models = folder / "ip_adapter" / "models"
    make_image_encoder().save_pretrained(models / "image_encoder")
    tensors = {f"{part}.{name}": tensor for part, values in parts.items() for name, tensor in values.items()}
    save_file(tensors, models / "ip-adapter-plus-face_sd15.safetensors")
    (folder / "faceid").mkdir()
    torch.save(make_faceid_portrait(unet), folder / "faceid" / "ip-adapter-faceid-portrait-v11_sd15.bin")


@pytest.fixture
def workplace(tiny_sd_dir, tiny_adapter_dir, tmp_path, monkeypatch) -> dict[str, str]:
    """The files that the recipes name, and what stands in for what they name elsewhere."""
    monkeypatch.chdir(tmp_path)
    for name in ("portrait", "pose", "face"):
        Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(f"{name}.png")
    columns = [f"AU{int(name[2:]):02d}_r" for name in AU_NAMES]
    rows = [["1", "1", *["2.5"] * 12], ["2", "0", *["0"] * 12]]
    Path("openface.csv").write_text("\n".join(map(",".join, [["frame", "success", *columns], *rows])))
    unet = make_components()["unet"]
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).save_pretrained("controlnet")
    write_lora(Path("lora"))
    write_ip_adapters(Path())
    assert hub.export.main([tiny_adapter_dir, "fineface-plain", "--format", "ip-adapter"]) == 0
    return {
        '"Tvaranka/fineface", variant="sd15"': repr(tiny_adapter_dir),
        '"stable-diffusion-v1-5/stable-diffusion-v1-5"': repr(tiny_sd_dir),
        '"lllyasviel/control_v11p_sd15_openpose"': '"controlnet"',
        '"latent-consistency/lcm-lora-sdv1-5"': '"lora"',
        '"h94/IP-Adapter"': '"ip_adapter"',
        '"h94/IP-Adapter-FaceID"': '"faceid"',
        "torch.float16": "torch.float32",
        '"cuda"': '"cpu"',
    }


def test_the_python_of_the_recipes_runs(workplace):
    names = {"embeddings": torch.randn(3, FACE_DIM)}
    runnable = [block for block in BLOCKS if "insightface" not in block]
    assert len(runnable) == len(BLOCKS) - 1
    for block in runnable:
        for named, stand_in in workplace.items():
            block = block.replace(named, stand_in)
        if "num_inference_steps" not in block:
            block = re.sub(r",?\s*\)\.images", ", num_inference_steps=2).images", block)
        exec(compile(block.replace("(768, 512)", "(48, 32)"), "docs/recipes.md", "exec"), names)
    assert names["image"].size == (32, 32) and names["smiling"].size == (32, 32)


def test_the_programs_know_the_options_of_the_recipes():
    assert len(COMMANDS) == 8
    for command in COMMANDS:
        command = [word for word in command if word not in ("accelerate", "launch", "python")]
        if command[0] == "generate.py":
            generate.parse_args(command[1:])
        elif command[:2] == ["-m", "examples.edit_expression"]:
            examples.edit_expression.parse_args(command[2:])
        elif command[:2] == ["-m", "hub.export"]:
            hub.export.parse_args(command[2:])
        else:
            assert command[0] == "train_fineface.py"
