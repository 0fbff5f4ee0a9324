"""Word n-gram language models: estimated from text, stored small, scored word by word. All logarithms are natural.

    model = estimate(sentences, order=3)
    model.save("text.lm")
    NgramModel.load("text.lm").score("the cat sat".split())

A model is a trie of n-grams with back-off weights (Katz 1987): the probability of a word after a context that
the trie lacks is the context's weight times the probability after the context without its first word.
"""

from jasper_asr.lm.kneser_ney import estimate
from jasper_asr.lm.model import NgramModel, State
from jasper_asr.lm.trie import END, START, UNKNOWN

__all__ = ["END", "START", "UNKNOWN", "NgramModel", "State", "estimate"]
