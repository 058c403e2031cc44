"""What the benchmarks compare is the same thing, what they promise about cost holds, and their tables print."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import add_lora, make_adapter, make_components

from au_attention_processor import au_layers
from benchmarks import bench_batch, bench_inference, bench_loading, few_steps, tables
from benchmarks.bench_inference import ROWS, Contender, Stand
from benchmarks.few_steps import Result, ResultFile, Setting, choose, near_best, pareto
from benchmarks.tables import Report, markdown_table
from drawing.jobs import MODEL_DEFAULTS_NAME, read_model_defaults
from pipeline_fineface import LORA_NAME, FineFacePipeline
from program import TOY_MODEL


ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
DRAWING = {"output_type": "pt", "height": 32, "width": 32}
# The paper's AU encoder fits into a token of this width.
WIDTH = 128


def read_tables(text: str) -> list[list[list[str]]]:
    """The cells of each Markdown table in `text`, without the line under the header."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    split = [[[cell.strip() for cell in line.strip("|").split("|")] for line in t.splitlines()] for t in found]
    return [[header, *rows] for header, _, *rows in split]


# --------------------------------------------------------------------------------------------------------------------
# What is compared
# --------------------------------------------------------------------------------------------------------------------


def components_on(device: torch.device, dtype: torch.dtype = torch.float32) -> dict:
    components = make_components(cross_attention_dim=WIDTH)
    return {k: v.to(device, dtype) if isinstance(v, torch.nn.Module) else v for k, v in components.items()}


@pytest.fixture
def stand() -> Stand:
    return Stand(components_on(CPU), lora_rank=4)


def draw(contender: Contender) -> torch.Tensor:
    return contender(2, 2, **DRAWING)


@pytest.mark.parametrize("row", ["lora-fused", "lora-baked", "textbook"])
def test_rows_with_a_lora_draw_the_same(stand, row):
    """So their times are the prices of one and the same picture."""
    ours = draw(stand.make("lora"))
    torch.testing.assert_close(draw(stand.make(row)), ours, rtol=1e-4, atol=1e-4)


def test_the_general_attention_draws_the_same(stand):
    torch.testing.assert_close(draw(stand.make("attention-1")), draw(stand.make("one-token")), rtol=1e-4, atol=1e-4)


def test_rows_differ_where_they_should(stand):
    """The two tests above would also pass if AUs and LoRA had no influence."""
    pictures = {row: draw(stand.make(row)) for row in ("plain", "one-token", "lora", "attention-4", "third-branch")}
    names = list(pictures)
    for first, second in ((a, b) for a in names for b in names if a < b):
        assert not torch.allclose(pictures[first], pictures[second], atol=1e-3), (first, second)


def test_contenders_share_weights_and_leave_them_alone(stand):
    before = draw(stand.make("plain"))
    contenders = [stand.make(row) for row in ROWS]
    assert torch.equal(draw(contenders[0]), before)
    pointers = {c.pipeline.vae.decoder.conv_in.weight.data_ptr() for c in contenders}
    assert len(pointers) == 1


def test_every_row_has_its_baseline():
    assert bench_inference.parse_args(["--device", "cpu", "--rows", "ip"]).rows == ["plain", "ip-plain", "ip"]


# --------------------------------------------------------------------------------------------------------------------
# Cost that can be counted instead of timed
# --------------------------------------------------------------------------------------------------------------------


def test_a_step_multiplies_nothing_more_than_plain():
    stand = Stand(components_on(torch.device("meta")), lora_rank=4)
    counts = {row: bench_inference.step_flops(stand.make(row), 1) for row in ROWS}
    assert counts["plain"] > 0
    for row in ("one-token", "lora-baked", "lora-fused"):
        assert counts[row] == counts["plain"]
    assert counts["ip"] == counts["ip-plain"]
    for row in ("lora", "attention-1", "textbook"):
        assert counts[row] > counts["plain"]
    assert counts["attention-16"] > counts["attention-4"]
    assert counts["third-branch"] == pytest.approx(1.5 * counts["plain"], rel=0.02)


def test_a_step_adds_one_vector_in_each_cross_attention_layer(stand):
    def operations(contender):
        shares, _ = bench_inference.profile_step(contender, 1, CPU, height=32, width=32)
        return {kind: share.calls for kind, share in shares.items()}

    plain, ours = operations(stand.make("plain")), operations(stand.make("one-token"))
    for kind in ("convolutions", "attention", "linear layers", "normalization", "activations"):
        assert ours[kind] == plain[kind] > 0, kind
    layers = len(au_layers(stand.components["unet"]))
    assert ours["additions and products"] - plain["additions and products"] == layers


# --------------------------------------------------------------------------------------------------------------------
# torch.compile
# --------------------------------------------------------------------------------------------------------------------


class Counter:
    """A backend that counts what it gets to compile, and runs it as it is."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph_module, example_inputs):
        self.graphs += 1
        return graph_module.forward


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield Counter()
    torch._dynamo.reset()


VARIATIONS = (
    {"aus": {"AU1": 3, "AU4": 2}},
    {"aus": "12E", "au_scale": 0.5},
    {"aus": "12E", "au_scale": 1.7},
    {"aus": "12E", "au_scale": 0},
    {"aus": None},
    {"aus": {}},
    {"aus": "6C", "negative_aus": "4D"},
    {"aus": "6C", "guidance_scale": 3.0},
    {"aus": "6C", "num_inference_steps": 3},
)


@pytest.mark.parametrize(
    "kind",
    [
        "one token and its LoRA",
        "four tokens",
        pytest.param("LoRA fused", marks=pytest.mark.slow),
        pytest.param("masks", marks=pytest.mark.slow),
    ],
)
def test_one_compilation_serves_all_calls(kind, tiny_components, compiler):
    unet = tiny_components["unet"]
    adapter = make_adapter(unet, num_tokens=4 if kind == "four tokens" else 1)
    pipeline = FineFacePipeline(**tiny_components, requires_safety_checker=False, au_adapter=adapter)
    add_lora(unet, LORA_NAME)
    if kind == "LoRA fused":
        pipeline.fuse_lora(components=["unet"])
    pipeline.set_progress_bar_config(disable=True)
    masks = {"au_masks": torch.ones(1, 32, 32)} if kind == "masks" else {}

    def call(prompt, aus, **kwargs):
        generator = torch.Generator().manual_seed(0)
        aus, with_masks = ([aus], masks) if masks and aus is not None else (aus, {})
        kwargs = {"num_inference_steps": 2, "output_type": "latent"} | with_masks | kwargs
        return pipeline(prompt, aus=aus, generator=generator, **kwargs).images

    variations = [v for v in VARIATIONS if not masks or (v["aus"] is not None and "negative_aus" not in v)]
    prompts = ["a boy in a park", "a girl", "an old man with a beard"]
    calls = [(prompts[i % 3], variation) for i, variation in enumerate(variations)]
    eager = [call(prompt, **variation) for prompt, variation in calls]
    # A graph break would be an error.
    unet.compile(backend=compiler, fullgraph=True)
    compiled = [call(prompt, **variation) for prompt, variation in calls]
    assert compiler.graphs == 1
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_ip_adapter_beside_it_compiles_once(stand, compiler):
    contender = stand.make("ip")
    contender.pipeline.unet.compile(backend=compiler, fullgraph=True)
    for aus in ("12E", "AU4=3", "1B+2B"):
        contender.kwargs["aus"] = aus
        draw(contender)
    assert compiler.graphs == 1


@pytest.mark.gpu
@pytest.mark.parametrize("row", ["one-token", "lora-fused", "lora"])
def test_cuda_graphs_replay_with_new_aus(row, compiler):
    device = torch.accelerator.current_accelerator()
    contender = Stand(components_on(device), lora_rank=4).make(row)
    expressions = ("12E", "AU4=3", "1B+2B", "12E")

    def pictures():
        drawn = []
        for aus in expressions:
            contender.kwargs["aus"] = aus
            drawn.append(draw(contender).clone())
        return drawn

    eager = pictures()
    contender.pipeline.unet.compile(mode="reduce-overhead", fullgraph=True)
    for ours, theirs in zip(pictures(), eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


# --------------------------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------------------------

# 60 MiB of adapter: far more than what loading needs for anything else.
WIDE_UNET = {
    "block_out_channels": (1024, 1024),
    "layers_per_block": 1,
    "cross_attention_dim": 1024,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read from /proc")
def test_loading_an_adapter_holds_no_second_copy(tmp_path):
    bench_loading.write_adapter(tmp_path, WIDE_UNET, torch.float32)
    pipeline = bench_loading.make_pipeline(WIDE_UNET, CPU, torch.float32)
    _, peak = bench_loading.time_loading(pipeline, tmp_path, repeats=1)
    stays = bench_loading.adapter_bytes(pipeline)
    assert stays > 40 * 2**20
    assert 0.8 * stays < peak < 1.25 * stays


def test_peak_growth_sees_a_second_copy():
    """The measure of the test above."""
    if not Path("/proc/self/statm").is_file():
        pytest.skip("memory is read from /proc")
    size = 40 * 2**20
    with bench_loading.peak_growth(CPU) as growth:
        first = torch.ones(size // 4)
        second = first.clone()
        assert growth() > 1.8 * size
    del first, second


def test_importing_the_pipeline_imports_nothing_heavy():
    code = (
        "import sys; from diffusers import StableDiffusionPipeline; before = set(sys.modules);"
        "import pipeline_fineface; print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    new = result.stdout.splitlines()[-1].split()
    known = {"pipeline_fineface", "action_units", "au_attention_processor", "au_encoder"}
    others = {name.partition(".")[0] for name in new} - known - set(sys.stdlib_module_names)
    # These two are installed with diffusers, and small.
    assert others <= {"diffusers", "safetensors", "numpy"}


# --------------------------------------------------------------------------------------------------------------------
# The tables
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_architecture(monkeypatch):
    tiny = bench_inference.Architecture("a tiny model", components_on, lambda: 4)
    monkeypatch.setitem(bench_inference.ARCHITECTURES, "toy", tiny)


def test_the_table_of_inference(tiny_architecture, tmp_path, capsys):
    output = tmp_path / "new" / "inference.md"
    bench_inference.main(
        ["--device", "cpu", "--batch-sizes", "2", "--steps", "2", "--repeats", "2", "--output", str(output)]
    )
    printed = capsys.readouterr().out
    assert output.read_text().split() == printed.split()
    assert f"torch {torch.__version__.split('+')[0]}" in printed
    ((header, *rows),) = read_tables(printed)
    assert [row[0] for row in rows] == [label for label, _ in ROWS.values()]
    assert header[3] == "ratio" and rows[0][3] == "1.000"
    for label, call, step, ratio, spread, peak, weights in rows:
        low, high = map(float, spread.split(" – "))
        assert low <= float(ratio) <= high, label
        assert 0 < float(step) < float(call)
        assert float(weights) < float(peak)


def test_the_count_runs_on_no_device(monkeypatch, capsys):
    monkeypatch.setitem(bench_inference.ARCHITECTURES, "sd15", bench_inference.Architecture("tiny", components_on))
    bench_inference.main(["--count", "--models", "sd15", "--batch-sizes", "1", "3", "--rows", "one-token", "ip"])
    one, three = read_tables(capsys.readouterr().out)
    assert [row[0] for row in one[1:]] == [ROWS[row][0] for row in ("plain", "one-token", "ip-plain", "ip")]
    assert [row[2] for row in one[1:]] == [row[2] for row in three[1:]]
    assert one[2][2] == one[4][2] == "1.00000"


def test_a_table_without_time_for_it_is_named(tiny_architecture, capsys):
    bench_inference.main(["--device", "cpu", "--max-minutes", "0", "--batch-sizes", "1"])
    assert "Not measured, for want of time: a tiny model, float32, batch 1, eager." in capsys.readouterr().out


def test_the_profile_adds_up(tiny_architecture, capsys):
    bench_inference.main(["--device", "cpu", "--profile", "--batch-sizes", "1", "--steps", "2"])
    operations, parts = read_tables(capsys.readouterr().out)
    for column in (1, 3):
        calls = [int(row[column]) for row in operations[1:] if row[column]]
        assert sum(calls[:-1]) == calls[-1]
    for column in (2, 4):
        milliseconds = [float(row[column]) for row in operations[1:]]
        assert sum(milliseconds[:-1]) == pytest.approx(milliseconds[-1], abs=0.1)
    milliseconds = [float(row[1]) for row in parts[1:]]
    assert sum(milliseconds[:-1]) == pytest.approx(milliseconds[-1], abs=0.5)


def test_the_table_of_a_batch(tiny_sd_dir, tiny_adapter_dir, tmp_path, capsys):
    model = tmp_path / "model"
    pipeline = FineFacePipeline.from_pretrained(tiny_sd_dir)
    pipeline.load_au_adapter(tiny_adapter_dir)
    pipeline.save_pretrained(model)
    arguments = ["--batch-size", "2", "--batches", "2", "--steps", "1", "--repeats", "2", "--device", "cpu"]
    bench_batch.main(["--model", str(model), *arguments])
    printed = capsys.readouterr().out
    (table,) = read_tables(printed)
    assert "4 pictures in batches of 2" in printed
    assert [row[0] for row in table[1:]] == ["bare loop", "`generate.py --batch`"]
    assert float(table[2][1]) > 0


def test_pictures_per_second_leaves_the_first_batch_out():
    assert bench_batch.pictures_per_second([100.0, 100.0, 104.0, 104.0, 106.0, 106.0], 2) == pytest.approx(4 / 6)


def test_the_tables_of_loading(monkeypatch, capsys):
    monkeypatch.setattr(bench_loading, "IMPORTS", ("import json", "import argparse"))
    unet_config = dict(make_components(cross_attention_dim=WIDTH)["unet"].config)
    bench_loading.main(["--device", "cpu", "--repeats", "1"], unet_config)
    loading, imports = read_tables(capsys.readouterr().out)
    assert [row[0].split(":")[0] for row in loading[1:]] == ["`load_au_adapter`, float32 UNet"] * 2 + [
        "`load_au_adapter`, float16 UNet"
    ] * 2
    # As many numbers, half as many bytes.
    assert float(loading[3][2]) == pytest.approx(float(loading[1][2]) / 2, abs=0.1)
    assert [row[0] for row in imports[1:]] == ["`import json`", "`import argparse`"]


def test_markdown_and_an_unwritable_report(tmp_path):
    assert markdown_table(["a", "b"], [["c", "1"]]) == "| a | b |\n| --- | ---: |\n| c | 1 |"
    report = Report(tmp_path / "report.md", CPU)
    report.add("one")
    report.add("two")
    assert (tmp_path / "report.md").read_text().endswith("one\n\ntwo\n")
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_tables_go_into_a_document(tmp_path, capsys):
    (tmp_path / "cost.md").write_text("new\n")
    document = tmp_path / "docs.markdown"
    document.write_text("before\n<!-- cost -->\nold\n<!-- /cost -->\nafter\n")
    for _ in range(2):
        tables.main([str(tmp_path), str(document)])
        assert document.read_text() == "before\n<!-- cost -->\n\nnew\n\n<!-- /cost -->\nafter\n"
    (tmp_path / "other.md").write_text("nowhere to go\n")
    with pytest.raises(SystemExit):
        tables.main([str(tmp_path), str(document)])
    assert "<!-- other -->" in capsys.readouterr().err
    assert "new" in document.read_text()


def test_the_document_has_a_place_for_what_make_bench_writes():
    document = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    names = ("inference", "batches", "profile", "many", "loading")
    filled = tables.fill_in(document, dict.fromkeys(names, "| a table |"))
    assert filled.count("| a table |") == len(names)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (bench_inference, ["--resolution", "100"], "multiple of 8"),
        (bench_inference, ["--device", "abacus"], "abacus"),
        (bench_inference, ["--batch-sizes", "0"], "from 1 on"),
        (bench_batch, ["--batches", "1"], "2 or more"),
        (few_steps, ["--model", "nowhere"], "without a meter/"),
        (tables, ["nowhere", "README.md"], "no .md file"),
    ],
)
def test_wrong_arguments_end_before_any_model(program, arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        program.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# Few steps
# --------------------------------------------------------------------------------------------------------------------


def make_result(sampler="ddim", steps=4, seconds=1.0, au_mse=1.0, attributes=0.9, sharpness=0.9) -> Result:
    return Result(Setting(sampler, steps, 2.0, 3.0), au_mse, 0.5, attributes, sharpness, seconds)


def test_choosing_takes_the_fastest_of_the_good():
    slow = make_result(steps=20, seconds=3.0, au_mse=0.5)
    exact = make_result(steps=8, seconds=0.8, au_mse=1.0)
    near = make_result(steps=6, seconds=0.6, au_mse=1.04)
    inexact = make_result(steps=4, seconds=0.4, au_mse=1.1)
    careless = make_result("euler", steps=4, seconds=0.4, au_mse=0.9, attributes=0.7)
    blurred = make_result("euler", steps=2, seconds=0.2, au_mse=0.8, sharpness=0.6)
    results = [slow, exact, near, inexact, careless, blurred]
    assert choose(results, 1.0) == near
    assert choose(results, 5.0) == slow
    assert choose(results, 0.1) == blurred
    assert near_best(results, 1.0, tolerance=3) == [inexact, near, exact]
    assert pareto(results) == [blurred, slow]
    assert few_steps.finalists(results, 1.0, "euler") == [r.setting for r in (near, blurred, exact, inexact)]


def test_results_are_read_back_under_the_same_conditions_only(tmp_path):
    path, result = tmp_path / "results.csv", make_result()
    without = Result(Setting("euler", 3, 1.5, None), 0.25, 0.5, 1.0, 0.75, 2.0)
    conditions = {"weights": "abc", "pictures": "2"}
    file = ResultFile(path, conditions)
    file.add(result)
    file.add(without)
    with open(path, "a") as stream:
        stream.write("abc,2,ddim,9,2")  # a run was killed here
    again = ResultFile(path, conditions)
    assert again.results == {result.setting: result, without.setting: without}
    assert ResultFile(path, conditions | {"weights": "other"}).results == {}
    with pytest.raises(ValueError, match="other columns"):
        ResultFile(path, {"colour": "red"})


def test_few_steps_recommends_what_generate_reads(tmp_path, capsys, monkeypatch):
    arguments = ["--samplers", "ddim", "dpmsolver++", "--steps", "1", "2", "--pictures", "2", "--final-pictures", "3"]
    arguments += ["--guidance-scales", "2", "--au-guidance-scales", "none", "4", "--max-seconds", "60", "--choose"]
    arguments += ["--output", str(tmp_path / "results.csv"), "--sheet", str(tmp_path / "sheet.png")]
    few_steps.main(arguments)
    printed = capsys.readouterr().out
    assert (tmp_path / "sheet.png").is_file()
    recommended = [json.loads(text) for text in re.findall(r"^fineface.json: (.*)$", printed, flags=re.MULTILINE)]
    (tmp_path / MODEL_DEFAULTS_NAME).write_text(json.dumps(recommended[0]))
    defaults = read_model_defaults(str(tmp_path))
    assert defaults["num_inference_steps"] in (1, 2)
    assert defaults["height"] == read_model_defaults(str(TOY_MODEL))["height"]

    measured = (tmp_path / "results.csv").read_text()
    monkeypatch.setattr(few_steps.Sweep, "measure", lambda *_: pytest.fail("this is in the file"))
    few_steps.main(arguments[: arguments.index("--sheet")])
    assert (tmp_path / "results.csv").read_text() == measured
    assert read_tables(capsys.readouterr().out) == read_tables(printed)
