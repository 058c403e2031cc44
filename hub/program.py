# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""What the programs of this folder share: their way to report errors, and folders that appear whole or not at all."""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """One that `run_program` reports the errors of."""

    def __init__(self, module: str, description: str):
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        raise ValueError(message)


def check_new_folder(folder: Path, overwrite: bool, marker: str) -> None:
    """
    Raise an OSError if `folder` cannot be written. One with something in it needs `overwrite`, and has to hold the
    file `marker`, so that nobody loses another folder by a slip. Creates nothing.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} has to be a folder, but is a file.")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{str(folder)!r} is not empty. Name another folder, or replace it: `--overwrite`.")
        if not (folder / marker).is_file():
            raise FileExistsError(
                f"{str(folder)!r} holds no {marker}, so this program has not written it, and `--overwrite` will not"
                " delete it. Name another folder."
            )
    check_writable(folder)


def check_writable(path: Path) -> None:
    """Raise an OSError if nothing can be written beside `path`."""
    existing = next(parent for parent in path.resolve().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"{str(path)!r} cannot be written: {str(existing)!r} is no folder that takes new files.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, which takes the place of `folder` if all goes well and is gone if not."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}_", dir=folder.parent))
    try:
        # Made here rather than by mkdtemp, which lets nobody else read it.
        (temporary / "new").mkdir()
        yield temporary / "new"
        if folder.exists():
            os.replace(folder, temporary / "old")
        try:
            os.replace(temporary / "new", folder)
        except OSError:
            if (temporary / "old").exists():
                os.replace(temporary / "old", folder)
            raise
    finally:
        shutil.rmtree(temporary)


def run_program(run: Callable[[], str]) -> int:
    """Print what `run` returns. The exit status: 0, 2 for anything wrong with what was asked, 130 after Ctrl-C."""
    try:
        print(run())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
