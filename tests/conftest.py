"""What several test files share."""
import importlib
import re
import shlex
import sys

import model

TEXT = "".join(f"def f{i}(x): return {'self index value'.split()[i % 3]} + {i * i}\n"
               for i in range(800))

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

def check_refused(result, *names):
    """Did `call` end in status 2 and one line on stderr, with all these in it?"""
    status, _, err = result
    assert status == 2
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    for name in names:
        assert name in err, err
