"""A command carried out in the process of the test: as it ends, without what starting one takes."""

from __future__ import annotations

import io
import os
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from svend.cli import main
from tests.conftest import Workplace
from tests.registry import store

MODULE = ["-m", "svend"]


def run_here(workplace: Workplace, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Do what `workplace.run` does of a `python -m svend`, where no process is what is tested."""
    assert command[1:3] == MODULE, command
    told = io.StringIO()
    with (store(workplace.folder), mock.patch.dict(os.environ, workplace.environment),
          redirect_stdout(told), redirect_stderr(told)):
        try:
            code = main(command[3:])
        except SystemExit as ended:  # argparse ends a process by itself
            code = ended.code if isinstance(ended.code, int) else 1
    return subprocess.CompletedProcess(command, code, told.getvalue())
