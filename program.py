# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""
Helpers that all programs share: parser, errors and exit status, checks of values, files that appear whole, the options
of the model, the device and processes. It does not import torch, so `--help` and typing errors answer at once.
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from numbers import Real
from pathlib import Path
from types import MappingProxyType


TOY_MODEL = Path(__file__).resolve().parent / "toy_faces" / "weights"
LOCK_NAME = ".fineface.lock"
# The longest file name of most file systems is 255 bytes, and a file has ".part" and a dot more while it is written.
MAX_NAME_BYTES = 249


# ---- The command line: what is asked for, and how a program ends ----------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser for `python -m module` that raises ValueError instead of exiting, and wraps no text."""

    def __init__(self, module: str | None = None, description: str | None = None, **options):
        defaults = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        prog = None if module is None else f"python -m {module}"
        super().__init__(description=description, **{"prog": prog, **defaults, **options})

    def error(self, message: str):
        raise ValueError(message)


def run_program(
    work: Callable[[], object],
    *,
    interrupted: str = "",
    out_of_memory: str = "Ask for less at once.",
    failures: tuple[type[Exception], ...] = (),
    refusals: tuple[type[Exception], ...] = (ValueError, OSError),
) -> int:
    """
    Print what `work` returns, unless it is None, or one line about its error. `interrupted` says how to go on after
    Ctrl-C, and `out_of_memory` what to try if the memory does not suffice. Returns the exit status: 0 done, 1 out of
    memory or one of the `failures`, 2 one of the `refusals`, 130 Ctrl-C. Other errors are bugs and keep their
    traceback.
    """
    try:
        done = work()
    except KeyboardInterrupt:
        _say("; ".join(filter(None, ("interrupted", interrupted))), sys.stderr)
        return 130
    except Exception as error:
        # An error can be one of torch's only if torch has been imported.
        torch = sys.modules.get("torch")
        if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
            message, status = f"out of memory. {out_of_memory}", 1
        elif isinstance(error, (*failures, *refusals)):
            message, status = " ".join(str(error).split()), 1 if isinstance(error, failures) else 2
        else:
            raise
        _say(f"error: {message}", sys.stderr)
        return status
    # If several processes share the work, only the first one reports.
    if done is not None and int(os.environ.get("RANK", 0)) == 0:
        _say(str(done), sys.stdout)
    return 0


def _say(line: str, stream) -> None:
    # A terminal that knows only ASCII must not end a program that has just finished.
    encoding = stream.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def spell_option(name: str) -> str:
    return "--" + name.replace("_", "-")


def number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def option(default, description: str | None, low=None, high=None, *, flag: str = "", group: str = "", **argument):
    """
    A field of a dataclass which is an option of a program; a required one has the default `dataclasses.MISSING`.

    The field's type says what the option takes: a bool makes a flag that sets the opposite of the default, a Literal
    has choices, and a tuple several values. A number is from `low` to `high`, both included. `flag` is the option as
    it is written, or several ways to write it, by default the field's name. `group` is its heading in `--help`. More
    arguments of `ArgumentParser.add_argument` replace those of the type.
    """
    argument["help"] = description
    metadata = {"flag": flag, "group": group, "low": low, "high": high, "argument": argument}
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def _options_of(config: type) -> list[tuple[dataclasses.Field, object]]:
    """The fields of a dataclass that are options, each with its type, without None."""
    hints, found = typing.get_type_hints(config), []
    for field in dataclasses.fields(config):
        if "argument" in field.metadata:
            kinds = typing.get_args(hints[field.name])
            found.append((field, kinds[0] if type(None) in kinds else hints[field.name]))
    return found


def _flags_of(field: dataclasses.Field, spell: Callable[[str], str]) -> list[str]:
    return field.metadata["flag"].split() or [spell(field.name)]


def _argument_of(field: dataclasses.Field, kind) -> dict:
    if kind is bool:
        return {"action": "store_false" if field.default is True else "store_true"}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is tuple:
        # Several values after one flag, or the flag several times.
        return {"type": typing.get_args(kind)[0], "action": "extend", "nargs": "+"}
    return {"type": kind}


def add_options(
    parser, config: type, names: Sequence[str] | None = None, spell: Callable[[str], str] = "--{}".format, **defaults
) -> None:
    """
    Add the options of a dataclass, or those of its fields `names`, to a parser. `spell` makes an option of a field's
    name. `defaults` replace the dataclass's own, which apply when `take_options` leaves a value out.
    """
    groups = {"": parser}
    for field, kind in _options_of(config):
        if names is not None and field.name not in names:
            continue
        argument = _argument_of(field, kind) | field.metadata["argument"]
        argument["default"] = defaults.get(field.name, argparse.SUPPRESS)
        flags, title = _flags_of(field, spell), field.metadata["group"]
        if flags[0].startswith("-"):
            argument = {"dest": field.name, "required": field.default is dataclasses.MISSING} | argument
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(*flags, **argument)


def take_options(config: type, args: argparse.Namespace, names: Sequence[str] | None = None) -> dict:
    """The values of the options that `add_options` added, by field. Those that were not given are left out."""
    fields = [field.name for field, _ in _options_of(config) if names is None or field.name in names]
    values = {name: getattr(args, name) for name in fields if hasattr(args, name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def check_options(config, spell: Callable[[str], str] = "--{}".format) -> None:
    """Raise a ValueError unless all options of a dataclass have values of their choices and in their ranges."""
    for field, kind in _options_of(type(config)):
        value, low, high = getattr(config, field.name), field.metadata["low"], field.metadata["high"]
        if typing.get_origin(kind) is typing.Literal:
            holds, allowed = value in typing.get_args(kind), f"one of {', '.join(typing.get_args(kind))}"
        elif kind in (int, float) and low is not None:
            allowed = "an integer" if kind is int else "a finite number"
            allowed = "a probability" if field.name.endswith("_prob") else allowed
            allowed += f", at least {low}" if high is None else f" in [{low}, {high}]"
            is_number = is_integer(value) or (kind is float and is_real(value))
            holds = is_number and low <= value <= (math.inf if high is None else high)
        else:
            continue
        if value is not None and not holds:
            raise ValueError(f"`{_flags_of(field, spell)[0]}` has to be {allowed}, but is {value!r}.")


# ---- Checks of values -----------------------------------------------------------------------------------------------


def is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value) -> bool:
    """Whether `value` is a finite number that a float can hold. A whole number of 400 digits is too large."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def show_value(value) -> str:
    """`repr(value)`, shortened, because a value from a file or a network may be of any length."""
    if is_integer(value) and abs(value) > 2**64:
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:96]}…{text[-1]}"


def check_integer(name: str, value, low: int, high: int | None = None) -> None:
    """Raise a ValueError unless `value` is a whole number in [low, high]; `name` is what messages call it."""
    if not is_integer(value) or value < low or (high is not None and value > high):
        allowed = f"from {low} on" if high is None else f"from {low} to {high}"
        raise ValueError(f"`{name}` has to be a whole number {allowed}, but is {show_value(value)}.")


def is_hub_id(name: str) -> bool:
    """Whether `name` can be the id of a Hub repository. If its first part is on this disk, it is a mistyped path."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).parent.exists()


def check_folder_or_hub_id(name: str, what: str) -> None:
    """Raise an error for a path without a folder. Whether a Hub id exists, only the Hub knows."""
    if not Path(name).is_dir() and not is_hub_id(name):
        raise FileNotFoundError(f"{what} is {name!r}, which is neither a folder nor the id of a Hub repository.")


# ---- Files and folders that appear whole or not at all --------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    Yield a temporary path beside `path`, whose folder is created if needed. If the block ends without an error, the
    file that it has written there replaces `path`; otherwise that file is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        with _disk_errors(path):
            # What a killed process has left can be a hard link, and writing into it would change what it links to.
            unfinished.unlink(missing_ok=True)
            yield unfinished
            _make_readable(unfinished)
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@functools.cache
def _umask() -> int:
    # It can be read only by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _make_readable(path: Path) -> None:
    """Some libraries write files that only their owner may read."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


def _work_folder(folder: Path) -> Path:
    """
    The folder that `new_folder` writes into. It is inside `folder` if that exists, because `folder` may be a mounted
    volume, and a rename cannot cross the border of a volume.
    """
    return (folder if folder.is_dir() else folder.parent) / f".{folder.name or 'volume'}.part"


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """
    Yield an empty folder. If the block ends without an error, its entries replace all that is in `folder`; otherwise
    they are deleted. Leftovers of a killed run are deleted first.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = _work_folder(folder)
    shutil.rmtree(work, ignore_errors=True)
    new, old = work / "new", work / "old"
    try:
        with _disk_errors(folder):
            new.mkdir(parents=True)
            yield new
            for path in new.rglob("*"):
                _make_readable(path)
            if not folder.exists():
                os.replace(new, folder)
            else:
                old.mkdir()
                _swap(folder, new, old)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(folder: Path, new: Path, old: Path) -> None:
    """Move the entries of `folder` to `old` and those of `new` to `folder`; if that fails, move them back."""
    with contextlib.ExitStack() as undo:
        for source, target in ((folder, old), (new, folder)):
            for path in [path for path in source.iterdir() if path != new.parent]:
                os.replace(path, target / path.name)
                undo.callback(os.replace, target / path.name, path)
        undo.pop_all()


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors by which libraries report a full disk into an OSError."""
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error ([0-9]+)\)", str(error))
        is_full = "No space left" in str(error) or "unexpected pos" in str(error)
        if isinstance(error, OSError) or not (found or is_full):
            raise
        number = int(found[1]) if found else errno.ENOSPC
        raise OSError(number, f"{os.strerror(number)}: not everything could be written", str(path)) from error


def check_new_folder(folder: Path, overwrite: bool, marker: str) -> None:
    """
    Raise an OSError if `folder` cannot be written. A folder that is not empty needs `overwrite` and has to hold the
    file `marker`, so that nobody deletes another folder by mistake. Creates nothing.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} has to be a folder, but is a file.")
    left = {_work_folder(folder.resolve()).name, "lost+found"}
    if folder.is_dir() and any(path.name not in left for path in folder.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{str(folder)!r} is not empty. Name another folder, or replace it: `--overwrite`.")
        if not (folder / marker).is_file():
            raise FileExistsError(
                f"{str(folder)!r} holds no {marker}, so this program has not written it, and `--overwrite` will not"
                " delete it. Name another folder."
            )
    check_writable(folder / marker, repr(str(folder)))


def check_writable(path: Path, name: str | None = None) -> None:
    """Raise an OSError if `path` cannot be written; `name` is what messages call it. Creates nothing."""
    existing = next(parent for parent in path.resolve().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"{name or repr(str(path))} cannot be written: nothing can be written into {str(existing)!r}.")


def check_output(path: Path, is_folder: bool = False, suffixes: Sequence[str] = (".png",)) -> None:
    """Raise an error if nothing can be written at `path`. Creates nothing."""
    long_part = next((part for part in path.parts if len(os.fsencode(part)) > MAX_NAME_BYTES), None)
    if long_part is not None:
        raise ValueError(f"`--output` holds the name {show_value(long_part)}, which is over {MAX_NAME_BYTES} bytes.")
    if path.exists() and path.is_dir() != is_folder:
        raise OSError(f"`--output` is {str(path)!r}, which is {'no' if is_folder else 'a'} folder.")
    if not is_folder and path.suffix.lower() not in suffixes:
        raise ValueError(f"`--output` is {str(path)!r}. Pictures are PNG files: give it the ending .png.")
    check_writable(path / LOCK_NAME if is_folder else path, f"`--output` {str(path)!r}")


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """
    Keep other runs out of `folder`, which is created if needed, until the block ends with or without an error. Raises
    a ValueError if another run is at work in it.
    """
    from filelock import FileLock, Timeout

    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{str(folder)!r} is being written by another run. Wait for its end, or name another folder."
        ) from error
    try:
        yield
    finally:
        # The file is deleted before the lock is released: afterwards it may belong to another run.
        with contextlib.suppress(OSError):
            (folder / LOCK_NAME).unlink(missing_ok=True)
        lock.release()
        # A run that was refused leaves no empty folders.
        with contextlib.suppress(OSError):
            for path in new_folders:
                path.rmdir()


def check_settings(path: Path, settings: dict, what: str, defaults: Mapping = MappingProxyType({})) -> bool:
    """
    Whether the file `path` holds `settings`; False if there is no file. Settings that a file of an older version does
    not have count as `defaults`. Raises a ValueError that names those that differ.
    """
    if not path.exists():
        return False
    wanted = json.loads(json.dumps(settings))
    found = {name: value for name, value in defaults.items() if name in wanted}
    found |= json.loads(path.read_text(encoding="utf-8"))
    differences = [
        f"`{name}` was {show_value(found.get(name))} and is now {show_value(wanted.get(name))}"
        for name in {**wanted, **found}
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(
            f"{str(path.parent)!r} holds {what} made with other settings: {'; '.join(differences)}. Set another"
            " folder, or delete this one."
        )
    return True


def write_settings(path: Path, settings: dict) -> None:
    write_atomically(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def folder_digest(folder: Path) -> str:
    """A short digest of the files in a folder: their names, sizes, and first and last megabytes."""
    digest, part = hashlib.blake2b(digest_size=8), 2**20
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(part))
            file.seek(max(part, size - part))
            digest.update(file.read())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """A short digest of all bytes of a file, which may be larger than the memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, functools.partial(hashlib.blake2b, digest_size=8)).hexdigest()


# ---- The model, the device, and processes ---------------------------------------------------------------------------


def add_model_options(parser) -> None:
    """Add the options of model, device and dtype to a parser or an argument group. `settle_device` completes them."""
    parser.add_argument("--model", default=str(TOY_MODEL), help="folder or Hub id (default: the toy model)")
    parser.add_argument("--adapter", help="folder or Hub id of the AU adapter (default: the one beside the model)")
    parser.add_argument("--adapter-variant", help="sd15: of the published adapter, the files for Stable Diffusion 1.5")
    parser.add_argument("--device", help="as torch names it (default: the accelerator, if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float32 on cpu, else 16)"
    )


def settle_device(args: argparse.Namespace) -> None:
    """Replace `args.device` by a `torch.device`, and an `args.dtype` of None by the dtype that suits the device."""
    args.device = pick_device(args.device)
    args.dtype = args.dtype or ("float32" if args.device.type == "cpu" else "float16")


def pick_device(name: str | None):
    """The `torch.device` of this name; without one, the accelerator that torch finds, or the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = {"cpu": 1} | ({accelerator.type: torch.accelerator.device_count()} if accelerator else {})
    if name is None:
        # accelerate sets this variable if it was asked to leave the GPU alone.
        cpu_only = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        return torch.device("cpu" if cpu_only else list(devices)[-1])
    match = re.fullmatch("([a-z]+)(?::([0-9]+))?", name)
    if not match or int(match[2] or 0) >= devices.get(match[1], 0):
        raise ValueError(f"`--device` is {name!r}, which torch does not find here. It finds {' and '.join(devices)}.")
    return torch.device(name)


def import_av(problem: str = "MP4 needs PyAV: pip install av. A GIF needs nothing more."):
    """PyAV, which reads and writes videos; a ValueError with `problem` says how to install it."""
    try:
        import av
    except ImportError as error:
        raise ValueError(problem) from error
    return av


def start_processes(device):
    """
    The `accelerate.PartialState` of all processes that `accelerate launch` or `torchrun` has started; without these
    launchers, of this process alone.
    """
    from accelerate import PartialState

    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and device.index is not None:
        raise ValueError(
            f"`--device` is {str(device)!r}, which all processes would share. Leave out the number: each takes a"
            " device of its own."
        )
    # The first process to finish waits for the last one, which may take days.
    return PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))


def on_main_process(state, work: Callable):
    """Run `work` on the main process and return its result on all processes. If it fails, all end with one message."""
    if state.num_processes == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    outcome = [None, None]
    if state.is_main_process:
        try:
            outcome = [work(), None]
        except (ValueError, OSError) as error:
            outcome = [None, error]
    error = outcome[1]
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise error or SystemExit(2)
    return outcome[0]


def share_of(state, entries: list) -> list:
    """This process's share of `entries`: every n-th one of n processes."""
    return entries[state.process_index :: state.num_processes]
