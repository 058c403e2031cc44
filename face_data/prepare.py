# Copyright 2026 The FineFace authors.
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
import os
import sqlite3
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from action_units import AU_NAMES, au_columns
from face_data.affectnet import MIN_SIDE, MIN_TOTAL_INTENSITY, AffectNet, find_layout
from face_data.au_tables import AU_TABLE_TOOLS
from face_data.build import Build, build_dataset
from face_data.disfa import Disfa, prepare_disfa
from face_data.from_hub import METADATA, HubPictures, fetch_pictures
from face_data.report import report_folders
from face_data.store import CAPTIONS, PHOTOS, WORK, check_folder
from face_data.table_index import AUTable, choose_aus
from face_data.tabled import Tabled, prepare_tabled
from program import add_options, run_program, take_options


# Options of `Tabled` for sources that bring their captions.
WITHOUT_CAPTIONS = ("image_column", "min_side", "min_total_intensity", "rows_per_part")
LIMITS = {"min_side": MIN_SIDE, "min_total_intensity": MIN_TOTAL_INTENSITY}
# Options of `hub` that say something of AUs, and nothing of pictures.
OPTIONS_OF_AUS = ("au_tool", "au_names", "image_column", "min_total_intensity", "correct_aus")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m face_data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    def add(name: str, text: str, work: Callable[[argparse.Namespace], str]) -> argparse.ArgumentParser:
        step = steps.add_parser(name, help=text, description=text, allow_abbrev=False)
        step.set_defaults(work=work)
        return step

    disfa = add("disfa", "Rows and pictures of DISFA.", lambda args: run_disfa(args, args.root, args.output))
    disfa.add_argument("--root", type=Path, required=True, help="Folder of the data set.")
    add_options(disfa, Disfa)
    _add_work(disfa)

    text = "Rows and pictures of AffectNet, with AUs from a table."
    affectnet = add("affectnet", text, lambda args: run_affectnet(args, args.root, args.output))
    affectnet.add_argument("--root", type=Path, required=True, help="Folder of the data set.")
    _add_table(affectnet)
    add_options(affectnet, Tabled, WITHOUT_CAPTIONS, **LIMITS)
    _add_work(affectnet)

    folder = add("folder", "Rows and pictures of any folder, with AUs, and maybe captions, from a table.", run_folder)
    folder.add_argument("--root", type=Path, required=True, help="Folder of the pictures.")
    folder.add_argument("--source", help="Name of the source, letters and digits; by default those of the folder.")
    _add_table(folder)
    add_options(folder, Tabled)
    _add_work(folder)

    hub = add("hub", "Pictures and captions of a data set on the Hub; with --aus its rows too.", run_hub)
    hub.add_argument("dataset", help="Id of the data set.")
    hub.add_argument("--pictures", type=Path, required=True, help="Folder for the pictures and their captions.")
    hub.add_argument("--source", help="Name of the source, letters and digits; by default those of the data set.")
    add_options(hub, HubPictures)
    _add_table(hub, required=False)
    add_options(hub, Tabled, ("image_column", "min_total_intensity", "correct_aus"))
    _add_work(hub)

    for kind, name, text in (
        (CAPTIONS, "caption", "Captions by BLIP-2, for pictures that have none."),
        (PHOTOS, "photos", "BLIP-2 is asked which pictures are photographs."),
    ):
        step = add(name, text, lambda args, kind=kind: run_blip2(args, args.folders, kind))
        step.add_argument("folders", type=Path, nargs="+", help="Work folders.")
        _add_blip2(step)

    build = add("build", "The data set for the training, from work folders.", run_build)
    build.add_argument("folders", type=Path, nargs="+", help="Work folders.")
    add_options(build, Build)
    _add_output(build, "Folder of the data set.")

    paper = add("paper", "All steps for DISFA and AffectNet, one after the other.", run_paper)
    paper.add_argument("--disfa", type=Path, required=True, help="Folder of DISFA.")
    paper.add_argument("--affectnet", type=Path, required=True, help="Folder of AffectNet.")
    add_options(paper, Disfa)
    _add_table(paper, au_names=AU_NAMES)
    add_options(paper, Tabled, WITHOUT_CAPTIONS, **LIMITS)
    _add_blip2(paper)
    add_options(paper, Build, ("format",))
    _add_work(paper, "Folder of the data set; OUTPUT/.work has what the single steps make.")

    text = "What the steps kept and left out, and why."
    report = add("report", text, lambda args: report_folders(args.folders).to_text())
    report.add_argument("folders", type=Path, nargs="+", help="Work folders.")
    return parser.parse_args(argv)


def _add_table(
    parser: argparse.ArgumentParser, required: bool = True, au_names: tuple[str, ...] | None = None
) -> None:
    parser.add_argument(
        "--aus",
        action="append",
        required=required,
        default=None if required else [],
        metavar="[TOOL=]TABLE[:AU5,AU9]",
        help="Table of the AUs: csv, tsv, jsonl, json or parquet; further tables with the AUs that come from each.",
    )
    parser.add_argument("--au_tool", choices=AU_TABLE_TOOLS, help="Whose columns; by default they tell.")
    default = "the paper's twelve" if au_names else "what the tables measure"
    text = f"AUs to take, such as AU12L AU12R AU26; by default {default}."
    parser.add_argument("--au_names", nargs="+", default=au_names, metavar="AU12", help=text)


def parse_tables(args: argparse.Namespace) -> tuple[AUTable, ...]:
    tables = tuple(map(AUTable.parse, args.aus))
    if args.au_tool is not None and (len(tables) > 1 or tables[0].tool not in (None, args.au_tool)):
        raise ValueError("`--au_tool` is for one table. Name the tool of each as `--aus TOOL=TABLE`.")
    tables = tuple(replace(table, tool=table.tool or args.au_tool) for table in tables)
    return choose_aus(tables, args.au_names and tuple(args.au_names))


def _add_blip2(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blip2", required=True, help="Folder or Hub id of a BLIP-2 model.")
    parser.add_argument("--batch_size", type=int, default=16, help="Pictures that BLIP-2 sees together.")
    parser.add_argument("--device", help="For BLIP-2; by default a GPU if there is one.")


def _add_output(parser: argparse.ArgumentParser, text: str) -> None:
    num_workers = os.cpu_count() or 1
    parser.add_argument("--output", type=Path, required=True, help=text)
    parser.add_argument("--num_workers", type=int, default=num_workers, help="Processes; by default one a core.")


def _add_work(parser: argparse.ArgumentParser, text: str = "Work folder for this source.") -> None:
    _add_output(parser, text)
    parser.add_argument(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help="A corrupt picture, a missing label file and the like end the step, or are left out and reported.",
    )


def run(args: argparse.Namespace) -> str:
    """Do a step, and say what came of it."""
    if getattr(args, "num_workers", 1) < 1:
        raise ValueError(f"`--num_workers` has to be at least 1, but is {args.num_workers}.")
    return args.work(args)


def run_disfa(args: argparse.Namespace, root: Path, folder: Path) -> str:
    prepare_disfa(Disfa(root, **take_options(Disfa, args)), folder, args.num_workers, args.on_error)
    return report_folders([folder]).to_text()


def run_affectnet(args: argparse.Namespace, root: Path, folder: Path) -> str:
    layout = find_layout(root)
    # The folder of a split comes before its pictures, so that `train_set/images/1.jpg` is not `val_set/images/1.jpg`.
    bases, options = (root, *layout.picture_dirs), take_options(Tabled, args, WITHOUT_CAPTIONS)
    tables = parse_tables(args)
    affectnet = AffectNet(
        "affectnet", bases, tables, correct_aus=True, needs_photo_filter=True, layout=layout, **options
    )
    prepare_tabled(affectnet, folder, args.num_workers, args.on_error)
    return report_folders([folder]).to_text()


def run_folder(args: argparse.Namespace) -> str:
    if not args.root.is_dir():
        raise ValueError(f"`--root` has to be a folder, but {str(args.root)!r} is none.")
    source = args.source or name_source(args.root.resolve().name)
    tabled = Tabled(source, (args.root,), parse_tables(args), **take_options(Tabled, args))
    prepare_tabled(tabled, args.output, args.num_workers, args.on_error)
    return report_folders([args.output]).to_text()


def name_source(name: str) -> str:
    """Letters and digits of a folder's name, of any script."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFC", name))) or "pictures"


def run_hub(args: argparse.Namespace) -> str:
    source = args.source or name_source(args.dataset.rpartition("/")[2])
    pictures = HubPictures(args.dataset, source, **take_options(HubPictures, args))
    # Before anything is fetched, tables that are missing or contradict each other are an error.
    if not args.aus:
        if args.au_names:
            au_columns(args.au_names)
        report = fetch_pictures(pictures, args.pictures, args.on_error).to_text()
        given = [name for name in OPTIONS_OF_AUS if getattr(args, name, None) not in (None, 0.0, False)]
        unused = ", ".join("--measured" if name == "correct_aus" else f"--{name}" for name in given)
        return (
            f"{report}\nMeasure the AUs of the pictures in {args.pictures}, and run the same command with --aus. It"
            f" fills {args.output}." + (f" Until then, nothing is made of {unused}." if unused else "")
        )
    options = take_options(Tabled, args, (*WITHOUT_CAPTIONS, "correct_aus"))
    tabled = Tabled(source, (args.pictures,), parse_tables(args), **options)
    report = fetch_pictures(pictures, args.pictures, args.on_error).to_text()
    prepare_tabled(replace(tabled, about=args.pictures / METADATA), args.output, args.num_workers, args.on_error)
    return f"{report}\n{report_folders([args.output]).to_text()}"


def run_blip2(args: argparse.Namespace, folders: list[Path], kind: str) -> str:
    # Loads transformers, which the other steps do not need.
    from face_data.annotate import annotate

    for folder in folders:
        annotate(folder, kind, args.blip2, args.batch_size, args.device)
    return f"{kind}: {', '.join(map(str, folders))}"


def run_build(args: argparse.Namespace) -> str:
    build = Build(tuple(args.folders), args.output, **take_options(Build, args))
    return build_dataset(build, args.num_workers).to_text()


def run_paper(args: argparse.Namespace) -> str:
    check_folder(args.output)
    folders = [args.output / WORK / name for name in ("disfa", "affectnet")]
    run_disfa(args, args.disfa, folders[0])
    run_affectnet(args, args.affectnet, folders[1])
    run_blip2(args, folders[1:], PHOTOS)
    run_blip2(args, folders, CAPTIONS)
    build = Build(tuple(folders), args.output, **take_options(Build, args, ("format",)))
    return build_dataset(build, args.num_workers).to_text()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status of `run_program`."""
    return run_program(
        lambda: run(parse_args(argv)),
        interrupted="the same command goes on from here",
        refusals=(ValueError, OSError, sqlite3.Error),
    )


if __name__ == "__main__":
    sys.exit(main())
