"""
What a process of pytest does before it collects tests, and the processes that tests start. It imports nothing large;
components and fixtures made of them are in tiny.py.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest


# Where tests run in the background, Ctrl-C is ignored, and some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ADDRESS = "FINEFACE_TEST_PROCESSES"
# Long ones begin first, and then those with the most tests: so no worker is alone with a long one at the end.
LONG_FILES = ("app", "pipeline_fineface", "train_fineface", "evaluation", "train_your_own", "recipes", "train_xl")
LONG_FILES += ("from_hub", "training_checkpoints", "toy_faces", "benchmarks")


def pytest_configure(config):
    # With workers (-n), this process only hands out tests, and they would wait until it has imported torch.
    if not hasattr(config, "workerinput") and config.getoption("numprocesses", None):
        with ExitStack() as stack:
            os.environ[ADDRESS] = stack.enter_context(served_processes())
            config.add_cleanup(stack.pop_all().close)
        # Files keep the order that they have below.
        config.option.loadscopereorder = False
    else:
        # Imports make half a million objects, none of them garbage. Python would look through them again and again.
        gc.disable()
        config.pluginmanager.import_plugin("tiny")


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        counts = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path.stem.removeprefix("test_") not in LONG_FILES, -counts[item.path]))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its state, and its precision, for the life of a process; here a process holds many runs."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def pytest_collection_finish():
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


@contextmanager
def served_processes() -> Iterator[str]:
    """Start processes.py. Yields the path of the socket at which it takes runs, at once: it reads them later."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        environment |= {"HF_HOME": f"{folder}/hf", "HF_HUB_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
        listener.bind(f"{folder}/runs")
        listener.listen()
        command = [sys.executable, str(Path(__file__).with_name("processes.py")), str(listener.fileno())]
        pipe = {"stdin": subprocess.PIPE, "pass_fds": [listener.fileno()]}
        with subprocess.Popen(command, env=environment, **pipe) as process:
            yield f"{folder}/runs"
            process.stdin.close()


@pytest.fixture(scope="session")
def processes(tmp_path_factory) -> Iterator[Callable[..., list[dict]]]:
    """
    Run Python code beside each other, each in a process, and return each `status`, `output` and `messages`. A run has
    `code` and, where wanted, `arguments`, its working `folder`, folders of modules as its `path`, more variables as
    its `environment`, `kill`, a function and a part of an argument at which it dies, `largest_file` in bytes,
    `hub`, the address of one that it may reach, and `bare`, whether it finds nothing imported but what diffusers
    imports with Stable Diffusion.

    They compute in one thread, and find the cache of the Hub empty at the first of them.
    """
    defaults = {"arguments": [], "folder": tmp_path_factory.mktemp("processes"), "path": [], "environment": {}}
    defaults |= {"kill": None, "largest_file": None, "hub": None, "bare": False}
    with ExitStack() as stack:
        # All workers share what the process that hands out tests has started.
        address = os.environ.get(ADDRESS) or stack.enter_context(served_processes())
        connection = stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.connect(address)
        stream = stack.enter_context(connection.makefile("rw"))

        def processes(*runs: dict) -> list[dict]:
            stream.write(json.dumps([defaults | run for run in runs], default=str) + "\n")
            stream.flush()
            return json.loads(stream.readline())

        yield processes
