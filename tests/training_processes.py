"""
Trainings in processes of their own, for tests in which one has to die, runs out of disk or has a second one beside it.

Reads a JSON list of runs a line, and answers with a list of their exit statuses and messages. The runs of a line go on
at the same time. All are forks of this process, so that the imports are paid for once.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile

import train_fineface
from training import checkpoints


def kill_at(module_name: str, function_name: str, argument: str) -> None:
    """Die in place of a call of a function that writes, renames or removes, once it is about what `argument` is in."""
    module = getattr(checkpoints, module_name) if module_name else checkpoints
    function = getattr(module, function_name)

    def killed(*args, **kwargs):
        if any(argument in str(value) for value in args):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(module, function_name, killed)


def run(arguments: list[str], environment: dict, kill: list | None, largest_file: int | None) -> int:
    os.environ |= environment
    if kill is not None:
        kill_at(*kill)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv[1:] = arguments
    return train_fineface.start()


def start(settings: dict):
    messages = tempfile.TemporaryFile("w+")
    process_id = os.fork()
    if process_id == 0:
        os.dup2(messages.fileno(), 1)
        os.dup2(messages.fileno(), 2)
        os._exit(run(settings["arguments"], settings["environment"], settings["kill"], settings["largest_file"]))
    return process_id, messages


for line in sys.stdin:
    answers = []
    with contextlib.ExitStack() as stack:
        for process_id, messages in [start(settings) for settings in json.loads(line)]:
            stack.enter_context(messages)
            _, status = os.waitpid(process_id, 0)
            messages.seek(0)
            answers.append({"status": os.waitstatus_to_exitcode(status), "messages": messages.read()})
    print(json.dumps(answers), flush=True)
# Without the seconds in which Python takes all that is imported apart.
os._exit(0)
