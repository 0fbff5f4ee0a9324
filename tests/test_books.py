import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes" / "mini"

BOOK = """The Project Gutenberg EBook of A Made-Up Book, by Nobody

Title: A Made-Up Book

*** START OF THIS PROJECT GUTENBERG EBOOK A MADE-UP BOOK ***

Produced by a volunteer whose name is not told here.

CHAPTER THE FIRST

Mr. Brown and Dr. Smith went down to the sea.  It was not yet
light; 'and yet,' said he, 'the dogs' owner isn't goin' home.'

"'Tis late," she said to J. Green. They've seen the _whole_ \xe9lite of it.

    The waves are high,
    The waves are blue,
    And so am I,
    And so are you.

He was born in 1812. Henry VIII. was not there at all. I'll stay a civil man[2].

  Fish . . . . . . . . . . 12

So we sat.  We sat.

*** END OF THIS PROJECT GUTENBERG EBOOK A MADE-UP BOOK ***

This sentence is not of the book.
"""

SENTENCES = [
    "mister brown and doctor smith went down to the sea",
    "it was not yet light and yet said he the dogs' owner isn't goin' home",
    "'tis late she said to j green",
    "they've seen the whole elite of it",
    "i'll stay a civil man",
    "so we sat",
]


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    spec = importlib.util.spec_from_file_location("books", RECIPES / "books.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_a_book_becomes_sentences_as_they_are_spoken(tmp_path, recipe, encoding):
    path = tmp_path / "7.txt"
    path.write_bytes(BOOK.replace("\n", "\r\n").encode(encoding))
    assert list(recipe.book(path)) == SENTENCES


def test_sentences_of_a_test_set_and_repeated_ones_are_left_out(tmp_path, recipe, monkeypatch, capsys):
    for name in ("7", "8"):
        (tmp_path / f"{name}.txt").write_text(BOOK, encoding="utf-8")
    (tmp_path / "books.tsv").write_text("id\ttitle\tauthor\n7\tA\tB\n9\tA\tB\n8\tA\tB\n", encoding="utf-8")
    heard = {"audio_filepath": "a.wav", "duration": 1, "text": "Doctor Smith went down to the river"}
    (tmp_path / "test.jsonl").write_text(json.dumps(heard) + "\n", encoding="utf-8")
    out = tmp_path / "out.txt.gz"
    arguments = [tmp_path, "--books", tmp_path / "books.tsv", "--without", tmp_path / "test.jsonl", "--out", out]
    monkeypatch.setattr(sys, "argv", ["books.py", *map(str, arguments)])
    recipe.main()
    assert gzip.decompress(out.read_bytes()).decode().splitlines() == SENTENCES[1:]
    assert "5 sentences, 2 books, 1 missing" in capsys.readouterr().out
