"""Tiny training runs on rendered faces, for the tests of training and of its data."""

import json
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES

from action_units import AU_NAMES
from toy_faces.renderer import caption, render, sample_aus, sample_portrait
from training.config import parse_args


TINY = "--au_hidden_dim 8 --rank 4 --train_batch_size 2 --max_train_steps 4 --learning_rate 1e-2 --report_to none"


@pytest.fixture(scope="session", autouse=True, name="datasets_cache")
def datasets_cache_fixture(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def write_faces(folder, changes=(), drop=()):
    """Five rendered faces. `changes` maps a row and a column to another value."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(5):
        aus = dict(zip(AU_NAMES, map(float, sample_aus(seed)), strict=True))
        box = {"face_x0": 0.2, "face_y0": 0.1, "face_x1": 0.8, "face_y1": 0.9}
        rows.append({"file_name": f"{seed}.png", "text": caption(sample_portrait(seed))} | aus | box)
        render(sample_portrait(seed), sample_aus(seed)).resize((48, 40)).save(folder / f"{seed}.png")
    for (row, column), value in dict(changes).items():
        rows[row][column] = value
    lines = [json.dumps({key: value for key, value in row.items() if key not in drop}) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session", name="faces_dir")
def faces_dir_fixture(tmp_path_factory):
    return write_faces(tmp_path_factory.mktemp("faces"))


on_every_family = pytest.mark.parametrize("arguments", FAMILIES, indirect=True)


@pytest.fixture(name="arguments")
def arguments_fixture(request, faces_dir, tmp_path):
    """The command line of a tiny run into `tmp_path / name`, on a base of the family "sd" or of another one."""
    base = request.getfixturevalue({"sd": "tiny_sd_dir", "sdxl": "tiny_xl_dir"}[getattr(request, "param", "sd")])

    def arguments(name, options=""):
        paths = ["--pretrained_model_name_or_path", base, "--train_data_dir", str(faces_dir)]
        return [*paths, "--output_dir", str(tmp_path / name), *TINY.split(), *options.split()]

    return arguments


@pytest.fixture(name="config")
def config_fixture(arguments):
    return parse_args(arguments("run"))


@pytest.fixture(scope="session", name="run_processes")
def run_processes_fixture(processes):
    """
    Run trainings beside each other, each in a process. They compute in one thread, and so does this process from now
    on: other numbers of threads add in other orders.
    """
    torch.set_num_threads(1)
    code = "import sys, train_fineface; sys.exit(train_fineface.start())"
    path = [Path(__file__).parents[1], Path(__file__).parent]
    return lambda *runs: processes(*({"code": code, "path": path} | run for run in runs))
