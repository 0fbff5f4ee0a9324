"""Bad inputs: each ends with its exit code, one line that names the file and the cause, and nothing written."""

import json
import os
import pickle
import re
import resource
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import yaml
from onnx import TensorProto, helper

from helpers_audio import CHECKPOINT, CONFIG, nemo_manifest, run, sound, tiny_graph, wav, write_model

USAGE, DATA, MODEL, STORAGE, NETWORK = 2, 3, 4, 5, 6

CASES = {}


def case(code, message):
    """Register a function (folder, model) -> argv. In `message` FOLDER is the folder, … is anything on the line."""

    def register(function):
        CASES[function.__name__] = (function, code, message)
        return function

    return register


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny.onnx")


# --- audio ------------------------------------------------------------------------


def transcribed(folder, model, content, name="x.wav"):
    (folder / name).write_bytes(content)
    return ("transcribe", folder / name, "--model", model)


def encoded(samples, rate=16_000, kind="WAV", subtype=None):
    buffer = BytesIO()
    soundfile.write(buffer, samples, rate, subtype, format=kind)
    return buffer.getvalue()


@case(STORAGE, "FOLDER/x.wav: no such file; check the path")
def audio_missing(folder, model):
    return ("transcribe", folder / "x.wav", "--model", model)


@case(DATA, "FOLDER/x.wav: holds no sound files; name another, or give --recursive to look into its folders")
def audio_is_an_empty_folder(folder, model):
    (folder / "x.wav").mkdir()
    return ("transcribe", folder / "x.wav", "--model", model)


@case(DATA, "FOLDER/x.wav: is empty (0 bytes); record or copy it again")
def audio_empty(folder, model):
    return transcribed(folder, model, b"")


@case(DATA, "FOLDER/x.wav: not audio that libsndfile can read (…); convert it to WAV or FLAC")
def audio_text(folder, model):
    return transcribed(folder, model, b"this is no sound at all, whatever its name says\n" * 99)


@case(DATA, "FOLDER/x.raw: not audio … headerless sound does not say its rate: wrap it in WAV, or pass (samples, rate)")
def audio_headerless(folder, model):
    return transcribed(folder, model, sound(1.0).tobytes(), "x.raw")


@case(DATA, "FOLDER/x.wav: is truncated, … of 32000 declared bytes are there; copy it again")
def audio_truncated_wav(folder, model):
    content = encoded(sound(1.0))
    return transcribed(folder, model, content[: len(content) // 2])


@case(DATA, "FOLDER/x.flac: breaks off after … s…; copy it again")
def audio_truncated_flac(folder, model):
    content = encoded(sound(1.0), kind="FLAC")
    return transcribed(folder, model, content[: len(content) // 2], "x.flac")


@case(DATA, "FOLDER/x.ogg: is truncated, its Ogg stream has no last page; copy it again")
def audio_truncated_ogg(folder, model):
    content = encoded(sound(1.0), kind="OGG")
    return transcribed(folder, model, content[: len(content) // 2], "x.ogg")


@case(DATA, "FOLDER/x.wav: holds NaN or infinite samples (0.500 s in); export it again")
def audio_nan(folder, model):
    samples = sound(1.0)
    samples[8_000] = np.nan
    return transcribed(folder, model, encoded(samples, subtype="FLOAT"))


@case(DATA, "FOLDER/x.wav: features are not finite: the samples hold … absurdly large values; full scale is 1.0")
def audio_absurdly_loud(folder, model):
    return transcribed(folder, model, encoded(sound(1.0) * np.float32(1e30), subtype="FLOAT"))


@case(DATA, "FOLDER/x.wav: 1 sample at 16000 Hz is too short for one feature frame; give at least 10 ms")
def audio_one_sample(folder, model):
    return transcribed(folder, model, encoded(sound(1.0)[:1]))


@case(DATA, "FOLDER/x.wav: holds no samples; record or export it again")
def audio_zero_samples(folder, model):
    return transcribed(folder, model, encoded(sound(1.0)[:0]))


@case(DATA, "FOLDER/x.wav: sample rate 300000 Hz is outside 4000 to 192000 Hz; check the header or resample")
def audio_rate_too_high(folder, model):
    return transcribed(folder, model, encoded(sound(1.0), rate=300_000))


@case(DATA, "FOLDER/x.wav: sample rate 2000 Hz is outside 4000 to 192000 Hz; check the header or resample")
def audio_rate_too_low(folder, model):
    return transcribed(folder, model, encoded(sound(1.0), rate=2_000))


@case(DATA, "FOLDER/x.wav: 9 channels, 1 to 8 are allowed; …")
def audio_nine_channels(folder, model):
    return transcribed(folder, model, encoded(np.tile(sound(0.2)[:, None], 9)))


@case(DATA, "FOLDER/x.flac: 4294967 s to decode, the limit is 14400 s; …")
def audio_that_declares_50_days(folder, model):
    flac = encoded(sound(1.0), kind="FLAC")
    fields = int.from_bytes(flac[18:26], "big") | 2**36 - 1  # STREAMINFO's 36-bit total of samples, all ones
    return transcribed(folder, model, flac[:18] + fields.to_bytes(8, "big") + flac[26:], "x.flac")


@case(
    USAGE,
    "FOLDER/x.wav: windows of 2 s have no room between halos of 1.5 s; take longer windows or a shorter, "
    "approximate halo (--halo-seconds)",
)
def audio_too_long_for_a_model_shorter_than_its_context(folder, model):
    write_model(folder / "static.onnx", batch_size=4, frames=200)
    return ("transcribe", wav(folder / "x.wav", 3.5), "--model", folder / "static.onnx", "--no-trim-silence")


# --- manifests ----------------------------------------------------------------------

ROW = {"audio_filepath": "a.wav", "duration": 1.0, "text": "hello"}


def evaluated(folder, model, content):
    if isinstance(content, bytes):
        (folder / "m.json").write_bytes(content)
    else:
        nemo_manifest(folder / "m.json", *content)
    return ("evaluate", folder / "m.json", "--model", model)


@case(STORAGE, "FOLDER/m.json: cannot be read: No such file or directory; …")
def manifest_missing(folder, model):
    return ("evaluate", folder / "m.json", "--model", model)


@case(STORAGE, "FOLDER/m.json: cannot be read: Is a directory; …")
def manifest_is_a_folder(folder, model):
    (folder / "m.json").mkdir()
    return ("evaluate", folder / "m.json", "--model", model)


@case(DATA, "FOLDER/m.json: holds no utterances; write one row for each audio file")
def manifest_empty(folder, model):
    return evaluated(folder, model, b"")


@case(DATA, "FOLDER/m.json: holds no utterances; write one row for each audio file")
def manifest_empty_array(folder, model):
    return evaluated(folder, model, b"[]\n")


@case(DATA, "FOLDER/m.json:1: is not JSON: Expecting value at column 1; mend or remove the row (and 1 more bad row)")
def manifest_not_json(folder, model):
    return evaluated(folder, model, b"wav/a.wav hello\nwav/b.wav you\n")


@case(DATA, "FOLDER/m.json:2: the last line is torn: the file ends inside it; write the manifest again")
def manifest_torn(folder, model):
    return evaluated(folder, model, json.dumps(ROW).encode() + b'\n{"audio_filepath": "b.w')


@case(DATA, "FOLDER/m.json:3: the last row is torn: the file ends inside it; write the manifest again")
def manifest_torn_array(folder, model):
    row = b'{"transcript": "a", "files": [{"fname": "a.wav", "duration": 1}]},\n'
    return evaluated(folder, model, b"[\n" + row + row[:20])


@case(DATA, "FOLDER/m.json:2: key 'text' is missing; add it")
def manifest_without_text(folder, model):
    return evaluated(folder, model, [ROW, {"audio_filepath": "b.wav", "duration": 1.0}])


@case(DATA, "FOLDER/m.json:1: key 'files' is missing; add it")
def manifest_without_files(folder, model):
    return evaluated(folder, model, b'[{"transcript": "hello"}]')


@case(DATA, "FOLDER/m.json:1: key 'duration' is a string, not a number; write it without quotes")
def manifest_wrong_type(folder, model):
    return evaluated(folder, model, [ROW | {"duration": "1.0"}])


@case(DATA, "FOLDER/m.json:1: key 'duration' is -1; give a finite number above 0")
def manifest_negative_duration(folder, model):
    return evaluated(folder, model, [ROW | {"duration": -1}])


@case(DATA, "FOLDER/m.json:1: key 'audio_filepath': '../a.wav' leaves the audio root FOLDER; …--allow-outside-root")
def manifest_outside_its_root(folder, model):
    return evaluated(folder, model, [ROW | {"audio_filepath": "../a.wav"}])


@case(DATA, "FOLDER/m.json:2: is not UTF-8 text (byte 0xe9); convert the manifest to UTF-8")
def manifest_latin1(folder, model):
    rows = [json.dumps(ROW), json.dumps(ROW | {"text": "né"}, ensure_ascii=False)]
    return evaluated(folder, model, "\n".join(rows).encode("latin-1"))


@case(DATA, "FOLDER/m.json: no utterance to evaluate; is --max-duration too small?")
def manifest_without_usable_row(folder, model):
    return (*evaluated(folder, model, [ROW, ROW]), "--max-duration", 0.5)


@case(STORAGE, "FOLDER/none: is not a folder; give the folder that holds the audio")
def audio_root_missing(folder, model):
    return (*evaluated(folder, model, [ROW]), "--audio-root", folder / "none")


# --- checkpoints --------------------------------------------------------------------


def exported(checkpoint, *options, config=CONFIG):
    return ("export", checkpoint, checkpoint.parent / "out.onnx", "--config", config, *options)


def saved(folder, change, name="x.pt"):
    """The golden checkpoint after `change(dict)`."""
    import torch

    content = torch.load(CHECKPOINT, weights_only=True)
    change(content)
    torch.save(content, folder / name)
    return folder / name


@case(STORAGE, "FOLDER/x.pt: no such model; give a file, or a built-in name (mini)")
def checkpoint_missing(folder, _):
    return exported(folder / "x.pt")


@case(STORAGE, "FOLDER/x.pt: is a folder; give the model file in it")
def checkpoint_is_a_folder(folder, _):
    (folder / "x.pt").mkdir()
    return exported(folder / "x.pt")


@case(MODEL, "FOLDER/x.pt: the file is empty; copy or download it again")
def checkpoint_empty(folder, _):
    (folder / "x.pt").touch()
    return exported(folder / "x.pt")


@case(MODEL, "FOLDER/x.pt: …")
def checkpoint_text(folder, _):
    (folder / "x.pt").write_text("this is not a checkpoint\n")
    return exported(folder / "x.pt")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@case(MODEL, "FOLDER/x.pt: refused, it holds Python objects other than tensors, which could run code; …")
def checkpoint_pickle_bomb(folder, _):
    (folder / "x.pt").write_bytes(pickle.dumps({"ema_state_dict": Bomb()}, protocol=2))
    return exported(folder / "x.pt")


@case(MODEL, "FOLDER/x.pt: refused, it holds Python objects other than tensors, which could run code; …")
def checkpoint_zipped_pickle_bomb(folder, _):
    return exported(saved(folder, lambda content: content.update(more=Bomb())))


@case(MODEL, "FOLDER/x.pt: 2 tensors do not fit …0.weight is [29, 7, 1], must be […0.bias is [5], must be [29]; …")
def checkpoint_wrong_shapes(folder, _):
    import torch

    def change(content):
        content["ema_state_dict"]["decoder.layers.0.bias"] = torch.zeros(5)
        content["ema_state_dict"]["decoder.layers.0.weight"] = torch.zeros(29, 7, 1)

    return exported(saved(folder, change))


@case(MODEL, "FOLDER/x.pt: 2 tensors do not fit …missing decoder.layers.0.bias; unexpected decoder.layers.0.basis…")
def checkpoint_wrong_names(folder, _):
    def change(content):
        state = content["ema_state_dict"]
        state["decoder.layers.0.basis"] = state.pop("decoder.layers.0.bias")

    return exported(saved(folder, change))


@case(MODEL, "FOLDER/x.pt: holds no ema_state_dict (keys: …); use --weights raw")
def checkpoint_without_ema(folder, _):
    return exported(saved(folder, lambda content: content.pop("ema_state_dict")))


@case(MODEL, "FOLDER/x.pt: holds no state_dict (keys: …); use --weights ema")
def checkpoint_without_raw(folder, _):
    return exported(saved(folder, lambda content: content.pop("state_dict")), "--weights", "raw")


@case(MODEL, "FOLDER/x.pt: carries no config and fits none of ours (…); give --config YAML")
def checkpoint_without_config(folder, _):
    return ("export", saved(folder, dict), folder / "out.onnx")


@case(MODEL, "FOLDER/x.pt: 1 tensors do not fit …encoder.layers.0.conv.0.weight holds values that are not finite…")
def checkpoint_nan(folder, _):
    def change(content):
        content["ema_state_dict"]["encoder.layers.0.conv.0.weight"][0, 0, 0] = float("nan")

    return exported(saved(folder, change))


@case(MODEL, "FOLDER/x.pt: not a PyTorch checkpoint (…); copy or download it again")
def checkpoint_truncated(folder, _):
    content = CHECKPOINT.read_bytes()
    (folder / "x.pt").write_bytes(content[: len(content) // 2])
    return exported(folder / "x.pt")


@case(MODEL, "FOLDER/x.bin: unknown kind of model; …")
def checkpoint_wrong_suffix(folder, _):
    (folder / "x.bin").write_bytes(CHECKPOINT.read_bytes())
    return exported(folder / "x.bin")


@case(MODEL, "FOLDER/x.safetensors: not a safetensors file (…); copy or download it again")
def safetensors_garbage(folder, _):
    (folder / "x.safetensors").write_bytes(b"\xff" * 999)
    return exported(folder / "x.safetensors")


# --- configs ------------------------------------------------------------------------


def configured(folder, change):
    raw = yaml.safe_load(CONFIG.read_text())
    change(raw)
    (folder / "c.yaml").write_text(yaml.safe_dump(raw))
    return ("export", CHECKPOINT, folder / "out.onnx", "--config", folder / "c.yaml")


@case(STORAGE, "FOLDER/c.yaml: cannot read the config (no such file or directory); check the path")
def config_missing(folder, _):
    return ("export", CHECKPOINT, folder / "out.onnx", "--config", folder / "c.yaml")


@case(MODEL, "FOLDER/c.yaml: unknown key jasper.encoder.blocks[1].kernels; known here: …kernel_size…")
def config_unknown_key(folder, _):
    return configured(folder, lambda raw: raw["jasper"]["encoder"]["blocks"][1].update(kernels=3))


@case(MODEL, "FOLDER/c.yaml: missing key input_val.filterbank_features.n_filt")
def config_missing_key(folder, _):
    return configured(folder, lambda raw: raw["input_val"]["filterbank_features"].pop("n_filt"))


@case(MODEL, "FOLDER/c.yaml: not valid YAML (…)")
def config_not_yaml(folder, _):
    (folder / "c.yaml").write_text("labels: [a, b\nname: {")
    return ("export", CHECKPOINT, folder / "out.onnx", "--config", folder / "c.yaml")


@case(MODEL, "FOLDER/c.yaml: the config: must be a mapping of keys to values, not NoneType")
def config_empty(folder, _):
    (folder / "c.yaml").touch()
    return ("export", CHECKPOINT, folder / "out.onnx", "--config", folder / "c.yaml")


@case(MODEL, "FOLDER/c.yaml: not UTF-8 text (…); is this a YAML model config?")
def config_binary(folder, _):
    (folder / "c.yaml").write_bytes(b"\xff\xfe\x00")
    return ("export", CHECKPOINT, folder / "out.onnx", "--config", folder / "c.yaml")


@case(MODEL, "FOLDER/c.yaml: key jasper.encoder.blocks[0].filters: must be a whole number, not str")
def config_wrong_type(folder, _):
    return configured(folder, lambda raw: raw["jasper"]["encoder"]["blocks"][0].update(filters="many"))


@case(MODEL, "FOLDER/c.yaml: key jasper.encoder.blocks[0].kernel_size: 10 is even; same padding needs an odd one")
def config_even_kernel(folder, _):
    return configured(folder, lambda raw: raw["jasper"]["encoder"]["blocks"][0].update(kernel_size=10))


# --- ONNX ---------------------------------------------------------------------------


def opened(folder):
    return ("transcribe", wav(folder / "a.wav", 0.5), "--model", folder / "x.onnx")


def altered(folder, change):
    """The exported model after `change(proto)`."""
    proto = onnx.load_from_string(tiny_graph())
    change(proto)
    onnx.save(proto, folder / "x.onnx")
    return opened(folder)


def with_config(proto, value):
    for entry in proto.metadata_props:
        if entry.key == "config":
            entry.value = value


def foreign_model(inputs, outputs, config=None):
    """A model that only copies: {input name: shape} -> {output name: shape}."""
    nodes = [helper.make_node("Identity", [a], [b]) for a, b in zip(inputs, outputs, strict=True)]
    kinds = {"feat_lens": TensorProto.INT32, "log_prob_lens": TensorProto.INT32}
    values = [
        [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    proto = helper.make_model(
        helper.make_graph(nodes, "foreign", *values), opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )
    if config:
        helper.set_model_props(proto, {"config": config})
    return proto


TINY_AS_JSON = json.dumps(yaml.safe_load(CONFIG.read_text()))


@case(STORAGE, "FOLDER/x.onnx: no such model; give a file, or a built-in name (mini)")
def onnx_missing(folder, _):
    return opened(folder)


@case(MODEL, "FOLDER/x.onnx: the file is empty; export it again")
def onnx_empty(folder, _):
    (folder / "x.onnx").touch()
    return opened(folder)


@case(MODEL, "FOLDER/x.onnx: not a model that onnxruntime can load (…); export it again")
def onnx_garbage(folder, _):
    (folder / "x.onnx").write_bytes(np.random.default_rng(0).bytes(5000))
    return opened(folder)


@case(MODEL, "FOLDER/x.onnx: not a model that onnxruntime can load (…); export it again")
def onnx_truncated(folder, _):
    (folder / "x.onnx").write_bytes(tiny_graph()[:600_000])
    return opened(folder)


@case(MODEL, "FOLDER/x.onnx: not an ONNX model; export it again")
def info_of_garbage(folder, _):
    (folder / "x.onnx").write_bytes(np.random.default_rng(0).bytes(5000))
    return ("info", folder / "x.onnx")


@case(MODEL, "FOLDER/x.onnx: carries no jasper config in its metadata; make it with jasper export")
def info_of_a_foreign_model(folder, _):
    onnx.save(foreign_model({"a": [1]}, {"b": [1]}), folder / "x.onnx")
    return ("info", folder / "x.onnx")


@case(MODEL, "FOLDER/x.onnx: carries no jasper config in its metadata; make it with jasper export")
def onnx_foreign(folder, _):
    onnx.save(foreign_model({"a": [1]}, {"b": [1]}), folder / "x.onnx")
    return opened(folder)


@case(MODEL, "FOLDER/x.onnx: inputs are ['a'] and outputs ['b'], not feats, feat_lens and log_probs, …")
def onnx_wrong_inputs(folder, _):
    onnx.save(foreign_model({"a": [1]}, {"b": [1]}, TINY_AS_JSON), folder / "x.onnx")
    return opened(folder)


@case(MODEL, "FOLDER/x.onnx: feats is [1, 'T'] and log_probs [1, 'T'], both must have three dimensions; …")
def onnx_wrong_rank(folder, _):
    sides = ({"feats": [1, "T"], "feat_lens": [1]}, {"log_probs": [1, "T"], "log_prob_lens": [1]})
    onnx.save(foreign_model(*sides, TINY_AS_JSON), folder / "x.onnx")
    return opened(folder)


@case(MODEL, "FOLDER/x.onnx: gives 9 classes, its own config says 29")
def onnx_wrong_classes(folder, _):
    sides = ({"feats": [1, 64, 9], "feat_lens": [1]}, {"log_probs": [1, 64, 9], "log_prob_lens": [1]})
    onnx.save(foreign_model(*sides, TINY_AS_JSON), folder / "x.onnx")
    return opened(folder)


@case(MODEL, "FOLDER/x.onnx: takes 32 mel bands, its own config says 64")
def onnx_wrong_bands(folder, _):
    sides = ({"feats": [1, 32, 29], "feat_lens": [1]}, {"log_probs": [1, 32, 29], "log_prob_lens": [1]})
    onnx.save(foreign_model(*sides, TINY_AS_JSON), folder / "x.onnx")
    return opened(folder)


@case(MODEL, "FOLDER/x.onnx: the config in its metadata is not JSON (…); export it again")
def onnx_metadata_not_json(folder, _):
    return altered(folder, lambda proto: with_config(proto, "name: Jasper"))


@case(MODEL, "FOLDER/x.onnx: missing key labels")
def onnx_metadata_without_labels(folder, _):
    raw = {key: value for key, value in json.loads(TINY_AS_JSON).items() if key != "labels"}
    return altered(folder, lambda proto: with_config(proto, json.dumps(raw)))


@case(MODEL, "FOLDER/x.onnx: log_probs are not finite; the weights or the precision are unfit")
def onnx_that_gives_nan(folder, _):
    def change(proto):
        bias = next(tensor for tensor in proto.graph.initializer if list(tensor.dims) == [29])
        bias.CopyFrom(onnx.numpy_helper.from_array(np.full(29, np.nan, np.float32), bias.name))

    return altered(folder, change)


@case(MODEL, "FOLDER/x.onnx: is an … model already; give a checkpoint")
def onnx_as_checkpoint(folder, _):
    write_model(folder / "x.onnx")
    return ("export", folder / "x.onnx", folder / "out.onnx")


# --- options ------------------------------------------------------------------------


def gated(folder, model, *options):
    return (*evaluated(folder, model, [ROW]), *options)


@case(USAGE, "reference WER nan: must be a percentage of at least 0")
def gate_nan(folder, model):
    return gated(folder, model, "--reference-wer", "nan")


@case(USAGE, "tolerance -0.01: must be a fraction of at least 0, such as 0.01")
def gate_negative_tolerance(folder, model):
    return gated(folder, model, "--reference-wer", 3.2, "--tolerance", -0.01)


@case(USAGE, "--tolerance needs --reference-wer")
def gate_without_reference(folder, model):
    return gated(folder, model, "--tolerance", 0.01)


@case(USAGE, "Invalid value for '--reference-wer': 'low' is not a valid float. (see jasper evaluate --help)")
def gate_not_a_number(folder, model):
    return gated(folder, model, "--reference-wer", "low")


@case(USAGE, "--pad-to-max-duration needs --max-duration")
def padding_without_length(folder, model):
    return gated(folder, model, "--pad-to-max-duration")


@case(USAGE, "--max-duration nan: must be a number of seconds above 0")
def max_duration_nan(folder, model):
    return gated(folder, model, "--max-duration", "nan")


@case(USAGE, "--max-duration -1: must be a number of seconds above 0")
def max_duration_negative(folder, model):
    return gated(folder, model, "--max-duration", -1)


@case(STORAGE, "FOLDER/none/p.txt: the folder FOLDER/none does not exist; make it first")
def output_folder_missing(folder, model):
    return gated(folder, model, "--save-predictions", folder / "none" / "p.txt")


@case(STORAGE, "FOLDER/out: is a folder; give a file name")
def output_is_a_folder(folder, model):
    (folder / "out").mkdir()
    return gated(folder, model, "--report", folder / "out")


@case(USAGE, "Invalid value for '--opset': 5 is not in the range 11<=x<=21. (see jasper export --help)")
def opset_too_old(folder, _):
    return ("export", CHECKPOINT, folder / "out.onnx", "--config", CONFIG, "--opset", 5)


@case(USAGE, "FOLDER/out.pb: the output must end in .onnx or .safetensors")
def export_to_another_kind(folder, _):
    return ("export", CHECKPOINT, folder / "out.pb", "--config", CONFIG)


@case(STORAGE, "FOLDER/none/out.onnx: the folder FOLDER/none does not exist; make it first")
def export_folder_missing(folder, _):
    return ("export", CHECKPOINT, folder / "none" / "out.onnx", "--config", CONFIG)


@case(USAGE, "Invalid value for '--batch-size': 0 is not in the range x>=1. (see jasper transcribe --help)")
def batch_size_zero(folder, model):
    return ("transcribe", folder / "a.wav", "--model", model, "--batch-size", 0)


@case(USAGE, "backend 'tpu': choose one of …ort…")
def backend_unknown(folder, model):
    return ("transcribe", folder / "a.wav", "--model", model, "--backend", "tpu")


@case(USAGE, "Invalid value for '--format' / '-f': 'xml' is not one of 'txt', …'tsv'. (see jasper transcribe --help)")
def format_unknown(folder, model):
    return ("transcribe", folder / "a.wav", "--model", model, "--format", "xml")


@case(STORAGE, "FOLDER/m.json: cannot be read: No such file or directory; …")
def train_manifest_missing(folder, _):
    return ("train", "--config", CONFIG, "--train", folder / "m.json", "--out", folder / "run")


@case(STORAGE, "FOLDER/c.yaml: cannot read the config (no such file or directory); check the path")
def train_config_missing(folder, _):
    return ("train", "--config", folder / "c.yaml", "--train", folder / "m.json", "--out", folder / "run")


# --- the test -----------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, tmp_path, model, monkeypatch):
    make, code, message = CASES[name]
    monkeypatch.chdir(tmp_path)
    argv = make(tmp_path, model)
    before = contents(tmp_path)
    started = time.perf_counter()
    result = run(*argv)
    seconds = time.perf_counter() - started
    (line,) = result[2].splitlines()
    pattern = ".*".join(map(re.escape, f"jasper: error: {message}".replace("FOLDER", str(tmp_path)).split("…")))
    assert re.fullmatch(pattern, line), line
    assert result[:2] == (code, "")
    assert contents(tmp_path) == before
    assert seconds < 5


def test_there_are_enough_cases():
    assert len(CASES) >= 40
    kinds = {name.split("_")[0] for name in CASES}
    assert {"audio", "manifest", "checkpoint", "config", "onnx", "gate"} <= kinds


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["transcribe", "a.wav", "--model", "none.onnx"], STORAGE),
        (["transcribe", "a.wav", "--nonsense"], USAGE),
        (["evaluate", "none.json"], STORAGE),
        (["evaluate", "bad.json"], DATA),
        (["evaluate", "bad.json", "--reference-wer", "nan"], USAGE),
        (["export", "none.pt", "out.onnx"], STORAGE),
        (["export", "none.pt", "out.onnx", "--opset", "5"], USAGE),
        (["info", "none.onnx"], STORAGE),
        (["train", "--config", "none.yaml", "--train", "none.json", "--out", "run"], STORAGE),
        (["train", "--config", "jasper10x5dr", "--train", "none.json", "--out", "run"], STORAGE),
        (["prepare", "librispeech", "none", "--manifest", "m.json"], STORAGE),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_that_need_no_model_take_less_than_a_second(tmp_path, argv, code):
    """CPU time of the whole process, imports and all, the best of up to three."""
    (tmp_path / "bad.json").write_text("not json\n")
    used = []
    while not used or (min(used) > 1 and len(used) < 3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "jasper_asr.cli", *argv]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert (done.returncode, done.stdout) == (code, "")
        assert re.fullmatch(r"jasper: error: .*\n", done.stderr)
    assert min(used) < 1
