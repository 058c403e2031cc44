# SPDX-License-Identifier: Apache-2.0
"""
Repeats the paper's Tables 1–3 and Fig. 7 on the toy world, and sets the results beside the paper's own numbers:

  python -m paper.tables --quick      # two cores, within an hour
  python -m paper.tables --full       # a GPU; accelerate launch splits it over several

It trains the systems that are missing, evaluates each of them by `evaluation.run`, and writes docs/results.md, whose
section on trials it keeps. A run that was stopped goes on when the same command runs again.
"""

import argparse
import functools
import itertools
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from action_units import AU_NAMES
from drawing.contact_sheet import Table
from drawing.files import write_png
from evaluation import figures
from evaluation.image_encoders import make_image_encoder
from evaluation.meters import ToolError, read_picture
from evaluation.metrics import Figure, bootstrap
from evaluation.report import markdown_table
from evaluation.run import PAPER_PARTS
from evaluation.testset import INTENSITIES, TOY_PROMPTS, Item, Prompt, read_prompts
from paper.experiment import BUDGETS, METER, SAMPLED, Experiment
from paper.workers import default_processes, run_jobs
from program import TOY_MODEL, Parser, check_integer, check_output, run_program, write_atomically


DOCS = Path(__file__).resolve().parent.parent / "docs"
TRIALS_HEADING = "\n## Trials\n"


@dataclass(frozen=True)
class Method:
    """A row of a table: the paper's four numbers, and how our system is trained and evaluated."""

    label: str
    paper: tuple[float, float, float, float]
    """AU MSE and CLIP-I of single AUs, AU MSE and CLIP-I of combinations."""
    name: str
    train: dict = field(default_factory=dict)
    system: str = "fineface"
    parts: tuple[str, ...] = PAPER_PARTS


OURS = Method("FineFace (Res + MLP64)", (4.71, 0.92, 7.54, 0.83), "fineface", parts=(*PAPER_PARTS, "extrapolation"))
"""The paper's design. All three tables have it, and Fig. 8 shows it beyond [0, 5]."""
LORA_T = Method("LoRA-T", (7.45, 0.91, 9.06, 0.86), "lora_t", system="lora_t")
NO_SMOOTHING = {"au_noise_variance": 0.0, "au_rounding_prob": 0.0}
TABLE1 = "Table 1: other systems"
TABLES = {
    TABLE1: (
        Method("SD (AUs as text)", (6.98, 0.80, 8.90, 0.71), "sd", system="sd"),
        # A whole UNet has to be moved more carefully than a LoRA.
        Method("DB", (7.19, 0.87, 8.78, 0.80), "dreambooth", {"learning_rate": 1e-4}, "dreambooth"),
        LORA_T,
        Method("LoRA-AU", (6.82, 0.98, 8.74, 0.91), "lora_au", system="lora_au"),
        OURS,
    ),
    "Table 2: AU encoders": (
        Method("No encoding", (4.72, 0.94, 7.64, 0.86), "encoder_none", {"encoder_type": "none"}),
        Method("MLP", (4.79, 0.86, 7.60, 0.76), "encoder_mlp", {"encoder_type": "mlp"}),
        Method("Res + MLP", (4.77, 0.84, 7.61, 0.74), "encoder_res_mlp", {"encoder_type": "res_mlp"}),
        OURS,
        Method("Res + 3MLP", (4.97, 0.91, 7.70, 0.83), "encoder_res_3mlp", {"encoder_type": "res_3mlp"}),
        Method("Individual + MLP", (5.48, 0.85, 7.97, 0.70), "encoder_individual", {"encoder_type": "individual"}),
    ),
    "Table 3: label smoothing": (
        Method("without", (4.81, 0.81, 7.64, 0.72), "no_smoothing", NO_SMOOTHING),
        OURS,
    ),
}
METHODS = {method.name: method for methods in TABLES.values() for method in methods}
COLUMNS = (
    ("AU MSE, single ↓", "au_mse", "single", False),
    ("CLIP-I, single", "clip_i", "single", True),
    ("AU MSE, combinations ↓", "au_mse", "combination", False),
    ("CLIP-I, combinations", "clip_i", "combination", True),
)
"""Heading, metric, part, and whether a higher value is better."""


# ---- Making ---------------------------------------------------------------------------------------------------------


def make(experiment: Experiment, method: Method) -> None:
    """Train a method, if it is not trained yet, and evaluate it."""
    adapter = None
    if method.system == "fineface":
        adapter = experiment.train_fineface(method.name, **method.train)
    elif method.system != "sd":
        adapter = experiment.train_baseline(method.name, method.system, **method.train)
    experiment.evaluate(method.name, adapter, method.system, parts=method.parts)


FACES = 4
"""Image prompts of Fig. 7."""
FIGURE7_RUNS = {"image_prompt": "with the IP-Adapter", "no_image_prompt": "without"}


def make_image_prompts(experiment: Experiment) -> tuple[Path, Path, list[str]]:
    """
    Render portraits of people whom no model was trained on. Returns their folder, the file of their prompts, and
    captions of all that they show.
    """
    from toy_faces.pictures import UNSEEN
    from toy_faces.renderer import caption, render, sample_portrait

    folder = experiment.folder / "image_prompts"
    prompts = folder / "prompts.csv"
    portraits = [sample_portrait(UNSEEN + 7_000 + number) for number in range(FACES)]
    with PartialState().main_process_first():
        if not prompts.exists():
            folder.mkdir(parents=True, exist_ok=True)
            rows = ["prompt,seed"]
            for number, portrait in enumerate(portraits):
                render(portrait).save(folder / f"{number}.png")
                rows.append(f"a portrait of a {portrait.person},{2000 + number}")
            write_atomically(prompts, "\n".join(rows) + "\n")
    return folder, prompts, [caption(portrait) for portrait in portraits]


def make_figure7(experiment: Experiment, name: str) -> None:
    """Evaluate FineFace with the IP-Adapter, which was trained separately (Eq. 5), or without it."""
    adapter = experiment.train_fineface(OURS.name)
    references, prompts, _ = make_image_prompts(experiment)
    ip_adapter = experiment.train_baseline("ip_adapter", "ip_adapter") if name == "image_prompt" else None
    experiment.evaluate(name, adapter, prompts=prompts, reference_images=references, ip_adapter=ip_adapter)


def make_all(experiment: Experiment, processes: int) -> None:
    """Make all that `write_results` needs and that is not there yet."""
    experiment.prepare()
    make_image_prompts(experiment)
    methods = [functools.partial(make, experiment, method) for method in METHODS.values()]
    ip_adapter = functools.partial(experiment.train_baseline, "ip_adapter", "ip_adapter")
    run_jobs([*methods, ip_adapter], processes)
    run_jobs([functools.partial(make_figure7, experiment, name) for name in FIGURE7_RUNS], processes)


def identity_kept(experiment: Experiment, run: str) -> Figure:
    """The share of the image prompt's attributes that the pictures of a run show."""
    _, prompts, captions = make_image_prompts(experiment)
    encoder = make_image_encoder(f"toy:{experiment.model}", torch.device("cpu"))
    shares, owners = [], []
    for prompt in read_prompts(prompts)[: experiment.budget.prompts]:
        # A prompt has about a hundred pictures, each of 128 pixels.
        images = [read_picture(path) for path in sorted(experiment.pictures(run).glob(f"p{prompt.index:02d}_*.png"))]
        shares.append(encoder.agreement(images, [captions[prompt.index]] * len(images)))
        owners += [prompt.index] * len(images)
    draws = experiment.budget.bootstrap_draws
    return bootstrap(np.mean, np.concatenate(shares), prompts=np.array(owners), draws=draws)


# ---- Writing --------------------------------------------------------------------------------------------------------


def compare_orders(experiment: Experiment, methods: Sequence[Method], column: int) -> str:
    """
    Say which order a column gives our methods, and of how many pairs it is the paper's. A pair is open where the
    interval of its difference has 0 in it. Pairs that are equal in the paper are left out.
    """
    heading, metric, part, more_is_better = COLUMNS[column]
    sign, agree, turned, num_open = 1 if more_is_better else -1, 0, [], 0
    for pair in itertools.combinations(methods, 2):
        better, worse = sorted(pair, key=lambda method: -sign * method.paper[column])
        if better.paper[column] == worse.paper[column]:
            continue
        figure = experiment.paired_difference((better.name, worse.name), metric, part)
        if not (figure.low > 0 or figure.high < 0):
            num_open += 1
        elif sign * figure.value > 0:
            agree += 1
        else:
            turned.append(f"{better.label} before {worse.label}")
    ranked = sorted(methods, key=lambda method: -sign * experiment.figure(method.name, metric, part).value)
    words = (
        f"**{heading}.** Ours, from best to worst: {', '.join(method.label for method in ranked)}. Pairs in the"
        f" paper's order: {agree} of {agree + len(turned) + num_open}; in the opposite order: {len(turned)}; open,"
        f" because the interval of their difference has 0 in it: {num_open}."
    )
    if turned:
        words += f" In this order in the paper, and in the opposite order here: {'; '.join(turned)}."
    return words


def format_paper_table(experiment: Experiment, title: str, methods: Sequence[Method]) -> list[str]:
    header = ["Method", *(cell for heading, *_ in COLUMNS for cell in (f"{heading}: paper", "ours"))]
    header += ["agreement with the prompt ↑", "slope, single", "pictures"]
    rows = []
    for method in methods:
        figure, row = functools.partial(experiment.figure, method.name), [method.label]
        for paper, (_, metric, part, _) in zip(method.paper, COLUMNS, strict=True):
            row += [f"{paper:.2f}", f"{figure(metric, part):.3f}"]
        row += [f"{figure('agreement', 'combination'):.3f}", f"{figure('slope', 'single')}"]
        rows.append([*row, str(experiment.num_pictures(method.name))])
    orders = [f"- {compare_orders(experiment, methods, column)}" for column in range(len(COLUMNS))]
    return ["", f"## {title}", "", *markdown_table(header, rows), "", *orders]


def format_figure7(experiment: Experiment) -> list[str]:
    rows, parts = [], ("combination", "single", "combination", "single")
    for run, label in FIGURE7_RUNS.items():
        kept = identity_kept(experiment, run)
        metrics = zip(("reference_similarity", "au_mse", "au_mse", "slope"), parts, strict=True)
        cells = [f"{experiment.figure(run, metric, part):.3f}" for metric, part in metrics]
        rows.append([label, f"{kept:.3f}", *cells, str(kept.pictures)])
    header = ["FineFace", "attributes of the image prompt ↑", "likeness to it ↑", "AU MSE, single ↓"]
    header += ["AU MSE, combinations ↓", "slope, single", "pictures"]
    words = (
        "The prompt says only man, woman, boy or girl; the image prompt says who it is. The two adapters were trained"
        " separately and work together by Eq. 5. The paper shows this in pictures and gives no number."
    )
    return ["", "## Fig. 7: with an image prompt", "", words, "", *markdown_table(header, rows)]


def read_trials(document: Path) -> str:
    """The section on trials of `document`, which is kept, as it is written by hand; "" if there is none."""
    text = document.read_text(encoding="utf-8") if document.is_file() else ""
    return text[text.index(TRIALS_HEADING) :] if TRIALS_HEADING in text else ""


def draw_figures(experiment: Experiment) -> dict[str, Image.Image]:
    """
    Draw the paper's Figs. 4 to 8, with a row for each system of Table 1 where the paper compares systems, and the
    charts of the paper's design. Returns the sheets by name.
    """

    def row_label(method: Method) -> str:
        return method.label.replace(" (", "\n").removesuffix(")")

    def row(run: str, prompt: Prompt, commands: Sequence[str]) -> list[Path]:
        items = [Item("neutral", prompt, ""), *(Item("single", prompt, aus) for aus in commands)]
        return [experiment.pictures(run) / item.name for item in items]

    prompt = read_prompts(TOY_PROMPTS)[0]
    title, neutral = f"{prompt.text} · seed {prompt.seed}", {"neutral": Item("neutral", prompt, "").name}
    folders = {row_label(method): experiment.pictures(method.name) for method in TABLES[TABLE1]}
    singles = {au: Item("single", prompt, f"{au}=5").name for au in AU_NAMES}
    pairs = list(itertools.product(("AU12", "AU4", "AU26"), (LORA_T, OURS)))
    intensities = Table(
        [row(method.name, prompt, [f"{au}={value}" for value in INTENSITIES]) for au, method in pairs],
        [f"{au}\n{row_label(method).splitlines()[0]}" for au, method in pairs],
        ["0", *map(str, INTENSITIES)],
    )
    references, prompts, _ = make_image_prompts(experiment)
    shown, commands = read_prompts(prompts)[: experiment.budget.prompts], ["AU12=5", "AU4=5", "AU26=5"]
    faces = Table(
        [[references / f"{p.index}.png", *row("image_prompt", p, commands)] for p in shown],
        [p.text.removeprefix("a portrait of ") for p in shown],
        ["image prompt", "neutral", *commands],
    )
    sheets = {
        "results_figure4": figures.draw_comparison(folders, neutral | singles, title),
        "results_figure5": figures.draw_comparison(folders, neutral | experiment.combinations(prompt, 10), title),
        "results_figure6": figures.draw_bands([intensities], title),
        "results_figure7": figures.draw_bands([faces], "text, image and AUs together"),
    }
    for name in (f"heat_map_{METER}", f"dose_response_{METER}", "figure8_extrapolation"):
        sheets[f"results_{name}"] = read_picture(experiment.folder / "runs" / OURS.name / "figures" / f"{name}.png")
    return sheets


INTRODUCTION = """\
# The paper's tables, on the toy world

By `python -m paper.tables --{budget.name}`: every system trained for {budget.steps} steps of {budget.batch_size} \
samples on the same {budget.pictures} pictures, from the same base, with the same seeds, and sampled with {sampling} \
and AUs guided together with the text, as in the paper. The loss and the label smoothing are the paper's. Other than \
in the paper, the learning rate is 1e-3 (for DB 1e-4) and falls along a cosine, a tenth of the captions is empty, \
and a running average of the weights is evaluated.

Each of our figures is followed by its 95 % bootstrap interval over prompts and pictures. Do not compare our numbers \
with the paper's: world and base differ, and our AU meter knows the truth, while the paper's shares its training \
data with the method. Compare the order of methods, where the same pictures of two methods differ by more than \
chance. A high CLIP-I alone is no merit: a system that ignores the AUs has 1.

Half of the captions that the base was trained with name the expression, in the very words that *SD*, *DB* and \
*LoRA-T* get. So this base was told more about AUs than Stable Diffusion was.
"""
SMALL_BUDGET = """
This budget is small, so the faces of all systems under-shoot. The adapter of the toy model, see \
[its report](../toy_faces/weights/REPORT.md), was trained on thirty times as many samples.
"""


def wrap(markdown: str, width: int = 120) -> str:
    """Break the long lines of paragraphs. Lists keep theirs, because a line that begins with a plus is an item."""
    lines = markdown.split("\n")
    return "\n".join(line if line.startswith(("|", "#", "!", "-")) else textwrap.fill(line, width) for line in lines)


def write_results(experiment: Experiment, output: Path) -> None:
    """Write `output`, and the sheets of pictures beside it."""
    sampling = ", ".join(f"`{name}={value}`" for name, value in experiment.sampling.items())
    text = INTRODUCTION.format(budget=experiment.budget, sampling=sampling)
    lines = [text.rstrip(), *([SMALL_BUDGET.rstrip()] if experiment.budget.name == "quick" else [])]
    for title, methods in TABLES.items():
        lines += format_paper_table(experiment, title, methods)
    lines += format_figure7(experiment)
    sheets = draw_figures(experiment)
    lines += ["", "## Pictures", "", "The last three are of the paper's design.", ""]
    lines += [f"![{name.removeprefix('results_').replace('_', ' ')}]({name}.png)\n" for name in sheets]
    for name, sheet in sheets.items():
        write_png(sheet, output.parent / f"{name}.png")
    write_atomically(output, wrap("\n".join(lines).rstrip()) + "\n" + read_trials(output))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group(required=True)
    for name in ("quick", "full"):
        words = "two cores, an hour" if name == "quick" else "a GPU"
        size.add_argument(f"--{name}", dest="size", action="store_const", const=name, help=words)
    parser.add_argument(
        "--processes", type=int, default=default_processes(), help="systems at once (default: %(default)s, here)"
    )
    parser.add_argument("--work", type=Path, help="folder of all that is made (default: runs/experiment-SIZE)")
    parser.add_argument("--model", default=str(TOY_MODEL), help="of the toy world (default: its own)")
    parser.add_argument("--num-inference-steps", type=int, help="(default: the model's)")
    parser.add_argument("--guidance-scale", type=float, help="(default: the model's)")
    parser.add_argument("--output", type=Path, default=DOCS / "results.md", help="(default: docs/results.md)")


def make_experiment(arguments: argparse.Namespace, **budget) -> Experiment:
    """The experiment of the command line; `budget` replaces fields of its budget."""
    check_integer("--processes", arguments.processes, 1)
    check_output(arguments.output, suffixes=(arguments.output.suffix.lower(),))
    sampling = {name: getattr(arguments, name) for name in SAMPLED if getattr(arguments, name) is not None}
    work = arguments.work or Path("runs") / f"experiment-{arguments.size}"
    return Experiment(work, replace(BUDGETS[arguments.size], **budget), arguments.model, sampling)


def report(work: Callable[[], object]) -> int:
    """The exit status of `run_program`; 1 also if a tool or a training has failed."""
    return run_program(
        work, interrupted="the same command goes on from here", failures=(ToolError, FloatingPointError)
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser("paper.tables", __doc__)
    add_arguments(parser)

    def work() -> Path | None:
        arguments = parser.parse_args(argv)
        experiment = make_experiment(arguments)
        make_all(experiment, arguments.processes)
        if PartialState().is_main_process:
            write_results(experiment, arguments.output)
            return arguments.output

    return report(work)


if __name__ == "__main__":
    sys.exit(main())
