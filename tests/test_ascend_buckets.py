"""Gears chosen from durations: `jasper compile --buckets`, `jasper info --manifest`, and an .om that runs with them."""

import json

import pytest

import fake_atc
import jasper_asr
from acl_double import AclDouble
from helpers_audio import nemo_manifest, run, sound, tiny_graph, wav, write_model
from jasper_asr.backends import acl
from jasper_asr.deploy.ascend import compile_om, parse_buckets, plan_buckets
from jasper_asr.deploy.buckets import Padding
from jasper_asr.errors import JasperError, UsageError

SHORT = [0.5, 0.6, 0.9, 1.0, 1.6, 2.9]
LENGTHS = [64, 112, 160, 304]
"""What `auto` takes for SHORT: four lengths bring the padding below 15 %, three do not."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with models of each kind, a manifest of each layout, and the stand-in for atc on PATH."""
    monkeypatch.chdir(tmp_path)
    program = fake_atc.install(tmp_path / "cann" / "bin")
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr(acl, "_PROCESS", acl._Process())
    shapes = {"open": {"max_frames": 304}, "one": {"max_frames": 304, "batch_size": 1}}
    shapes |= {"fixed": {"frames": 304, "batch_size": 1}, "batch": {"frames": 304}}
    for name, shape in shapes.items():
        write_model(tmp_path / f"{name}.onnx", opset=11, **shape)
    rows = [{"audio_filepath": f"/else/where/{n}.wav", "duration": n, "text": "a"} for n in SHORT]
    nemo_manifest(tmp_path / "nemo.jsonl", *rows)
    nvidia = [{"transcript": "a", "files": [{"fname": f"{n}.wav", "duration": n}]} for n in SHORT]
    (tmp_path / "nvidia.json").write_text(json.dumps(nvidia))
    nemo_manifest(tmp_path / "long.jsonl", *(rows[0] | {"duration": n} for n in (3.05, 60)))
    nemo_manifest(tmp_path / "full.jsonl", rows[0] | {"duration": 3.04})
    return tmp_path


def dims_of(command: str) -> str:
    return next(word for word in command.replace("'", "").split() if word.startswith("--dynamic_dims="))


class TestParse:
    @pytest.mark.parametrize(
        ("text", "wanted"),
        [("auto", None), ("2", 2), ("6", 6), (" 100 ", 100), ("1024,2048, 4000", [1024, 2048, 4000]), ("7,5", [7, 5])],
    )
    def test_reads(self, text, wanted):
        assert parse_buckets(text) == wanted

    @pytest.mark.parametrize("text", ["", "few", "1.5", "1024,", "-3", "1x1024", "٣", "9" * 10])
    def test_refuses(self, text):
        with pytest.raises(UsageError) as error:
            parse_buckets(text)
        assert str(error.value) == (
            f"buckets {text!r}: give auto, how many lengths, or lengths in frames such as 1024,2048,4000"
        )

    @pytest.mark.parametrize("text", ["0", "1", "101", "1024"])
    def test_refuses_a_number_of_lengths(self, text):
        with pytest.raises(UsageError) as error:
            parse_buckets(text)
        assert str(error.value) == f"buckets {text!r}: atc takes 2 to 100 lengths; frames are given as 1024,2048,4000"


class TestPlan:
    def test_auto(self, here):
        found = plan_buckets("one.onnx", SHORT)
        total = sum(round(100 * n) for n in SHORT)
        after = 1 - total / (64 * 2 + 112 * 2 + 160 + 304)
        assert found == Padding(6, 0, 304, pytest.approx(1 - total / (6 * 304)), tuple(LENGTHS), pytest.approx(after))
        assert found.after < 0.15 < plan_buckets("one.onnx", SHORT, 3).after

    @pytest.mark.parametrize(
        ("wanted", "lengths"), [(2, (112, 304)), (6, (*LENGTHS[:1], 96, 112, 160, 304)), ([304, 80], (80, 304))]
    )
    def test_so_many_or_these(self, here, wanted, lengths):
        assert plan_buckets("one.onnx", SHORT, wanted).lengths == lengths

    def test_longer_utterances_do_not_count_but_are_told(self, here):
        found = plan_buckets("one.onnx", [*SHORT, 3.05, 60])
        assert (found.utterances, found.longer, found.lengths) == (6, 2, tuple(LENGTHS))
        assert plan_buckets("one.onnx", SHORT, [64, 112]).longer == 2

    def test_one_length_gets_a_second(self, here):
        assert plan_buckets("one.onnx", [0.5, 0.5]).lengths == (64, 304)


class TestCompile:
    def test_auto_from_each_layout(self, here):
        for manifest in ("nemo.jsonl", "nvidia.json"):
            code, out, err = run(
                *("compile", "one.onnx", "--soc", "Ascend310", "--buckets", "auto", "--manifest", manifest, "--dry-run")
            )
            assert code == 0
            assert "'--input_shape=feats:1,64,-1;feat_lens:1' '--dynamic_dims=64;112;160;304'" in out
            assert err == (
                "jasper: padding: 58.9% of the computed frames with 6 utterances at 304, "
                "8.1% with lengths 64, 112, 160, 304\n"
            )

    def test_several_manifests_and_what_is_longer(self, here):
        code, out, err = run(
            *("compile", "one.onnx", "--soc", "Ascend310", "--buckets", 2),
            *("--manifest", "nemo.jsonl", "nvidia.json", "--manifest", "long.jsonl", "--dry-run"),
        )
        assert (code, dims_of(out)) == (0, "--dynamic_dims=112;304")
        assert "with 12 utterances at 304" in err
        assert err.endswith("; 2 utterances are longer and go through the network in windows\n")

    def test_the_batch_of_an_open_model(self, here):
        options = ("--soc", "Ascend310", "--dry-run", "--batch-size", 16)
        code, out, _ = run("compile", "open.onnx", *options, "--buckets", "auto", "--manifest", "nemo.jsonl")
        assert code == 0
        assert "'--input_shape=feats:16,64,-1;feat_lens:16' '--dynamic_dims=64;112;160;304'" in out
        code, out, _ = run("compile", "open.onnx", *options, "--gears", "160,304")
        assert (code, dims_of(out)) == (0, "--dynamic_dims=160;304")
        code, out, _ = run("compile", "batch.onnx", *options)
        assert code == 0
        assert "'--input_shape=feats:16,64,304;feat_lens:16' --output=batch" in out

    def test_lengths_need_no_manifest(self, here):
        code, out, err = run("compile", "one.onnx", "--soc", "Ascend310", "--buckets", "160,304", "--dry-run")
        assert (code, dims_of(out), err) == (0, "--dynamic_dims=160;304", "")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                ["one.onnx", "--buckets", "auto"],
                "--buckets auto needs --manifest: the durations to choose the lengths for",
            ),
            (["one.onnx", "--buckets", "4"], "--buckets 4 needs --manifest: the durations to choose the lengths for"),
            (["one.onnx", "--manifest", "nemo.jsonl"], "--manifest is for --buckets"),
            (["one.onnx", "--buckets", "auto", "--gears", "1,2"], "--buckets and --gears exclude each other"),
            (
                ["one.onnx", "--buckets", "few", "--manifest", "nemo.jsonl"],
                "buckets 'few': give auto, how many lengths, or lengths in frames such as 1024,2048,4000",
            ),
            (
                ["one.onnx", "--buckets", "160,400", "--manifest", "nemo.jsonl"],
                "one.onnx: was exported for up to 304 frames, a gear asks for 400",
            ),
            (
                ["one.onnx", "--buckets", "auto", "--manifest", "full.jsonl"],
                "one.onnx: 2 gears, 1 of them different; give 2 to 100 different ones",
            ),
            (
                ["one.onnx", "--buckets", "160,160"],
                "one.onnx: 2 gears, 1 of them different; give 2 to 100 different ones",
            ),
            (
                ["fixed.onnx", "--buckets", "auto", "--manifest", "nemo.jsonl"],
                "fixed.onnx: is fixed to 304 frames; export it without --frames, with --max-frames",
            ),
            (
                ["open.onnx", "--buckets", "auto", "--manifest", "nemo.jsonl"],
                "open.onnx: is open in its batch; buckets need --batch-size here",
            ),
            (
                ["one.onnx", "--batch-size", "2", "--buckets", "auto", "--manifest", "nemo.jsonl"],
                "one.onnx: was exported for batches of 1; export it for 2 or for any",
            ),
            (
                ["one.onnx", "--buckets", "auto", "--manifest", "long.jsonl"],
                "no utterance has 304 frames or fewer; nothing to choose lengths from",
            ),
            (
                ["one.onnx", "--buckets", "64,112", "--manifest", "long.jsonl"],
                "no utterance has 112 frames or fewer; nothing to measure",
            ),
        ],
    )
    def test_refuses(self, here, options, message):
        before = sorted(here.iterdir())
        assert run("compile", *options, "--soc", "Ascend310") == (2, "", f"jasper: error: {message}\n")
        assert sorted(here.iterdir()) == before

    def test_a_manifest_that_cannot_be_read(self, here):
        code, out, err = run("compile", "one.onnx", "--soc", "Ascend310", "--buckets", "2", "--manifest", "none.json")
        assert (code, out) == (5, "")
        assert err.startswith("jasper: error: none.json: cannot be read")

    def test_a_batch_size_below_one(self, here):
        with pytest.raises(JasperError, match=r"^batch size 0: must be at least 1$"):
            compile_om("open.onnx", soc="Ascend310", batch_size=0, gears=[160, 304])


class TestInfo:
    def padding(self, model) -> dict:
        code, out, _ = run("info", model, "--manifest", "nemo.jsonl", "--format", "json")
        assert code == 0
        return json.loads(out)["padding"]

    def test_before_and_after(self, here):
        wanted = {"utterances": 6, "longer": 0, "lengths": LENGTHS}
        for model, length in (("one.onnx", 304), ("fixed.onnx", 304), ("mini", 4000)):
            found = self.padding(model)
            assert found | wanted == found
            assert (found["length"], found["own"]) == (length, False)
            assert found["before"] == pytest.approx(1 - 750 / (6 * length))
            assert found["after"] == pytest.approx(1 - 750 / 816)

    def test_of_an_om_with_gears(self, here):
        compile_om("one.onnx", soc="Ascend310", gears=[160, 304])
        found = self.padding("one.om")
        assert (found["lengths"], found["own"], found["length"]) == ([160, 304], True, 4000)
        assert found["after"] == pytest.approx(1 - 750 / (5 * 160 + 304))
        _, text, _ = run("info", "one.om", "--manifest", "nemo.jsonl")
        assert text.splitlines()[-1].split(maxsplit=1) == [
            "padding",
            "96.9% of the computed frames with 6 utterances at 4000, 32.1% with the model's gears 160, 304",
        ]

    def test_without_a_manifest_it_says_nothing(self, here):
        assert "padding" not in run("info", "one.onnx")[1]

    def test_utterances_that_the_model_does_not_take_at_once(self, here):
        _, text, _ = run("info", "fixed.onnx", "--manifest", "nemo.jsonl", "--manifest", "long.jsonl")
        assert text.endswith("; 2 utterances are longer and go through the network in windows\n")


def test_compiled_for_its_durations_and_run(here):
    """A corpus, the gears for it, and the same words as without: each batch in the smallest gear that holds it."""
    for seed, seconds in enumerate(SHORT):
        wav(here / f"{seconds}.wav", seconds, seed)
    (here / "any.onnx").write_bytes(tiny_graph())
    code, out, _ = run(
        *("compile", "open.onnx", "--soc", "Ascend310P3", "--batch-size", 2),
        *("--buckets", "auto", "--manifest", "nvidia.json", "--output", "b.om"),
    )
    assert (code, out) == (0, "b.om\n")
    clips = [(sound(seconds, seed), 16_000) for seed, seconds in enumerate(SHORT)]
    with jasper_asr.load("any.onnx", threads=1) as transcriber:
        expected = [transcriber.transcribe(clip) for clip in clips]
    asked = []
    with AclDouble(), jasper_asr.load("b.om") as transcriber:
        assert transcriber.batch_size == 2
        original = transcriber._backend.run
        transcriber._backend.run = lambda feats, lens: asked.append(feats.shape) or original(feats, lens)
        assert list(transcriber.transcribe_many(clips)) == expected
        code, out, _ = run("evaluate", "nvidia.json", "--model", "b.om", "--batch-size", 2)
    assert sorted(asked) == [(2, 64, 64), (2, 64, 112), (2, 64, 304)]
    assert code == 0
