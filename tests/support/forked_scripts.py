"""The checks' scripts in forks of one process that has imported their libraries already.

A fresh process imports for four seconds, which a hundred tests would wait for. A fork has nothing
of the project or of the tests in it either.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ForkedScripts:
    """Stands in for `script_process.completed`: the process starts with the first command."""

    def __init__(self, offline: Mapping[str, str]) -> None:
        """offline: what its environment has besides ours."""
        self.offline = offline
        self.server: subprocess.Popen[str] | None = None
        self.owner = 0  # the process that has started it: a fork of a test starts its own
        self.asked = 0

    def completed(
        self, command: Sequence[str], environment: Mapping[str, str]
    ) -> tuple[int, str, str]:
        assert list(command[:2]) == [sys.executable, "-P"]
        if self.server is None or self.owner != os.getpid():
            self.owner = os.getpid()
            self.server = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | dict(self.offline),
                text=True,
            )
        assert self.server.stdin is not None and self.server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            outputs = [str(Path(folder, name)) for name in ("stdout", "stderr")]
            self.asked += 1
            asked = [list(command[2:]), dict(environment), str(Path.cwd()), outputs]
            print(json.dumps([self.asked, *asked]), file=self.server.stdin, flush=True)
            number, code = 0, 0
            while number != self.asked:  # a test that was interrupted has not read its answer
                number, code = map(int, self.server.stdout.readline().split())
            printed, complaints = (
                Path(output).read_text(errors="backslashreplace") for output in outputs
            )
        return code, printed, complaints

    def close(self) -> None:
        if self.server is not None and self.owner == os.getpid():
            self.server.communicate()


def serve() -> None:
    """Forks for each line of stdin, and answers with its number and the exit code."""
    for line in sys.stdin:
        number, *asked = json.loads(line)
        child = os.fork()
        if not child:
            os._exit(run(*asked))
        _, status = os.waitpid(child, 0)
        print(number, os.waitstatus_to_exitcode(status), flush=True)


def run(words: list[str], environment: dict[str, str], folder: str, outputs: list[str]) -> int:
    """The script as if Python had been started with it; its exit code."""
    for descriptor, output in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = words
    code: Any = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as left:
        code = left.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


if __name__ == "__main__":
    import transformers.modeling_utils  # noqa: F401

    serve()
