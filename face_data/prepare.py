# SPDX-License-Identifier: Apache-2.0
"""
Training data from DISFA, AffectNet, or any pictures with AUs, step by step. Each step can be stopped: the same command
goes on where it was.

  all of the paper's data   python -m face_data.prepare paper --disfa DISFA --affectnet AffectNet --aus libreface.csv \
                                --blip2 Salesforce/blip2-opt-2.7b --output faces

  or step by step           python -m face_data.prepare disfa --root DISFA --output work/disfa
                            python -m face_data.prepare affectnet --root AffectNet --aus libreface.csv \
                                --output work/affectnet
                            python -m face_data.prepare folder --root pictures --aus labels.csv --output work/mine
                            python -m face_data.prepare hub user/faces --pictures pictures --output work/hub
                            python -m face_data.prepare photos work/affectnet --blip2 Salesforce/blip2-opt-2.7b
                            python -m face_data.prepare caption work/disfa work/affectnet work/mine --blip2 …
                            python -m face_data.prepare build work/disfa work/affectnet work/mine --output faces
                            python -m face_data.prepare report work/disfa
"""

import argparse
import functools
import os
import sqlite3
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from action_units import AU_NAMES, au_columns
from face_data.affectnet import MIN_SIDE, MIN_TOTAL_INTENSITY, AffectNet, find_files
from face_data.au_tables import AU_TABLE_TOOLS
from face_data.build import Build, build_dataset
from face_data.disfa import Disfa
from face_data.from_hub import METADATA, HubPictures, fetch_pictures
from face_data.report import report_folders
from face_data.store import CAPTIONS, PHOTOS, WORK, check_folder, fill_folder
from face_data.tabled import AUTable, Tabled, choose_aus
from program import Parser, add_options, check_options, option, run_program, take_options


# Options of `Tabled` for sources that bring their captions, and those that say something of AUs and not of pictures.
WITHOUT_CAPTIONS = ("image_column", "min_side", "min_total_intensity", "rows_per_part")
OF_AUS = ("image_column", "min_total_intensity", "correct_aus")
LIMITS = {"min_side": MIN_SIDE, "min_total_intensity": MIN_TOTAL_INTENSITY}


@dataclass(frozen=True)
class Step:
    """What a step is asked besides the options of its source and of the data set. No step has all of these options."""

    folders: tuple[Path, ...] = option((), "Work folders.", flag="folders")
    dataset: str | None = option(None, "Id of the data set.", flag="dataset")
    root: Path | None = option(None, "Folder of the data set, or of the pictures.", required=True)
    disfa: Path | None = option(None, "Folder of DISFA.", required=True)
    affectnet: Path | None = option(None, "Folder of AffectNet.", required=True)
    pictures: Path | None = option(None, "Folder for the pictures and their captions.", required=True)
    source: str | None = option(None, "Name of the source, letters and digits; by default those of the data's name.")
    aus: tuple[str, ...] = option(
        (),
        "Table of the AUs: csv, tsv, jsonl, json or parquet; further tables with the AUs that come from each.",
        action="append",
        nargs=None,
        metavar="[TOOL=]TABLE[:AU5,AU9]",
    )
    au_tool: Literal[AU_TABLE_TOOLS] | None = option(None, "Whose columns; by default they tell.")
    au_names: tuple[str, ...] | None = option(
        None,
        "AUs to take, such as AU12L AU12R AU26; by default what the tables measure, and in `paper` its twelve.",
        metavar="AU12",
    )
    blip2: str | None = option(None, "Folder or Hub id of a BLIP-2 model.", required=True)
    batch_size: int = option(16, "Pictures that BLIP-2 sees together.", low=1)
    device: str | None = option(None, "For BLIP-2; by default a GPU if there is one.")
    output: Path | None = option(None, "Folder to fill. In `paper`, OUTPUT/.work has the single steps.", required=True)
    num_workers: int = option(os.cpu_count() or 1, "Processes; by default one a core.", low=1)
    on_error: Literal["stop", "skip"] = option(
        "stop", "A corrupt picture, a missing label file and the like end the step, or are left out and reported."
    )

    def __post_init__(self):
        check_options(self)

    def tables(self) -> tuple[AUTable, ...]:
        tables = tuple(map(AUTable.parse, self.aus))
        if not tables:
            raise ValueError("`--aus` has to name a table of AUs.")
        if self.au_tool is not None and (len(tables) > 1 or tables[0].tool not in (None, self.au_tool)):
            raise ValueError("`--au_tool` is for one table. Name the tool of each as `--aus TOOL=TABLE`.")
        return choose_aus(tuple(replace(table, tool=table.tool or self.au_tool) for table in tables), self.au_names)

    def fill(self, source: Disfa | Tabled, folder: Path) -> str:
        fill_folder(source, folder, self.num_workers, self.on_error)
        return report_folders([folder])


WORK_OPTIONS = ("output", "num_workers", "on_error")
TABLE_OPTIONS = ("aus", "au_tool", "au_names")
BLIP2_OPTIONS = ("blip2", "batch_size", "device")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("face_data.prepare", __doc__)
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    def add(name: str, work: Callable, text: str, own: Sequence[str], *others: tuple, **defaults) -> None:
        step = steps.add_parser(name, help=text, description=text)
        step.set_defaults(work=work)
        for config, names in ((Step, own), *others):
            add_options(step, config, names, **defaults)

    of_affectnet = (Tabled, WITHOUT_CAPTIONS)
    add("disfa", run_disfa, "Rows and pictures of DISFA.", ("root", *WORK_OPTIONS), (Disfa, None))
    text = "Rows and pictures of AffectNet, with AUs from a table."
    add("affectnet", run_affectnet, text, ("root", *TABLE_OPTIONS, *WORK_OPTIONS), of_affectnet, **LIMITS)
    text = "Rows and pictures of any folder, with AUs, and maybe captions, from a table."
    add("folder", run_folder, text, ("root", "source", *TABLE_OPTIONS, *WORK_OPTIONS), (Tabled, None))
    text = "Pictures and captions of a data set on the Hub; with --aus its rows too."
    own = ("dataset", "pictures", "source", *TABLE_OPTIONS, *WORK_OPTIONS)
    add("hub", run_hub, text, own, (HubPictures, None), (Tabled, OF_AUS))
    text = "Captions by BLIP-2, for pictures that have none."
    add("caption", run_caption, text, ("folders", *BLIP2_OPTIONS))
    text = "BLIP-2 is asked which pictures are photographs."
    add("photos", functools.partial(run_caption, kind=PHOTOS), text, ("folders", *BLIP2_OPTIONS))
    text = "The data set for the training, from work folders."
    add("build", run_build, text, ("folders", "output", "num_workers"), (Build, None))
    text = "All steps for DISFA and AffectNet, one after the other."
    own, others = ("disfa", "affectnet", *TABLE_OPTIONS, *BLIP2_OPTIONS, *WORK_OPTIONS), (Disfa, None)
    add("paper", run_paper, text, own, others, of_affectnet, (Build, ("format",)), au_names=AU_NAMES, **LIMITS)
    text = "What the steps kept and left out, and why."
    add("report", lambda step, args: report_folders(step.folders), text, ("folders",))
    return parser.parse_args(argv)


def run_disfa(step: Step, args: argparse.Namespace) -> str:
    return step.fill(Disfa(step.root, **take_options(Disfa, args)), step.output)


def run_affectnet(step: Step, args: argparse.Namespace) -> str:
    picture_dirs, file_lists = find_files(step.root)
    # The folder of a split comes before its pictures, so that `train_set/images/1.jpg` is not `val_set/images/1.jpg`.
    bases, options = (step.root, *picture_dirs), take_options(Tabled, args, WITHOUT_CAPTIONS)
    options |= {"correct_aus": True, "needs_photo_filter": True}
    affectnet = AffectNet("affectnet", bases, step.tables(), file_lists=file_lists, **options)
    return step.fill(affectnet, step.output)


def run_folder(step: Step, args: argparse.Namespace) -> str:
    if not step.root.is_dir():
        raise ValueError(f"`--root` has to be a folder, but {str(step.root)!r} is none.")
    source = step.source or name_source(step.root.resolve().name)
    return step.fill(Tabled(source, (step.root,), step.tables(), **take_options(Tabled, args)), step.output)


def name_source(name: str) -> str:
    """Letters and digits of a folder's name, of any script."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFC", name))) or "pictures"


def run_hub(step: Step, args: argparse.Namespace) -> str:
    source = step.source or name_source(step.dataset.rpartition("/")[2])
    pictures = HubPictures(step.dataset, source, **take_options(HubPictures, args))
    # Before anything is fetched, tables that are missing or contradict each other are an error.
    if step.aus:
        options = take_options(Tabled, args, (*WITHOUT_CAPTIONS, *OF_AUS))
        tabled = Tabled(source, (step.pictures,), step.tables(), **options)
    elif step.au_names:
        au_columns(step.au_names)
    report = fetch_pictures(pictures, step.pictures, step.on_error)
    if step.aus:
        return f"{report}\n{step.fill(replace(tabled, about=step.pictures / METADATA), step.output)}"
    given = {"au_tool": step.au_tool, "au_names": step.au_names} | take_options(Tabled, args, OF_AUS)
    unused = ", ".join("--measured" if name == "correct_aus" else f"--{name}" for name in given if given[name])
    return (
        f"{report}\nMeasure the AUs of the pictures in {step.pictures}, and run the same command with --aus. It fills"
        f" {step.output}." + (f" Until then, nothing is made of {unused}." if unused else "")
    )


def run_caption(step: Step, args: argparse.Namespace, kind: str = CAPTIONS) -> str:
    # Loads transformers, which the other steps do not need.
    from face_data.annotate import annotate

    for folder in step.folders:
        annotate(folder, kind, step.blip2, step.batch_size, step.device)
    return f"{kind}: {', '.join(map(str, step.folders))}"


def run_build(step: Step, args: argparse.Namespace) -> str:
    return build_dataset(Build(step.folders, step.output, **take_options(Build, args)), step.num_workers)


def run_paper(step: Step, args: argparse.Namespace) -> str:
    check_folder(step.output)
    folders = tuple(step.output / WORK / name for name in ("disfa", "affectnet"))
    run_disfa(replace(step, root=step.disfa, output=folders[0]), args)
    run_affectnet(replace(step, root=step.affectnet, output=folders[1]), args)
    run_caption(replace(step, folders=folders[1:]), args, PHOTOS)
    run_caption(replace(step, folders=folders), args)
    return run_build(replace(step, folders=folders), args)


def run(args: argparse.Namespace) -> str:
    """Do a step, and say what came of it."""
    return args.work(Step(**take_options(Step, args)), args)


def main(argv: list[str] | None = None) -> int:
    return run_program(
        lambda: run(parse_args(argv)),
        interrupted="the same command goes on from here",
        refusals=(ValueError, OSError, sqlite3.Error),
    )


if __name__ == "__main__":
    sys.exit(main())
