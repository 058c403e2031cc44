"""Training: what it writes, what it changes, and that it repeats, resumes and caches without a difference."""

import dataclasses
import itertools
import json
import re
import shutil
import signal

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from hub_server import TOKEN, running_hub
from PIL import Image
from safetensors.torch import load_file
from test_feedback import FEEDBACK
from tiny import FAMILIES, free_address, make_components
from training_runs import (  # noqa: F401
    arguments_fixture,
    config_fixture,
    datasets_cache_fixture,
    faces_dir_fixture,
    on_every_family,
    run_processes_fixture,
    write_faces,
)

import train_fineface
from action_units import AU_NAMES
from face_data.pictures import FACE_BOX
from pipeline_fineface import FineFacePipeline
from train_fineface import diffusion_loss, main, make_model, min_snr_weights
from training import data as training_data
from training.checkpoints import TrainingState
from training.config import TRAINING_PRESETS, TrainConfig, parse_args
from training.data import PixelInputs, TrainingSamples, load_training_data
from training.encoders import FAMILIES as ENCODER_FAMILIES
from training.encoders import load_encoders
from training.validation import choose_validation_aus


ADAPTER_FILES = {
    "au_encoder/config.json",
    "au_encoder/diffusion_pytorch_model.safetensors",
    "au_attn_processors.safetensors",
    "pytorch_lora_weights.safetensors",
}
WEIGHTS = sorted(name for name in ADAPTER_FILES if name.endswith(".safetensors"))
# Everything that changes what is trained, all at once.
EVERYTHING = (
    "--cache_latents --use_ema --lr_scheduler cosine --random_flip --caption_drop_prob 0.3 --face_loss_weight 4"
    " --timestep_bias_strategy later --timestep_bias_multiplier 3 --timestep_sampling stratified --noise_offset 0.1"
    " --mixed_precision bf16 --snr_gamma 5"
)
VALIDATION = "--validation_aus neutral AU12=5 --validation_inference_steps 2 --validation_prompt woman man"


@pytest.fixture
def train(arguments, tmp_path):
    """Train, and return the weights that were written."""

    def train(name, options=""):
        main(arguments(name, options))
        return {file: load_file(tmp_path / name / file) for file in WEIGHTS}

    return train


def flat(weights):
    return {f"{file}:{key}": tensor for file, tensors in weights.items() for key, tensor in tensors.items()}


def assert_equal(weights, others, **tolerance):
    weights, others = flat(weights), flat(others)
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        if tolerance:
            torch.testing.assert_close(tensor, others[key], **tolerance)
        else:
            assert torch.equal(tensor, others[key]), key


def noisy_inputs(batch_size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, 4, 8, 8)
    return {
        "latents": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "timesteps": torch.randint(1000, (batch_size,), generator=generator),
        "prompt_embeds": torch.randn(batch_size, 5, 32, generator=generator),
        "au_intensities": 5 * torch.rand(batch_size, 12, generator=generator),
    }


def loss_of(model, noise_scheduler, latents, noise, timesteps, prompt_embeds, au_intensities, snr_gamma=None):
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    prediction = model(noisy_latents, timesteps, prompt_embeds, au_intensities)
    return diffusion_loss(prediction, noise_scheduler, latents, noise, timesteps, snr_gamma=snr_gamma)


def make_noise_scheduler(prediction_type="epsilon"):
    config = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    return DDPMScheduler(prediction_type=prediction_type, **config)


# --------------------------------------------------------------------------------------------------------------------
# What a run writes
# --------------------------------------------------------------------------------------------------------------------


@on_every_family
def test_a_run_writes_the_adapter_and_it_changes_the_picture(arguments, request, tmp_path):
    main(arguments("run"))
    tiny_base = FAMILIES[request.node.callspec.params["arguments"]].make_pipe()
    files = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert files == {*ADAPTER_FILES, "train_config.json"}
    assert json.loads((tmp_path / "run/train_config.json").read_text())["rank"] == 4

    def picture(**kwargs):
        generator = torch.Generator().manual_seed(0)
        return tiny_base("a face", num_inference_steps=2, generator=generator, output_type="pt", **kwargs).images

    base = picture()
    tiny_base.load_au_adapter(tmp_path / "run")
    assert tiny_base.unet.peft_config["fineface"].r == tiny_base.unet.peft_config["fineface"].lora_alpha == 4
    assert not torch.equal(picture(aus={}), base)
    assert not torch.equal(picture(aus={"AU12": 5}), picture(aus={}))
    tiny_base.unload_au_adapter()
    assert torch.equal(picture(), base)


def test_checkpoints_are_adapters_and_only_the_last_ones_are_kept(train, tmp_path, tiny_base):
    train("run", "--checkpointing_steps 1 --checkpoints_total_limit 2")
    folders = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert folders == {"au_encoder", "checkpoint-3", "checkpoint-4"}
    tiny_base.load_au_adapter(tmp_path / "run/checkpoint-3")
    assert "unet.conv_in.weight" not in load_file(tmp_path / "run/checkpoint-3/trained_parameters.safetensors")


def test_the_seed_repeats_a_run_and_another_one_does_not(train):
    first = train("first", "--max_train_steps 2")
    assert_equal(first, train("second", "--max_train_steps 2"))
    third = train("third", "--max_train_steps 2 --seed 1")
    assert not torch.equal(first[WEIGHTS[-1]].popitem()[1], third[WEIGHTS[-1]].popitem()[1])


def test_dry_run_prints_the_settings_alone(arguments, tmp_path, capsys):
    main(arguments("run", "--dry_run"))
    assert json.loads(capsys.readouterr().out)["train_batch_size"] == 2
    assert not (tmp_path / "run").exists()


def test_a_config_is_built_without_its_machine_and_run_from_python(arguments, tmp_path):
    elsewhere = TrainConfig(
        pretrained_model_name_or_path="base",
        output_dir=tmp_path / "elsewhere",
        train_data_dir=tmp_path / "no folder",
        use_8bit_adam=True,
        report_to="clearml",
    )
    assert not elsewhere.output_dir.exists()
    config = dataclasses.replace(parse_args(arguments("run")), max_train_steps=1)
    train_fineface.run(config)
    assert (config.output_dir / WEIGHTS[0]).is_file()


def test_each_number_has_a_range():
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    numbers = {name for name, field in fields.items() if re.search(r"\b(int|float)\b", str(field.type))}
    assert all(fields[name].metadata["low"] is not None for name in numbers)


def logged(run, name: str) -> list[float]:
    """What a run with `--report_to tensorboard` has logged of a value."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (events,) = (run / "logs/fineface").glob("events.*")
    return [event.value for event in event_accumulator.EventAccumulator(str(events)).Reload().Scalars(name)]


def test_a_run_says_what_it_trains_on_and_logs_rates_and_gradient(arguments, tmp_path, capsys):
    options = "--report_to tensorboard --learning_rate 0.01 --au_learning_rate 0.02 --gradient_accumulation_steps 3"
    main(arguments("run", options))
    said = capsys.readouterr().out
    trained = {name: tensor.numel() for name, tensor in load_file(tmp_path / "run" / WEIGHTS[-1]).items()}
    for line in (
        "samples  +5",
        r"epochs  +4\.8",
        "batch size of a process  +2",
        r"samples of a step  +6 \(1 processes, 3 accumulated batches\)",
        "optimizer steps  +4, from step 0 on",
        rf"trained parameters  +[\d,]+ \(LoRA {sum(trained.values()):,}, AU encoder with keys and values [\d,]+\)",
    ):
        assert re.search(line, said), line
    values = {name: logged(tmp_path / "run", name) for name in ("lr", "au_lr", "grad_norm")}
    assert values["lr"] == pytest.approx([0.01] * 4) and values["au_lr"] == pytest.approx([0.02] * 4)
    assert len(values["grad_norm"]) == 4 and min(values["grad_norm"]) > 0


def test_defaults_are_those_of_the_paper(faces_dir, tmp_path):
    config = TrainConfig(pretrained_model_name_or_path="base", output_dir=tmp_path / "run", train_data_dir=faces_dir)
    assert (config.learning_rate, config.train_batch_size, config.rank) == (1e-4, 16, 32)
    assert (config.au_noise_variance, config.au_rounding_prob) == (0.2, 0.2)
    assert (config.encoder_type, config.num_au_tokens) == ("res_mlp64", 1)
    assert (config.au_drop_prob, config.caption_drop_prob, config.snr_gamma) == (0, 0, None)


@pytest.mark.parametrize("preset", ["best", "best_feedback"])
def test_a_preset_changes_defaults_and_gives_way_to_flags(arguments, preset):
    changed = dict(TRAINING_PRESETS[preset])
    name, _ = changed.popitem()
    paper, best = parse_args(arguments("run")), parse_args(arguments("run", f"--preset {preset}"))
    assert parse_args(arguments("run", "--preset paper")) == paper
    assert best == dataclasses.replace(paper, **TRAINING_PRESETS[preset]) != paper
    given = parse_args(arguments("run", f"--preset {preset} --{name} {getattr(paper, name)}"))
    assert given == dataclasses.replace(paper, **changed)


def test_flags_without_effect_are_named(arguments):
    flags = "--ema_decay 0.9 --au_feedback_weight 2 --au_feedback_mode one_step --timestep_bias_begin 4"
    assert parse_args(arguments("run", flags)).flags_without_effect() == [
        "`--au_feedback_weight`, `--au_feedback_mode`: no effect without `--au_feedback_meter`.",
        "`--timestep_bias_begin`: no effect without `--timestep_bias_strategy`.",
        "`--ema_decay`: no effect without `--use_ema`.",
    ]
    flags = "--au_feedback_meter a:b --au_feedback_mode one_step --au_feedback_steps 8 --au_feedback_single_prob 0.5"
    [said] = parse_args(arguments("run", f"{flags} --use_ema --ema_decay 0.9")).flags_without_effect()
    names = "`--au_feedback_steps`, `--au_feedback_single_prob`"
    assert said == f"{names}: no effect with `--au_feedback_mode one_step`, which draws nothing."
    assert not parse_args(arguments("run", "--preset best")).flags_without_effect()
    [said] = parse_args(arguments("run", "--preset best_feedback")).flags_without_effect()
    assert "`--au_feedback_appearance_weight`: no effect without `--au_feedback_meter`" in said


# --------------------------------------------------------------------------------------------------------------------
# Resuming, caching, accumulating
# --------------------------------------------------------------------------------------------------------------------


@on_every_family
@pytest.mark.parametrize(
    "options",
    ["", EVERYTHING, "--use_8bit_adam"],
    ids=["plain", "everything", "8 bits"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(train, tmp_path, options):
    if "8bit" in options:
        pytest.importorskip("bitsandbytes")
    options = f"--checkpointing_steps 2 --gradient_accumulation_steps 2 {options}"
    uninterrupted = train("run", options)
    random_state = torch.get_rng_state()
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    # What a kill while saving leaves behind.
    (tmp_path / "run/.checkpoint-4.part").mkdir()
    resumed = train("run", f"{options} --resume_from_checkpoint latest")
    assert_equal(resumed, uninterrupted)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_checkpoint_can_be_continued_in_another_folder(train, tmp_path):
    whole = train("run", "--checkpointing_steps 3")
    assert_equal(train("other", f"--resume_from_checkpoint {tmp_path / 'run/checkpoint-3'}"), whole)


def test_latest_without_a_checkpoint_starts_a_run(train, tmp_path):
    first = train("first", "--max_train_steps 1")
    assert_equal(first, train("second", "--max_train_steps 1 --resume_from_checkpoint latest"))


@on_every_family
def test_a_cache_changes_nothing_and_drops_the_encoders(train, monkeypatch, tmp_path):
    plain = train("plain", "--random_flip --caption_drop_prob 0.3")
    cached = train("cached", "--random_flip --caption_drop_prob 0.3 --cache_latents")
    # Convolutions of other batch sizes round otherwise, and Adam's first steps divide by small numbers.
    assert_equal(cached, plain, atol=1e-3, rtol=0)

    def fail(*args):
        raise AssertionError("Nothing has to be encoded when the cache is complete.")

    for encoders in ENCODER_FAMILIES.values():
        monkeypatch.setattr(encoders, "encode_pictures", fail)
        monkeypatch.setattr(encoders, "encode_captions", fail)
    options = f"--random_flip --caption_drop_prob 0.3 --cache_latents --cache_dir {tmp_path / 'cached/cache'}"
    assert_equal(train("again", options), cached)


def test_a_cache_of_other_pictures_is_not_used(train, tmp_path, tiny_sd_dir, faces_dir):
    options = f"--max_train_steps 1 --cache_latents --cache_dir {tmp_path / 'cache'}"
    train("first", options)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    train("second", f"{options} --resolution 16")
    train("third", f"{options} --max_train_samples 3")
    assert len(list((tmp_path / "cache").glob("latents-*"))) == 3
    assert len(list((tmp_path / "cache").glob("captions-*"))) == 2


def test_an_unfinished_cache_is_completed(train, tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "ROWS_PER_SHARD", 2)
    cached = train("first", f"--cache_latents --cache_dir {tmp_path / 'cache'}")
    shards = sorted((tmp_path / "cache").glob("latents-*/*"))
    assert [shard.name for shard in shards] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    kept = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    assert_equal(train("second", f"--cache_latents --cache_dir {tmp_path / 'cache'}"), cached)
    assert shards[0].stat().st_mtime_ns == kept


def test_accumulated_batches_equal_one_batch(train):
    # One step with plain averages: what the gradients are decides alone.
    options = "--max_train_steps 2 --adam_epsilon 1"
    whole = train("whole", f"{options} --train_batch_size 4")
    parts = train("parts", f"{options} --train_batch_size 2 --gradient_accumulation_steps 2")
    assert_equal(parts, whole, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_compiling_changes_nothing_but_rounding(train):
    # Adam divides by the gradient's size, which would make rounding of small gradients large.
    options = "--adam_epsilon 1 --max_train_steps 2 --num_au_tokens 2"
    assert_equal(train("compiled", f"{options} --torch_compile"), train("eager", options), atol=1e-5, rtol=0)


def test_workers_change_nothing(train):
    options = "--max_train_steps 2"
    assert_equal(train("workers", f"{options} --dataloader_num_workers 1"), train("none", options))


def test_positions_learn_which_side_of_the_face_they_are_on(train, tmp_path):
    sides = {(row, f"AU12{side}"): float(row) for row in range(5) for side in "LR"}
    box = {(row, name): value for row in range(5) for name, value in zip(FACE_BOX, (0, 0, 1, 1), strict=True)}
    folder = write_faces(tmp_path / "sided", sides | box, ("AU12",))
    options = f"--train_data_dir {folder} --au_side_tokens --au_side_attention_weight 9 --learning_rate 3e-2"
    options += " --random_flip --gradient_checkpointing --report_to tensorboard"
    train("run", f"{options} --max_train_steps 30")
    losses = logged(tmp_path / "run", "au_side_attention_loss")
    # A position that does not know its side guesses: ln 2.
    assert losses[0] == pytest.approx(0.69, abs=0.05) and losses[-1] < 0.5


def test_an_adapter_knows_the_aus_that_it_was_trained_for(train, arguments, tmp_path):
    sides = {(row, f"AU12{side}"): float(row) for row in range(5) for side in "LR"}
    folder = write_faces(tmp_path / "sided", sides, ("AU12", "AU26"))
    options = f"--train_data_dir {folder} --checkpointing_steps 2 --random_flip"
    train("run", f"{options} --max_train_steps 2")
    for adapter in ("run", "run/checkpoint-2"):
        config = json.loads((tmp_path / adapter / "au_encoder" / "config.json").read_text())
        assert config["au_names"] == [*AU_NAMES[:6], "AU12L", "AU12R", *AU_NAMES[7:11]]
    options += " --max_train_steps 4 --resume_from_checkpoint latest"
    with pytest.raises(ValueError, match="AUs to train are AU1, AU4, but .* was trained with AU1, AU2, .*AU12L"):
        main(arguments("run", f"{options} --aus AU1 AU4"))
    train("run", options)


def test_validation_draws_what_the_adapter_can(arguments):
    config = parse_args(arguments("run", "--validation_prompt boy"))
    notes: list[str] = []
    assert choose_validation_aus(config, AU_NAMES, notes) == config.validation_aus and not notes
    assert choose_validation_aus(config, ("AU4", "AU6", "AU12"), notes) == ("neutral", "AU6=3 AU12=5", "AU4=5")
    assert len(notes) == 1 and "leaves out AU1=4 AU2=4 AU5=4 AU26=4; AU1=4 AU15=5 AU17=3" in notes[0]
    config = dataclasses.replace(config, validation_aus=("smirk", "AU4=5"))
    assert choose_validation_aus(config, ("AU4", "AU12L", "AU12R"), []) == config.validation_aus
    with pytest.raises(ValueError, match="`--validation_aus` is the preset 'smirk', which needs AU12R"):
        choose_validation_aus(config, AU_NAMES, [])


def test_a_step_may_be_divided_otherwise_when_resumed_but_not_be_another(train, arguments, tmp_path):
    options = "--checkpointing_steps 2 --adam_epsilon 1"
    whole = train("run", f"{options} --train_batch_size 4")
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    options += " --resume_from_checkpoint latest"
    with pytest.raises(ValueError, match="A step has 2 samples, but had 4 in '.*checkpoint-2'.*number of processes"):
        main(arguments("run", f"{options} --train_batch_size 2"))
    parts = train("run", f"{options} --train_batch_size 2 --gradient_accumulation_steps 2")
    assert_equal(parts, whole, atol=1e-5, rtol=0)


def test_a_killed_run_goes_on_from_its_last_checkpoint(train, arguments, run_processes, tmp_path):
    options = "--checkpointing_steps 1 --checkpoints_total_limit 1 --use_ema"
    whole = train("whole", options)
    moments = [
        ["training.checkpoints.save_file", "checkpoint-2.part/trained_parameters"],
        ["os.replace", "run/checkpoint-2"],
        ["shutil.rmtree", "run/.checkpoint-1.old"],
        ["os.replace", "run/au_attn_processors"],
    ]
    left = []
    for moment in moments:
        run = {"arguments": arguments("run", f"{options} --resume_from_checkpoint latest"), "kill": moment}
        (answer,) = run_processes(run)
        assert answer["status"] == -signal.SIGKILL, answer["messages"]
        left.append(sorted(path.name for path in (tmp_path / "run").glob("*checkpoint-*")))
    unfinished = [".checkpoint-2.part", "checkpoint-1"]
    assert left == [unfinished, unfinished, [".checkpoint-1.old", "checkpoint-2"], ["checkpoint-4"]]
    assert_equal(train("run", f"{options} --resume_from_checkpoint latest"), whole)
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-4"]


def test_a_full_disk_is_reported_and_no_checkpoint_is_lost(train, arguments, run_processes, tmp_path):
    options = "--checkpointing_steps 1 --checkpoints_total_limit 1"
    whole = train("whole", options)
    train("run", f"{options} --max_train_steps 2")
    options += " --resume_from_checkpoint latest"
    (answer,) = run_processes({"arguments": arguments("run", options), "largest_file": 20_000})
    assert answer["status"] == 2
    (message,) = [line for line in answer["messages"].splitlines() if "error: " in line]
    expected = r"error: checkpoint-3 cannot be written to '.*/run', where \d+ MiB are free: .*File too large"
    assert re.search(expected, message)
    assert "Earlier files are kept. Free some space" in message
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-2"]
    assert_equal(train("run", options), whole)


def test_two_processes_equal_one_with_twice_the_batch(train, arguments, run_processes, tmp_path):
    options = "--adam_epsilon 1 --timestep_sampling stratified --face_loss_weight 4 --checkpointing_steps 2 --use_ema"
    # The first steps without feedback, whose error would otherwise be most of the gradient.
    options += f" {FEEDBACK} --au_feedback_start 2"
    whole = train("whole", f"{options} --train_batch_size 4")
    address = free_address() | {"ACCELERATE_USE_CPU": "true"}
    both = {"arguments": arguments("run", f"{options} --cache_latents"), "environment": address | {"WORLD_SIZE": "2"}}
    answers = run_processes(
        *({**both, "environment": both["environment"] | {"RANK": rank, "LOCAL_RANK": rank}} for rank in ("0", "1"))
    )
    assert [answer["status"] for answer in answers] == [0, 0], answers
    parts = {file: load_file(tmp_path / "run" / file) for file in WEIGHTS}
    assert_equal(parts, whole, atol=1e-5, rtol=0)
    # One process goes on with what two began.
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    options += " --resume_from_checkpoint latest --cache_latents --train_batch_size 4"
    assert_equal(train("run", options), whole, atol=1e-5, rtol=0)


def test_deepspeed_equals_training_without_it_and_resumes(train, arguments, run_processes, tmp_path):
    pytest.importorskip("deepspeed")
    options = "--adam_epsilon 1 --checkpointing_steps 2 --use_ema"
    alone = train("alone", options)
    environment = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    environment |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}

    def run(stage, *more):
        variables = environment | free_address() | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
        return run_processes({"arguments": arguments("run", " ".join([options, *more])), "environment": variables})[0]

    answer = run("3")
    assert answer["status"] == 2 and "--zero_stage" in answer["messages"], answer
    for more in ("", "--resume_from_checkpoint latest"):
        answer = run("2", more)
        assert answer["status"] == 0, answer
        assert_equal({file: load_file(tmp_path / "run" / file) for file in WEIGHTS}, alone, atol=1e-5, rtol=0)
        shutil.rmtree(tmp_path / "run/checkpoint-4")


# --------------------------------------------------------------------------------------------------------------------
# What is shown
# --------------------------------------------------------------------------------------------------------------------


@on_every_family
@pytest.mark.parametrize("options", ["", "--cache_latents --use_ema --mixed_precision bf16"], ids=["plain", "cached"])
def test_validation_pictures_are_sheets_and_change_nothing(train, tmp_path, options):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    validation = "--validation_aus neutral AU12=5 --validation_inference_steps 1 --validation_prompt woman"
    silent = train("silent", options)
    shown = train("shown", f"{options} {validation} --validation_steps 3 --report_to tensorboard")
    assert_equal(shown, silent)
    sheets = sorted((tmp_path / "shown/validation").iterdir())
    assert [path.name for path in sheets] == ["step-000003.png", "step-000004.png"]
    (run,) = (tmp_path / "shown/logs/fineface").glob("events.*")
    events = event_accumulator.EventAccumulator(str(run), {"images": 0, "scalars": 0}).Reload()
    assert [event.step for event in events.Images("validation")] == [3, 4]
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3, 4]


def test_validation_pictures_have_the_same_noise_every_time(train, tmp_path):
    options = f"{VALIDATION} --num_validation_images 2 --validation_steps 1 --max_train_steps 2 --learning_rate 0"
    train("run", options)
    first, second = (Image.open(path) for path in sorted((tmp_path / "run/validation").iterdir()))
    # Two prompts and two seeds below each other, two expressions beside each other, of 32 pixels each.
    assert first.height > 4 * 32 and first.width > 2 * 32
    title = 20
    assert np.array_equal(np.asarray(first)[title:], np.asarray(second)[title:])
    # Pictures of noise, not white paper.
    assert len(np.unique(np.asarray(first)[title:].reshape(-1, 3), axis=0)) > 1000


def test_pushed_to_the_hub_it_has_a_card_and_loads_in_one_line(arguments, tmp_path, monkeypatch):
    options = "--push_to_hub --hub_model_id fineface --validation_inference_steps 1"
    with running_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "not the one")
        with pytest.raises(OSError, match="does not take the token"):
            main(arguments("run", options))
        assert not (tmp_path / "run").exists()
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        main(arguments("run", options))
        files = hub.repositories["model", "user/fineface"].files
    card = files["README.md"].decode()
    assert "| `rank` | 4 |" in card and 'from_pretrained("user/fineface"' in card
    assert ADAPTER_FILES | {"model_index.json", "pipeline.py", "images/AU12.png"} <= files.keys()
    # Beside it, the same for plain diffusers.
    assert "au_ip_adapter.safetensors" in files and 'load_ip_adapter("user/fineface"' in card
    assert not any("checkpoint" in name for name in files)


# --------------------------------------------------------------------------------------------------------------------
# What is trained
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["--num_au_tokens 1", "--num_au_tokens 2", "--au_side_tokens"])
def test_only_encoder_values_and_lora_learn_and_keys_with_several_tokens(arguments, options):
    config, several = parse_args(arguments("run", f"{options} --gradient_checkpointing")), options[-1] != "1"
    unet = make_components()["unet"]
    base = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    torch.manual_seed(0)
    # Of twelve AUs, two are the sides of one.
    au_names = (*AU_NAMES[:10], "AU12L", "AU12R") if config.au_side_tokens else AU_NAMES
    model = make_model(unet, config, au_names=au_names)
    keys = model.au_adapter.to_k_au.weight.detach().clone()
    optimizer = train_fineface.make_optimizer(model, config)
    for seed in range(2):
        loss_of(model, make_noise_scheduler(), **noisy_inputs(seed=seed)).backward()
        learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        optimizer.step()
    adapter = {name for name in learning if not name.startswith("unet.")}
    assert learning - adapter == {name for name, _ in model.named_parameters() if ".lora_" in name}
    expected = {"encoder.intensity_proj.weight", "encoder.intensity_proj.bias", "to_v_au.weight"}
    expected |= {"to_k_au.weight"} if several else set()
    expected |= {"encoder.side_embedding"} if config.au_side_tokens else set()
    assert adapter == {f"au_adapter.{name}" for name in expected} == adapter & set(model.trained_parameters())
    # Every layer of every attention has its LoRA, and all that learns did move.
    attentions = [name for name, _ in unet.named_modules() if name.endswith((".attn1", ".attn2"))]
    assert len([name for name in learning if ".lora_" in name]) == 2 * 4 * len(attentions)
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.trained_parameters().values())
    assert torch.equal(model.au_adapter.to_k_au.weight, keys) != several
    after = {name.replace(".base_layer", ""): tensor for name, tensor in unet.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items())


def test_keys_and_values_start_as_those_of_the_text(config):
    unet = make_components()["unet"]
    text = {name: module.to_v.weight.clone() for name, module in unet.named_modules() if name.endswith("attn2")}
    started = make_model(unet, config).au_adapter.attn_processors_state_dict()
    assert all(torch.equal(started[f"{name}.processor.to_v_au.weight"], weight) for name, weight in text.items())
    zero = make_model(make_components()["unet"], dataclasses.replace(config, au_kv_init="zero")).au_adapter
    assert not zero.to_v_au.weight.any()


def test_gradient_checkpointing_leaves_gradients_as_they_are(arguments):
    gradients = []
    for options in ("", "--gradient_checkpointing"):
        torch.manual_seed(0)
        model = make_model(make_components()["unet"], parse_args(arguments("run", options)))
        for parameter in model.trained_parameters().values():
            torch.nn.init.normal_(parameter, std=0.1)
        loss_of(model, make_noise_scheduler(), **noisy_inputs()).backward()
        gradients.append([parameter.grad for parameter in model.trained_parameters().values()])
    torch.testing.assert_close(*gradients)


def test_adapter_and_lora_have_learning_rates_of_their_own(arguments):
    config = parse_args(arguments("run", "--learning_rate 0.1 --au_learning_rate 0.2"))
    model = make_model(make_components()["unet"], config)
    lora, adapter = train_fineface.make_optimizer(model, config).param_groups
    assert (lora["lr"], adapter["lr"]) == (0.1, 0.2)
    assert len(lora["params"]) + len(adapter["params"]) == len(model.trained_parameters())
    assert any(parameter is model.au_adapter.to_v_au.weight for parameter in adapter["params"])


def test_in_mixed_precision_what_is_trained_stays_in_float32(train, tmp_path):
    weights = train("run", "--mixed_precision bf16 --max_train_steps 2 --cache_latents")
    assert {tensor.dtype for tensor in flat(weights).values()} == {torch.float32}
    cached = [load_file(path).values() for path in (tmp_path / "run/cache").glob("*/*.safetensors")]
    assert {rows.dtype for rows in itertools.chain(*cached)} == {torch.float16}


def test_all_gradients_together_are_clipped(train):
    # Without Adam's division, a step is the gradient.
    options = "--max_train_steps 1 --adam_weight_decay 0 --adam_beta1 0 --adam_epsilon 1"
    start = flat(train("start", f"{options} --learning_rate 0"))
    for max_grad_norm in (0.01, 0.02):
        end = flat(train(f"{max_grad_norm}", f"{options} --learning_rate 1 --max_grad_norm {max_grad_norm}"))
        length = sum((end[key] - tensor).square().sum() for key, tensor in start.items()).sqrt()
        assert length == pytest.approx(max_grad_norm, rel=0.01)


# --------------------------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_the_formula(config, prediction_type):
    model = make_model(make_components()["unet"], config)
    inputs, noise_scheduler = noisy_inputs(3), make_noise_scheduler(prediction_type)
    alpha = noise_scheduler.alphas_cumprod[inputs["timesteps"]].sqrt().reshape(-1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    noisy = alpha * inputs["latents"] + sigma * inputs["noise"]
    target = inputs["noise"]
    if prediction_type == "v_prediction":
        target = alpha * inputs["noise"] - sigma * inputs["latents"]
    with torch.no_grad():
        prediction = model(noisy, inputs["timesteps"], inputs["prompt_embeds"], inputs["au_intensities"])
        losses = (prediction - target).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(loss_of(model, noise_scheduler, **inputs), losses.mean())
        snr = (alpha / sigma).square().flatten()
        weights = snr.clamp(max=5) / (snr + 1 if prediction_type == "v_prediction" else snr)
        torch.testing.assert_close(min_snr_weights(noise_scheduler, inputs["timesteps"], 5.0), weights)
        weighted = loss_of(model, noise_scheduler, **inputs, snr_gamma=5.0)
        torch.testing.assert_close(weighted, (weights * losses).mean())


def test_the_model_predicts_what_the_pipeline_predicts(config, tmp_path, tiny_components, tiny_base):
    model = make_model(tiny_components["unet"], config)
    for parameter in model.trained_parameters().values():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    TrainingState(model, None).save_adapter(tmp_path / "adapter")
    other = FineFacePipeline(**make_components(), requires_safety_checker=False)
    other.load_au_adapter(tmp_path / "adapter")
    inputs = noisy_inputs()
    aus = inputs["au_intensities"]
    with torch.no_grad():
        expected = model(inputs["latents"], inputs["timesteps"], inputs["prompt_embeds"], aus)
        kwargs = other.encode_aus(aus, torch.device("cpu"), 1, 2)[0]
        predicted = other.unet(
            inputs["latents"], inputs["timesteps"], inputs["prompt_embeds"], cross_attention_kwargs=kwargs
        ).sample
    torch.testing.assert_close(predicted, expected, atol=1e-5, rtol=1e-4)


def test_latents_are_drawn_from_the_distribution_and_scaled(arguments, tmp_path):
    config = parse_args(arguments("run", "--max_train_steps 1 --rank 1"))
    accelerator = train_fineface.make_accelerator(config)
    encoders = load_encoders(config, accelerator.device, torch.float32)
    inputs = PixelInputs(load_training_data(config), encoders, 32)
    samples, noise_scheduler = TrainingSamples(inputs, 1000, config), make_noise_scheduler()
    model, given = make_model(make_components()["unet"], config), {}

    def remember(module, arguments, output):
        given["noisy_latents"] = arguments[0]

    model.register_forward_hook(remember)
    train_fineface.train(config, accelerator, TrainingState(model, None), samples, noise_scheduler, encoders)
    drawn = [samples[number] for number in range(2)]
    batch = {name: torch.stack([sample[name] for sample in drawn]) for name in drawn[0]}
    distribution = encoders.vae.encode(batch["pixel_values"]).latent_dist
    latents = (distribution.mean + distribution.std * batch["latent_noise"]) * encoders.vae.config.scaling_factor
    alpha = noise_scheduler.alphas_cumprod[batch["timesteps"]].sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(given["noisy_latents"], alpha * latents + (1 - alpha**2).sqrt() * batch["noise"])


def test_training_learns_which_aus_belong_to_which_picture(config):
    model = make_model(make_components()["unet"], config)
    # At much noise, the velocity is what has to be known about the picture.
    noise_scheduler = make_noise_scheduler("v_prediction")
    inputs = noisy_inputs(2)
    aus = torch.zeros(2, 12)
    aus[0, 6], aus[1, 2] = 5, 5
    inputs |= {"prompt_embeds": inputs["prompt_embeds"][:1].expand(2, -1, -1), "au_intensities": aus}
    inputs |= {"latents": torch.tensor([2.0, -2.0]).reshape(2, 1, 1, 1) * torch.ones(2, 4, 8, 8)}
    optimizer = torch.optim.AdamW(model.trained_parameters().values(), 1e-2)
    generator = torch.Generator().manual_seed(0)

    def loss(**changed):
        inputs["noise"] = torch.randn(2, 4, 8, 8, generator=generator)
        inputs["timesteps"] = torch.full((2,), 999)
        return loss_of(model, noise_scheduler, **inputs | changed)

    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        right = torch.stack([loss() for _ in range(4)]).mean()
        swapped = torch.stack([loss(au_intensities=aus.flip(0)) for _ in range(4)]).mean()
    assert right < 0.75 * swapped


# --------------------------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ("--rank 0", "`--rank` has to be an integer, at least 1, but is 0"),
        ("--seed -1", "`--seed` has to be an integer, at least 0, but is -1"),
        ("--au_drop_prob 1.5", r"`--au_drop_prob` has to be a probability in \[0, 1\], but is 1.5"),
        ("--learning_rate nan", "`--learning_rate` has to be a finite number, at least 0, but is nan"),
        ("--encoder_type big", "invalid choice: 'big'"),
        ("--dataset_name some/faces", "either from `--train_data_dir` or from `--dataset_name`"),
        ("--validation_aus AU3=2", "`--validation_aus` names 'AU3'"),
        ("--aus AU12L AU26", "`--aus`: `au_names` holds AU12L, so it needs both"),
        ("--cache_latents --streaming", "`--cache_latents` writes every row to disk"),
        ("--timestep_bias_begin 5 --timestep_bias_end 5", "`--timestep_bias_end` has to be after .*, 5, but is 5"),
        ("--encoder_type direct --au_side_tokens", "`--au_side_tokens` has to be off with `--encoder_type direct`"),
        ("--au_side_attention_weight 1", "`--au_side_attention_weight` has to be 0 without `--au_side_tokens`"),
        ("--au_side_tokens --au_side_attention_weight 1 --torch_compile", "`--torch_compile` has to be off with"),
        ("--encoder_type direct --num_au_tokens 2", "`--num_au_tokens` has to be 1 with `--encoder_type direct`"),
        ("--max_train_step 3", "unrecognized arguments: --max_train_step"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_status_2(arguments, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        main(arguments("run", options))
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_a_folder_that_is_not_there_is_refused_when_the_run_begins(arguments):
    config = parse_args(arguments("run", "--train_data_dir nowhere"))
    with pytest.raises(ValueError, match="`--train_data_dir` has to be a folder, but 'nowhere' is none"):
        train_fineface.run(config)


def test_a_tracker_that_does_not_exist_or_is_not_installed_is_refused(arguments, tmp_path):
    with pytest.raises(ValueError, match="Unsupported logging capability: paper. Choose between .*tensorboard"):
        main(arguments("run", "--report_to paper"))
    with pytest.raises(ValueError, match="`--report_to comet_ml` needs comet-ml. Install it: `pip install comet-ml`"):
        main(arguments("run", "--report_to comet_ml"))
    assert not (tmp_path / "run").exists()


def test_a_resolution_that_does_not_fit_the_vae_is_refused(arguments):
    with pytest.raises(ValueError, match="`--resolution` has to be divisible by 2, but is 33"):
        main(arguments("run", "--resolution 33"))


def test_a_base_of_an_unknown_family_is_refused(arguments, tmp_path, tiny_sd_dir):
    shutil.copytree(tiny_sd_dir, tmp_path / "base")
    index = json.loads((tmp_path / "base/model_index.json").read_text())
    index |= {"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": ["transformers", "T5EncoderModel"]}
    (tmp_path / "base/model_index.json").write_text(json.dumps(index))
    # Nothing is loaded before.
    shutil.rmtree(tmp_path / "base/unet")
    message = "is a StableDiffusion3Pipeline of .*text_encoder_3.*AUs have pipelines for .* one text_encoder"
    with pytest.raises(ValueError, match=message):
        main([*arguments("run"), "--pretrained_model_name_or_path", str(tmp_path / "base")])


def test_a_base_that_predicts_something_else_is_refused(arguments, tmp_path, tiny_sd_dir):
    shutil.copytree(tiny_sd_dir, tmp_path / "base")
    DDIMScheduler(prediction_type="sample").save_pretrained(tmp_path / "base/scheduler")
    with pytest.raises(ValueError, match="predicts 'sample', but has to predict epsilon or v_prediction"):
        main([*arguments("run"), "--pretrained_model_name_or_path", str(tmp_path / "base")])


def test_an_earlier_run_is_not_overwritten_and_not_continued_otherwise(train, arguments, tmp_path):
    train("run", "--max_train_steps 2 --checkpointing_steps 1")
    with pytest.raises(ValueError, match="holds checkpoint-2 of an earlier run.*`--resume_from_checkpoint latest`"):
        main(arguments("run"))
    with pytest.raises(ValueError, match="`--rank` is 8, but '.*checkpoint-2' was trained with 4"):
        main(arguments("run", "--resume_from_checkpoint latest --rank 8"))
    with pytest.raises(ValueError, match="holds checkpoint-2, which is not '.*checkpoint-1'. Delete later"):
        main(arguments("run", f"--resume_from_checkpoint {tmp_path / 'run/checkpoint-1'}"))
    with pytest.raises(FileNotFoundError, match="`--resume_from_checkpoint`: 'nowhere' is no checkpoint"):
        main(arguments("run", "--resume_from_checkpoint nowhere"))


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights(arguments, tmp_path, tiny_sd_dir):
    shutil.copytree(tiny_sd_dir, tmp_path / "base")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "base/unet")
    torch.nn.init.constant_(unet.conv_out.bias, float("nan"))
    unet.save_pretrained(tmp_path / "base/unet")
    message = r"The loss is nan at step 1, with the samples Row \d \('\d.png'\), Row \d \('\d.png'\)\. .*no step w"
    with pytest.raises(FloatingPointError, match=message):
        main([*arguments("run"), "--pretrained_model_name_or_path", str(tmp_path / "base")])


def test_the_last_good_weights_are_kept_when_the_loss_is_no_longer_finite(arguments, tmp_path):
    with pytest.raises(FloatingPointError, match=r"at step 2, with the samples Row .*; checkpoint-1 holds them"):
        main(arguments("run", "--learning_rate 1e30"))
    kept = load_file(tmp_path / "run/checkpoint-1/trained_parameters.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert json.loads((tmp_path / "run/checkpoint-1/training_state.json").read_text())["step"] == 1
