"""Emphasis and breaks in prompts: A1111's syntax, the one that prompts are passed around in.

    (word)       1.1 times                      (word:1.3)   1.3 times
    ((word))     1.1 times 1.1 times            [word]       divided by 1.1
    \\( \\) \\[ \\] \\\\   these characters themselves       BREAK        an upper-case word: a new part begins
    \\BREAK       that word itself

Facts from AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py: round and square brackets are counted apart,
so that they may cross; a bracket that is never closed lasts to the end; one that closes nothing is text; so is a number
that ends no bracket, or is none ("(a:1e9)" is "a:1e9" at 1.1). Three things differ on purpose: a backslash before
another character is text (there it disappears), BREAK works within brackets too (there it becomes a word), and no
weight leaves -100..100. Prompt editing [a:b:0.5] and alternation [a|b] are not done: they read as emphasis.
"""

from __future__ import annotations

import re
from typing import NamedTuple

STEP = 1.1  # what one pair of brackets multiplies or divides by
LIMIT = 100.0  # weights beyond it only make noise, and too many brackets would overflow
SYNTAX = re.compile(
    r"\\(?P<literal>[\\()\[\]]|BREAK\b)"
    r"|(?P<parting>\bBREAK\b)"
    r"|:\s*(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
)
SPECIAL = re.compile(r"[\\()\[\]]|\bBREAK\b")


class Span(NamedTuple):
    """Text, as it is meant (escapes undone), and how much it counts: 1 is plain."""

    text: str
    weight: float


def escape(text: str) -> str:
    """The prompt that means this text and nothing else: `parse(escape(text))` is one span of weight 1."""
    return SPECIAL.sub(lambda match: "\\" + match[0], text)


def parse(prompt: str) -> tuple[tuple[Span, ...], ...]:
    """The prompt's parts, between the words BREAK, each with its spans; there is at least one part.

    Neighbours differ in weight; no span is empty, so that an empty part has none. White space around BREAK goes.
    Takes time linear in the length of the prompt.
    """
    parts: list[list[_Piece]] = [[]]
    # Round brackets by number: the one around each, and what it says, None without a number. 0 is the whole prompt.
    around: list[int] = [0]
    says: list[float | None] = [1.0]
    now, square = 0, 0  # the innermost open round bracket, and how many square ones are open
    end = 0

    def add(text: str) -> None:
        pieces = parts[-1]
        if pieces and pieces[-1][1:] == (now, square):
            pieces[-1][0].append(text)
        elif text:
            pieces.append(([text], now, square))

    for match in SYNTAX.finditer(prompt):
        start = match.start()
        if start > end:
            add(prompt[end:start])
        end = match.end()
        kind, text = match.lastgroup, match.group()
        if kind == "parting":
            parts.append([])
        elif kind == "literal":
            add(text[1:])
        elif text == "(":
            around.append(now)
            says.append(None)
            now = len(around) - 1
        elif text == "[":
            square += 1
        elif text == "]" and square:
            square -= 1
        elif text != "]" and now:  # a closing round bracket, with or without a number
            if kind == "number":
                says[now] = _held(float(match[kind]))
            now = around[now]
        else:
            add(text)
    add(prompt[end:])
    weights = _products(around, says)
    return tuple(
        _spans(pieces, weights, first=number == 0, last=number == len(parts) - 1) for number, pieces in enumerate(parts)
    )


_Piece = tuple[list[str], int, int]  # words; the round bracket they stand in; how many square ones are around them


def _held(weight: float) -> float:
    return min(max(weight, -LIMIT), LIMIT)


def _products(around: list[int], says: list[float | None]) -> list[tuple[int, float]]:
    """For each round bracket, how many without a number it stands in, and the product of the numbers.

    From the outermost inwards, so that each bracket costs one multiplication. Pairs without a number are counted, not
    multiplied: ([word]) is exactly 1.
    """
    made = [(0, 1.0)]
    for bracket in range(1, len(around)):
        count, product = made[around[bracket]]
        number = says[bracket]
        made.append((count + 1, product) if number is None else (count, _held(product * number)))
    return made


def _spans(pieces: list[_Piece], weights: list[tuple[int, float]], *, first: bool, last: bool) -> tuple[Span, ...]:
    spans: list[tuple[list[str], float]] = []
    for words, bracket, square in pieces:
        count, product = weights[bracket]
        # 200 is far beyond the limit, and far from overflow.
        weight = _held(STEP ** min(count - square, 200) * product)
        if spans and spans[-1][1] == weight:
            spans[-1][0].extend(words)
        else:
            spans.append((words, weight))
    texts = [Span("".join(words), weight) for words, weight in spans]
    if texts and not first:
        texts[0] = texts[0]._replace(text=texts[0].text.lstrip())
    if texts and not last:
        texts[-1] = texts[-1]._replace(text=texts[-1].text.rstrip())
    return tuple(span for span in texts if span.text)
