"""What the benchmarks compare is the same thing, what they promise about cost holds, and their tables print."""

import re
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import make_components, make_xl_components, shorten
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextModel

from au_attention_processor import au_layers
from benchmarks import bench_inference, bench_loading, bench_training
from benchmarks.pipelines import ARCHITECTURES, ROWS, SD21, Variant, make_row, random_components, text_encoder
from benchmarks.tables import markdown_table, run_benchmark


ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
DRAWING = {"output_type": "pt", "height": 32, "width": 32}
# The paper's AU encoder fits into a token of this width.
WIDTH = 128
KINDS = {
    "convolutions": ("conv",),
    "attention": ("scaled_dot_product", "_scaled_dot_product", "softmax", "_softmax", "bmm"),
    "linear layers": ("linear", "addmm", "mm"),
    "normalization": ("native_group_norm", "native_layer_norm"),
    "activations": ("silu", "gelu"),
    "additions and products": ("add", "sub", "mul", "div"),
}
"""Operations by the beginnings of their names."""


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
    components["unet"] = shorten(components["unet"])
    return {k: v.to(device, dtype) if isinstance(v, torch.nn.Module) else v for k, v in components.items()}


def make_unet() -> UNet2DConditionModel:
    return make_components(cross_attention_dim=WIDTH)["unet"]


@pytest.fixture
def make():
    """Makes the variant of a row on one set of weights."""
    components = components_on(CPU)
    return lambda row: make_row(row, components, lora_rank=4)


def draw(variant: Variant) -> torch.Tensor:
    return variant(2, 2, **DRAWING)


@pytest.mark.parametrize("row", ["lora-fused", "lora-baked", "textbook"])
def test_rows_with_a_lora_draw_the_same(make, row):
    """So their times are the prices of one and the same picture."""
    ours = draw(make("lora"))
    torch.testing.assert_close(draw(make(row)), ours, rtol=1e-4, atol=1e-4)


def test_rows_differ_where_they_should(make):
    """The two tests above would also pass if AUs and LoRA had no influence."""
    pictures = {row: draw(make(row)) for row in ("plain", "one-token", "lora", "attention-4", "third-branch")}
    names = list(pictures)
    for first, second in ((a, b) for a in names for b in names if a < b):
        assert not torch.allclose(pictures[first], pictures[second], atol=1e-3), (first, second)


def test_variants_share_weights_and_leave_them_alone(make):
    before = draw(make("plain"))
    variants = [make(row) for row in ROWS]
    assert torch.equal(draw(variants[0]), before)
    pointers = {c.pipeline.vae.decoder.conv_in.weight.data_ptr() for c in variants}
    assert len(pointers) == 1


def test_random_weights_draw_the_same_finite_picture():
    """Infinite numbers, or memory that nobody has written, may take another time."""
    tiny = make_components(cross_attention_dim=WIDTH)
    makers = {name: partial(type(tiny[name]).from_config, tiny[name].config) for name in ("unet", "vae")}
    makers["text_encoder"] = text_encoder(CLIPTextModel, WIDTH, 2, 2)
    first, second = (draw(make_row("lora", random_components(makers, CPU, torch.float32))) for _ in range(2))
    assert torch.equal(first, second) and first.isfinite().all() and first.std() > 0


def test_a_step_of_xl_multiplies_nothing_more_either():
    components = make_xl_components(cross_attention_dim=WIDTH)
    components["unet"] = shorten(components["unet"])
    components = {k: v.to("meta") if isinstance(v, torch.nn.Module) else v for k, v in components.items()}
    rows = ("plain", "one-token", "lora", "plain-aus", "ip-plain", "ip", "third-branch", "textbook")
    counts = {row: bench_inference.step_flops(make_row(row, components, lora_rank=4), 1) for row in rows}
    assert 0 < counts["plain"] == counts["one-token"] < counts["plain-aus"] < counts["lora"] < counts["textbook"]
    assert counts["ip"] == counts["ip-plain"] and counts["third-branch"] == 1.5 * counts["plain"]


# --------------------------------------------------------------------------------------------------------------------
# Cost that can be counted instead of timed
# --------------------------------------------------------------------------------------------------------------------


def test_a_step_multiplies_nothing_more_than_plain():
    components = components_on(torch.device("meta"))
    counts = {row: bench_inference.step_flops(make_row(row, components, lora_rank=4), 1) for row in ROWS}
    assert counts["plain"] > 0
    for row in ("one-token", "lora-baked", "lora-fused"):
        assert counts[row] == counts["plain"]
    assert counts["ip"] == counts["ip-plain"]
    for row in ("lora", "attention-4", "textbook", "plain-aus"):
        assert counts[row] > counts["plain"]
    assert counts["attention-16"] > counts["attention-4"]
    assert counts["third-branch"] == pytest.approx(1.5 * counts["plain"], rel=0.02)


def test_a_step_adds_one_vector_in_each_cross_attention_layer(make):
    def operations(variant) -> dict[str, int]:
        """Calls of operations in one step: those of three steps less those of two."""
        calls = Counter()
        for steps, sign in ((3, 1), (2, -1)):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                variant(1, steps, output_type="latent", height=32, width=32)
            for event in profiler.key_averages():
                calls[event.key] += sign * event.count
        return {
            kind: sum(count for name, count in calls.items() if any(f"aten::{part}" in name for part in parts))
            for kind, parts in KINDS.items()
        }

    plain, ours = operations(make("plain")), operations(make("one-token"))
    for kind in ("convolutions", "attention", "linear layers", "normalization", "activations"):
        assert ours[kind] == plain[kind] > 0, kind
    layers = len(au_layers(make("plain").pipeline.unet))
    assert ours["additions and products"] - plain["additions and products"] == layers


# --------------------------------------------------------------------------------------------------------------------
# torch.compile
# --------------------------------------------------------------------------------------------------------------------


class CountingBackend:
    """A backend that counts what it gets to compile, and runs it as it is."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph_module, example_inputs):
        self.graphs += 1
        return graph_module.forward


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield CountingBackend()
    torch._dynamo.reset()


@pytest.mark.slow
def test_an_ip_adapter_beside_it_compiles_once(make, compiler):
    variant = make("ip")
    variant.pipeline.unet.compile(backend=compiler, fullgraph=True)
    for aus in ("12E", "AU4=3", "1B+2B"):
        variant.kwargs["aus"] = aus
        draw(variant)
    assert compiler.graphs == 1


@pytest.mark.gpu
@pytest.mark.parametrize("row", ["one-token", "lora-fused", "lora"])
def test_cuda_graphs_replay_with_new_aus(row, compiler):
    device = torch.accelerator.current_accelerator()
    variant = make_row(row, components_on(device), lora_rank=4)
    expressions = ("12E", "AU4=3", "1B+2B", "12E")

    def pictures():
        drawn = []
        for aus in expressions:
            variant.kwargs["aus"] = aus
            drawn.append(draw(variant).clone())
        return drawn

    eager = pictures()
    variant.pipeline.unet.compile(mode="reduce-overhead", fullgraph=True)
    for ours, theirs in zip(pictures(), eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


# --------------------------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------------------------

# 60 MiB of adapter: far more than what loading needs for anything else.
WIDE_UNET = partial(
    UNet2DConditionModel,
    block_out_channels=(1024, 1024),
    layers_per_block=1,
    cross_attention_dim=1024,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read from /proc")
def test_loading_an_adapter_holds_no_second_copy(tmp_path):
    bench_loading.write_adapter(tmp_path, WIDE_UNET)
    components = bench_loading.make_components(WIDE_UNET, CPU, torch.float32)
    _, _, stays, peak = bench_loading.time_loading(components, tmp_path, repeats=1)
    assert stays > 40 * 2**20
    assert 0.8 * stays < peak < 1.25 * stays


def test_peak_growth_sees_a_second_copy():
    """The measure of the test above."""
    if not Path("/proc/self/statm").is_file():
        pytest.skip("memory is read from /proc")
    # Large beside the free memory of the process, which is used first.
    size = 200 * 2**20
    kept = []

    def work() -> None:
        kept.append(torch.ones(size // 4))
        kept.append(kept[0].clone())
        # On a busy machine, the thread that watches the memory may be late.
        time.sleep(20 * bench_loading.SAMPLING_INTERVAL)
        kept.clear()

    assert bench_loading.peak_growth(CPU, work) > 1.8 * size


def test_importing_the_pipeline_imports_nothing_heavy(processes):
    code = "import sys; before = set(sys.modules); import pipeline_fineface; print(*set(sys.modules) - before)"
    (answer,) = processes({"code": code, "path": [ROOT], "bare": True})
    assert answer["status"] == 0, answer
    new = answer["output"].split()
    assert "pipeline_fineface" in new
    known = {"pipeline_fineface", "action_units", "au_attention_processor", "au_encoder", "au_pipeline_mixin"}
    others = {name.partition(".")[0] for name in new} - known - set(sys.stdlib_module_names)
    # These two are installed with diffusers, and small.
    assert others <= {"diffusers", "safetensors", "numpy"}


# --------------------------------------------------------------------------------------------------------------------
# The tables
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_architecture(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "toy", ("a tiny model", components_on))


def test_the_table_of_inference(tiny_architecture, tmp_path, capsys):
    output = tmp_path / "new" / "inference.md"
    bench_inference.main(
        ["--device", "cpu", "--batch-sizes", "2", "--steps", "2", "--repeats", "2", "--output", str(output)]
    )
    printed = capsys.readouterr().out
    assert output.read_text().split() == printed.split()
    assert f"torch {torch.__version__.split('+')[0]}" in printed
    ((header, *rows),) = read_tables(printed)
    assert [row[0] for row in rows] == [row.label for row in ROWS.values()]
    assert header[3] == "ratio" and rows[0][3] == "1.000"
    for label, call, step, ratio, spread, _ in rows:
        low, high = map(float, spread.split(" – "))
        assert low <= float(ratio) <= high, label
        assert 0 < float(step) < float(call)


def test_the_count_runs_on_no_device(monkeypatch, capsys):
    monkeypatch.setitem(ARCHITECTURES, "sd15", ("tiny", components_on))
    bench_inference.main(["--count", "--models", "sd15", "--batch-sizes", "1", "3", "--rows", "one-token", "ip"])
    one, three = read_tables(capsys.readouterr().out)
    assert [row[0] for row in one[1:]] == [ROWS[row].label for row in ("plain", "one-token", "ip-plain", "ip")]
    assert [row[2] for row in one[1:]] == [row[2] for row in three[1:]]
    assert one[2][2] == one[4][2] == "1.00000"


def test_a_folded_adapter_is_small(tmp_path):
    bench_loading.write_adapter(tmp_path / "trained", make_unet)
    sizes = [bench_loading.export_as(form, tmp_path / "trained")[1] for form in bench_loading.FORMS]
    assert sizes[1] < sizes[0] / 2 and sizes[2] > sizes[1]


def test_the_table_of_loading(monkeypatch, capsys):
    monkeypatch.setitem(SD21, "unet", make_unet)
    bench_loading.main(["--device", "cpu", "--repeats", "1"])
    ((_, *rows),) = read_tables(capsys.readouterr().out)
    expected = [f"{form}, {dtype} UNet" for form in bench_loading.FORMS for dtype in ("float32", "float16")]
    assert [row[0] for row in rows] == expected
    # As many numbers, half as many bytes.
    assert float(rows[1][4]) == pytest.approx(float(rows[0][4]) / 2, abs=0.1)


def test_the_table_of_training(tiny_architecture, monkeypatch, capsys):
    monkeypatch.setattr(bench_training, "PICTURES", 4)
    rows = ["textbook", "one-token", "cached"]
    steps = ["--batch-size", "2", "--warm-up", "1", "--steps", "2"]
    assert bench_training.main(["--device", "cpu", *steps, "--rows", *rows]) == 0
    ((header, *measured),) = read_tables(capsys.readouterr().out)
    assert [row[0] for row in measured] == [bench_training.ROWS[row][0] for row in rows]
    assert header[1] == "images/s" and all(float(row[1]) > 0 for row in measured)


def test_a_benchmark_that_stops_leaves_its_tables(tmp_path, capsys):
    def tables(args):
        assert args.device == CPU and args.steps == 3 and args.rounds == 2
        yield markdown_table({"a": "{}", "b": "{:.0f}"}, [("c", 1.2), ("d", float("nan"))])
        raise ValueError("stopped")

    options = {"--steps": {"type": int, "default": (3, 5)}, "--rounds": {"type": int, "default": (4, 5)}}
    argv = ["--device", "cpu", "--output", str(tmp_path / "report.md"), "--rounds", "2"]
    assert run_benchmark("benchmarks.none", "", options, tables, argv) == 2
    assert (tmp_path / "report.md").read_text().endswith("\n\n| a | b |\n| --- | ---: |\n| c | 1 |\n| d | – |\n")
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"] and "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (bench_training, ["--rows", "magic"], "magic"),
        (bench_inference, ["--device", "abacus"], "abacus"),
        (bench_inference, ["--batch-sizes", "0"], "from 1 on"),
        (bench_loading, ["--repeats", "none"], "from 1 on"),
    ],
)
def test_wrong_arguments_end_before_any_model(program, arguments, message, capsys):
    assert program.main(arguments) == 2
    assert message in capsys.readouterr().err
