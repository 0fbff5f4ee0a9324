"""Labels to ids and back, and the transcript normalisation of NVIDIA's Jasper.

Normalisation decides what WER means, so it keeps the conventions of NVIDIA's cleaner, odd ones included:
"8:00 PM" is "eight zero zero pm", "100%" is "one hundred", "2.50" is "two point fifty", "1234" is
"twelve thirty four", "ft." is always "fort". It departs from them only where they are plainly wrong:

    written          NVIDIA                      here
    €30, £20         ethirty, twenty             thirty euros, twenty pounds
    $1.5, $2 million one dollar five cents, ...  one dollar fifty cents, two million dollars
    10am, km2        tenam, kmtwo                ten am, km two
    1990s            nineteen ninetys            nineteen nineties
    1,2,3            one hundred twenty three    one two three
    1.2.3            one point two three         one point two point three
    $,5, 36 digits   not a transcript at all     five, digit by digit
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import inflect

LABELS: tuple[str, ...] = (" ", *"abcdefghijklmnopqrstuvwxyz", "'")
"""The 28 characters of Jasper's output, in NVIDIA's order; the CTC blank follows as index 28."""


def blank_id(labels: Sequence[str] = LABELS) -> int:
    """The index of the CTC blank: the one after the last label."""
    return len(labels)


def encode(text: str, labels: Sequence[str] = LABELS) -> list[int]:
    """Label ids of `text`, one a character.

    Raises:
        ValueError: a character is not a label; normalise the text first.
    """
    ids = _label_ids(tuple(labels))
    try:
        return [ids[character] for character in text]
    except KeyError as error:
        message = f"character {error.args[0]!r} is not a label; normalise the text before encoding it"
        raise ValueError(message) from None


def decode_ids(ids: Iterable[int], labels: Sequence[str] = LABELS) -> str:
    """The text that `ids` spell, one character an id: a plain mapping, repeats are kept.

    Raises:
        ValueError: an id is not that of a label, the blank among them.
    """
    characters = []
    for index in ids:
        if not 0 <= index < len(labels):
            raise ValueError(f"id {index} is not that of a label; the labels are 0 to {len(labels) - 1}")
        characters.append(labels[index])
    return "".join(characters)


def normalize_transcript(text: str, labels: Sequence[str] = LABELS) -> str:
    """English `text` as it is spoken, in label characters only, words parted by single spaces.

    Numbers, money, ordinals and abbreviations are spelled out, other scripts become Latin letters, and the
    rest of the punctuation parts words. Total: any string gives a string, and with the default labels
    normalising twice changes nothing. The first number of a process costs the import of inflect (seconds).
    """
    if not _PLAIN.fullmatch(text):
        text = _transliterate(text).lower()
        if _DIGIT.search(text):
            text = _spell_numbers(text)
        text = _ABBREVIATED.sub(lambda match: _ABBREVIATIONS.get(match[1], match[0]), text)
        text = text.replace("&", " and ").replace("+", " plus ")
    words = text.lower().translate(_kept(tuple(labels))).split()
    return (" " if " " in labels else "").join(words)


_PLAIN = re.compile(r"[A-Za-z' ]*")
_DIGIT = re.compile(r"[0-9]")

# "misess" is the reference's spelling, and so what a model trained on its transcripts has learnt.
_ABBREVIATIONS = {
    "capt": "captain",
    "co": "company",
    "col": "colonel",
    "dr": "doctor",
    "drs": "doctors",
    "esq": "esquire",
    "ft": "fort",
    "gen": "general",
    "hon": "honorable",
    "jr": "junior",
    "lt": "lieutenant",
    "ltd": "limited",
    "maj": "major",
    "mr": "mister",
    "mrs": "misess",
    "rev": "reverend",
    "sgt": "sergeant",
    "st": "saint",
}
_ABBREVIATED = re.compile(r"\b([a-z]{2,4})\.")

# Sign: unit, units, hundredth, hundredths.
_CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "€": ("euro", "euros", "cent", "cents"),
}

# Lookbehinds keep every search linear in the length of a run of digits.
_THOUSANDS = re.compile(r"(?<![0-9,])[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?!,?[0-9])")
_SIGN_AFTER = re.compile(r"(?<![0-9.])([0-9]+(?:\.[0-9]+)*) ?([£€])(?! ?[0-9.])")
_MONEY = re.compile(r"([$£€]) ?((?:[0-9]+(?:\.[0-9]+)*)|\.[0-9]+)(?:\s+(hundred|thousand|million|billion|trillion)\b)?")
_POINT = re.compile(r"(?<=[0-9])\.(?=[0-9])")
_GLUED = re.compile(r"(?<=[a-z])(?=[0-9])|(?<=[0-9])(?!(?:st|nd|rd|th)\b)(?!(?<=0)s\b)(?=[a-z])")
_NUMBER = re.compile(r"([0-9]+)(st|nd|rd|th|s)?")

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LONGEST_NUMBER = 36  # digits; inflect has names up to the decillions


@lru_cache(maxsize=8)
def _label_ids(labels: tuple[str, ...]) -> Mapping[str, int]:
    return {label: index for index, label in enumerate(labels)}


@lru_cache(maxsize=8)
def _kept(labels: tuple[str, ...]) -> Mapping[int, str]:
    """For str.translate: labels stay, other letters vanish, anything else parts words."""
    other = [chr(code) for code in range(128)] + list(_CURRENCIES)
    return {ord(c): c if c in labels else "" if c.isalpha() else " " for c in other}


def _transliterate(text: str) -> str:
    return text if text.isascii() else "".join(map(_ascii, text))


@lru_cache(maxsize=4096)
def _ascii(character: str) -> str:
    """The ASCII spelling of letters, digits and punctuation; symbols are not spoken, so they part words."""
    if character.isascii() or character in _CURRENCIES:
        return character
    from anyascii import anyascii

    category = unicodedata.category(character)
    spelled = str(anyascii(character))
    if category[0] in "LM" or category in ("Nd", "Nl"):
        return spelled
    if category == "Cf":  # soft hyphens and joiners are inside a word
        return ""
    return " " if any(c.isalnum() for c in spelled) else spelled or " "


def _spell_numbers(text: str) -> str:
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text = _SIGN_AFTER.sub(r"\2\1", text)
    text = _MONEY.sub(_spell_money, text)
    text = _POINT.sub(" point ", text)
    text = _GLUED.sub(" ", text)
    return _NUMBER.sub(_spell_number, text)


def _spell_money(match: re.Match[str]) -> str:
    """The amount with the names of its units; its digits are left to `_spell_number`."""
    unit, units, hundredth, hundredths = _CURRENCIES[match[1]]
    amount, magnitude = match[2], match[3]
    whole, _, fraction = amount.partition(".")
    if magnitude or len(fraction) > 2:
        return " ".join(filter(None, (amount, magnitude, units)))
    whole, fraction = whole.lstrip("0"), fraction.ljust(2, "0").lstrip("0")
    parts = []
    if whole or not fraction:
        parts.append(f"{whole or '0'} {unit if whole == '1' else units}")
    if fraction:
        parts.append(f"{fraction} {hundredth if fraction == '1' else hundredths}")
    return " ".join(parts)


def _spell_number(match: re.Match[str]) -> str:
    digits, suffix = match[1], match[2]
    if len(digits) > _LONGEST_NUMBER:
        return _one_by_one(digits)
    if suffix == "s":
        rest, _, last = _cardinal(digits).rpartition(" ")
        return f"{rest} {_engine().plural_noun(last)}"
    if suffix:
        return _parted(_engine().number_to_words(digits + suffix))
    return _cardinal(digits)


@lru_cache(maxsize=4096)
def _cardinal(digits: str) -> str:
    """A number as NVIDIA's cleaner reads it: codes digit by digit, 1001 to 2999 as a year."""
    if digits[0] == "0":
        return _one_by_one(digits)
    number = int(digits)
    if number > 1_000_000_000 and number % 10_000:  # a telephone number, not a quantity
        return _one_by_one(digits)
    if 1000 < number < 3000 and not 2000 <= number < 2010:
        if number % 100 == 0:
            return f"{_parted(_engine().number_to_words(digits[:2]))} hundred"
        return _parted(_engine().number_to_words(digits, zero="oh", group=2))
    return _parted(_engine().number_to_words(digits, andword=""))


def _one_by_one(digits: str) -> str:
    return " ".join(_DIGITS[int(digit)] for digit in digits)


def _parted(words: object) -> str:
    """inflect's words without its hyphens and commas."""
    return " ".join(re.findall("[a-z]+", str(words)))


@lru_cache(maxsize=1)
def _engine() -> "inflect.engine":
    import inflect

    return inflect.engine()
