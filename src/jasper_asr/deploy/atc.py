"""atc, Huawei's compiler, as a program: where it is, running it, and what it says when it fails.

Written against the vendor's documentation and tested against a double of atc; not yet run on a board.
"""

import os
import re
import selectors
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from jasper_asr.errors import CompileError

SUCCESS = "ATC run success, welcome to the next use."

PLAIN_PATH = re.compile(r"[A-Za-z0-9_./\u4e00-\u9fff-]+")
"""Letters that atc takes in a path: no space, and beyond ASCII only Chinese."""


def plain_path(model: Path, work: Path) -> str:
    """A path to `model` that atc accepts: its own, or a link inside `work`."""
    path = str(model.resolve())
    if PLAIN_PATH.fullmatch(path):
        return path
    (work / "model.onnx").symlink_to(path)
    return "model.onnx"


def find_atc(atc: str | os.PathLike[str] | None) -> str | None:
    """Absolute path of the program; None if there is none. Raises CompileError for an `atc` that is no program."""
    if atc is not None:
        found = shutil.which(atc)
        if found is None:
            raise CompileError(f"{os.fspath(atc)}: no such program; give the path of atc, or leave it out")
        return os.path.abspath(found)
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if home := os.environ.get("ASCEND_TOOLKIT_HOME"):
        folders += [os.path.join(home, "compiler", "bin"), os.path.join(home, "bin")]
    found = shutil.which("atc", path=os.pathsep.join(folders))
    return os.path.abspath(found) if found else None


def atc_version(program: str) -> str | None:
    """`Version=...` of the version.info near atc, which has no option that prints it; None if there is none."""
    for folder in Path(program).resolve().parents[1:3]:
        with suppress(OSError):
            text = (folder / "version.info").read_text(encoding="utf-8", errors="replace")
            if match := re.search(r"^\s*version\s*=\s*(\S+)", text, re.IGNORECASE | re.MULTILINE):
                return match[1]
    return None


_CURES = {
    "E10001": ("an option has a bad value", "check --soc and the precision against this CANN version"),
    "E10002": ("it cannot parse the input shape", "export the model again with jasper export --target ascend"),
    "E10016": ("a name is not in the model", "export the model again, or mend --keep-fp32"),
    "E10040": ("the gears do not fit the model", "give 2 to 100 gears for the sizes that are open"),
    "E10041": ("it cannot load the model", "export it again; check the file's rights and the free memory"),
    "E10045": ("the gears do not fit the model", "give 2 to 100 gears for the sizes that are open"),
    "E10501": ("its environment is not set", "source set_env.sh of the CANN toolkit first (ASCEND_OPP_PATH)"),
    "E13010": ("its environment is not set", "source set_env.sh of the CANN toolkit first (ASCEND_OPP_PATH)"),
    "E16002": ("it has no parser for an op at this opset", "export with --target ascend --opset 11"),
    "E19999": ("an internal error", "run the command by hand with --log=info and read its log"),
    "EZ9999": ("an internal error", "run the command by hand with --log=info and read its log"),
}
"""Code that atc prints -> (cause, cure)."""

_CODE = re.compile(r"\b(E[0-9A-Z][0-9]{4}):\s*(.*)")
_STAMP = re.compile(r"\[PID: ?\d+\]\s*|\d{4}-\d\d-\d\d-[\d:.]+\s*")
_LONGEST_LINE = 1 << 16


@dataclass
class Outcome:
    """What atc said and how it ended; `returncode` None: it ran out of time."""

    timeout: float
    returncode: int | None = None
    success: bool = False
    code: str = ""
    complaint: str = ""
    solution: str = ""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=3))

    def read(self, line: str) -> None:
        self.success |= SUCCESS in line
        if line.strip():
            self.tail.append(line.strip()[:200])
        if not self.code and (match := _CODE.search(line)):
            self.code, self.complaint = match[1], _STAMP.sub("", match[2]).strip(" .")[:200]
        elif self.code and not self.solution and (match := re.search(r"Solution:\s*(.+)", line)):
            self.solution = match[1].strip(" .")[:200]

    def reason(self, soc: str) -> str | None:
        """Why this is a failure, with the cure; None for success."""
        if self.returncode is None:
            return f"atc did not finish within {self.timeout:g} s and was stopped; give it more time"
        if self.code and (self.returncode or not self.success):
            return self._coded(soc)
        if self.returncode < 0:
            name = signal.Signals(-self.returncode).name
            return f"atc was killed by {name}; usually for memory: compile where there is more, or with fewer gears"
        words = f"(its last words: {' | '.join(self.tail) or 'none'})"
        if self.returncode:
            return f"atc failed with exit code {self.returncode} {words}; run it by hand with --log=info"
        if not self.success:
            return f"atc ended without reporting success {words}; run it by hand with --log=info"
        return None

    def _coded(self, soc: str) -> str:
        cause, cure = _CURES.get(self.code, ("an error", self.solution or "look the code up in the ATC manual"))
        if self.code == "E10001" and soc == "Ascend310":
            cure += "; CANN 8.3 and later know no Ascend310"
        said = f": {self.complaint}" if self.complaint else ""
        return f"atc failed with {self.code}, {cause}{said}; {cure}"


def run_atc(argv: list[str], folder: Path, timeout: float, progress: Callable[[str], None] | None) -> Outcome:
    """Run atc to its end or to the timeout; nothing it started lives on. Raises CompileError if it cannot start."""
    outcome = Outcome(timeout)
    deadline = time.monotonic() + timeout
    try:
        process = subprocess.Popen(
            argv,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CompileError(f"{argv[0]}: cannot be run ({reason}); install the CANN toolkit again") from error
    try:
        for line in _lines(process, deadline):
            outcome.read(line)
            if progress:
                progress(line)
        outcome.returncode = process.wait(max(deadline - time.monotonic(), 0.1))
    except (TimeoutError, subprocess.TimeoutExpired):
        pass
    finally:
        _end_group(process)
    return outcome


def _lines(process: "subprocess.Popen[bytes]", deadline: float) -> Iterator[str]:
    """Lines of the output, until it ends or atc does. Raises TimeoutError at the deadline."""
    assert process.stdout is not None
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            ended = process.poll() is not None
            if not selector.select(min(left, 0.2)):
                if ended:  # a helper of its own still holds the pipe
                    break
                continue
            chunk = os.read(process.stdout.fileno(), _LONGEST_LINE)
            if not chunk:
                break
            *lines, pending = (pending + chunk).splitlines(keepends=True)
            if pending.endswith((b"\n", b"\r")) or len(pending) > _LONGEST_LINE:
                lines, pending = [*lines, pending], b""
            yield from (line.decode("utf-8", "replace").rstrip("\r\n") for line in lines)
        else:
            raise TimeoutError
    if pending:
        yield pending.decode("utf-8", "replace")


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """Stop the whole process group: politely, then for good."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)
            if number == signal.SIGTERM:
                time.sleep(0.05)  # for its children, which are not ours to wait for
    if process.stdout:
        process.stdout.close()
