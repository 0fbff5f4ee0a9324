"""Graphs kept on disk: what is opened is what would be built, and nothing that goes wrong costs more than time."""

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from jasper_asr import load
from jasper_asr.errors import ModelError, StorageError
from jasper_asr.model import cache, export
from jasper_asr.model.checkpoint import random_weights, save_safetensors

SAMPLES = (np.random.default_rng(5).standard_normal(24_000) * 0.1).astype(np.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JASPER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_safetensors(path, tiny, random_weights(tiny, seed=1))
    return path


def log_probs(model: Path, **options) -> np.ndarray:
    with load(model, threads=1, **options) as transcriber:
        return transcriber.log_probs([SAMPLES])[0]


def graphs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.onnx"))


def test_the_second_start_builds_nothing(folder, model, monkeypatch):
    first = log_probs(model)
    assert len(graphs(folder)) == 1
    monkeypatch.setattr(export, "_build", lambda *_, **__: pytest.fail("built again"))
    np.testing.assert_array_equal(log_probs(model), first)


def test_without_a_cache_the_result_is_the_same(folder, model, monkeypatch):
    kept = log_probs(model)
    shutil.rmtree(folder)
    monkeypatch.setenv("JASPER_CACHE", "")
    np.testing.assert_array_equal(log_probs(model), kept)
    assert not folder.exists()


def test_a_changed_checkpoint_replaces_its_graph(folder, model, tiny):
    before, old = log_probs(model), graphs(folder)
    save_safetensors(model, tiny, random_weights(tiny, seed=2))
    after = log_probs(model)
    assert np.abs(after - before).max() > 0.01
    assert len(graphs(folder)) == 1
    assert graphs(folder) != old


def test_each_way_to_build_has_a_graph_of_its_own(folder, model):
    direct = log_probs(model, convolution="direct")
    np.testing.assert_allclose(log_probs(model, convolution="spectral"), direct, atol=1e-4)
    log_probs(model, convolution="direct", batch_size=2)  # masked
    assert len(graphs(folder)) == 3


def test_large_weights_are_kept_beside_their_graph(folder, model, monkeypatch):
    expected = log_probs(model)
    shutil.rmtree(folder)
    monkeypatch.setattr(export, "INLINE_BYTES", 1000)
    for _ in range(2):
        np.testing.assert_array_equal(log_probs(model), expected)
    assert [path.suffix for path in sorted(graphs(folder)[0].parent.iterdir())] == [".data", ".onnx"]


def test_code_that_changed_builds_anew(folder, model, monkeypatch):
    log_probs(model)
    old = graphs(folder)
    monkeypatch.setattr(cache, "__version__", "other")
    log_probs(model)
    assert len(graphs(folder)) == 1
    assert graphs(folder) != old


def test_those_unused_for_longest_go_first(folder, model, monkeypatch):
    log_probs(model, convolution="direct")
    log_probs(model, convolution="spectral")
    direct, spectral = sorted(graphs(folder), key=lambda path: path.stat().st_size)
    os.utime(direct.parent, (1e9, 1e9))
    os.utime(spectral.parent, (2e9, 2e9))
    total = direct.stat().st_size + spectral.stat().st_size
    monkeypatch.setattr(cache, "LARGEST_CACHE", total + 100_000)
    log_probs(model, convolution="direct", batch_size=2)
    assert not direct.parent.exists()
    assert spectral.exists()
    assert len(graphs(folder)) == 2


def test_processes_that_start_together_do_not_meet(folder, model, tmp_path):
    """Each opens a whole graph: what one writes is never what another reads."""
    script = (
        "import sys, numpy as np, jasper_asr\n"
        "with jasper_asr.load(sys.argv[1], threads=1) as transcriber:\n"
        "    samples = np.random.default_rng(5).standard_normal(24_000) * 0.1\n"
        "    np.save(sys.argv[2], transcriber.log_probs([samples.astype(np.float32)])[0])\n"
    )
    outputs = [tmp_path / f"{index}.npy" for index in range(4)]
    started = [subprocess.Popen([sys.executable, "-c", script, model, out]) for out in outputs]
    assert [process.wait(60) for process in started] == [0] * 4
    expected = log_probs(model)
    for out in outputs:
        np.testing.assert_array_equal(np.load(out), expected)
    assert [entry.name[:5] for entry in folder.iterdir()] == ["tiny-"]


def test_a_faster_process_wins(folder, model, monkeypatch):
    """Between the building and the moving another process has put its graph there."""
    expected, (path,) = log_probs(model), graphs(folder)
    write_graph = export.write_graph
    aside = folder.parent / "aside"
    path.parent.rename(aside)

    def late(*arguments, **options):
        result = write_graph(*arguments, **options)
        aside.rename(path.parent)
        return result

    monkeypatch.setattr(export, "write_graph", late)
    np.testing.assert_array_equal(log_probs(model), expected)
    assert graphs(folder) == [path]
    assert len(list(folder.iterdir())) == 1


def test_use_counts_as_use(folder, model):
    log_probs(model)
    (path,) = graphs(folder)
    os.utime(path.parent, (1e9, 1e9))
    log_probs(model)
    assert path.parent.stat().st_mtime > 1.5e9


def refuse(path, _pieces) -> None:
    raise StorageError(f"{path}: cannot be written")


@pytest.mark.parametrize("fault", ["file in the way", "disk full", "beyond the limit", "write fails"])
def test_what_cannot_be_kept_is_built_for_the_moment(folder, model, monkeypatch, fault):
    if fault == "file in the way":
        folder.write_text("")
    elif fault == "disk full":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(1, 1, 0))
    elif fault == "beyond the limit":
        monkeypatch.setattr(cache, "LARGEST_CACHE", 1000)
    else:
        monkeypatch.setattr(export, "write_whole", refuse)
    found = log_probs(model)
    assert not folder.is_dir() or not graphs(folder)
    monkeypatch.setenv("JASPER_CACHE", "")
    np.testing.assert_array_equal(log_probs(model), found)


def test_a_damaged_graph_is_built_again(folder, model):
    expected = log_probs(model)
    (path,) = graphs(folder)
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1000])
    np.testing.assert_array_equal(log_probs(model), expected)
    assert path.stat().st_size == whole


def test_what_is_not_the_graphs_fault_is_said(folder, model):
    log_probs(model)
    for _ in range(2):
        with pytest.raises(ModelError, match="onnxruntime has no working CANNExecutionProvider"):
            load(model, backend="cann")


def test_the_folder_is_where_others_keep_theirs(monkeypatch, tmp_path):
    monkeypatch.delenv("JASPER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "jasper-asr"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "jasper-asr"
