"""What a process of pytest does before it collects tests. Components and fixtures that they share are in tiny.py."""

import gc
import signal


# Where tests run in the background, Ctrl-C is ignored, and some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    # With workers (-n), this process only hands out tests, and they would wait until it has imported torch.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        # Imports make half a million objects, none of them garbage. Python would look through them again and again.
        gc.disable()
        config.pluginmanager.import_plugin("tiny")


def pytest_collection_finish():
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()
