# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""Feedback from a meter: what it teaches, what it leaves alone, and how a run with it goes on."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from tiny import make_components
from torch import nn

import train_fineface
from action_units import AU_NAMES
from au_encoder import read_tensors
from training.checkpoints import PARAMETERS_NAME
from training.config import FEEDBACK_MODES, parse_args
from training.data import PixelInputs, TrainingSamples, load_training_data
from training.encoders import StableDiffusionEncoders, load_encoders
from training.feedback import AUFeedback, appearance_change, check_meter, first_weights_of, load_meter, shake


pytest_plugins = ["training_runs"]

SIDED = ("AU1", "AU12L", "AU12R", "AU43")
FEEDBACK = "--au_feedback_meter test_feedback:make_tiny_meter --au_feedback_steps 2 --au_feedback_guidance_scale 2"


class TinyMeter(nn.Module):
    """Reads AUs from the mean colours of the four quarters of a picture."""

    def __init__(self, au_names=AU_NAMES):
        super().__init__()
        torch.manual_seed(3)
        self.au_names = au_names
        self.layer = nn.Linear(12, len(au_names))

    def forward(self, pixel_values):
        return 10 * self.layer(nn.functional.adaptive_avg_pool2d(pixel_values, 2).flatten(1))


def make_tiny_meter():
    return TinyMeter()


def make_sided_meter():
    return TinyMeter(SIDED)


def make_model_and_feedback(config, meter=None, **options):
    components = make_components()
    encoders = StableDiffusionEncoders([components["tokenizer"]], [components["text_encoder"]], components["vae"])
    model = train_fineface.make_model(components["unet"], config)
    scheduler = DDIMScheduler.from_config(components["scheduler"].config)
    meter = meter or TinyMeter().eval().requires_grad_(False)
    options.setdefault("first_weights", first_weights_of(model))
    batch = encoders.encode_captions(torch.stack([encoders.tokenize(text) for text in ("a boy", "a girl")]))
    return model, AUFeedback(meter, encoders, scheduler, AU_NAMES, **options), batch


def draw_noise():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_error_of_the_meter_reaches_all_that_is_trained_and_nothing_else(config):
    model, feedback, batch = make_model_and_feedback(config, steps=2, guidance_scale=2.0)
    feedback.loss(model, batch, draw_noise(), torch.rand(2, 12)).backward()
    trained = model.trained_parameters()
    # The LoRA begins with its second matrices at 0, so only they have a gradient yet.
    reached = {name for name, parameter in trained.items() if parameter.grad is not None and parameter.grad.any()}
    assert {"au_adapter.to_v_au.weight", "au_adapter.encoder.intensity_proj.weight"} <= reached
    assert any("lora_B" in name for name in reached)
    frozen = [*feedback.vae.parameters(), *feedback.meter.parameters(), *model.unet.parameters()]
    assert not any(p.grad is not None and p.grad.any() for p in frozen if not p.requires_grad)


def test_pictures_are_those_of_the_pipeline(config):
    """So that what the meter judges in training is what users get."""
    from pipeline_fineface import FineFacePipeline

    model, feedback, batch = make_model_and_feedback(config, steps=3, guidance_scale=2.5)
    components = make_components() | {"unet": model.unet, "au_adapter": model.au_adapter.eval()}
    pipe = FineFacePipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    aus = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) * 5
    with torch.no_grad():
        drawn = feedback.draw(model, batch, draw_noise(), aus)
    expected = pipe(
        ["a boy", "a girl"],
        aus=aus,
        latents=draw_noise(),
        num_inference_steps=3,
        guidance_scale=2.5,
        output_type="pt",
    ).images
    assert torch.allclose((drawn / 2 + 0.5).clamp(0, 1), expected, atol=1e-4)


def test_only_the_last_steps_carry_gradient(config):
    calls = []
    model, feedback, batch = make_model_and_feedback(config, steps=4, backprop=1, guidance_scale=2.0)
    model.register_forward_hook(lambda module, args, output: calls.append(output.requires_grad))
    feedback.loss(model, batch, draw_noise(), torch.rand(2, 12))
    # Of each step, the guided prediction and the unconditional one.
    assert calls == [False, False] * 3 + [True, False]


def test_one_random_step_carries_gradient_and_the_pictures_are_the_same(config):
    model, feedback, batch = make_model_and_feedback(config, steps=3, guidance_scale=2.0, mode="random_step")
    commands, carried = torch.rand(2, 12), set()
    for seed in range(8):
        calls = []
        handle = model.register_forward_hook(lambda module, args, output, to=calls: to.append(output.requires_grad))
        feedback.loss(model, batch, draw_noise(), commands, torch.Generator().manual_seed(seed)).backward()
        handle.remove()
        assert calls[1::2] == [False] * 3 and sum(calls) == 1
        carried.add(calls.index(True))
        assert model.au_adapter.to_v_au.weight.grad.any()
        model.zero_grad()
    assert carried == {0, 2, 4}
    feedback_of_all = make_model_and_feedback(config, steps=3, guidance_scale=2.0)[1]
    with torch.no_grad():
        drawn = [one.draw(model, batch, draw_noise(), commands) for one in (feedback, feedback_of_all)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_right_prediction_gives_the_clean_picture_and_noise_weighs_it(config, prediction_type):
    _, feedback, _ = make_model_and_feedback(config, mode="one_step")
    feedback.scheduler.register_to_config(prediction_type=prediction_type)
    latents, noise, timesteps = draw_noise(), draw_noise().flip(0), torch.tensor([300, 900])
    noisy_latents = feedback.scheduler.add_noise(latents, noise, timesteps)
    prediction = noise if prediction_type == "epsilon" else feedback.scheduler.get_velocity(latents, noise, timesteps)
    commands, seeds = torch.rand(2, 12), (5, 6)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    loss = feedback.one_step_loss(prediction, noisy_latents, timesteps, commands, generators)
    pictures = feedback.vae.decode(latents / feedback.encoders.scaling_factor).sample
    errors = torch.stack(
        [
            feedback.error(pictures[i : i + 1], commands[i : i + 1], torch.Generator().manual_seed(seed))
            for i, seed in enumerate(seeds)
        ]
    )
    signal = feedback.scheduler.alphas_cumprod[timesteps]
    snr = signal / (1 - signal)
    assert signal[0] > 10 * signal[1]
    torch.testing.assert_close(loss, (errors * snr / (1 + snr)).mean(), rtol=1e-3, atol=0)


def test_a_meter_on_latents_needs_no_decoder(config):
    class LatentMeter(TinyMeter):
        reads_latents = True

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 12)

    model, feedback, batch = make_model_and_feedback(config, LatentMeter().requires_grad_(False), steps=2)
    feedback.vae = None
    assert feedback.draw(model, batch, draw_noise(), torch.rand(2, 12)).shape == draw_noise().shape
    feedback.loss(model, batch, draw_noise(), torch.rand(2, 12), torch.Generator().manual_seed(0)).backward()
    assert model.au_adapter.to_v_au.weight.grad.any()


def test_the_one_step_estimate_draws_nothing(config):
    calls = []
    model, feedback, batch = make_model_and_feedback(config, mode="one_step")
    model.register_forward_hook(lambda module, args, output: calls.append(output))
    timesteps, aus = torch.tensor([100, 500]), torch.rand(2, 12)
    prediction = model(draw_noise(), timesteps, batch["prompt_embeds"], aus)
    batch |= {"timesteps": timesteps, "au_intensities": aus, "feedback_seed": torch.tensor([1, 2])}
    batch["aus_are_dropped"] = torch.tensor([False, False])
    feedback.batch_loss(model, batch, draw_noise(), prediction).backward()
    assert len(calls) == 1 and model.au_adapter.to_v_au.weight.grad.any()


def test_the_one_step_estimate_asks_nothing_of_samples_without_their_aus(config, arguments):
    _, feedback, _ = make_model_and_feedback(config, mode="one_step")
    options = f"{FEEDBACK} --au_feedback_mode one_step --au_drop_prob 0.5 --au_noise_variance 0 --au_rounding_prob 0"
    config = parse_args(arguments("run", options))
    data, encoders = load_training_data(config), load_encoders(config, torch.device("cpu"), torch.float32)
    data.au_intensities[0] = 0  # A neutral face keeps its label.
    samples = TrainingSamples(PixelInputs(data, encoders, 32), 1000, config)
    batch = [samples[number] for number in range(20)]
    names = ("row", "timesteps", "au_intensities", "feedback_seed", "aus_are_dropped", "noise")
    batch = {name: torch.stack([sample[name] for sample in batch]) for name in names}
    prediction = batch["noise"].clone().requires_grad_()
    feedback.batch_loss(None, batch, batch["noise"], prediction).backward()
    is_taught = prediction.grad.flatten(1).any(dim=1)
    assert torch.equal(is_taught, ~batch["aus_are_dropped"])
    is_neutral = (batch["au_intensities"] == 0).all(dim=1)
    assert is_neutral[~is_taught].all() and (is_neutral & is_taught).sum() > 0 and 4 < is_taught.sum() < 16


def test_an_unknown_mode_is_refused(config, arguments, capsys):
    with pytest.raises(ValueError, match="`--au_feedback_mode` has to be one of draw, random_step, one_step, but is"):
        replace(config, au_feedback_mode="all")
    with pytest.raises(SystemExit):
        parse_args(arguments("run", "--au_feedback_mode one_step --au_feedback_backprop 1"))
    assert "`--au_feedback_mode` has to be draw with `--au_feedback_backprop`" in capsys.readouterr().err


def test_a_tint_and_a_shadow_change_the_appearance_but_a_wrinkle_hardly_does():
    tint, shadow, wrinkle = change = torch.zeros(3, 3, 128, 128)
    tint[2, 56:62, 44:50], shadow[:, 40:80, 30:98], wrinkle[:, 40, 50:78] = 1.0, -0.1, -1.0
    tint, shadow, wrinkle = appearance_change(change, 16).tolist()
    assert min(tint, shadow) > 5 * wrinkle > 0


def test_what_a_meter_does_not_see_stays_as_it_is_on_the_neutral_face(config):
    """The meter reads the upper left quarter alone, and weighing the appearance keeps the rest of the picture."""
    meter = TinyMeter().eval().requires_grad_(False)
    meter.layer.weight.view(12, 3, 4)[..., 1:] = 0
    commands, changes = torch.tensor([[5.0] + [0.0] * 11, [0.0] * 11 + [5.0]]), []
    for weight in (0.0, 1e6):
        torch.manual_seed(0)
        options = {"steps": 1, "guidance_scale": 1.0, "appearance_weight": weight}
        model, feedback, batch = make_model_and_feedback(config, meter, **options)
        optimizer = torch.optim.AdamW(model.trained_parameters().values(), 3e-2)
        for _ in range(8):
            optimizer.zero_grad()
            feedback.loss(model, batch, draw_noise(), commands).backward()
            optimizer.step()
        with torch.no_grad():
            drawn, neutral = (feedback.draw(model, batch, draw_noise(), aus) for aus in (commands, 0 * commands))
        changes.append(appearance_change(drawn - neutral, 4).mean().item())
    assert changes[1] < changes[0] / 4


def test_the_neutral_face_cannot_drift_together_with_the_others(config):
    """Pictures are compared with the neutral face of the first weights, so a tint of all faces counts."""
    model, feedback, batch = make_model_and_feedback(config, steps=1, guidance_scale=1.0, appearance_weight=1e6)
    neutral, losses = torch.zeros(2, 12), []
    for drift in (0.0, 1.0):
        with torch.no_grad():
            for parameter in model.trained_parameters().values():
                parameter += drift
        losses.append(feedback.loss(model, batch, draw_noise(), neutral).item())
    assert losses[1] > 2 * losses[0] > 0
    with pytest.raises(ValueError, match="needs `first_weights`"):
        make_model_and_feedback(config, appearance_weight=1.0, first_weights=None)


def test_the_appearance_needs_drawn_pictures(config, arguments, capsys):
    meter = TinyMeter()
    meter.reads_latents = True
    with pytest.raises(ValueError, match="`--au_feedback_appearance_weight` compares drawn pictures.*reads latents"):
        make_model_and_feedback(config, meter, appearance_weight=1.0)
    with pytest.raises(SystemExit):
        parse_args(arguments("run", "--au_feedback_mode one_step --au_feedback_appearance_weight 1"))
    assert "`--au_feedback_appearance_weight` has to be 0 in the mode one_step" in capsys.readouterr().err


def test_a_picture_is_commanded_the_aus_of_another_row(arguments):
    """Even in a batch of one, and always the same ones, so that a resumed run goes on with them."""
    options = f"{FEEDBACK} --train_batch_size 1 --au_noise_variance 0 --au_rounding_prob 0"
    config = parse_args(arguments("run", options))
    data = load_training_data(config)
    encoders = load_encoders(config, torch.device("cpu"), torch.float32)
    samples = [TrainingSamples(PixelInputs(data, encoders, 32), 1000, config) for _ in range(2)]
    row_of = {tuple(aus): row for row, aus in enumerate(data.au_intensities)}
    pairs = []
    for number in range(40):
        one, again = samples[0][number], samples[1][number]
        assert torch.equal(one["commanded_aus"], again["commanded_aus"])
        assert one["feedback_seed"] == again["feedback_seed"]
        pairs.append((int(one["row"]), row_of[tuple(one["commanded_aus"].numpy())]))
    assert all(row != other for row, other in pairs) and {other for _, other in pairs} == set(range(5))
    assert (
        "commanded_aus" not in TrainingSamples(PixelInputs(data, encoders, 32), 1000, parse_args(arguments("run")))[0]
    )


def test_a_share_of_the_pictures_is_commanded_one_au_alone(arguments):
    def commands(options: str) -> torch.Tensor:
        config = parse_args(arguments("run", f"{FEEDBACK} {options}"))
        data, encoders = load_training_data(config), load_encoders(config, torch.device("cpu"), torch.float32)
        samples = TrainingSamples(PixelInputs(data, encoders, 32), 1000, config)
        return torch.stack([samples[number]["commanded_aus"] for number in range(60)])

    singles, others = commands("--au_feedback_single_prob 0.5"), commands("")
    alone = (singles > 0).sum(1) == 1
    assert 20 <= alone.sum() <= 40 and len(singles[alone].nonzero()[:, 1].unique()) > 8
    assert singles[alone].max() > 4 and singles[alone].sum(1).min() < 1
    assert torch.equal(singles[~alone], others[~alone])


def test_feedback_makes_the_meter_read_what_was_commanded(config):
    model, feedback, batch = make_model_and_feedback(config, steps=2, guidance_scale=2.0)
    commands = torch.tensor([[5.0] + [0.0] * 11, [0.0] * 11 + [5.0]])
    optimizer = torch.optim.AdamW(model.trained_parameters().values(), 3e-2)
    torch.manual_seed(0)

    def error() -> float:
        with torch.no_grad():
            return feedback.error(feedback.draw(model, batch, draw_noise(), commands), commands).item()

    before = error()
    for _ in range(20):
        optimizer.zero_grad()
        feedback.loss(model, batch, draw_noise(), commands).backward()
        optimizer.step()
    assert error() < 0.9 * before


def test_a_meter_of_sides_is_asked_for_both_and_one_of_fewer_aus_judges_those(config):
    model, feedback, batch = make_model_and_feedback(config, TinyMeter(SIDED), steps=1)
    commands = torch.zeros(2, 12)
    commands[:, AU_NAMES.index("AU12")] = 4
    pictures = torch.zeros(2, 3, 32, 32)
    generator = torch.Generator().manual_seed(0)
    error = feedback.error(pictures, commands, generator)
    read = feedback.meter(shake(pictures, torch.Generator().manual_seed(0)))
    # AU43 is nothing that these adapters can be asked for.
    squares = (read[:, :3] - torch.tensor([0.0, 4.0, 4.0])).square()
    assert torch.allclose(error, squares.mean())
    # The weight of an AU holds for both of its sides.
    weights = torch.ones(2, 12)
    weights[0, AU_NAMES.index("AU12")] = 3
    weighted = feedback.error(pictures, commands, torch.Generator().manual_seed(0), au_weights=weights)
    assert torch.allclose(weighted, (squares * torch.tensor([[1.0, 3.0, 3.0], [1.0, 1.0, 1.0]])).mean())


def test_a_meter_that_reads_nothing_of_the_adapter_is_refused(config):
    with pytest.raises(ValueError, match="reads AU43, none of which the adapter has: AU1, AU2"):
        make_model_and_feedback(config, TinyMeter(("AU43",)))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere", FileNotFoundError, "neither a folder with a meter nor an import path"),
        ("test_feedback:nothing", ValueError, "cannot be imported"),
        ("no_such_package_at_all:meter", ValueError, "cannot be imported"),
        ("test_feedback:draw_noise", ValueError, "returned a Tensor, but a meter is a torch.nn.Module"),
    ],
)
def test_a_name_that_is_no_meter_is_an_error(name, error, message):
    with pytest.raises(error, match=message):
        load_meter(name)


def test_a_meter_that_cannot_be_loaded_is_refused_before_data_and_base(arguments, tmp_path):
    (tmp_path / "empty").mkdir()
    missing = f"--train_data_dir {tmp_path / 'empty'} --au_feedback_meter nowhere"
    with pytest.raises(FileNotFoundError, match="'nowhere' is neither a folder with a meter nor an import path"):
        train_fineface.main(arguments("run", missing))
    assert not (tmp_path / "run").exists()


def test_a_meter_that_could_teach_nothing_is_refused():
    picture = torch.zeros(1, 3, 32, 32)
    check_meter(TinyMeter(), picture)
    meter = TinyMeter()
    meter.au_names = ("AU1", "AU2")
    with pytest.raises(ValueError, match=r"returned a tensor of shape \(1, 12\), but .* \(1, 2\) for .*, AU1, AU2"):
        check_meter(meter, picture)
    meter = TinyMeter().requires_grad_(False)
    meter.forward = torch.no_grad()(meter.forward)
    with pytest.raises(ValueError, match="No gradient passes through the meter"):
        check_meter(meter, picture)


def test_a_run_says_which_aus_have_feedback(arguments, capsys):
    meter = FEEDBACK.replace("make_tiny_meter", "make_sided_meter")
    train_fineface.main(arguments("run", f"{meter} --max_train_steps 1"))
    said = capsys.readouterr().out
    assert re.search(r"AUs with feedback +AU1, AU12\n", said)
    assert "The meter does not read AU2, AU4, AU5, AU6, AU9, AU15, AU17, AU20, AU25, AU26: feedback" in said


def test_a_meter_comes_from_a_folder_frozen(tmp_path):
    from toy_faces.networks import PictureReader

    PictureReader(2, (8, 8), 8, au_names=("AU1", "AU4")).save_pretrained(tmp_path)
    meter = load_meter(str(tmp_path))
    assert meter.au_names == ("AU1", "AU4") and not any(p.requires_grad for p in meter.parameters())


def trained_weights(arguments, tmp_path, name, options):
    train_fineface.main(arguments(name, options))
    return read_tensors(tmp_path / name / "checkpoint-4" / PARAMETERS_NAME)


def test_the_meter_of_the_documentation_loads_and_carries_gradient(tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs/training.md").read_text(encoding="utf-8")
    [block] = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "MyMeter" in block]
    (tmp_path / "documented_meter.py").write_text(block)
    detector = (
        "from torch import nn\n\ndef Detector():\n    return nn.Sequential(nn.Conv2d(3, 5, 224), nn.Flatten())\n"
    )
    (tmp_path / "my_detector.py").write_text(detector)
    save_file(nn.Sequential(nn.Conv2d(3, 5, 224)).state_dict(), tmp_path / "detector.safetensors")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    meter = load_meter("documented_meter:MyMeter")
    assert meter.au_names == ("AU1", "AU2", "AU4", "AU6", "AU12")
    pixel_values = torch.zeros(2, 3, 64, 64, requires_grad=True)
    intensities = meter(pixel_values)
    intensities.sum().backward()
    assert intensities.shape == (2, 5) and intensities.min() >= 0 and intensities.max() <= 5
    assert pixel_values.grad.any()


@pytest.mark.parametrize("mode", FEEDBACK_MODES)
def test_a_run_with_feedback_learns_otherwise_from_its_start_on_and_resumes_to_the_bit(arguments, tmp_path, mode):
    save = "--checkpointing_steps 1 --train_batch_size 1"
    options = f"{save} {FEEDBACK} --au_feedback_start 2 --au_feedback_mode {mode}"
    if mode == "random_step":
        options += " --au_feedback_appearance_weight 1"
    plain = trained_weights(arguments, tmp_path, "plain", save)
    whole = trained_weights(arguments, tmp_path, "whole", options)
    name = "au_adapter.to_v_au.weight"
    half = [read_tensors(tmp_path / run / "checkpoint-2" / PARAMETERS_NAME)[name] for run in ("plain", "whole")]
    assert torch.equal(*half) and not torch.equal(plain[name], whole[name])
    shutil.rmtree(tmp_path / "whole/checkpoint-4")
    with pytest.raises(ValueError, match="`--au_feedback_meter` is None, but '.*' was trained with 'test_feedback:"):
        train_fineface.main(arguments("whole", f"{save} --resume_from_checkpoint latest"))
    parts = trained_weights(arguments, tmp_path, "whole", f"{options} --resume_from_checkpoint latest")
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


@pytest.mark.parametrize("options", ["--cache_latents --mixed_precision bf16 --gradient_checkpointing"])
def test_feedback_works_with_what_saves_memory(arguments, tmp_path, options):
    options += f" --checkpointing_steps 4 {FEEDBACK} --au_feedback_backprop 1 --au_feedback_batch_size 1"
    weights = trained_weights(arguments, tmp_path, "run", options)
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_run_goes_on_from_an_adapter(arguments, tmp_path):
    train_fineface.main(arguments("first"))
    config = parse_args(arguments("second", f"--adapter_name_or_path {tmp_path / 'first'}"))
    model = train_fineface.make_model(make_components()["unet"], config)
    saved = read_tensors(tmp_path / "first" / "au_attn_processors.safetensors")
    kept = model.au_adapter.attn_processors_state_dict()
    assert all(torch.equal(kept[key], saved[key]) for key in saved)
    assert any(p.any() for name, p in model.trained_parameters().items() if "lora_B" in name)
    with pytest.raises(ValueError, match="has the AUs AU1, AU2, .* but the data have AU1, AU4"):
        train_fineface.make_model(make_components()["unet"], config, au_names=["AU1", "AU4"])
