"""The rules of docs/architecture.md, read from the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import jasper_asr

ROOT = Path(jasper_asr.__file__).parent
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

ROOMS = [
    ["cli"],
    ["train", "serve", "tune", "deploy"],
    ["evaluate", "benchmark"],
    ["stream"],
    ["outputs"],
    ["transcribe", "inputs"],
    ["backends"],
    ["windows"],
    ["model", "data", "features", "formats", "calibrate"],
    ["beam", "align"],
    ["config", "audio", "text", "decode", "wer"],
    ["lm"],
    ["files"],
    ["errors", "_version"],
]
"""From the top down; a room is a module or a package. Rooms of one line do not know each other."""

LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}

TORCH_ANYWHERE = ("model/net.py", "model/net_spectral.py", "train/")
TORCH_IN_FUNCTIONS = ("benchmark/subject.py", "cli/training.py", "model/checkpoint.py")

HEAVY = ["inflect", "onnx", "onnxruntime", "safetensors", "soundfile", "soxr", "torch"]


class Import(NamedTuple):
    """A module that is imported; `at_once`: while its file is, not within a function nor for types only."""

    name: str
    at_once: bool


def imports(path: str) -> Iterator[Import]:
    yield from _imports(ast.parse((ROOT / path).read_text(encoding="utf-8")), at_once=True)


def _imports(node: ast.AST, at_once: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, at_once) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            # `from jasper_asr import audio` imports a room
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (Import(name if child.module == "jasper_asr" else str(child.module), at_once) for name in names)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _for_types(child)
            yield from _imports(child, at_once and not inside)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def room(module: str) -> str:
    """`model/graph.py`, `jasper_asr.model.graph` -> `model`."""
    parts = module.removesuffix(".py").replace("/", ".").removeprefix("jasper_asr.").split(".")
    return "_version" if parts[0] == "__version__" else parts[0]


def test_every_module_has_a_room():
    assert {room(path) for path in MODULES} <= {*LEVEL, "__init__"}
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES)
def test_imports_go_down(path):
    if path == "__init__.py":  # the front door, which opens the spine when asked to
        return
    for found in imports(path):
        if found.name.split(".")[0] == "jasper_asr" and room(found.name) != room(path):
            assert LEVEL[room(found.name)] > LEVEL[room(path)], f"{path} imports {found.name}"


@pytest.mark.parametrize("path", MODULES)
def test_torch_stays_in_its_place(path):
    at_once = [found.at_once for found in imports(path) if found.name.split(".")[0] == "torch"]
    if at_once and not path.startswith(TORCH_ANYWHERE):
        assert path in TORCH_IN_FUNCTIONS
        assert not any(at_once)


@pytest.mark.parametrize("path", MODULES)
def test_slow_imports_wait_until_they_are_needed(path):
    """At the top of a file only where nobody comes by chance: torch for training, onnx for writing a graph."""
    at_once = {found.name.split(".")[0] for found in imports(path) if found.at_once} & set(HEAVY)
    allowed = {"torch"} if path.startswith(TORCH_ANYWHERE) else {"onnx"} if path == "model/graph.py" else set()
    assert at_once <= allowed


@pytest.mark.parametrize("module", ["jasper_asr", "jasper_asr.cli", "jasper_asr.transcribe", "jasper_asr.evaluate"])
def test_importing_loads_no_runtime(module):
    script = f"import sys, {module}; print(*sorted(set(sys.modules) & set({HEAVY})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("\n", "")


@pytest.mark.parametrize("path", MODULES)
def test_only_the_command_line_prints(path):
    printing = [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call | ast.Attribute) and _prints(node)
    ]
    assert not printing or path.startswith("cli/"), printing


def _prints(node: ast.Call | ast.Attribute) -> bool:
    if isinstance(node, ast.Attribute):
        return ast.unparse(node) in ("sys.stdout", "sys.stderr")
    return ast.unparse(node.func) in ("print", "click.echo", "click.secho", "rich.print", "warnings.warn")


def test_the_public_names():
    assert set(jasper_asr.__all__) == {"Transcriber", "Transcript", "__version__", "load"}
    assert all(hasattr(jasper_asr, name) for name in jasper_asr.__all__)
    with pytest.raises(AttributeError, match=r"^module 'jasper_asr' has no attribute 'nothing'$"):
        _ = jasper_asr.nothing


def test_this_test_sees_what_it_should(tmp_path, monkeypatch):
    source = """
import torch
from jasper_asr import audio, __version__
from jasper_asr.data.manifest import Utterance
if TYPE_CHECKING:
    import inflect
def function():
    if True:
        from soxr.cysoxr import resample
        print(sys.stderr)
"""
    (tmp_path / "made_up.py").write_text(source)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert list(imports("made_up.py")) == [
        ("torch", True),
        ("jasper_asr.audio", True),
        ("jasper_asr.__version__", True),
        ("jasper_asr.data.manifest", True),
        ("inflect", False),
        ("soxr.cysoxr", False),
    ]
    assert [room(name) for name, _ in imports("made_up.py")][1:4] == ["audio", "_version", "data"]
    with pytest.raises(AssertionError, match=r"made_up.py:10: print"):
        test_only_the_command_line_prints("made_up.py")
