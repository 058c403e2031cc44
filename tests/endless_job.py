"""A job for other processes, in a module of its own that they import in no time."""

import time
from pathlib import Path


def touch_for_ever(path: Path) -> None:
    while True:
        path.touch()
        time.sleep(0.1)
