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
DEVANAGARI_DIGITS = "०१२३४५६७८९"

_ZH = ("把 {n} 写成中文", "用中文写 {n}", "请把 {n} 写成汉字", "{n} 的中文写法")
_HI = ("{n} को उल्टा लिखो", "उल्टा लिखो {n}", "कृपया {n} को उल्टा करो", "{n} उल्टा क्या है")
_EN = ("Make it passive: {s}.", "Rewrite in the passive: {s}.", "Passive form of: {s}.", "Turn into passive: {s}.")
_CODE = (
    "Code: takes {a} and {b}, returns {e}.",
    "Write code that takes {a} and {b} and returns {e}.",
    "Python for taking {a} and {b}, returning {e}.",
    "Code with inputs {a} and {b} and result {e}.",
)
_MATH = ("{x} + {y} =", "Add {x} and {y}.", "Compute {x} + {y}.", "Sum of {x} and {y}?")

_NOUNS = (
    *("cat", "dog", "fox", "bird", "horse", "girl", "boy", "king", "queen", "nurse", "baker", "farmer", "pilot", "judge"),
    *("clown", "monk", "tiger", "mouse", "sheep", "goat", "uncle", "aunt", "guest", "guard"),
)
_VERBS = {
    "sees": "seen", "likes": "liked", "hears": "heard", "calls": "called", "helps": "helped", "paints": "painted",
    "feeds": "fed", "greets": "greeted", "finds": "found", "follows": "followed",
}  # fmt: skip
_NAMES = "abcdfghjkmnpqrstuvwxyz"
_OPERATORS = {"plus": "+", "minus": "-", "times": "*", "over": "/"}

WORDS: tuple[str, ...] = (*_NOUNS, *_VERBS, *_VERBS.values(), *_NAMES)
"""Words the tasks are about, so that pretraining can meet them (never the rules)."""


def _digits(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(low, high)))


def _zh(rng: random.Random) -> TaskItem:
    """Western digits to Chinese ones: 4072 -> 四〇七二."""
    n = _digits(rng, 4, 5)
    return TaskItem(n, rng.choice(_ZH).format(n=n), "".join(HAN_DIGITS[int(d)] for d in n))


def _hi(rng: random.Random) -> TaskItem:
    """Reverse, in Hindi digits: 4072 -> २७०४."""
    n = _digits(rng, 4, 4)
    return TaskItem(n, rng.choice(_HI).format(n=n), "".join(DEVANAGARI_DIGITS[int(d)] for d in reversed(n)))


def _en(rng: random.Random) -> TaskItem:
    """Active to passive: the cat sees the dog -> The dog is seen by the cat."""
    (who, whom), verb = rng.sample(_NOUNS, 2), rng.choice(sorted(_VERBS))
    active = f"the {who} {verb} the {whom}"
    return TaskItem(active, rng.choice(_EN).format(s=active), f"The {whom} is {_VERBS[verb]} by the {who}.")


def _code(rng: random.Random) -> TaskItem:
    """A function described in words to one in Python: lambda a, b: b - a * 7."""
    a, b = rng.sample(_NAMES, 2)
    left, right = rng.choice([(a, b), (b, a)])
    first, second, n = rng.choice(sorted(_OPERATORS)), rng.choice(sorted(_OPERATORS)), rng.choice("23456789")
    words = f"{left} {first} {right} {second} {n}"
    answer = f"lambda {a}, {b}: {left} {_OPERATORS[first]} {right} {_OPERATORS[second]} {n}"
    return TaskItem(f"{a} {b} {words}", rng.choice(_CODE).format(a=a, b=b, e=words), answer)


def _math(rng: random.Random) -> TaskItem:
    """Three-digit sums without a carry: 341 + 527 = 868."""
    pairs = [(0, 0)] * 3
    for i in range(3):
        x = rng.randint(1 if i == 0 else 0, 8 if i == 0 else 9)
        pairs[i] = (x, rng.randint(1 if i == 0 else 0, 9 - x))
    x_text, y_text = ("".join(str(p[side]) for p in pairs) for side in (0, 1))
    prompt = rng.choice(_MATH).format(x=x_text, y=y_text)
    return TaskItem(f"{x_text} {y_text}", prompt, str(int(x_text) + int(y_text)))


DRAW: dict[Task, Callable[[random.Random], TaskItem]] = {"zh": _zh, "en": _en, "hi": _hi, "code": _code, "math": _math}
"""Task -> a function that draws one question from the whole space of its inputs."""
