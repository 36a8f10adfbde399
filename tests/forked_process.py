"""Commands and programs in processes of their own, forked from one that has imported Plait.

Importing PyTorch and Plait takes seconds, and the tests need hundreds of processes. Each is a real
one, with its own folder, environment, streams, limits and end; only its imports are those of a
server, which has done nothing but import. Tests of what an import does start Python itself.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from plait.cli.main import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


def run_plait(*arguments, **options):
    """`plait ARGUMENTS...`, as `run_python`."""
    return run_python("plait", *arguments, **options)


def run_python(*words, timeout=300, **options):
    """Start, wait, and return what `subprocess.run` would."""
    return ForkedProcess(*words, **options).finish(timeout)


class ForkedProcess:
    """`plait ...`, `python -m MODULE ...` or `python SCRIPT ...`, running."""

    def __init__(self, *words, cwd=None, input="", env=None, before=None):
        """Start: before is called in the process first, input is all that it can read."""
        self.words = [str(word) for word in words]
        self._folder = TemporaryDirectory()
        self._streams = [Path(self._folder.name) / name for name in ("in", "out", "err")]
        self._streams[0].write_text(input)
        surroundings = (str(cwd or Path.cwd()), dict(os.environ if env is None else env), before)
        target = (self.words, self._streams, *surroundings)
        self._process = _CONTEXT.Process(target=_become, args=target)
        self._process.start()

    def finish(self, timeout):
        """Wait; kill what is not done in time."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        out, err = (path.read_text() for path in self._streams[1:])
        self._folder.cleanup()
        return subprocess.CompletedProcess(self.words, self._process.exitcode, out, err)


def _become(words, streams, cwd, env, before):
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (the server has none)
    # The server ignores Ctrl-C; a program does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "OMP_NUM_THREADS" in env:
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    if before is not None:
        before()
    sys.argv = words
    if words[0] == "plait":
        main()
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).parent.resolve()))
        runpy.run_path(words[0], run_name="__main__")
