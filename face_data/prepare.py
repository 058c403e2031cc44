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
from dataclasses import replace
from pathlib import Path

from action_units import AU_NAMES
from face_data.affectnet import MIN_SIDE, MIN_TOTAL_INTENSITY, prepare_affectnet
from face_data.au_tables import AU_TABLE_TOOLS
from face_data.build import FORMATS, Build, build_dataset
from face_data.disfa import Disfa, prepare_disfa
from face_data.from_hub import BOX_FORMATS, METADATA, HubPictures, fetch_pictures
from face_data.report import report_folders
from face_data.store import CAPTIONS, PHOTOS, WORK, check_folder
from face_data.table_index import AUTable, choose_aus
from face_data.tabled import Tabled, prepare_tabled
from program import run_program


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m face_data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return steps.add_parser(name, help=text, description=text, allow_abbrev=False)

    disfa = add("disfa", "Rows and pictures of DISFA.")
    disfa.add_argument("--root", type=Path, required=True, help="Folder of the data set.")
    _add_disfa(disfa)
    _add_work(disfa)

    affectnet = add("affectnet", "Rows and pictures of AffectNet, with AUs from a table.")
    affectnet.add_argument("--root", type=Path, required=True, help="Folder of the data set.")
    _add_table(affectnet)
    _add_limits(affectnet)
    _add_rows_per_part(affectnet)
    _add_work(affectnet)

    folder = add("folder", "Rows and pictures of any folder, with AUs, and maybe captions, from a table.")
    folder.add_argument("--root", type=Path, required=True, help="Folder of the pictures.")
    folder.add_argument("--source", help="Name of the source, letters and digits; by default those of the folder.")
    folder.add_argument("--captions", type=Path, metavar="TABLE", help="Captions, if --aus has none.")
    folder.add_argument("--caption_column", help="By default text, caption or prompt, if it is there.")
    folder.add_argument("--drop_emotion_words", action="store_true", help="Take words of emotion out of captions.")
    folder.add_argument("--measured", action="store_true", help="AUs are measured: correct them as the paper does.")
    folder.add_argument("--drawings", action="store_true", help="There may be drawings: ask BLIP-2, as in `photos`.")
    _add_table(folder)
    _add_limits(folder, 1, 0.0)
    _add_rows_per_part(folder)
    _add_work(folder)

    hub = add("hub", "Pictures and captions of a data set on the Hub; with --aus its rows too.")
    hub.add_argument("dataset", help="Id of the data set.")
    hub.add_argument("--pictures", type=Path, required=True, help="Folder for the pictures and their captions.")
    hub.add_argument("--source", help="Name of the source, letters and digits; by default those of the data set.")
    hub.add_argument("--config", help="Configuration of the data set.")
    hub.add_argument("--split", default="train", help="Split of the data set.")
    hub.add_argument("--revision", help="Commit or branch.")
    hub.add_argument("--picture_column", help="By default the first column of pictures.")
    hub.add_argument("--caption_column", help="By default text, caption or prompt, if it is there.")
    hub.add_argument("--face_count_column", help="Column with the number of faces: only rows with 1 are kept.")
    hub.add_argument("--boxes_column", help="Column with boxes of faces: only rows with one are kept.")
    hub.add_argument("--box_format", choices=BOX_FORMATS, default=BOX_FORMATS[0], help="Of --boxes_column.")
    hub.add_argument(
        "--detector",
        metavar="MODULE:FUNCTION",
        help="From a picture to the boxes of its faces, 0 to 1: only pictures with one are kept.",
    )
    hub.add_argument("--keep_emotion_words", action="store_true", help="Leave the captions as they are.")
    hub.add_argument("--max_pictures", type=int, help="Stop when so many are kept.")
    hub.add_argument("--measured", action="store_true", help="AUs are measured: correct them as the paper does.")
    _add_table(hub, required=False)
    _add_limits(hub, 1, 0.0)
    _add_rows_per_part(hub)
    _add_work(hub)

    for name, text in (
        ("caption", "Captions by BLIP-2, for pictures that have none."),
        ("photos", "BLIP-2 is asked which pictures are photographs."),
    ):
        step = add(name, text)
        step.add_argument("folders", type=Path, nargs="+", help="Work folders.")
        step.add_argument("--blip2", required=True, help="Folder or Hub id of a BLIP-2 model.")
        _add_blip2(step)

    build = add("build", "The data set for the training, from work folders.")
    build.add_argument("folders", type=Path, nargs="+", help="Work folders.")
    build.add_argument("--default_caption", help="For pictures that have none.")
    build.add_argument("--keep_drawings", action="store_true", help="Do not ask whether pictures are photographs.")
    build.add_argument("--drop_emotion_words", action="store_true", help="Take words of emotion out of captions.")
    build.add_argument("--keep_aus", action="store_true", help="Do not correct measured AUs.")
    _add_au_names(build, None, "AUs of the data set; by default those that all sources have.")
    _add_format(build)
    _add_output(build, "Folder of the data set.")

    paper = add("paper", "All steps for DISFA and AffectNet, one after the other.")
    paper.add_argument("--disfa", type=Path, required=True, help="Folder of DISFA.")
    paper.add_argument("--affectnet", type=Path, required=True, help="Folder of AffectNet.")
    paper.add_argument("--blip2", required=True, help="Folder or Hub id of a BLIP-2 model.")
    _add_disfa(paper)
    _add_table(paper, au_names=AU_NAMES)
    _add_limits(paper)
    _add_rows_per_part(paper)
    _add_blip2(paper)
    _add_format(paper)
    _add_work(paper, "Folder of the data set; OUTPUT/.work has what the single steps make.")

    report = add("report", "What the steps kept and left out, and why.")
    report.add_argument("folders", type=Path, nargs="+", help="Work folders.")
    return parser.parse_args(argv)


def _add_disfa(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, help="Frames of DISFA as pictures, SN001/00001.jpg; no videos then.")
    parser.add_argument("--camera", choices=("left", "right"), default="left", help="Which videos of DISFA.")
    parser.add_argument("--neutral_share", type=float, default=0.1, help="Kept share of DISFA's frames without AUs.")
    parser.add_argument("--seed", type=int, default=0, help="Decides which.")
    parser.add_argument("--jpeg_quality", type=int, default=95, help="Of frames taken from videos.")
    parser.add_argument("--subjects", nargs="+", default=(), metavar="SN001", help="Only these; by default all.")


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
    parser.add_argument("--image_column", help="Column of the file names; by default the first usual one.")
    default = "the paper's twelve" if au_names else "what the tables measure"
    _add_au_names(parser, au_names, f"AUs to take, such as AU12L AU12R AU26; by default {default}.")


def _add_au_names(parser: argparse.ArgumentParser, default: tuple[str, ...] | None, text: str) -> None:
    parser.add_argument("--au_names", nargs="+", default=default, metavar="AU12", help=text)


def parse_tables(args: argparse.Namespace) -> tuple[AUTable, ...]:
    tables = tuple(map(AUTable.parse, args.aus))
    if args.au_tool is not None and (len(tables) > 1 or tables[0].tool not in (None, args.au_tool)):
        raise ValueError("`--au_tool` is for one table. Name the tool of each as `--aus TOOL=TABLE`.")
    tables = tuple(replace(table, tool=table.tool or args.au_tool) for table in tables)
    return choose_aus(tables, args.au_names and tuple(args.au_names))


def _add_limits(
    parser: argparse.ArgumentParser, min_side: int = MIN_SIDE, min_total: float = MIN_TOTAL_INTENSITY
) -> None:
    parser.add_argument("--min_side", type=int, default=min_side, help="Pixels both sides of a picture have.")
    parser.add_argument("--min_total_intensity", type=float, default=min_total, help="Smallest sum of all AUs.")


def _add_rows_per_part(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows_per_part", type=int, default=1024, help="Rows of the table that are done together.")


def _add_blip2(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch_size", type=int, default=16, help="Pictures that BLIP-2 sees together.")
    parser.add_argument("--device", help="For BLIP-2; by default a GPU if there is one.")


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="Files, or shards to stream.")


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
    steps = {
        "disfa": lambda: run_disfa(args, args.root, args.output),
        "affectnet": lambda: run_affectnet(args, args.root, args.output),
        "folder": lambda: run_folder(args),
        "hub": lambda: run_hub(args),
        "caption": lambda: run_blip2(args, args.folders, CAPTIONS),
        "photos": lambda: run_blip2(args, args.folders, PHOTOS),
        "build": lambda: run_build(args),
        "paper": lambda: run_paper(args),
        "report": lambda: report_folders(args.folders).to_text(),
    }
    return steps[args.step]()


def run_disfa(args: argparse.Namespace, root: Path, folder: Path) -> str:
    disfa = Disfa(
        root, args.images, args.camera, args.neutral_share, args.seed, args.jpeg_quality, tuple(args.subjects)
    )
    prepare_disfa(disfa, folder, args.num_workers, args.on_error)
    return report_folders([folder]).to_text()


def run_affectnet(args: argparse.Namespace, root: Path, folder: Path) -> str:
    prepare_affectnet(
        root,
        parse_tables(args),
        folder,
        args.num_workers,
        args.on_error,
        image_column=args.image_column,
        min_side=args.min_side,
        min_total_intensity=args.min_total_intensity,
        rows_per_part=args.rows_per_part,
    )
    return report_folders([folder]).to_text()


def run_folder(args: argparse.Namespace) -> str:
    if not args.root.is_dir():
        raise ValueError(f"`--root` has to be a folder, but {str(args.root)!r} is none.")
    tabled = Tabled(
        args.source or name_source(args.root.resolve().name),
        (args.root,),
        parse_tables(args),
        args.captions,
        args.image_column,
        args.caption_column,
        args.min_side,
        args.min_total_intensity,
        correct_aus=args.measured,
        needs_photo_filter=args.drawings,
        drop_emotion_words=args.drop_emotion_words,
        rows_per_part=args.rows_per_part,
    )
    prepare_tabled(tabled, args.output, args.num_workers, args.on_error)
    return report_folders([args.output]).to_text()


def name_source(name: str) -> str:
    """Letters and digits of a folder's name, of any script."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFC", name))) or "pictures"


def run_hub(args: argparse.Namespace) -> str:
    source = args.source or name_source(args.dataset.rpartition("/")[2])
    pictures = HubPictures(
        args.dataset,
        source,
        args.config,
        args.split,
        args.revision,
        args.picture_column,
        args.caption_column,
        args.face_count_column,
        args.boxes_column,
        args.box_format,
        args.detector,
        args.keep_emotion_words,
        args.max_pictures,
        args.min_side,
        args.rows_per_part,
    )
    tabled = None
    if args.aus:
        # Before anything is fetched, tables that are missing or contradict each other are an error.
        tabled = Tabled(
            source,
            (args.pictures,),
            parse_tables(args),
            image_column=args.image_column,
            min_side=args.min_side,
            min_total_intensity=args.min_total_intensity,
            correct_aus=args.measured,
            rows_per_part=args.rows_per_part,
        )
    report = fetch_pictures(pictures, args.pictures, args.on_error).to_text()
    if tabled is None:
        return (
            f"{report}\nMeasure the AUs of the pictures in {args.pictures}, and run the same command with --aus. It"
            f" fills {args.output}."
        )
    tabled = replace(tabled, about=args.pictures / METADATA)
    prepare_tabled(tabled, args.output, args.num_workers, args.on_error)
    return f"{report}\n{report_folders([args.output]).to_text()}"


def run_blip2(args: argparse.Namespace, folders: list[Path], kind: str) -> str:
    # Loads transformers, which the other steps do not need.
    from face_data.annotate import annotate

    for folder in folders:
        annotate(folder, kind, args.blip2, args.batch_size, args.device)
    return f"{kind}: {', '.join(map(str, folders))}"


def run_build(args: argparse.Namespace) -> str:
    build = Build(
        tuple(args.folders),
        args.output,
        args.format,
        args.default_caption,
        photo_filter=not args.keep_drawings,
        correct_aus=not args.keep_aus,
        drop_emotion_words=args.drop_emotion_words,
        au_names=args.au_names and tuple(args.au_names),
    )
    return build_dataset(build, args.num_workers).to_text()


def run_paper(args: argparse.Namespace) -> str:
    check_folder(args.output)
    folders = [args.output / WORK / name for name in ("disfa", "affectnet")]
    run_disfa(args, args.disfa, folders[0])
    run_affectnet(args, args.affectnet, folders[1])
    run_blip2(args, folders[1:], PHOTOS)
    run_blip2(args, folders, CAPTIONS)
    build = Build(tuple(folders), args.output, args.format)
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
