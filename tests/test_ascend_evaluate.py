"""The Ascend guide's evaluation, command by command, on an .om that runs on the strict double of `acl`.

2703 utterances in batches of 16, one of them of exactly 40 s: what the guide's script crashes on or gets wrong. A
network of one convolution stands for Jasper, so that all of dev-clean's 169 batches of 4000 frames take seconds.
"""

import json
import weakref
from functools import cache

import numpy as np
import pytest

import fake_atc
from acl_double import AclDouble
from helpers_audio import nemo_manifest, run, sound, tiny_config, wav
from jasper_asr import features, transcribe
from jasper_asr.audio import write_wav
from jasper_asr.backends import acl
from jasper_asr.config import ModelConfig, parse_config
from jasper_asr.deploy.ascend import compile_om
from jasper_asr.model.checkpoint import Checkpoint, random_weights
from jasper_asr.model.export import graph_bytes

SECONDS = [0.21, 0.13, 0.3, 0.17, 0.26, 0.4]
GUIDE = ("--max-duration", 40, "--pad-to-max-duration", "--reference-wer", "3.20", "--tolerance", "0.01")


@cache
def config() -> ModelConfig:
    """The tiny Jasper with its first block alone, and few filters."""
    raw = json.loads(json.dumps(dict(tiny_config().raw)))
    raw["jasper"]["encoder"]["blocks"] = [raw["jasper"]["encoder"]["blocks"][0] | {"filters": 4}]
    raw["jasper"]["decoder"]["in_feats"] = 4
    return parse_config(raw, "one_block.yaml")


@cache
def graph(**shape) -> bytes:
    weights = random_weights(config(), seed=5)
    weights["decoder.layers.0.weight"] *= 3  # letters that change with the sound
    return graph_bytes(Checkpoint(config(), weights, "ema", "0" * 64), opset=11, **shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Short clips, one of exactly 40 s, one that is a little longer; and the same network as .onnx for any size."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "any.onnx").write_bytes(graph())
    for seed, seconds in enumerate(SECONDS):
        wav(folder / f"{seed}.wav", seconds, seed)
    for name, samples in (("forty", 640_000), ("longer", 640_400)):
        write_wav(folder / f"{name}.wav", sound(samples / 16_000, 9))
    return folder


@pytest.fixture(scope="module")
def texts(folder):
    """What onnxruntime makes of each clip alone, at its exact length."""
    with transcribe.load(folder / "any.onnx", threads=1) as transcriber:
        found = {path.name: transcriber.transcribe(path).text for path in sorted(folder.glob("*.wav"))}
    assert len(set(found.values())) == len(found)  # or a wrong order would not show
    assert all(len(text.replace(" ", "")) > 3 for text in found.values())
    return found


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compile the network for these shapes and gears by the stand-in for atc."""
    monkeypatch.setattr(acl, "_PROCESS", acl._Process())
    program = fake_atc.install(tmp_path / "bin")

    def make(gears=None, **shape):
        onnx = tmp_path / "jasper_1batch.onnx"
        onnx.write_bytes(graph(**shape))
        return compile_om(onnx, soc="Ascend310", gears=gears, atc=program).om

    return make


class Watch:
    """What each run of the backend was given: real utterances, shape; and how many results were alive before it."""

    def __init__(self, monkeypatch):
        self.real, self.shapes, self.alive = [], [], []
        self._results: list[weakref.ref] = []
        original = acl.AclBackend.run

        def run(backend, feats, lens):
            self.real.append(int((lens > 1).sum()))
            self.shapes.append(feats.shape)
            self._results = [result for result in self._results if result() is not None]
            self.alive.append(len(self._results))
            log_probs, out_lens = original(backend, feats, lens)
            self._results.append(weakref.ref(log_probs))
            return log_probs, out_lens

        monkeypatch.setattr(acl.AclBackend, "run", run)


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


def manifest(folder, texts, names, name="manifest.jsonl", **durations):
    rows = [
        {"audio_filepath": f, "duration": durations.get(f.removesuffix(".wav"), 1.0), "text": texts[f]} for f in names
    ]
    return nemo_manifest(folder / name, *rows)


def many(count, *, at, seed=0):
    """`count` names in a wild order, the clip of 40 s in the middle of them."""
    names = [f"{index}.wav" for index in np.random.default_rng(seed).integers(0, len(SECONDS), count)]
    names[at] = "forty.wav"
    return names


def evaluate(path, om, predictions, *options):
    with AclDouble() as double:
        code, out, err = run("evaluate", path, "--model", om, "--save-predictions", predictions, *options)
    return code, out, err, double.calls.count("mdl.execute")


@pytest.mark.parametrize(
    ("shape", "gears", "shapes"),
    [
        pytest.param({"batch_size": 16, "frames": 4000}, None, {(16, 64, 4000)}, marks=pytest.mark.slow, id="static"),
        pytest.param(
            {"batch_size": 16, "max_frames": 4000}, [48, 4000], {(16, 64, 48), (16, 64, 4000)}, id="time gears"
        ),
    ],
)
def test_2703_utterances_in_batches_of_16(folder, texts, tmp_path, compiled, watch, shape, gears, shapes):
    om = compiled(gears, **shape)
    names = many(2703, at=1234)
    path = manifest(folder, texts, names, forty=40.0)
    code, out, err, executed = evaluate(path, om, tmp_path / "f", "--batch-size", 16, *GUIDE)
    assert (code, out) == (0, "eval_wer: 0.00\n")
    assert "; 2703 utterances, 0 failed, 0 skipped; " in err
    assert "gate holds: WER 0.00 % is within 3.2 % + 1.0% = 3.232 %" in err
    assert (tmp_path / "f").read_text().splitlines() == [texts[name] for name in names]
    assert executed == len(watch.real) == 169
    assert watch.real == [16] * 168 + [15]
    assert set(watch.shapes) == shapes
    assert max(watch.alive) <= 2  # log-probs go once they are decoded


@pytest.mark.parametrize(("batch_size", "real"), [(16, [16, 16, 15]), (1, [1] * 47)])
def test_the_guides_static_model(folder, texts, tmp_path, compiled, watch, batch_size, real):
    """The same in small: all of 4000 frames; the batch is that of the model, whatever was asked for."""
    om = compiled(batch_size=batch_size, frames=4000)
    names = many(47, at=20)
    path = manifest(folder, texts, names, forty=40.0)
    code, out, _, executed = evaluate(path, om, tmp_path / "f", "--batch-size", 16, *GUIDE)
    assert (code, out) == (0, "eval_wer: 0.00\n")
    assert (tmp_path / "f").read_text().splitlines() == [texts[name] for name in names]
    assert (executed, watch.real) == (len(real), real)
    assert set(watch.shapes) == {(batch_size, 64, 4000)}
    assert max(watch.alive) <= 2


def test_the_gate_fails_on_another_wer(folder, texts, tmp_path, compiled):
    om = compiled(batch_size=4, frames=4000)
    names = many(5, at=2)
    path = manifest(folder, texts | {"forty.wav": "something else"}, names, forty=40.0)
    code, _, err, _ = evaluate(path, om, tmp_path / "f", *GUIDE)
    assert code == 7
    assert "gate not met: WER " in err
    assert (tmp_path / "f").read_text().splitlines() == [texts[name] for name in names]  # written all the same


def test_forty_seconds_are_4000_valid_frames_and_one_beyond(folder):
    """A centred STFT has 4001 frames; NVIDIA's own length, ceil(N / 160), leaves the last one out and zeroes it."""
    samples = sound(40.0, 9)
    padded = config().features
    feats, valid = features.features(samples, padded)
    assert (feats.shape, valid) == (
        (64, 4016),
        4000,
    )  # 4001 rounded up to 16: what the guide's static model overflows on
    assert not feats[:, 4000:].any()
    # normalised over the 4000, so the frames that are kept hold all of the signal that counts
    np.testing.assert_allclose(feats[:, :4000].mean(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(feats[:, :4000].std(axis=1, ddof=1), 1, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_clip_beyond_the_model_goes_in_windows(folder, texts, tmp_path, compiled, watch, batch_size):
    """A manifest that says 40 s, rounded, of a file of 40.025 s: 4003 valid frames. None of its speech is lost."""
    om = compiled(batch_size=batch_size, frames=4000)
    names = ["0.wav", "longer.wav", "1.wav"]
    path = manifest(folder, texts, names, longer=40.0)
    code, _, err, _ = evaluate(path, om, tmp_path / "f", *GUIDE)
    assert (code, "; 3 utterances, 0 failed, 0 skipped; " in err) == (0, True)
    assert (tmp_path / "f").read_text().splitlines() == [texts[name] for name in names]
    assert set(watch.shapes) == {(batch_size, 64, 4000)}


def test_what_the_manifest_calls_longer_is_skipped_and_counted(folder, texts, tmp_path, compiled):
    om = compiled(batch_size=1, frames=4000)
    path = manifest(folder, texts, ["0.wav", "longer.wav", "1.wav"], longer=40.025)
    code, _, err, executed = evaluate(path, om, tmp_path / "f", *GUIDE)
    assert (code, executed) == (0, 2)
    assert "; 2 utterances, 0 failed, 1 skipped; " in err
    assert (tmp_path / "f").read_text().splitlines() == [texts["0.wav"], texts["1.wav"]]


def test_an_unreadable_clip_among_them_keeps_its_line(folder, texts, tmp_path, compiled):
    om = compiled(batch_size=4, frames=48)
    (folder / "empty.wav").write_bytes(b"")
    names = ["0.wav", "empty.wav", "1.wav"]
    path = manifest(folder, texts | {"empty.wav": "lost"}, names)
    code, _, err, executed = evaluate(path, om, tmp_path / "f")
    assert (code, executed) == (1, 1)
    assert "; 2 utterances, 1 failed, 0 skipped; " in err
    assert (tmp_path / "f").read_text() == f"{texts['0.wav']}\n\n{texts['1.wav']}\n"
