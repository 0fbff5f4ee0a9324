"""Sentences for the language model, from plain-text books as Project Gutenberg distributes them.

    python recipes/mini/books.py FOLDER --books recipes/mini/books.tsv --without MANIFEST... --out books.txt.gz

FOLDER holds the books of the list as ID.txt. `books.tsv` names those that the shipped model read: public-domain
prose without any book of LibriSpeech's dev and test sets. A sentence that shares six words in a row with a transcript
of a --without manifest is dropped. One sentence a line: a-z, apostrophes, single spaces, 3 to 40 words.
"""

import argparse
import gzip
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from build_lm import transcript

WORDS = (3, 40)
NGRAM = 6

START = re.compile(r"\*\*\*\s*START OF (?:THIS|THE) PROJECT GUTENBERG.*\n|\*END\*?\s*THE SMALL PRINT.*\n", re.I)
END = re.compile(
    r"\n.{0,12}\*\*\*\s*END OF TH(?:IS|E) PROJECT GUTENBERG|\n\s*End of (?:the |this )?Project Gutenberg", re.I
)
NOTE = re.compile(r"\[(?:Illustration|Footnote|Sidenote|Transcriber|Note)[^\]]{0,3000}\]|\[(?:\d+|[A-Z*])\]", re.I)
ABOUT_THE_BOOK = re.compile(
    r"gutenberg|proofread|e-?text|https?:|www\.|copyright|ISBN|transcrib|(?:produced|printed|published) (?:by|in)\b",
    re.I,
)
PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--", "\u00e6": "ae"})
TABLE = re.compile(r"\.{5,}|(?:\. ){5,}|\S\s{6,}\d|[|=<>{}\\]|_{3,}")
TITLES = {
    "Capt": "Captain", "Col": "Colonel", "Dr": "Doctor", "Gen": "General", "Gov": "Governor", "Hon": "Honorable",
    "Lieut": "Lieutenant", "Maj": "Major", "Mme": "Madame", "Mlle": "Mademoiselle", "Mr": "Mister", "Mrs": "Missus",
    "Prof": "Professor", "Rev": "Reverend", "St": "Saint",
}  # fmt: skip
TITLE = re.compile(rf"\b({'|'.join(TITLES)})\.?(?=\s+[A-Z])")
BOUNDARY = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]*[A-Z])")
ABBREVIATED = re.compile(
    r"(?:^|[\s(.-])(?:[A-HJ-Z]|Vol|No|Nos|p|pp|cf|Fig|viz|Messrs|Co|Jan|Feb|Aug|Sept|Oct|Nov|Dec)\.$"
)
ENDED = re.compile(r"(?:[.!?;:]|--)[\"')]*$")
UNSPEAKABLE = re.compile(
    r"\d|\b[IVXLC]{2,}\b|\b(?:[Ii]\. ?e|[Ee]\. ?g|[Ii]bid|cf|[Vv]ol)\.|-{3,}|\b[A-HJ-Z]--|[^\x00-\x7f]|[\[\]@#~^$/+%*]"
)
ELISIONS = re.compile(r"'(?:tis|twas|twere|twill|twould|em|un|im|er|e|ere|ow|ave|ouse|bout|cause)")
CLIPPED = re.compile(r"\w{2,}in|o|an|th|wi|ol|d|t|ha|fo|mo|didn|wouldn|couldn|ain|jus|mos|las")


def main() -> None:
    """Read the listed books one after the other; say what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--books", type=Path, required=True, help="tab-separated, the first column the id")
    parser.add_argument("--without", type=Path, nargs="*", default=[], metavar="MANIFEST")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    barred = {gram for path in options.without for text in transcripts(path) for gram in ngrams(text)}
    ids = [line.split("\t")[0] for line in options.books.read_text(encoding="utf-8").splitlines()[1:]]
    paths = [options.folder / f"{name}.txt" for name in ids]
    missing = [path.name for path in paths if not path.exists()]
    seen: set[str] = set()
    words = 0
    with gzip.open(options.out, "wt", encoding="utf-8", compresslevel=6) as out:
        for path in paths:
            for text in book(path) if path.exists() else ():
                if text not in seen and barred.isdisjoint(ngrams(text)):
                    seen.add(text)
                    words += text.count(" ") + 1
                    out.write(text + "\n")
    books = len(paths) - len(missing)
    print(f"{options.out}: {words} words, {len(seen)} sentences, {books} books, {len(missing)} missing", *missing)


def transcripts(manifest: Path) -> list[str]:
    """Of a JSON-lines manifest, or of LibriSpeech's own .trans.txt."""
    lines = manifest.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] if line.startswith("{") else line.split(" ", 1)[-1] for line in lines]
    return [transcript(text) for text in texts]


def ngrams(text: str) -> Iterator[tuple[str, ...]]:
    """Every NGRAM words in a row."""
    words = text.split()
    return (tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))


def book(path: Path) -> Iterator[str]:
    """The sentences of a book, as they would be transcribed."""
    for paragraph in paragraphs(body(decoded(path.read_bytes()))):
        for sentence in sentences(paragraph):
            if ENDED.search(sentence) and not UNSPEAKABLE.search(sentence):
                text = transcript(without_quotes(sentence))
                if WORDS[0] <= len(text.split()) <= WORDS[1]:
                    yield text


def decoded(data: bytes) -> str:
    """UTF-8 or, as older files are, Windows-1252; accents folded, typographic signs made plain."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
    text = text.translate(PLAIN)
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def body(text: str) -> str:
    """What lies between Project Gutenberg's header and footer, without notes."""
    if start := START.search(text[:60_000]):
        text = text[start.end() :]
    if end := END.search(text, len(text) // 2):
        text = text[: end.start()]
    return NOTE.sub(" ", text)


def paragraphs(text: str) -> Iterator[str]:
    """Prose, each paragraph on one line: no headings, verse, tables, or words about the edition."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.split("\n") if line.strip()]
        joined = " ".join(" ".join(lines).replace("_", "").split())
        letters = [c for c in joined if c.isalpha()]
        heading = len(letters) < 8 or sum(c.isupper() for c in letters) > 0.35 * len(letters)
        if not (heading or ABOUT_THE_BOOK.search(block) or TABLE.search(block) or is_verse(lines)):
            yield TITLE.sub(lambda match: TITLES[match[1]], joined)


def is_verse(lines: list[str]) -> bool:
    """Several short lines that are set in, or begin with capitals."""
    if len(lines) < 2 or max(map(len, lines)) >= 62:
        return False
    set_in = sum(line.startswith("  ") for line in lines)
    capitals = sum(line.lstrip(" \"'(")[:1].isupper() for line in lines)
    return set_in > 0.6 * len(lines) or (len(lines) >= 3 and capitals > 0.7 * len(lines))


def sentences(paragraph: str) -> Iterator[str]:
    """Split after . ! ? before a capital, long ones also at semicolons and colons."""
    start = 0
    for match in [*BOUNDARY.finditer(paragraph), None]:
        piece = paragraph[start : match.end() if match else None].strip()
        if match and ABBREVIATED.search(piece.rstrip("\"')")):
            continue
        start = match.end() if match else len(paragraph)
        yield from [piece] if piece.count(" ") < WORDS[1] else re.split(r"(?<=[;:])\s+", piece)


def without_quotes(sentence: str) -> str:
    """Without single quotation marks; apostrophes at a word's edge stay where one is usual ('tis, goin', boys' own)."""

    def kept(match: re.Match[str]) -> str:
        before, word, after, rest = match[1], match[2], match[3], sentence[match.end() : match.end() + 2]
        lower = word.lower()
        opening = "'" if before and ELISIONS.fullmatch("'" + lower) else ""
        plural = lower.endswith("s") and re.match(r" [a-z]", rest)
        closing = "'" if after and (CLIPPED.fullmatch(lower) or plural) else ""
        return f" {opening}{word}{closing} " if before or after else word

    return re.sub(r"((?<![A-Za-z])'+)?([A-Za-z]+(?:'[A-Za-z]+)*)('+(?![A-Za-z]))?", kept, sentence)


if __name__ == "__main__":
    main()
