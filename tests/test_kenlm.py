"""KenLM's binaries. Those in data/kenlm were made by KenLM's build_binary from tiny.arpa, one of each kind.

tiny.arpa is pruned so that some n-grams lack their own ends: KenLM fills those in with what backing off gives. The
totals in query.json are those of KenLM's query program.
"""

import json
import math
import shutil
import struct

import numpy as np
import pytest

from jasper_asr.beam import BeamSearch
from jasper_asr.errors import ModelError, UsageError
from jasper_asr.lm import NgramModel, kenlm

EXACT = ["probing", "trie", "array"]
QUANTISED = ["quant", "quantarray"]
KIND_AT = 88 + 8  # after text, test values, order and multiplier


@pytest.fixture(scope="module")
def arpa(data):
    return NgramModel.load(data / "kenlm" / "tiny.arpa")


def load(data, kind):
    return NgramModel.load(data / "kenlm" / f"tiny.{kind}")


def ngrams(model, order=1, node=None, context=()):
    """All n-grams of a model that can be listed, as ids."""
    nodes = range(len(model.words)) if node is None else range(*model.levels[order - 2].first[node : node + 2])
    for child in nodes:
        gram = (*context, int(model.levels[order - 1].words[child]))
        yield gram
        if order < model.order:
            yield from ngrams(model, order + 1, child, gram)


def after(model, words):
    state = ()
    for word in words:
        state, _ = model.advance_id(state, word)
    return state


@pytest.mark.parametrize("kind", EXACT)
def test_every_ngram_scores_as_in_the_arpa_file(data, arpa, kind):
    model = load(data, kind)
    assert model.words == arpa.words
    grams = list(ngrams(arpa))
    assert len(grams) == sum(arpa.counts)
    assert {len(gram) for gram in grams} == {1, 2, 3, 4}
    for *context, word in grams:
        found = model.advance_id(after(model, context), word)[1]
        expected = arpa.advance_id(after(arpa, context), word)[1]
        assert found == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("kind", EXACT)
def test_sentences_score_as_with_the_arpa_file(data, arpa, kind):
    model = load(data, kind)
    rng = np.random.default_rng(1)
    for _ in range(300):
        sentence = rng.choice([*arpa.words, "zebra"], rng.integers(0, 12)).tolist()
        assert model.score(sentence) == pytest.approx(arpa.score(sentence), abs=2e-5)


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_tries_score_as_kenlm_does(data, arpa, kind):
    model = load(data, kind)
    query = json.loads((data / "kenlm" / "query.json").read_text(encoding="utf-8"))
    found = [model.score(sentence.split()) for sentence in query["sentences"]]
    np.testing.assert_allclose(found, np.array(query[kind]) * math.log(10), rtol=2e-6, atol=2e-5)
    assert (
        max(abs(score - arpa.score(text.split())) for score, text in zip(found, query["sentences"], strict=True)) > 1e-3
    )


@pytest.mark.parametrize("kind", [*EXACT, *QUANTISED])
def test_equal_states_score_alike(data, kind):
    """What beam search relies on, to merge and to share."""
    model = load(data, kind)
    rng = np.random.default_rng(2)
    longest = 0
    for _ in range(50):
        words = rng.integers(0, len(model.words), 6).tolist()
        state = after(model, words)
        longest = max(longest, len(state))
        kept = after(model, words[-len(state) :] if state else [])
        for word in range(len(model.words)):
            assert model.advance_id(kept, word)[1] == pytest.approx(model.advance_id(state, word)[1], abs=1e-9)
    assert longest > 1


def test_what_blanks_fill_in(data, arpa):
    """Tries count the n-grams that KenLM adds; hash tables do not."""
    assert load(data, "probing").counts == arpa.counts
    assert all(found >= given for found, given in zip(load(data, "trie").counts, arpa.counts, strict=True))
    assert load(data, "trie").counts[2] > arpa.counts[2]


def test_a_trie_can_be_saved_and_hash_tables_cannot(data, arpa, tmp_path):
    load(data, "trie").save_arpa(tmp_path / "again.arpa")
    again = NgramModel.load(tmp_path / "again.arpa")
    assert again.score(["the", "cat"]) == pytest.approx(arpa.score(["the", "cat"]), abs=2e-5)
    for save in ("save", "save_arpa"):
        path = tmp_path / "no.lm"
        with pytest.raises(UsageError) as caught:
            getattr(load(data, "probing"), save)(path)
        assert str(caught.value) == f"{path}: a KenLM model of hash tables cannot be converted; give its ARPA file"
        assert not path.exists()


@pytest.mark.parametrize("kind", EXACT)
def test_beam_search_takes_them(data, arpa, kind):
    labels = (*" abcdefghijklmnopqrstuvwxyz", "'")
    rows = np.log(np.random.default_rng(4).dirichlet(np.full(29, 0.1), 30) + 1e-9).astype(np.float32)
    expected = BeamSearch(labels, lm=arpa, beam_width=8)(rows, 30)
    found = BeamSearch(labels, lm=load(data, kind), beam_width=8)(rows, 30)
    assert [row.text for row in found] == [row.text for row in expected]
    np.testing.assert_allclose([row.score for row in found], [row.score for row in expected], atol=1e-4)


def test_words_outside_latin(data):
    model = load(data, "probing")
    assert "naïve" in model
    assert model.word_id("zebra") == model.word_id("<unk>") >= 0


# what is refused


@pytest.fixture
def changed(data, tmp_path):
    """A copy of one of the files, changed; `write(kind, change)` gives its path."""

    def write(kind, change):
        content = bytearray((data / "kenlm" / f"tiny.{kind}").read_bytes())
        path = tmp_path / "m.bin"
        path.write_bytes(change(content) or content)
        return path

    return write


def refusal(path):
    with pytest.raises(ModelError) as caught:
        NgramModel.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


CURE = "build it again with today's build_binary, or give its ARPA file"
DAMAGED = "damaged KenLM binary; copy or build it again"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda b: b.replace(b"version 5", b"version 4", 1),
            f"is a KenLM binary ('format version 4') other than of format version 5; {CURE}",
        ),
        (
            lambda b: b.replace(b"format version 5\n", b"incomplete\n", 1),
            f"is a KenLM binary ('incomplete') other than of format version 5; {CURE}",
        ),
        (lambda b: b.__setitem__(60, 1), f"is a KenLM binary of another kind of machine; {CURE}"),
        (lambda b: b.__setitem__(KIND_AT, 1), "is a KenLM binary of kind 1, version 0; build it as probing or trie"),
        (lambda b: b.__setitem__(KIND_AT, 9), "is a KenLM binary of kind 9, version 0; build it as probing or trie"),
        (
            lambda b: b.__setitem__(KIND_AT + 8, 7),
            "is a KenLM binary of kind 0, version 7; build it as probing or trie",
        ),
        (lambda b: b.__setitem__(KIND_AT + 4, 0), f"is a KenLM binary without its words; {CURE}"),
        (lambda b: b.__setitem__(88, 200), DAMAGED),
        (lambda b: b.__setitem__(88, 1), DAMAGED),
        (lambda b: b.__setitem__(slice(108, 116), struct.pack("<Q", 1 << 60)), DAMAGED),
        (lambda b: b.__setitem__(108, b[108] + 3), DAMAGED),
        (lambda b: b[:-1], DAMAGED),
        (lambda b: b[:100], DAMAGED),
        (lambda b: b[:60], DAMAGED),
        (lambda b: b.replace(b"cat\0", b"c\xfft\0", 1), "has words that are not UTF-8; give an ARPA file in UTF-8"),
        (lambda b: b.replace(b"cat\0", b"dog\0", 1), "damaged vocabulary; copy or make it again"),
        (lambda b: b.replace(b"</s>\0", b"</z>\0", 1), "has no </s>; give a model of sentences"),
    ],
)
def test_wrong_probing_files(changed, change, message):
    assert refusal(changed("probing", change)) == message


def test_numbers_that_are_not_finite(changed, data):
    content = (data / "kenlm" / "tiny.probing").read_bytes()
    header = kenlm._read_header(content)
    unigrams = header.size + 8 + kenlm._buckets(header.counts[0], header.multiplier) * 12
    bigrams = unigrams + 8 * (header.counts[0] + 1)
    nan = struct.pack("<f", math.nan)
    for place in (unigrams + 8, unigrams + 12, bigrams + 8):
        path = changed("probing", lambda b, at=place: b.__setitem__(slice(at, at + 4), nan))
        assert "numbers that are not finite" in refusal(path)


@pytest.mark.parametrize("kind", ["trie", "array", "quant", "quantarray"])
def test_wrong_tries(changed, kind):
    assert refusal(changed(kind, lambda b: b[:-1])) == DAMAGED
    assert refusal(changed(kind, lambda b: b[: len(b) // 2])) == DAMAGED
    assert "without its words" in refusal(changed(kind, lambda b: b.__setitem__(KIND_AT + 4, 0)))
    assert "kind" in refusal(changed(kind, lambda b: b.__setitem__(KIND_AT + 8, 0)))


@pytest.mark.parametrize("kind", [*EXACT, *QUANTISED])
def test_bytes_at_random_are_one_clear_error_or_a_sane_model(changed, kind):
    rng = np.random.default_rng(0)

    def spoil(content):
        for place in rng.integers(0, len(content), 8):
            content[place] = rng.integers(256)

    for _ in range(60):
        path = changed(kind, spoil)
        try:
            score = NgramModel.load(path).score(["the", "cat", "zebra"])
        except ModelError as error:
            message = str(error)
        else:
            message = "" if math.isfinite(score) else "not finite"
        assert not message or message.startswith(f"{path}: ")
        assert "\n" not in message


def test_the_file_is_mapped(data, tmp_path):
    """Hash tables are not copied into memory, and the file may be deleted while it is in use."""
    path = shutil.copy(data / "kenlm" / "tiny.probing", tmp_path / "m.bin")
    model = NgramModel.load(path)
    before = model.score(["the", "cat", "sat"])
    path.unlink()
    assert model.score(["the", "cat", "sat"]) == before


def test_capitals_are_read_in_lower_case(data, tmp_path):
    """Letters of the words alone change place, not their numbers."""
    content = (data / "kenlm" / "tiny.probing").read_bytes()
    start = content.rindex(b"<unk>\0")
    words = content[start:].split(b"\0")
    raised = [word if word.startswith(b"<") else word.decode().upper().encode() for word in words]
    path = tmp_path / "capitals.bin"
    path.write_bytes(content[:start] + b"\0".join(raised))
    assert NgramModel.load(path).score(["the", "cat"]) == load(data, "probing").score(["the", "cat"])
