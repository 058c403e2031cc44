import io
import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch

import program
from program import (
    Parser,
    add_options,
    check_integer,
    check_new_folder,
    check_options,
    is_hub_id,
    is_real,
    new_folder,
    only_run_in,
    option,
    replacing,
    run_program,
    show_value,
    spell_option,
    take_options,
    write_atomically,
)


ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, *arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def fail_with(error: BaseException):
    def work():
        raise error

    return work


# --------------------------------------------------------------------------------------------------------------------
# The end of a program
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("wrong\nin two lines"), 2, "error: wrong in two lines\n"),
        (FileNotFoundError("no such file"), 2, "error: no such file\n"),
        (torch.OutOfMemoryError("a page of numbers"), 1, "error: out of memory. Ask for less at once.\n"),
        (MemoryError(), 1, "error: out of memory. Ask for less at once.\n"),
        (ArithmeticError("the tool"), 1, "error: the tool\n"),
        (KeyboardInterrupt(), 130, "interrupted; go on\n"),
    ],
)
def test_each_error_is_one_line_and_a_status(error, status, message, capsys):
    assert run_program(fail_with(error), interrupted="go on", failures=(ArithmeticError,)) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", message)


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 / 0)


def test_only_the_first_of_several_processes_reports(monkeypatch, capsys):
    assert run_program(lambda: "done") == 0 and run_program(lambda: None) == 0
    monkeypatch.setenv("RANK", "1")
    assert run_program(lambda: "done") == 0
    assert capsys.readouterr().out == "done\n"


def test_a_terminal_that_knows_ascii_only_ends_no_finished_program(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run_program(lambda: "фото.png") == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"\\u0444\\u043e\\u0442\\u043e.png\n"


def test_a_parser_raises_instead_of_exiting():
    parser = Parser("some.module", "  two\n  lines")
    parser.add_argument("--count", type=int)
    with pytest.raises(ValueError, match="--cou"):
        parser.parse_args(["--cou", "1"])
    assert parser.prog == "python -m some.module" and "  two\n  lines" in parser.format_help()


@dataclass(frozen=True)
class Request:
    source: str = option(MISSING, "where from", flag="source")
    output: Path = option(MISSING, "where to")
    num_steps: int | None = option(None, "how many", low=1, group="drawing")
    drop_prob: float = option(0.5, "how often", 0, 1)
    mode: Literal["fast", "slow"] = option("fast", "how")
    is_kept: bool = option(True, "throw it away", flag="-t --throw-away")
    names: tuple[str, ...] = option((), "which")

    def __post_init__(self):
        check_options(self, spell_option)


def read_request(*words: str) -> Request:
    parser = Parser("some.module")
    add_options(parser, Request, spell=spell_option)
    return Request(**take_options(Request, parser.parse_args(words)))


def test_the_fields_of_a_dataclass_are_the_options_of_a_program():
    request = read_request("a", "--output", "b")
    assert request == Request("a", Path("b"))
    given = read_request("a", "--output=b", "--num-steps=3", "-t", "--names", "x", "y", "--names=z", "--mode=slow")
    assert given == replace(request, num_steps=3, is_kept=False, names=("x", "y", "z"), mode="slow")
    # What replaces a default stands, and what belongs to others is left alone.
    parser = Parser("some.module")
    add_options(parser, Request, ("num_steps", "drop_prob"), num_steps=7)
    assert take_options(Request, parser.parse_args([])) == {"num_steps": 7}
    assert "\ndrawing:\n  --num_steps" in parser.format_help()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "--output"),
        (["a", "--output=b", "--mode=other"], "--mode"),
        (["a", "--output=b", "--num-steps=0"], "`--num-steps` has to be an integer, at least 1, but is 0"),
        (["a", "--output=b", "--drop-prob=nan"], r"`--drop-prob` has to be a probability in \[0, 1\], but is nan"),
    ],
)
def test_values_that_an_option_cannot_have_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        read_request(*words)


def test_values_are_checked_in_python_too():
    with pytest.raises(ValueError, match="`--mode` has to be one of fast, slow, but is 'other'"):
        Request("a", Path("b"), mode="other")
    with pytest.raises(ValueError, match="`--num-steps` has to be an integer"):
        Request("a", Path("b"), num_steps=1.5)


def test_importing_it_does_not_import_torch():
    result = run_python("import program, sys; print('torch' in sys.modules)")
    assert result.stdout == "False\n", result.stderr


# --------------------------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------------------------


def test_numbers_that_no_float_holds_are_no_numbers():
    assert is_real(2.5) and is_real(-3)
    assert not any(map(is_real, (True, "1", None, float("nan"), float("inf"), 10**400)))
    assert show_value(10**5000) == "a whole number of 16610 bits" and len(show_value("x" * 999)) < 120


@pytest.mark.parametrize("value", [True, 1.0, "1", 0, 11, pytest.param(10**5000, id="huge")])
def test_a_whole_number_out_of_range_is_named(value):
    with pytest.raises(ValueError, match="`--count` has to be a whole number from 1 to 10, but is "):
        check_integer("--count", value, 1, 10)


def test_a_mistyped_path_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert is_hub_id("user/model-1.5")
    assert not any(map(is_hub_id, ("models/other", "./user/model", "a/b/c", "model", "user/mo del")))


# --------------------------------------------------------------------------------------------------------------------
# Files and folders
# --------------------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    # What a killed run has left.
    path.parent.mkdir()
    (path.parent / ".a.txt.part").write_text("half")
    write_atomically(path, "Ä")
    assert path.read_bytes() == "Ä".encode()
    with pytest.raises(ZeroDivisionError), replacing(path) as unfinished:
        unfinished.write_text("half")
        raise ZeroDivisionError
    assert path.read_bytes() == "Ä".encode() and [path.name for path in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    code = """
import os, sys
os.umask(0o022)
from pathlib import Path
from program import new_folder, replacing
folder = Path(sys.argv[1])
with replacing(folder / "file") as file:
    file.touch(0o600)
with new_folder(folder / "new") as new:
    (new / "part").mkdir(0o700)
    (new / "part" / "weights").touch(0o600)
"""
    assert run_python(code, tmp_path).returncode == 0
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    assert modes == {"file": "0o644", "new": "0o755", "part": "0o755", "weights": "0o644"}


def write_version(folder: Path, version: str) -> None:
    with new_folder(folder) as new:
        (new / "part").mkdir()
        (new / "part" / "version").write_text(version)
        (new / f"only_{version}").touch()


def entries(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_appears_whole_or_not_at_all(is_there, tmp_path):
    folder = tmp_path / "a" / "out"
    if is_there:
        folder.mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), new_folder(folder) as new:
        (new / "half").touch()
        raise ZeroDivisionError
    assert entries(tmp_path / "a") == (["out"] if is_there else [])
    write_version(folder, "1")
    write_version(folder, "2")
    assert entries(folder) == ["only_2", "part", "part/version"] and entries(tmp_path)[:2] == ["a", "a/out"]
    assert (folder / "part" / "version").read_text() == "2"


def test_a_folder_that_is_there_is_filled_from_within(tmp_path, monkeypatch):
    """It may be the root of a volume: nothing can be renamed into it from outside, and it cannot be renamed itself."""
    folder, replace = tmp_path / "volume", os.replace
    folder.mkdir()

    def replace_within_a_volume(source, target):
        is_inside = [folder in Path(path).parents for path in (source, target)]
        if is_inside != [True, True]:
            raise OSError(18, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_within_a_volume)
    write_version(folder, "1")
    write_version(folder, "2")
    assert entries(folder) == ["only_2", "part", "part/version"]


def test_what_a_killed_run_has_left_is_cleared(tmp_path):
    code = """
import os, sys
from pathlib import Path
from program import new_folder
with new_folder(Path(sys.argv[1])) as new:
    (new / "half").touch()
    os._exit(9)
"""
    for folder in (tmp_path / "new", tmp_path / "there"):
        if folder.name == "there":
            folder.mkdir()
        assert run_python(code, folder).returncode == 9
        # The leftovers are no content.
        check_new_folder(folder, overwrite=False, marker="version")
        write_version(folder, "1")
        assert entries(folder) == ["only_1", "part", "part/version"]
    assert entries(tmp_path)[0] == "new" and not list(tmp_path.glob(".*"))


def test_a_swap_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    folder, replace = tmp_path / "out", os.replace
    write_version(folder, "1")

    def replace_but_for_one(source, target):
        if Path(target) == folder / "only_2":
            raise OSError("broken")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_but_for_one)
    with pytest.raises(OSError, match="broken"):
        write_version(folder, "2")
    assert entries(folder) == ["only_1", "part", "part/version"] and (folder / "part" / "version").read_text() == "1"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit of this kind")
@pytest.mark.parametrize("library", ["safetensors", "torch"])
def test_a_full_disk_is_an_error_of_one_line(library, processes, tmp_path):
    code = """
import sys
import tracemalloc
from pathlib import Path
import safetensors.torch, torch
from program import new_folder, run_program
tensors = {"weight": torch.zeros(100_000)}

def work():
    with new_folder(Path(sys.argv[1])) as folder:
        if sys.argv[2] == "torch":
            torch.save(tensors, folder / "weights")
        else:
            safetensors.torch.save_file(tensors, folder / "weights")

sys.exit(run_program(work))
"""
    run = {"code": code, "arguments": [tmp_path / "out", library], "path": [ROOT], "largest_file": 50_000}
    (answer,) = processes(run)
    message = answer["messages"]
    assert answer["status"] == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert str(tmp_path / "out") in message and list(tmp_path.iterdir()) == []


def test_a_second_run_in_a_folder_is_refused_until_the_first_ends(tmp_path):
    code = "import sys; from pathlib import Path; from program import only_run_in\n"
    code += "with only_run_in(Path(sys.argv[1])): print('in')"
    with only_run_in(tmp_path / "out"):
        second = run_python(code, tmp_path / "out")
        assert second.returncode != 0 and "is being written by another run" in second.stderr
    # Nothing was written, so the folder is gone again.
    assert list(tmp_path.iterdir()) == []
    assert run_python(code, tmp_path / "out").stdout == "in\n"


def test_a_killed_run_keeps_nobody_out(tmp_path):
    code = "import os, sys; from pathlib import Path; from program import only_run_in\n"
    code += "with only_run_in(Path(sys.argv[1])): os._exit(9)"
    assert run_python(code, tmp_path).returncode == 9
    with only_run_in(tmp_path):
        pass


def test_digests_tell_folders_apart(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    first = program.folder_digest(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"a": 2}))
    assert first != program.folder_digest(tmp_path)


def test_the_digest_of_a_file_does_not_need_its_size_in_memory(tmp_path):
    with (path := tmp_path / "table.csv").open("wb") as file:
        file.truncate(2**25)
    tracemalloc.start()
    digest, (_, peak) = program.file_digest(path), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22
    path.write_bytes(bytes(2**25 - 1) + b"1")
    assert digest != program.file_digest(path) and len(digest) == 16
