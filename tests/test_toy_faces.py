# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""The toy world beside its renderer: the loop that trains it, the recipe, the weights, the report."""

import functools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from action_units import AU_NAMES, au_projection, available_presets, parse_aus
from drawing.jobs import read_model_defaults
from pipeline_fineface import FineFacePipeline
from toy_faces import networks, report, train
from toy_faces.fit import Length, fit
from toy_faces.networks import PictureReader, SecondMeter
from toy_faces.pictures import (
    UNSEEN,
    Pictures,
    captions_of,
    expression_of,
    render_expression,
    render_seed,
    to_pixel_values,
)
from toy_faces.renderer import (
    ATTRIBUTES,
    TOY_AU_NAMES,
    attributes_in,
    render,
    sample_aus,
    sample_portrait,
    to_toy_aus,
)
from training.feedback import load_meter


ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "toy_faces" / "weights"


class Stopped(Exception):
    pass


def fit_line(folder: Path, steps: int, stop_at: int | None = None) -> torch.Tensor:
    """Fit a line; the loss function raises at one step, as a kill would end it."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_function(rng: np.random.Generator) -> torch.Tensor:
        if stop_at is not None and loss_function.step == stop_at:
            raise Stopped
        loss_function.step += 1
        x = torch.from_numpy(rng.normal(size=(8, 3))).float() + 0.01 * torch.randn(8, 3)
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    loss_function.step = 0
    fit("line", {"line": model}, loss_function, folder, Length(steps, 8), 0.1, ema_decay=0.9)
    return model.weight.detach()


def test_an_interrupted_fit_continues_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("toy_faces.fit.SECONDS_BETWEEN_CHECKPOINTS", -1)  # a checkpoint at every step
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = fit_line(tmp_path / "whole", 20)
    with pytest.raises(Stopped):
        fit_line(tmp_path / "parts", 20, stop_at=7)
    assert torch.equal(fit_line(tmp_path / "parts", 20), whole)
    assert torch.equal(fit_line(tmp_path / "parts", 20), whole)  # and a finished one is not trained on


def test_a_loss_that_is_not_finite_stops_the_fit(tmp_path):
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        fit("bad", {"bad": nn.Linear(1, 1)}, lambda rng: torch.tensor(float("nan")), tmp_path, Length(5, 1), 0.1)


def test_a_fit_ends_with_its_seconds(tmp_path):
    model = nn.Linear(1, 1)
    fit("line", {"line": model}, lambda rng: model(torch.ones(1, 1)).sum(), tmp_path, Length(10**9, 1, 0.2), 0.1)
    lines = (tmp_path / "line.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["seconds"] <= 0.2
    halves = load_file(tmp_path / "line.half.safetensors")
    assert halves["line.weight"].dtype == torch.float16 and torch.allclose(
        halves["line.weight"].float(), model.weight, atol=1e-3
    )


def test_pictures_come_in_shards_and_finished_ones_are_kept(tmp_path):
    shards = Pictures(tmp_path, 4, draw=render_seed, processes=1, shard=3).wait()
    assert [len(shard) for shard in shards] == [3, 1] and np.array_equal(shards[1][0], render_seed(3))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = Pictures(tmp_path, 4, draw=render_seed, processes=1, shard=3)
    assert np.array_equal(again.wait()[0], shards[0])
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    pixel_values = to_pixel_values(shards[0])
    assert pixel_values.shape == (3, 3, 128, 128) and -1 <= pixel_values.min() and pixel_values.max() <= 1


def test_half_of_the_training_expressions_are_those_of_the_paper():
    assert all(np.array_equal(expression_of(seed), to_toy_aus(sample_aus(seed))) for seed in range(0, 20, 2))
    others = np.stack([expression_of(seed) for seed in range(1, 400, 2)])
    left, right = (TOY_AU_NAMES.index(name) for name in ("AU12L", "AU12R"))
    assert (others[:, left] != others[:, right]).any() and others[:, TOY_AU_NAMES.index("AU10")].any()


def test_the_words_of_the_world_are_one_token_each_and_no_text_is_lost():
    captions = captions_of(range(300), 0)
    tokenizer = networks.make_tokenizer(captions)
    assert max(len(tokenizer(text).input_ids) for text in captions) <= networks.MAX_TOKENS
    assert tokenizer.tokenize("a girl with red hair") == [f"{word}</w>" for word in "a girl with red hair".split()]
    text = "zürich ⅔ 東京 <au>"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(" ", "") == text.replace(
        " ", ""
    )


def test_normalized_latents_have_unit_scale_and_decode_to_the_same_picture():
    torch.manual_seed(0)
    vae = networks.make_vae((8, 8, 8, 8), 0).eval()
    pixel_values = to_pixel_values(np.stack([render_seed(seed) for seed in range(4)]))
    with torch.no_grad():
        before = vae.encode(pixel_values).latent_dist
        mean, std = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
        picture = vae.decode(before.mean).sample
        networks.normalize_latents(vae, mean, std)
        after = vae.encode(pixel_values).latent_dist
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(16), atol=1e-4)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(16), atol=1e-4)
        assert torch.allclose(after.std * std[:, None, None], before.std, rtol=1e-3)
        assert torch.allclose(vae.decode(after.mean).sample, picture, atol=1e-4)


def test_the_attribute_loss_is_least_for_the_right_attributes():
    attributes = {name: values[0] for name, values in ATTRIBUTES.items()}
    logits = torch.cat([10 * torch.eye(len(values))[:1] for values in ATTRIBUTES.values()], dim=1)
    assert networks.attribute_loss(logits, networks.attribute_numbers([attributes])) < 0.01
    wrong = attributes | {"skin": ATTRIBUTES["skin"][1]}
    assert networks.attribute_loss(logits, networks.attribute_numbers([wrong])) > 1


def test_dose_response_on_answers_known_by_hand():
    prompts, commands = report.single_commands(range(2))
    assert len(prompts) == len(commands) == 2 * 12 * 5
    neutral = torch.zeros_like(commands)
    for row in report.dose_response(commands, 0.5 * commands, neutral):
        assert row["r"] == pytest.approx(1) and row["slope"] == pytest.approx(0.5) and row["others"] == 0
        assert row["mse"] == pytest.approx(0.25 * np.mean([1, 4, 9, 16, 25]) / 12)
    shifted = report.dose_response(commands, commands + 1, neutral)[0]
    assert shifted["others"] == pytest.approx(1) and shifted["slope"] == pytest.approx(1)


def test_what_leaks_to_the_other_side_is_measured():
    names = ("AU12L", "AU12R", "AU26")
    _, commands = report.single_commands(range(1), names)
    measured = commands.clone()
    measured[:, 1] += 0.2 * commands[:, 0]
    left, right, jaw = report.dose_response(commands, measured, torch.zeros_like(commands), names)
    assert left["leak"] == pytest.approx(1.0) and right["leak"] == 0 and "leak" not in jaw


def render_commands(prompts: list[int], aus: torch.Tensor) -> torch.Tensor:
    """Pictures of somebody who obeys: people of these prompts of the report with `aus`, `(pictures, 12 or 24)`."""
    people = [sample_portrait(UNSEEN + prompt, **attributes_in(report.PROMPTS[prompt])) for prompt in prompts]
    pictures = [np.asarray(render(person, command)) for person, command in zip(people, aus.numpy(), strict=True)]
    return to_pixel_values(np.stack(pictures))


def test_the_report_sees_who_obeys_by_both_meters_and_whose_face_is_whole():
    bench = report.Bench(WEIGHTS, 4, {})
    single, combined = report.single_commands(range(1)), report.combination_commands(range(3), 4)
    single, combined = (report.Commanded(*drawn, render_commands(*drawn)) for drawn in (single, combined))
    resting = render_commands([0, 1, 2], torch.zeros(3, 12))
    read = {
        meter: report.measure_obedience(bench, meter, resting, resting, single, combined) for meter in bench.meters
    }
    assert list(read) == ["second_meter", "meter"]
    for figures, _ in read.values():
        assert figures["lowest r"] > 0.95 and 0.8 < figures["lowest slope"] < figures["highest slope"] < 1.2
        assert max(figures["single AUs, MSE / without AUs"], figures["combinations, MSE / without AUs"]) < 0.08
    figures = {name: {meter: read[meter][0][name] for meter in read} for name in read["meter"][0]}
    text = report.format_report(figures, {meter: read[meter][1] for meter in read}, AU_NAMES, {"skin": 1.0}, "")
    assert "| | second meter, which judges | meter that teaches | goal |" in text
    assert re.search(r"\| lowest r \| (0\.9|1\.0)\d \| (0\.9|1\.0)\d \| ≥ 0.88 \|", text)
    # Smiles as they were commanded, and the same people with a smile on one side alone.
    prompts, smiles = [0, 1, 2], torch.eye(12)[[AU_NAMES.index("AU12")] * 3] * 4
    lopsided = smiles @ au_projection(AU_NAMES, TOY_AU_NAMES)
    lopsided[:, TOY_AU_NAMES.index("AU12R")] = 0
    whole, broken = (
        report.wholeness(bench, report.Commanded(prompts, smiles, render_commands(prompts, aus)))
        for aus in (smiles, lopsided)
    )
    assert whole["distance from renders"] < 1e-3 < 0.2 < broken["distance from renders"]
    name = "asymmetry of what was commanded alike"
    assert whole[name] < 0.2 and broken[name] > whole[name] + 0.2


def test_every_prompt_of_the_report_names_what_is_scored():
    assert len(report.PROMPTS) == len(set(report.PROMPTS)) == 15
    named = [attributes_in(prompt) for prompt in report.PROMPTS]
    for name in report.SCORED_ATTRIBUTES:
        assert sum(name in attributes for attributes in named) >= 3, name
    prompts, combinations = report.combination_commands(range(15), 50)
    assert len(prompts) == len(combinations) == 150 and len(combinations.unique(dim=0)) == 50
    assert set(prompts) == set(range(15)) and ((combinations > 0).sum(1) >= 2).all()


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    assert train.main(["--preset=tiny", f"--output_dir={folder}", "--device=cpu"]) == 0
    return folder


def test_the_recipe_makes_every_part_and_the_pipeline_loads_them(tiny_run, tmp_path):
    recipe = train.Recipe(train.SIZES["tiny"], tiny_run, torch.device("cpu"))
    weights = tmp_path / "weights"
    recipe.export(weights)
    pipe = FineFacePipeline.from_pretrained(weights, dtype=torch.float32)
    assert pipe.au_adapter is not None and pipe.image_encoder is not None
    image = pipe("a girl", aus="AU12=5", num_inference_steps=1).images[0]
    assert image.size == (128, 128)
    meter = PictureReader.from_pretrained(weights / "meter", dtype=torch.float32)
    assert meter(torch.zeros(1, 3, 128, 128)).shape == (1, 24) and tuple(meter.config.au_names) == TOY_AU_NAMES
    judge = SecondMeter.from_pretrained(weights / "second_meter", dtype=torch.float32)
    assert judge(torch.zeros(1, 3, 128, 128)).shape == (1, 24)
    pipe.load_au_adapter(weights / "sided")
    assert pipe.au_names == TOY_AU_NAMES and pipe("a girl", aus="wink", num_inference_steps=1).images
    assert StableDiffusionPipeline.from_pretrained(weights).unet.config.sample_size == 16
    # A second run goes on from these weights: it takes the VAE, and base and adapter move on from where they were.
    later = tmp_path / "later"
    train.Recipe(recipe.size, later, recipe.device, weights).run(("captions", *train.FIRST_TRACK))
    assert (later / "sided").is_dir() and not (later / "sided_start.pt").exists()
    moves = []
    for before, after in ((weights / "vae", later / "vae"), (weights / "unet", later / "base" / "unet")):
        one, other = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (before, after))
        moves.append(max((tensor.float() - other[name].float()).abs().max() for name, tensor in one.items()))
    assert moves[0] == 0 and 0 < moves[1] < 0.05


def test_a_recipe_that_fails_leaves_no_process_that_renders(tmp_path, monkeypatch):
    def fail_while_rendering(recipe: train.Recipe) -> None:
        recipe.pictures.finished()
        raise OSError("the disk is full")

    monkeypatch.setattr(train.Recipe, "vae", fail_while_rendering)
    monkeypatch.setattr(train, "Pictures", functools.partial(Pictures, shard=4))
    size = replace(train.SIZES["tiny"], pictures=400)
    with pytest.raises(OSError, match="the disk is full"):
        train.Recipe(size, tmp_path, torch.device("cpu")).run(["vae"])
    assert not multiprocessing.active_children() and len(list((tmp_path / "pictures").iterdir())) < 50


def test_half_of_the_commands_let_one_side_rest():
    commanded = train.rest_one_side(torch.ones(400, 24), np.random.default_rng(0))
    left, right = ([name.endswith(side) for name in TOY_AU_NAMES] for side in "LR")
    rests = torch.stack([(commanded[:, side] == 0).all(1) for side in (left, right)])
    assert not rests.all(0).any() and (rests.sum(1) > 70).all() and 160 < rests.sum() < 240
    assert (commanded[:, ~(np.array(left) | np.array(right))] == 1).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_half_of_the_commands_are_one_au_alone(symmetric):
    commanded = train.leave_one_au(torch.full((400, 24), 9.0), symmetric, np.random.default_rng(0))
    replaced = (commanded == 0).any(1)
    assert 160 < replaced.sum() < 240 and (commanded[~replaced] == 9).all()
    alone = commanded[replaced]
    assert alone.max(1).values.min() >= 0.6 and alone.max() <= 5
    columns = {tuple(name for name, value in zip(TOY_AU_NAMES, row, strict=True) if value) for row in alone.tolist()}
    assert ("AU5",) in columns and ("AU12L", "AU12R") in columns and (("AU10",) in columns) is not symmetric
    assert len(columns) == (12 if symmetric else 16)


@pytest.mark.parametrize("au_names", [AU_NAMES, TOY_AU_NAMES])
def test_a_quarter_of_the_commands_are_named_expressions(au_names):
    commanded = train.name_expressions(torch.full((400, 24), 9.0), au_names, np.random.default_rng(0))
    named = commanded[(commanded != 9).any(1)]
    assert 70 < len(named) < 130
    presets = parse_aus(list(available_presets(au_names)), au_names=au_names) @ au_projection(au_names, TOY_AU_NAMES)
    # Each row is a preset times a strength. One of the presets is the neutral face.
    presets, named = presets[presets.any(1)], named[named.any(1)]
    strengths = named.norm(dim=1, keepdim=True) / presets.norm(dim=1)
    errors = (named[:, None] - strengths[..., None] * presets).abs().amax(2)
    best = errors.argmin(1, keepdim=True)
    assert errors.gather(1, best).max() < 1e-4 and len(best.unique()) > len(presets) / 2
    assert strengths.gather(1, best).min() >= 0.5 and strengths.gather(1, best).max() <= 1


def test_errors_of_recipe_and_report_are_one_line(tmp_path, capsys):
    for module, argv, message in (
        (train, ["--preset=tiny", f"--start={tmp_path / 'nowhere'}", f"--output_dir={tmp_path / 'run'}"], "nowhere"),
        (train, ["--preset=big"], "invalid choice: 'big'"),
        (report, [f"--model={tmp_path}"], "has no meter/"),
    ):
        assert module.main(argv) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line


def test_a_finished_recipe_does_nothing_twice(tiny_run):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*.safetensors")}
    assert train.main(["--preset=tiny", f"--output_dir={tiny_run}", "--device=cpu", "--until=attribute_reader"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*.safetensors")}


def test_the_presets_keep_their_time_and_the_base_sees_enough():
    cpu, gpu = train.SIZES["cpu"], train.SIZES["gpu"]
    twice = [cpu.reader, cpu.adapter, cpu.feedback] * 2
    fits = [cpu.vae, cpu.base, cpu.image_encoder, cpu.attribute_reader, *twice]
    # The rest of 8 hours is for rendering; on a GPU, the adapters are trained beside each other.
    assert sum(length.seconds for length in fits) <= 7.75 * 3600
    assert sum(length.seconds for length in (gpu.base, gpu.adapter, gpu.feedback)) <= 8 * 60
    assert min(cpu.base.steps * cpu.base.batch, gpu.base.steps * gpu.base.batch) >= 10 * 128_000


@pytest.mark.slow
def test_both_tracks_of_the_recipe_at_once_make_every_part(tmp_path):
    """As with the preset `gpu`."""
    train.run_in_parallel(train.SIZES["tiny"], tmp_path, torch.device("cpu"))
    assert all((tmp_path / part).is_dir() for part in (*train.TAKEN, "base", "twelve", "sided"))


@pytest.mark.slow
def test_a_recipe_killed_at_any_moment_goes_on(tmp_path):
    command = [sys.executable, "-m", "toy_faces.train", "--preset=tiny", f"--output_dir={tmp_path}", "--device=cpu"]
    for seconds in (6, 8, 10, 12):
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert (tmp_path / "twelve" / "au_attn_processors.safetensors").exists()


# What is committed.


def test_the_weights_are_small_safetensors_and_complete():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".txt"}
    index = json.loads((WEIGHTS / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


@pytest.mark.parametrize("name", ["meter", "second_meter"])
def test_the_meters_read_renders_that_they_never_saw(name):
    meter, seeds = load_meter(str(WEIGHTS / name)), range(UNSEEN, UNSEEN + 64)
    pictures = np.stack([render_expression(seed) for seed in seeds])
    with torch.no_grad():
        measured = meter(to_pixel_values(pictures)).numpy()
    assert np.square(measured - np.stack([expression_of(seed) for seed in seeds])).mean() < 0.08


def read_drawn(pipe: FineFacePipeline, aus: str) -> dict[str, float]:
    """The mean intensities that the judge reads from two people with these AUs."""
    meter, prompts = load_meter(str(WEIGHTS / "second_meter")), [report.PROMPTS[index] for index in (1, 8)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    images = pipe(prompts, aus=aus, generator=generators, output_type="pt", **read_model_defaults(str(WEIGHTS))).images
    with torch.no_grad():
        return dict(zip(meter.au_names, meter(images * 2 - 1).mean(0).tolist(), strict=True))


def test_the_toy_face_obeys_brows_lids_and_jaw():
    pipe = FineFacePipeline.from_pretrained(WEIGHTS, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    neutral = read_drawn(pipe, "neutral")
    for name, column in (("AU4", "AU4L"), ("AU5", "AU5"), ("AU26", "AU26")):
        assert read_drawn(pipe, f"{name}=5")[column] > neutral[column] + 2, name


def test_the_sided_adapter_winks_and_moves_one_corner_of_the_mouth():
    pipe = FineFacePipeline.from_pretrained(WEIGHTS, dtype=torch.float32)
    pipe.load_au_adapter(WEIGHTS / "sided")
    pipe.set_progress_bar_config(disable=True)
    neutral = read_drawn(pipe, "neutral")
    for name, other in (("AU43L", "AU43R"), ("AU12R", "AU12L")):
        drawn = read_drawn(pipe, f"{name}=5")
        assert drawn[name] > neutral[name] + 2 and abs(drawn[other] - neutral[other]) < 1, name
