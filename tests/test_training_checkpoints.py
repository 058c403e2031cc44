"""Checkpoints: which one a run goes on from, what is refused, and what a broken or left file does."""

import json
import os
import shutil

import pytest
from accelerate import Accelerator
from training_runs import (  # noqa: F401
    arguments_fixture,
    datasets_cache_fixture,
    faces_dir_fixture,
    run_processes_fixture,
    write_faces,
)

from program import only_run_in
from train_fineface import main
from training.checkpoints import find_checkpoint, load_checkpoint
from training.config import parse_args, published_settings


@pytest.fixture(scope="module")
def finished(tiny_sd_dir, tmp_path_factory):
    """The folder of a run with two checkpoints, and its command line. It is copied, and not changed."""
    folder = tmp_path_factory.mktemp("finished")
    faces = write_faces(folder / "faces")
    main(command(folder, tiny_sd_dir, faces))
    return folder


def command(folder, base, faces):
    options = "--au_hidden_dim 8 --rank 4 --train_batch_size 2 --max_train_steps 4 --report_to none"
    options += " --checkpointing_steps 2"
    paths = ["--pretrained_model_name_or_path", str(base), "--train_data_dir", str(faces)]
    return [*paths, "--output_dir", str(folder / "run"), *options.split()]


@pytest.fixture
def resume(finished, tiny_sd_dir, tmp_path):
    """Go on with a copy of the run in `tmp_path`."""
    shutil.copytree(finished / "run", tmp_path / "run")

    def resume(checkpoint="latest", faces=finished / "faces", go=main):
        return go([*command(tmp_path, tiny_sd_dir, faces), "--resume_from_checkpoint", checkpoint])

    return resume


def test_the_bare_name_of_a_checkpoint_is_one_of_the_output_folder(resume, tmp_path):
    def found(checkpoint):
        return resume(checkpoint, go=lambda argv: find_checkpoint(parse_args(argv)))

    assert found("checkpoint-4") == found("latest") == found(str(tmp_path / "run/checkpoint-4"))
    with pytest.raises(ValueError, match="holds checkpoint-4, which is not '.*run/checkpoint-2'"):
        found("checkpoint-2")
    with pytest.raises(FileNotFoundError, match="'checkpoint-3' is no checkpoint. '.*run' holds checkpoint-2, chec"):
        found("checkpoint-3")


def test_a_data_set_of_another_size_is_refused(resume, tmp_path):
    faces = write_faces(tmp_path / "faces")
    lines = (faces / "metadata.jsonl").read_text().splitlines()
    (faces / "metadata.jsonl").write_text("\n".join(lines[:4]))
    with pytest.raises(ValueError, match="The data set has 4 rows, but had 5 in '.*checkpoint-4'. A run continues"):
        resume(faces=faces)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("training_state.json", "[]", r"training_state.json holds \[\]"),
        ("training_state.json", "", "training_state.json: Expecting value"),
        ("training_state.json", '{"step": "4"}', "training_state.json holds"),
        ("training_state.json", "[" * 100_000, "training_state.json: maximum recursion depth"),
        ("train_config.json", "7", "train_config.json holds 7"),
        ("optimizer.bin", "", "optimizer.bin is broken"),
        ("optimizer.bin", "PK no archive", "optimizer.bin is broken"),
        ("scheduler.bin", None, "scheduler.bin"),
        ("trained_parameters.safetensors", "", "trained_parameters.safetensors"),
    ],
)
def test_a_broken_checkpoint_is_named(resume, tmp_path, name, content, message):
    path = tmp_path / "run/checkpoint-4" / name
    assert path.is_file()
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(
        ValueError, match=f"checkpoint '.*checkpoint-4' cannot be read: .*{message}.*Delete it to resume"
    ):
        resume()


def test_a_checkpoint_that_does_not_fit_into_memory_is_not_called_broken(tmp_path, monkeypatch):
    def load_state(self, folder):
        raise MemoryError("cannot allocate")

    monkeypatch.setattr(Accelerator, "load_state", load_state)
    with pytest.raises(MemoryError, match="cannot allocate"):
        load_checkpoint(Accelerator(cpu=True), tmp_path)


def test_a_second_run_in_one_folder_is_refused_and_a_killed_one_locks_nothing(resume, run_processes, tmp_path):
    with (
        only_run_in(tmp_path / "run"),
        pytest.raises(ValueError, match="'.*run' is being written by another run. Wait for its end"),
    ):
        resume()
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    argv = []
    resume(go=argv.extend)
    (answer,) = run_processes({"arguments": argv, "kill": ["os.replace", "run/checkpoint-4"]})
    assert answer["status"] < 0
    main(argv)
    assert sorted(path.name for path in (tmp_path / "run").glob("*checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not list((tmp_path / "run").glob(".*"))


def test_two_runs_share_a_cache_that_neither_has_made(arguments, run_processes, tmp_path):
    options = f"--cache_latents --random_flip --max_train_steps 1 --cache_dir {tmp_path / 'cache'}"
    answers = run_processes(*({"arguments": arguments(name, options)} for name in ("one", "other")))
    assert [answer["status"] for answer in answers] == [0, 0], answers
    assert {path.name for path in (tmp_path / "cache").glob("*/*")} == {"00000.safetensors"}


def test_a_refused_run_leaves_no_folder(arguments, tmp_path):
    with pytest.raises(ValueError, match="has no column text"):
        main(arguments("new/run", f"--train_data_dir {write_faces(tmp_path / 'wrong', drop=('text',))}"))
    assert not (tmp_path / "new").exists()


def test_nothing_is_written_beside_the_output_folder(resume, tmp_path):
    # It may be the root of a volume, from whose neighbours no rename leads into it.
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    (tmp_path / "run/.au_adapter_left_by_a_kill").mkdir()
    os.utime(tmp_path, (0, 0))
    resume()
    assert tmp_path.stat().st_mtime == 0
    assert (tmp_path / "run/checkpoint-4").is_dir() and not list((tmp_path / "run").glob(".*"))


def test_a_card_shows_what_decides_the_weights_and_no_paths_or_prompts(finished):
    settings = json.loads((finished / "run/train_config.json").read_text())
    settings |= {"dataset_name": "private/faces", "validation_prompt": ["my neighbour"], "cache_dir": "cache"}
    shown = published_settings(settings | {"image_column": "C:\\faces", "unknown": 1})
    assert {"rank", "seed", "max_train_steps", "train_batch_size"} <= shown.keys()
    secret = {"dataset_name", "train_data_dir", "output_dir", "validation_prompt", "cache_dir", "image_column"}
    assert not shown.keys() & (secret | {"unknown", "pretrained_model_name_or_path", "hub_model_id"})
