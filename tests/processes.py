"""
Python code in processes of its own, as `python -c code arguments` runs it, for tests in which one has to die, runs out
of disk, has a second one beside it, or must not find the clone.

Each worker of pytest has a connection, in which it writes a JSON list of runs a line, and reads a list of their exit
statuses, outputs and messages. The runs of a line go on at the same time. All are forks of this process, which has
imported the large libraries and nothing of ours, so that these imports are paid for once. What a run is made of, the
fixture `processes` of conftest.py says.
"""

import gc
import importlib
import json
import os
import pkgutil
import resource
import select
import signal
import socket
import sys
import tempfile
import traceback
import types

from diffusers import StableDiffusionPipeline  # noqa: F401


MODULES_OF_DIFFUSERS = frozenset(sys.modules)

import accelerate  # noqa: E402, F401
import datasets  # noqa: E402
import huggingface_hub  # noqa: E402
import peft  # noqa: E402, F401
import torch  # noqa: E402, F401
from diffusers import AutoencoderKL, StableDiffusionXLPipeline  # noqa: E402, F401
from transformers import CLIPTextModelWithProjection, CLIPTokenizer  # noqa: E402, F401


def kill_at(name: str, argument: str) -> None:
    """Die in place of a call of a function that writes, renames or removes, once it is about what `argument` is in."""
    module_name, _, function_name = name.rpartition(".")
    module, function = importlib.import_module(module_name), pkgutil.resolve_name(name)

    def killed(*args, **kwargs):
        if any(argument in str(value) for value in args):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(module, function_name, killed)


def talk_to(hub: str) -> None:
    """As `HF_ENDPOINT=hub HF_HUB_DISABLE_XET=1`, which these libraries read when they are imported."""
    constants = huggingface_hub.constants
    constants.ENDPOINT = datasets.config.HF_ENDPOINT = huggingface_hub.hf_api.api.endpoint = hub
    constants.HUGGINGFACE_CO_URL_TEMPLATE = hub + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False
    constants.HF_HUB_DISABLE_XET = True


def run(settings: dict) -> int:
    os.chdir(settings["folder"])
    os.environ |= settings["environment"]
    sys.argv, sys.path = ["-c", *settings["arguments"]], ["", *settings["path"], *sys.path]
    # This module is none of the run's: processes that the run starts would import it.
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    try:
        if settings["bare"]:
            for name in sys.modules.keys() - MODULES_OF_DIFFUSERS:
                del sys.modules[name]
        if settings["hub"] is not None:
            talk_to(settings["hub"])
        if settings["kill"] is not None:
            kill_at(*settings["kill"])
        if settings["largest_file"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (settings["largest_file"], settings["largest_file"]))
        exec(compile(settings["code"], "-c", "exec"), main.__dict__)
        return 0
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()


def start(settings: dict):
    outputs = [tempfile.TemporaryFile("w+") for _ in range(2)]
    process_id = os.fork()
    if process_id == 0:
        for output, number in zip(outputs, (1, 2), strict=True):
            os.dup2(output.fileno(), number)
        os._exit(run(settings))
    return process_id, outputs


def serve(connection: socket.socket) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    stream = connection.makefile("rw")
    for line in stream:
        answers = []
        for process_id, outputs in [start(settings) for settings in json.loads(line)]:
            _, status = os.waitpid(process_id, 0)
            texts = []
            for output in outputs:
                with output:
                    output.seek(0)
                    texts.append(output.read())
            answers.append({"status": os.waitstatus_to_exitcode(status), "output": texts[0], "messages": texts[1]})
        stream.write(json.dumps(answers) + "\n")
        stream.flush()


# A run does not search the half a million objects of these libraries for garbage.
gc.freeze()
# This folder is none in which a run looks for modules.
sys.path.pop(0)
# Nobody waits for the processes that serve the connections.
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
with socket.socket(fileno=int(sys.argv[1])) as listener:
    # Whoever has started this closes its standard input at the end.
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        with connection:
            if os.fork() == 0:
                listener.close()
                serve(connection)
                os._exit(0)
# Without the seconds in which Python takes all that is imported apart.
os._exit(0)
