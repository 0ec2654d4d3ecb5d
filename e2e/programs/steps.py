"""steps.py: how long the test programs of Python go on."""

import os
import sys


def asked_to_end():
    """Whether the file is there that STOP_FILE names."""
    return os.path.exists(os.environ.get("STOP_FILE", ""))


def steps():
    """Counts from 1 to the program's first argument, or until the program is asked to end."""
    for step in range(1, int(sys.argv[1]) + 1):
        yield step
        if asked_to_end():
            return
