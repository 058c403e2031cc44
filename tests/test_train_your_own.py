"""The commands of docs/train_your_own.md run as they stand, on drawn pictures and with a tiny base under its name."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value
from test_evaluation import write_program
from test_face_data import draw, tiny_blip2_dir  # noqa: F401
from test_from_hub import PROMPTS, portrait
from training_runs import datasets_cache_fixture  # noqa: F401

import evaluation.run
import face_data.prepare
import generate
import hub.export
import train_fineface
from action_units import AU_NAMES
from toy_faces.renderer import sample_aus


ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "train_your_own.md").read_text(encoding="utf-8")
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PROGRAMS = {
    "face_data.prepare": face_data.prepare.main,
    "train_fineface.py": lambda words: train_fineface.main(words) or 0,
    "hub.export": hub.export.main,
    # Hundreds of pictures: only whether the options are known.
    "evaluation.run": lambda words: evaluation.run.parse_args(words) and 0,
    "generate.py": lambda words: generate.parse_args(words) and 0,
}
# The tools cannot be installed beside ours. What stands in for them answers in their form, with the AUs that the
# picture was drawn with, whose number its name is.
TOOLS = """
    import re, sys
    from pathlib import Path
    from types import SimpleNamespace as Some
    sys.path.insert(0, {root!r})
    from action_units import AU_NAMES
    from toy_faces.renderer import sample_aus
    def aus_of(path):
        return dict(zip(AU_NAMES, map(float, sample_aus(int(Path(path).stem)))))
"""
MEDIAPIPE = """
    import numpy, PIL.Image
    from tools import *
    SHAPES = {"AU2": "browOuterUp", "AU4": "browDown", "AU6": "cheekSquint", "AU9": "noseSneer", "AU12": "mouthSmile"}
    SHAPES |= {"AU15": "mouthFrown", "AU20": "mouthStretch"}
    class FaceLandmarker:
        create_from_options = staticmethod(lambda options: FaceLandmarker())
        __enter__ = lambda self: self
        __exit__ = lambda self, *error: None
        def detect(self, pixels):
            aus = aus_of(next(path for path in Path(sys.argv[1]).read_text().splitlines() if shows(path, pixels)))
            values = {shape + side: aus[au] / 5 for au, shape in SHAPES.items() for side in ("Left", "Right")}
            values |= {"noseSneerLeft": 0.0, "eyeBlinkLeft": 1.0, "eyeBlinkRight": 0.0}
            values |= {"browInnerUp": aus["AU1"] / 5, "jawOpen": aus["AU26"] / 5, "mouthShrugLower": aus["AU17"] / 5}
            shapes = [Some(category_name=name, score=value) for name, value in values.items()]
            return Some(face_blendshapes=[shapes], face_landmarks=[[Some(x=0.2, y=0.1), Some(x=0.8, y=0.9)]])
    tasks = Some(vision=Some(FaceLandmarkerOptions=Some, FaceLandmarker=FaceLandmarker), BaseOptions=Some)
    Image, ImageFormat = lambda image_format, data: data, Some(SRGB="sRGB")
    def shows(path, pixels):
        with PIL.Image.open(path) as image:
            return numpy.array_equal(image.convert("RGB"), pixels)
"""
PYFEAT = """
    from tools import *
    import pandas
    class Detectorv2:
        def detect(self, paths, batch_size):
            row = {f"AU{int(name[2:]):02d}": value / 5 for name, value in aus_of(paths[0]).items()}
            return pandas.DataFrame([row | {"FaceScore": 0.9}])
"""
LIBREFACE = """
    from tools import *
    def get_facial_attributes(path, temp_dir):
        return {"au_intensities": {f"au_{name[2:]}_intensity": value for name, value in aus_of(path).items()}}
"""
OPENFACE = """
    import sys
    sys.path.insert(0, {modules!r})
    from tools import *
    options = dict(zip(sys.argv[1:-1:2], sys.argv[2::2]))
    Path(options["-out_dir"]).mkdir()
    for path in Path(options["-fdir"]).glob("*.png"):
        aus = {{f"AU{{int(name[2:]):02d}}_r": value for name, value in aus_of(path).items()}}
        text = ", ".join(["face", "confidence", *aus]) + "\\n" + ", ".join(map(str, [0, 0.98, *aus.values()]))
        (Path(options["-out_dir"]) / f"{{path.stem}}.csv").write_text(text)
"""


def commands_between(start: str, end: str) -> list[str]:
    part = TEXT[TEXT.index(start) : TEXT.index(end) if end else None]
    blocks = re.findall("```bash\n(.*?)```", part, flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture
def workplace(tiny_sd_dir, tiny_blip2_dir, tmp_path, monkeypatch):  # noqa: F811
    """A folder with pictures, the tools, and a data set in place of that of the Hub; runs a command of the page."""
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        draw(number, sample_aus(number), tmp_path / f"photos/{number:02d}.png", 40)
    (tmp_path / "photos/.hidden").touch()
    features = Features({"image": Image(), "prompt": Value("string")})
    columns = {"image": [{"bytes": portrait(row), "path": None} for row in range(4)], "prompt": PROMPTS[:4]}
    Dataset.from_dict(columns, features).to_parquet(tmp_path / "hub_data/train.parquet")
    modules = tmp_path / "modules"
    modules.mkdir()
    sources = {"tools": TOOLS.replace("{root!r}", repr(str(ROOT)))}
    sources |= {"mediapipe": MEDIAPIPE, "feat": PYFEAT, "libreface": LIBREFACE}
    for name, code in sources.items():
        (modules / f"{name}.py").write_text(textwrap.dedent(code))
    write_program(modules / "FaceLandmarkImg", textwrap.dedent(OPENFACE).format(modules=str(modules)))
    environment = os.environ | {"PYTHONPATH": str(modules), "PATH": f"{modules}{os.pathsep}{os.environ['PATH']}"}
    stand_ins = {BASE: tiny_sd_dir, "Salesforce/blip2-opt-2.7b": tiny_blip2_dir, "laion/emonet-face-big": "hub_data"}
    # The tokens of the tiny base hold 15 AUs as an IP-Adapter.
    names = " ".join((*AU_NAMES, "AU43")).replace("AU12", "AU12L AU12R")
    stand_ins |= {
        "--min_side 512": f"--min_side 16 --au_names {names}",
        "--dataloader_num_workers 4": "--dataloader_num_workers 0",
    }
    stand_ins |= {"--max_train_steps 10000": "--max_train_steps 2 --report_to none", "accelerate launch": "python"}
    stand_ins |= {"--preset best": "--preset best --au_hidden_dim 8 --rank 4"}
    stand_ins |= {"--validation_steps 250": "--validation_steps 250 --validation_inference_steps 2"}
    stand_ins |= {"evaluation/tool_scripts": str(ROOT / "evaluation/tool_scripts")}

    def run(command: str) -> None:
        for named, stand_in in stand_ins.items():
            command = command.replace(named, stand_in)
        words = [word for word in shlex.split(command) if word != "-m"]
        if words[0] == "python" and words[1] in PROGRAMS:
            assert PROGRAMS[words[1]](words[2:]) == 0, command
        else:
            command = re.sub(r"^(/envs/\w+/bin/)?python\b", shlex.quote(sys.executable), command)
            subprocess.run(command, shell=True, env=environment, check=True)

    return run


def built_rows(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "train/metadata.jsonl").read_text().splitlines()]


def test_the_road_with_photographs_leads_to_plain_diffusers(workplace, tiny_sd_dir):
    for command in commands_between("## (a) My photographs", "## (b) Public data"):
        workplace(command)
    rows = built_rows("faces")
    assert len(rows) == 6 and all(row["text"] for row in rows)
    for row in rows:
        aus = dict(zip(AU_NAMES, map(float, sample_aus(int(Path(row["origin"]).stem))), strict=True))
        # AU5 and AU9 come from py-feat, the others from MediaPipe, as far as it is asked here.
        for name in ("AU1", "AU4", "AU5", "AU6", "AU9", "AU12L", "AU12R", "AU15", "AU26"):
            assert row[name] == pytest.approx(aus[name.rstrip("LR")], abs=1e-4), name
        assert [row[name] for name in ("AU43", "face_x0", "face_y1")] == [2.5, 0.2, 0.9]
    # Either of the other tools would have said the same.
    for table in ("libreface.csv", "openface.csv"):
        workplace(f"python -m face_data.prepare folder --root photos --aus {table} --output work/{table}")
    assert list(Path("adapter/validation").iterdir()) and Path("plain/au_ip_adapter.safetensors").is_file()
    (block,) = re.findall("```python\n(.*?)```", TEXT, flags=re.DOTALL)
    for named, stand_in in {BASE: tiny_sd_dir, "torch.float16": "torch.float32", '"cuda"': '"cpu"'}.items():
        block = block.replace(named, stand_in)
    exec(compile(block, "docs/train_your_own.md", "exec"), {})
    assert Path("smile.png").is_file()


def test_the_road_with_public_data_leads_to_a_data_set(workplace):
    for command in commands_between("## (b) Public data", ""):
        workplace(command)
    rows = sorted(built_rows("faces-emonet"), key=lambda row: row["text"])
    assert [row["text"] for row in rows] == [f"a person {number}" for number in range(4)]
    # Each picture is called by its number in the part, which is that of the row here.
    for number, row in enumerate(rows):
        aus = dict(zip(AU_NAMES, map(float, sample_aus(number)), strict=True))
        assert [row[name] for name in ("AU5", "AU12L")] == pytest.approx([aus["AU5"], aus["AU12"]], abs=1e-4)
