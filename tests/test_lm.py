import gzip
import importlib.util
import itertools
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from jasper_asr.errors import ModelError, StorageError, UsageError
from jasper_asr.lm import NgramModel, estimate

LN10 = math.log(10)

ARPA = """\
comment before the data

\\data\\
ngram 1=5
ngram 2=4
ngram 3=1

\\1-grams:
-0.6\t</s>
-99\t<s>\t-0.3
-1.5\t<unk>
-0.4\ta\t-0.2
-0.7\tb\t-0.1

\\2-grams:
-0.25 <s> a -0.15
-0.35 a b -0.45
-0.55 b </s>
-0.65 a a

\\3-grams:
-0.05 <s> a b

\\end\\
"""


def random_text(seed, sentences=300, vocabulary=30):
    """Words of unequal frequency in sentences of 1 to 8, so that all counts of counts occur."""
    rng = np.random.default_rng(seed)
    words = [f"w{index}" for index in range(vocabulary)]
    share = 1 / np.arange(1, vocabulary + 1)
    return [" ".join(rng.choice(words, rng.integers(1, 9), p=share / share.sum())) for _ in range(sentences)]


class SlowKneserNey:
    """Interpolated modified Kneser-Ney by its definition (Chen and Goodman 1999), over dictionaries."""

    def __init__(self, sentences, order):
        self.order = order
        self.raw = raw = Counter()
        for sentence in sentences:
            tokens = ["<s>", *sentence.split(), "</s>"]
            for n in range(1, order + 1):
                raw.update(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        self.vocabulary = sorted({gram[0] for gram in raw if len(gram) == 1} | {"<unk>"})
        preceded = defaultdict(set)
        for gram in raw:
            preceded[gram[1:]].add(gram[0])
        self.count, self.follow, self.discount = {}, defaultdict(dict), {}
        for gram, count in raw.items():
            if gram == ("<s>",):
                continue
            highest = len(gram) == order or gram[0] == "<s>"
            self.count[gram] = count if highest else len(preceded[gram])
            self.follow[gram[:-1]][gram[-1]] = self.count[gram]
        for n in range(1, order + 1):
            self.discount[n] = self._discounts(Counter(c for g, c in self.count.items() if len(g) == n))

    def _discounts(self, n):
        if all(n[k] for k in (1, 2, 3)):
            y = n[1] / (n[1] + 2 * n[2])
            found = [0, *(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))]
            if min(found[1:]) > 0:
                return found
        return [0, 0.5, 1.0, 1.5]

    def prob(self, context, word):
        lower = self.prob(context[1:], word) if context else 1 / (len(self.vocabulary) - 1)
        followers = self.follow.get(context)
        if not followers:
            return lower
        discount = self.discount[len(context) + 1]
        total = sum(followers.values())
        mass = sum(discount[min(3, count)] for count in followers.values())
        count = followers.get(word, 0)
        return (count - discount[min(3, count)]) / total + mass / total * lower


def state_after(model, words):
    """The state after `words`, the first of which may be <s>."""
    state, words = (model.start(), words[1:]) if words[:1] == ("<s>",) else ((), words)
    for word in words:
        state, _ = model.advance(state, word)
    return state


def total_probability(model, state):
    return sum(math.exp(model.advance(state, word)[1]) for word in model.words if word != "<s>")


@pytest.fixture
def arpa(tmp_path):
    path = tmp_path / "hand.arpa"
    path.write_text(ARPA)
    return path


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("sentences", "vocabulary"), [(300, 30), (4, 5)])
def test_equals_kneser_ney_by_its_definition(order, sentences, vocabulary):
    """The small text has no counts of 3 somewhere, and so needs the fixed discounts."""
    text = random_text(order, sentences, vocabulary)
    slow, model = SlowKneserNey(text, order), estimate(text, order)
    assert model.words == slow.vocabulary
    assert model.order == order
    rng = np.random.default_rng(0)
    contexts = {()} | {("<s>",) for _ in range(order > 1)}
    for _ in range(60):
        contexts.add(tuple(rng.choice(slow.vocabulary[2:], rng.integers(0, order)))[: order - 1])
        sentence = ["<s>", *text[rng.integers(len(text))].split()]
        start = rng.integers(len(sentence))
        contexts.add(tuple(sentence[start : start + order - 1]))
    for context in contexts:
        if "<s>" in context[1:]:
            continue
        state = state_after(model, context)
        for word in slow.vocabulary:
            if word != "<s>":
                expected = math.log(slow.prob(tuple(map(str, context)), word))
                assert model.advance(state, word)[1] == pytest.approx(expected, abs=2e-5)


def test_discounts_of_the_formula_are_in_use():
    slow = SlowKneserNey(random_text(3), 3)
    assert all(slow.discount[n] != [0, 0.5, 1.0, 1.5] for n in (2, 3))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("prune", [0.0, 1e-4, 3e-4, 1e-3, 1.0])
def test_probabilities_add_up_to_one_after_any_context(order, prune):
    text = random_text(order)
    model = estimate(text, order, prune=prune)
    states = {(), model.start()}
    for sentence in text[:40]:
        words = tuple(sentence.split())
        states |= {state_after(model, ("<s>", *words[:n])) for n in range(len(words) + 1)}
        states |= {state_after(model, words[n:]) for n in range(len(words))}
    assert len(states) > 20 or order == 1 or prune == 1.0
    for state in states:
        assert total_probability(model, state) == pytest.approx(1, abs=1e-5)


def removal_costs(slow, order):
    """n-gram of the highest order -> relative entropy of the model without it from the model with it, by definition."""
    tokens = sum(count for gram, count in slow.raw.items() if len(gram) == 1)
    words = [word for word in slow.vocabulary if word != "<s>"]
    costs = {}
    for gram in slow.count:
        if len(gram) != order:
            continue
        context, rest = gram[:-1], set(slow.follow[gram[:-1]]) - {gram[-1]}
        probs = {word: slow.prob(context, word) for word in words}
        lower = {word: slow.prob(context[1:], word) for word in words}
        weight = (1 - sum(probs[word] for word in rest)) / (1 - sum(lower[word] for word in rest))
        without = {word: probs[word] if word in rest else weight * lower[word] for word in words}
        divergence = sum(probs[word] * math.log(probs[word] / without[word]) for word in words)
        costs[gram] = slow.raw[context] / tokens * divergence
    return costs


@pytest.mark.parametrize("order", [2, 3])
def test_pruning_drops_the_ngrams_whose_loss_matters_least(order):
    text = random_text(order, 120, 12)
    costs = removal_costs(SlowKneserNey(text, order), order)
    for share in (0.2, 0.5, 0.9):
        ranked = sorted(costs.values())
        at = int(share * len(ranked))
        low, high = max(itertools.pairwise(ranked[at - 5 : at + 5]), key=lambda pair: pair[1] - pair[0])  # no ties
        threshold = (low + high) / 2
        model = estimate(text, order, prune=threshold)
        assert model.counts[-1] == sum(cost >= threshold for cost in costs.values())
        for gram, cost in costs.items():
            state = state_after(model, gram[:-1])
            explicit = len(state) == order - 1 and model._child(order - 1, state[-1], model.word_id(gram[-1])) >= 0
            assert explicit == (cost >= threshold)


def test_the_more_is_pruned_the_less_the_text_is_known_by_heart():
    text = random_text(1, 1000)
    models = [estimate(text, 3, prune=prune) for prune in (0.0, 1e-5, 1e-4, 1e-3)]
    sizes = [model.counts for model in models]
    assert [size[0] for size in sizes] == [33] * 4
    assert all(a[1] >= b[1] and a[2] > b[2] for a, b in itertools.pairwise(sizes))
    perplexities = [model.perplexity(text) for model in models]
    assert perplexities == sorted(perplexities)


def test_pruning_nothing_changes_nothing():
    text = random_text(5)
    whole, pruned = estimate(text), estimate(text, prune=1e-30)
    assert pruned.counts[1] >= whole.counts[1] - 5  # those that the back-off gives exactly may go
    for sentence in random_text(6, 50):
        assert pruned.score(sentence.split()) == pytest.approx(whole.score(sentence.split()), abs=1e-3)


@pytest.mark.parametrize(
    ("words", "log10"),
    [
        ("a b", -0.25 - 0.05 - 0.45 - 0.55),  # a b </s> is no trigram: back-off of a b, then b </s>
        ("a a", -0.25 + (-0.15 - 0.65) + (-0.2 - 0.6)),  # <s> a a: back-off of <s> a; a a has no back-off, a has
        ("b", (-0.3 - 0.7) - 0.55),  # <s> b is no bigram: back-off of <s>, then b
        ("", -0.3 - 0.6),
        ("c a", (-0.3 - 1.5) - 0.4 + (-0.2 - 0.6)),  # c is unknown, and nothing follows <unk>
        ("b a b", (-0.3 - 0.7) + (-0.1 - 0.4) - 0.35 + (-0.45 - 0.55)),
    ],
)
def test_back_off_by_hand(arpa, words, log10):
    model = NgramModel.load(arpa)
    assert model.score(words.split()) == pytest.approx(log10 * LN10, rel=1e-6)


def test_state_is_what_matters_and_no_more(arpa):
    model = NgramModel.load(arpa)
    after = {words: state_after(model, words) for words in [("<s>", "a"), ("a",), ("b", "a"), ("<s>", "b", "a")]}
    assert after["b", "a"] == after["a",] == after["<s>", "b", "a"]
    assert after["<s>", "a"] != after["a",]
    assert state_after(model, ("<s>", "a", "b")) == state_after(model, ("a", "b"))


def test_a_context_without_its_own_suffix(tmp_path):
    """Pruning of other makes leaves trigrams whose last two words are no bigram."""
    path = tmp_path / "gap.arpa"
    path.write_text(
        "\\data\\\nngram 1=4\nngram 2=1\nngram 3=1\nngram 4=1\n\\1-grams:\n-1 <s> -.5\n-1 </s>\n-2 a -.25\n-3 b -.125\n"
        "\\2-grams:\n-.1 a b -.2\n\\3-grams:\n-.3 a b a -.7\n\\4-grams:\n-.01 a b a a\n\\end\\\n"
    )
    model = NgramModel.load(path)
    assert model.counts == (4, 1, 1, 1)
    state = state_after(model, ("a", "b", "a"))
    assert len(state) == 3
    assert state[1] == -1
    assert model.advance(state, "a")[1] == pytest.approx(-0.01 * LN10)
    assert model.advance(state, "b")[1] == pytest.approx((-0.7 - 0.1) * LN10)  # a b a hands on, b a is none, a b
    assert model.finish(state) == pytest.approx((-0.7 - 0.25 - 1) * LN10)


def test_perplexity_by_its_definition(arpa):
    model = NgramModel.load(arpa)
    texts = ["a b", "b", "c a"]
    total = sum(model.score(text.split()) for text in texts)
    assert model.perplexity(texts) == pytest.approx(math.exp(-total / (2 + 1 + 2 + 3)))


def test_unknown_words(arpa, tmp_path):
    model = NgramModel.load(arpa)
    assert "a" in model
    assert "c" not in model
    assert "" not in model
    assert "zz" not in model  # sorts after the last word
    assert model.advance((), "c") == model.advance((), "<unk>")
    path = tmp_path / "closed.arpa"
    path.write_text(ARPA.replace("ngram 1=5", "ngram 1=4").replace("-1.5\t<unk>\n", ""))
    closed = NgramModel.load(path)
    state, log_prob = closed.advance(closed.start(), "c")
    assert log_prob == pytest.approx(-0.7 * LN10)  # as its rarest word, which <s> is not
    assert state == ()
    unseen = estimate(["a b", "b a"], 2)
    assert unseen.advance((), "c")[1] < min(unseen.advance((), word)[1] for word in ("a", "b"))


def test_arpa_round_trip(tmp_path):
    model = estimate(random_text(1), 3, prune=1e-4)
    path = tmp_path / "model.arpa"
    model.save_arpa(path)
    zipped = tmp_path / "model.arpa.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    for again in (NgramModel.load(path), NgramModel.load(zipped)):
        assert again.counts == model.counts
        for sentence in random_text(2, 30):
            assert again.score(sentence.split()) == pytest.approx(model.score(sentence.split()), rel=1e-5)


def test_arpa_lines_in_any_order(arpa, tmp_path):
    lines = ARPA.splitlines()
    shuffled = [*lines[:8], *lines[12:7:-1], *lines[13:15], *lines[18:14:-1], *lines[19:]]
    path = tmp_path / "shuffled.arpa"
    path.write_text("\r\n".join(shuffled))
    for words in ("a b", "a a", "b a b", "c"):
        assert NgramModel.load(path).score(words.split()) == NgramModel.load(arpa).score(words.split())


def test_our_format_keeps_a_small_model_exactly(arpa, tmp_path):
    model = NgramModel.load(arpa)
    model.save(tmp_path / "hand.lm")
    again = NgramModel.load(tmp_path / "hand.lm")
    for level, other in zip(model.levels, again.levels, strict=True):
        for field in ("words", "log_probs", "backoffs", "first"):
            assert np.array_equal(getattr(level, field), getattr(other, field))


def test_our_format_within_quantisation(tmp_path):
    text = [" ".join(pair) for pair in zip(random_text(1, 2000, 300), random_text(2, 2000, 300), strict=True)]
    model = estimate(text, 3)
    model.save(tmp_path / "a.lm")
    again = NgramModel.load(tmp_path / "a.lm")
    assert again.counts == model.counts
    for level, other in zip(model.levels, again.levels, strict=True):
        assert np.array_equal(level.words, other.words)
        assert np.array_equal(level.first, other.first)
        for values, coded in ((level.log_probs, other.log_probs), (level.backoffs, other.backoffs)):
            assert np.abs(values - coded).max() < 0.5
            assert np.abs(values - coded).mean() < 0.02
            assert np.array_equal(values == 0, coded == 0)
    assert again.perplexity(text) == pytest.approx(model.perplexity(text), rel=0.01)
    again.save(tmp_path / "b.lm")
    assert (tmp_path / "b.lm").read_bytes() == (tmp_path / "a.lm").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.lm", "b.lm"]


def test_rare_words_are_counted_as_unknown():
    text = [*random_text(3, 400, 300), "once", "twice twice"]
    seen = Counter(" ".join(text).split())
    assert 10 < sum(count < 5 for count in seen.values()) < len(seen)
    spelt = [" ".join(word if seen[word] >= 5 else "<unk>" for word in line.split()) for line in text]
    model, expected = estimate(text, 3, prune=1e-4, min_count=5), estimate(spelt, 3, prune=1e-4)
    assert model.words == expected.words
    assert "once" not in model
    assert model.counts == expected.counts
    for line in text:
        assert model.score(line.split()) == expected.score(line.split())


def test_capitals_are_read_in_lower_case(tmp_path, arpa):
    path = tmp_path / "capitals.arpa"
    path.write_text(ARPA.replace("\ta", "\tA").replace("\tb", "\tB").replace(" a", " A").replace(" b", " B"))
    model = NgramModel.load(path)
    assert model.words == ["</s>", "<s>", "<unk>", "a", "b"]
    assert model.score(["a", "b"]) == NgramModel.load(arpa).score(["a", "b"])
    mixed = tmp_path / "mixed.arpa"
    mixed.write_text(ARPA.replace("\tb", "\tB").replace(" b", " B"))
    assert NgramModel.load(mixed).words == ["</s>", "<s>", "<unk>", "B", "a"]


DAMAGED = "damaged language model; copy or make it again"
STRANGE = "is neither a language model of ours nor ARPA text; give one of these"
LOST = "damaged: n-grams refer to what is not there; copy or make it again"
UNEQUAL = "damaged: its parts differ in size; copy or make it again"
VOCABULARY = "damaged vocabulary; copy or make it again"
INFINITE = "holds numbers that are not finite; copy or make it again"
NEWER = "language model of another version of this package; update the package"
SHORT = "ends early, or announces other numbers of n-grams than it holds; copy or make it again"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\\data\\", "data", STRANGE),
        ("\n\\end\\", "", SHORT),
        ("ngram 2=4", "ngram 2=5", SHORT),
        ("ngram 2=4", "ngram 2=x", "line 5: invalid literal for int() with base 10: 'x'; correct it"),
        ("\\2-grams:", "\\3-grams:", "line 15: expected \\2-grams:; correct it"),
        ("-0.35 a b -0.45", "-0.35 a", "line 17: not a 2-gram with its log-probability; correct it"),
        ("-0.35 a b", "x a b", "line 17: a log-probability or back-off is no number; correct it"),
        ("-0.35 a b", "-0.35 a c", "line 17: c is not among the 1-grams; correct it"),
        ("-0.7\tb", "-0.7\ta", "line 13: a second 1-gram a; correct it"),
        ("-0.65 a a", "-0.65 a b", "holds a 2-gram twice; copy or make it again"),
        ("-0.05 <s> a b", "-0.05 b a b", "a 3-gram's first words are no n-gram; copy or make it again"),
        ("-0.4\ta", "nan\ta", "holds numbers that are not finite; copy or make it again"),
        ("-0.4\ta", "0.4\ta", "holds probabilities above 1; copy or make it again"),
    ],
)
def test_wrong_arpa_files(tmp_path, old, new, message):
    path = tmp_path / "wrong.arpa"
    assert old in ARPA
    path.write_text(ARPA.replace(old, new))
    with pytest.raises(ModelError) as error:
        NgramModel.load(path)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize("mark", ["<s>", "</s>"])
def test_models_without_marks_of_a_sentence(tmp_path, mark):
    path = tmp_path / "unmarked.arpa"
    path.write_text(ARPA.replace(mark, "x"))
    with pytest.raises(ModelError, match=f"^{path}: has no {mark}; give a model of sentences$"):
        NgramModel.load(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", STRANGE),
        (b"RIFF\xff\xfe\x00", STRANGE),
        (b"PK\x03\x04 and no more", DAMAGED),
        (gzip.compress(ARPA.encode())[:40], "damaged gzip file; copy or make it again"),
        (b"\x1f\x8bgarbage", "damaged gzip file; copy or make it again"),
        (
            b"mmap lm http://kheafield.com/code format version 5\n\x00\x00\xff",
            "damaged KenLM binary; copy or build it again",
        ),
    ],
)
def test_other_kinds_of_file(tmp_path, data, message):
    path = tmp_path / "other.lm"
    path.write_bytes(data)
    with pytest.raises(ModelError) as error:
        NgramModel.load(path)
    assert str(error.value) == f"{path}: {message}"


def test_a_damaged_file_of_ours_is_never_taken_for_whole(tmp_path, arpa):
    """Cut short anywhere, or with any one byte changed, it is refused, or (names, dates) reads as before."""
    model = NgramModel.load(arpa)
    path, bad = tmp_path / "whole.lm", tmp_path / "bad.lm"
    model.save(path)
    data = path.read_bytes()
    messages = []
    for at in range(0, len(data), 11):
        flipped = bytearray(data)
        flipped[at] ^= 0x55
        for broken in (data[:at], bytes(flipped)):
            bad.write_bytes(broken)
            try:
                assert NgramModel.load(bad).score(["a", "b"]) == model.score(["a", "b"])
            except ModelError as error:
                messages.append(str(error))
    assert len(messages) > len(data) / 11 * 1.5
    assert all(message.startswith(f"{bad}: ") and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": np.array([2, 3], np.uint8)}, NEWER),
        ({"version": np.array([1, 4], np.uint8)}, DAMAGED),
        ({"version": np.array([1, 0], np.uint8)}, DAMAGED),
        ({"words2": np.array([1, 2, 3, 200], np.uint8)}, LOST),
        ({"words2": np.array([1, 2, 3, -1], np.int8)}, LOST),
        ({"continuations1": np.array([0, 9, 0, -5, 0], np.int8)}, LOST),
        ({"continuations1": np.array([9, 0, 0, 0, 0], np.uint8)}, LOST),
        ({"words2": np.array([1], np.uint8)}, DAMAGED),
        ({"log_probs2": np.array([1], np.uint8)}, UNEQUAL),
        ({"log_probs2": np.array([99] * 4, np.uint8)}, DAMAGED),
        ({"log_prob_book2": np.full(256, np.nan, np.float32)}, INFINITE),
        ({"vocabulary": np.frombuffer(b"b\na\n</s>\n<s>\n<unk>", np.uint8)}, VOCABULARY),
        ({"vocabulary": np.frombuffer(b"\xff\xff", np.uint8)}, DAMAGED),
        ({"words2": np.array([{}], object)}, DAMAGED),
    ],
)  # fmt: skip
def test_parts_of_our_format_that_disagree(tmp_path, arpa, change, message):
    path = tmp_path / "wrong.lm"
    NgramModel.load(arpa).save(path)
    with np.load(path) as file:
        arrays = dict(file) | change
    with path.open("wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(ModelError) as error:
        NgramModel.load(path)
    assert str(error.value) == f"{path}: {message}"


def test_files_out_of_reach(tmp_path, arpa):
    with pytest.raises(StorageError) as error:
        NgramModel.load(tmp_path / "none.lm")
    assert str(error.value) == f"{tmp_path}/none.lm: cannot be read (no such file or directory); check the path"
    with pytest.raises(StorageError, match="cannot be written"):
        NgramModel.load(arpa).save(tmp_path / "none" / "x.lm")


def test_estimate_refuses_what_it_cannot_do():
    with pytest.raises(UsageError, match=r"^language model: the text holds no words; give one sentence a line$"):
        estimate(["", "  "])
    with pytest.raises(UsageError, match=r"^order 0: must be at least 1$"):
        estimate(["a"], 0)


def test_the_recipe_leaves_held_out_sentences_out(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(
        "build_lm", Path(__file__).parents[1] / "recipes" / "mini" / "build_lm.py"
    )
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    sentences = [f"Mr. Holmes' {number} dogs - {'very ' * (number % 7)}old!" for number in range(200)]
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress("\n".join(sentences).encode()))
    training, held_out = recipe.split([path])
    assert not set(training) & set(held_out)
    assert set(training) | set(held_out) == {f"mister holmes' dogs {'very ' * n}old" for n in range(7)}
    assert 0 < len(held_out) < 7
    arguments = [path, "--out", tmp_path / "x.lm", "--prune", 0, "--min-count", 1]
    monkeypatch.setattr(sys, "argv", ["build_lm.py", *map(str, arguments)])
    recipe.main()
    model = NgramModel.load(tmp_path / "x.lm")
    assert "mister" in model
    assert (
        f"perplexity {model.perplexity(held_out):.1f} on {len(held_out)} held-out sentences" in capsys.readouterr().out
    )
