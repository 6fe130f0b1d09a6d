"""A client process of the loopback Hub: the real libraries, imported after their environment is set.

One process answers many requests, since importing the libraries takes seconds. What it prints is kept in `output`.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from loopback_hub import LoopbackHub


ROOT = Path(__file__).resolve().parent.parent
_LOOP = """
import json, sys, traceback
answers = open(int(sys.argv[1]), "w")
shared = {}
for line in sys.stdin:
    request = json.loads(line)
    scope = dict(shared, **request["values"])
    try:
        exec(compile(request["code"], "<snippet>", "exec"), scope)
        if request["shared"]:
            shared.update(scope)
        answer = {"result": scope.get("result")}
    except BaseException as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        answer = {"error": kinds, "message": str(error), "traceback": traceback.format_exc()}
    print(json.dumps(answer, default=str), file=answers, flush=True)
"""


class ClientError(Exception):
    """An exception in the client process: the names of its classes, and its message."""

    def __init__(self, kinds: list[str], message: str, traceback: str):
        super().__init__(traceback)
        self.kinds, self.message = kinds, message


class HubClient:
    """A Python process with this Hub as its Hub, an HF_HOME of its own and one token."""

    def __init__(self, hub: LoopbackHub, home: Path, token: str | None, **env: str):
        home.mkdir(parents=True, exist_ok=True)
        self.output_path = home / "output.txt"
        read, write = os.pipe()
        env = hub.env(home, token, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **env)
        with open(self.output_path, "a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", _LOOP, str(write)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[write],
                env=env,
                cwd=home,
                text=True,
                start_new_session=True,
            )
        os.close(write)
        self.answers = os.fdopen(read)

    def __enter__(self) -> "HubClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def output(self) -> str:
        return self.output_path.read_text()

    def start(self, code: str, shared: bool = False, **values: Any) -> None:
        """Send a snippet and do not wait for it. `values` are its variables; `shared` keeps what it defines."""
        assert self.process.stdin is not None
        request = {"code": textwrap.dedent(code), "values": values, "shared": shared}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def wait(self) -> Any:
        """What the snippet left in `result`; raises [`ClientError`] with its exception."""
        line = self.answers.readline()
        assert line, f"the client process died: {self.output[-3000:]}"
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(answer["error"], answer["message"], answer["traceback"])
        return answer["result"]

    def run(self, code: str, shared: bool = False, **values: Any) -> Any:
        self.start(code, shared=shared, **values)
        return self.wait()

    def kill(self) -> None:
        """kill -9, the whole group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.answers):
            if stream is not None and not stream.closed:
                stream.close()
