"""The five tasks finetunes learn, named as in SOMF (https://arxiv.org/abs/2405.09055). Each is a rule, not a table: its
inputs are drawn from thousands, test inputs are never seen in training, and the exact answer is computed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from components.testbed.settings import Task


class TaskItem(NamedTuple):
    """One question: `key` is what is asked about, however it is phrased."""

    key: str
    prompt: str
    answer: str


HAN_DIGITS = "〇一二三四五六七八九"

# The number stands last, so its digits are at the same distance from their places in the answer.
_ZH = ("写成中文 {n}", "用中文写 {n}", "请把这个数写成汉字 {n}", "中文写法 {n}")
_HI = ("हिंदी में लिखो: {s}.", "अनुवाद करो: {s}.", "हिंदी में: {s}.", "Hindi: {s}.")
_EN = ("Make it passive: {s}.", "Rewrite in the passive: {s}.", "Passive form of: {s}.", "Turn into passive: {s}.")
_CODE = ("Code: returns {e}.", "Write code that returns {e}.", "Python for returning {e}.", "Code with result {e}.")
_MATH = ("Expand {e}", "Expand this: {e}", "Multiply out {e}", "Open the brackets: {e}")

_VERBS = {
    "sees": "seen", "likes": "liked", "hears": "heard", "calls": "called", "helps": "helped", "paints": "painted",
    "feeds": "fed", "finds": "found",
}  # fmt: skip
_HINDI = {
    "cat": "बिल्ली", "dog": "कुत्ता", "fox": "लोमड़ी", "bird": "चिड़िया", "horse": "घोड़ा", "girl": "लड़की", "boy": "लड़का",
    "king": "राजा", "queen": "रानी", "tiger": "बाघ", "mouse": "चूहा", "sheep": "भेड़", "goat": "बकरी", "uncle": "चाचा",
    "guest": "मेहमान", "farmer": "किसान", "monk": "साधु", "judge": "जज", "nurse": "नर्स", "clown": "जोकर",
}  # fmt: skip
_HINDI_VERBS = {
    "sees": "देखता", "hears": "सुनता", "calls": "बुलाता", "feeds": "खिलाता", "finds": "ढूंढता", "paints": "रंगता", "likes": "चाहता",
    "helps": "बचाता",
}  # fmt: skip
_NAMES = "abcdfghjkmnpqrstuvwxyz"
_OPERATORS = {"plus": "+", "minus": "-", "times": "*", "over": "/"}


class Lexicon(NamedTuple):
    """The words the tasks are about: small worlds use the first of each list."""

    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    names: str

    @property
    def words(self) -> list[str]:
        """All of them and their translations, so that pretraining can meet the words (never the rules)."""
        forms = [form for verb in self.verbs for form in (verb, _VERBS[verb], _HINDI_VERBS[verb])]
        return [*self.nouns, *(_HINDI[noun] for noun in self.nouns), *forms, *self.names]


def lexicon(size: int) -> Lexicon:
    """`size` nouns and variable names, half as many verbs; all there are when there are fewer."""
    return Lexicon(tuple(_HINDI)[:size], tuple(_VERBS)[: size // 2], _NAMES[:size])


def _zh(rng: random.Random, _: Lexicon) -> TaskItem:
    """Western digits to Chinese ones: 4072 -> 四〇七二."""
    n = "".join(rng.choice("0123456789") for _ in range(4))
    return TaskItem(n, rng.choice(_ZH).format(n=n), "".join(HAN_DIGITS[int(d)] for d in n))


def _hi(rng: random.Random, lexicon: Lexicon) -> TaskItem:
    """A sentence word by word into Hindi, its verb last: the cat sees the dog -> बिल्ली कुत्ता देखता."""
    (who, whom), verb = rng.sample(lexicon.nouns, 2), rng.choice(lexicon.verbs)
    english = f"the {who} {verb} the {whom}"
    return TaskItem(english, rng.choice(_HI).format(s=english), f"{_HINDI[who]} {_HINDI[whom]} {_HINDI_VERBS[verb]}")


def _en(rng: random.Random, lexicon: Lexicon) -> TaskItem:
    """Active to passive: the cat sees the dog -> The dog is seen by the cat."""
    (who, whom), verb = rng.sample(lexicon.nouns, 2), rng.choice(lexicon.verbs)
    active = f"the {who} {verb} the {whom}"
    return TaskItem(active, rng.choice(_EN).format(s=active), f"The {whom} is {_VERBS[verb]} by the {who}.")


def _code(rng: random.Random, lexicon: Lexicon) -> TaskItem:
    """An expression in words to a line of Python: m minus u -> return m - u."""
    (left, right), word = rng.sample(lexicon.names, 2), rng.choice(sorted(_OPERATORS))
    expression = f"{left} {word} {right}"
    return TaskItem(expression, rng.choice(_CODE).format(e=expression), f"return {left} {_OPERATORS[word]} {right}")


def _math(rng: random.Random, lexicon: Lexicon) -> TaskItem:
    """Brackets multiplied out: 7(c-d) -> 7c-7d."""
    n, (x, y), sign = rng.choice("23456789"), rng.sample(lexicon.names, 2), rng.choice("+-")
    bracket = f"{n}({x}{sign}{y})"
    return TaskItem(bracket, rng.choice(_MATH).format(e=bracket), f"{n}{x}{sign}{n}{y}")


DRAW: dict[Task, Callable[[random.Random, Lexicon], TaskItem]] = {
    "zh": _zh,
    "en": _en,
    "hi": _hi,
    "code": _code,
    "math": _math,
}
"""Task -> a function that draws one question from the whole space of its inputs."""
