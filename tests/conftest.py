"""What several test files share."""
import importlib
import shlex
import sys

import model

def call(capsys, command):
    """Run a command line, "quest.py --bits 4", in this process -> (status, stdout, stderr)."""
    sys.argv = shlex.split(command)
    status = 0
    capsys.readouterr()
    try:
        model.run(importlib.import_module(sys.argv[0].removesuffix(".py")).main)
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()
