from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype.text.prompts import LIMIT, escape, parse

# What A1111's own documentation and doctests say, and the corners of its grammar.
EXAMPLES: dict[str, list[list[tuple[str, float]]]] = {
    "": [[]],
    "normal text": [[("normal text", 1)]],
    "an (important) word": [[("an ", 1), ("important", 1.1), (" word", 1)]],
    "((word))": [[("word", 1.21)]],
    "[word]": [[("word", 1 / 1.1)]],
    "[[word]]": [[("word", 1 / 1.21)]],
    "(word:1.5)": [[("word", 1.5)]],
    "(word:.5) (word:2.) (word:+1.5)": [[("word", 0.5), (" ", 1), ("word", 2), (" ", 1), ("word", 1.5)]],
    "(word : 1.5 )": [[("word ", 1.5)]],
    "(word:-1)": [[("word", -1)]],
    "(word:0)": [[("word", 0)]],
    "((word:1.5))": [[("word", 1.65)]],
    "((a:2)b:3)": [[("a", 6), ("b", 3)]],
    "([word])": [[("word", 1)]],
    "a ([b]) c": [[("a b c", 1)]],
    "(unbalanced": [[("unbalanced", 1.1)]],
    "[unbalanced": [[("unbalanced", 1 / 1.1)]],
    "a ((b) c": [[("a ", 1), ("b", 1.21), (" c", 1.1)]],
    "unbalanced) word]": [[("unbalanced) word]", 1)]],
    "a:1.5) b": [[("a:1.5) b", 1)]],
    "(a [b) c]": [[("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]],
    r"\(literal\]": [[("(literal]", 1)]],
    r"\\(a\\)": [[("\\", 1), ("a\\", 1.1)]],
    r"(a\):1.5)": [[("a)", 1.5)]],
    r"C:\fox \n ¯\_": [[(r"C:\fox \n ¯\_", 1)]],
    "(unnecessary)(parens)": [[("unnecessaryparens", 1.1)]],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        [
            ("a ", 1),
            ("house", 1.573),
            (" ", 1.1),
            ("on", 1),
            (" a ", 1.1),
            ("hill", 0.55),
            (", sun, ", 1.1),
            ("sky", 1.4641),
            (".", 1.1),
        ]
    ],
    "()": [[]],
    "(:1.5)": [[]],
    "ratio 16:9 at 12:30": [[("ratio 16:9 at 12:30", 1)]],
    "(a:b)": [[("a:b", 1.1)]],
    "(a:1.2.3)": [[("a:1.2.3", 1.1)]],
    "(a:1e999)": [[("a:1e999", 1.1)]],
    "(a:nan) (b:inf)": [[("a:nan", 1.1), (" ", 1), ("b:inf", 1.1)]],
    "(a:\u0661)": [[("a:\u0661", 1.1)]],
    f"(a:{'9' * 500})": [[("a", LIMIT)]],
    f"(a:-{'9' * 500})": [[("a", -LIMIT)]],
    "(" * 1000 + "a": [[("a", LIMIT)]],
    "[" * 20_000 + "a": [[("a", 0)]],
    "(((a:1000):1000):0.001)": [[("a", 10)]],
    "a BREAK b": [[("a", 1)], [("b", 1)]],
    "a\nBREAK\n\nb": [[("a", 1)], [("b", 1)]],
    "a BREAK": [[("a", 1)], []],
    "BREAK a": [[], [("a", 1)]],
    "a BREAK BREAK b": [[("a", 1)], [], [("b", 1)]],
    "(a BREAK b:1.5) c": [[("a", 1.5)], [("b", 1.5), (" c", 1)]],
    "a BREAK b (c) BREAK d": [[("a", 1)], [("b ", 1), ("c", 1.1)], [("d", 1)]],
    "a BREAK (b) c ": [[("a", 1)], [("b", 1.1), (" c ", 1)]],
    "(" * 300 + "a:0)" + ":100)" * 299: [[("a", 0)]],
    "a,BREAK,b": [[("a,", 1)], [(",b", 1)]],
    "BREAKFAST break outBREAK BREAK_ Break": [[("BREAKFAST break outBREAK BREAK_ Break", 1)]],
    r"a \BREAK b": [[("a BREAK b", 1)]],
    r"a \\BREAK b": [[("a \\", 1)], [("b", 1)]],
    r"a \BREAKFAST": [[(r"a \BREAKFAST", 1)]],
    "[a:b:0.5] [a|b]": [[("a:b:0.5", 1 / 1.1), (" ", 1), ("a|b", 1 / 1.1)]],
}


@pytest.mark.parametrize("prompt", EXAMPLES)
def test_examples(prompt: str) -> None:
    parts = parse(prompt)
    wanted = EXAMPLES[prompt]
    assert [[span.text for span in part] for part in parts] == [[text for text, _ in part] for part in wanted]
    for part, theirs in zip(parts, wanted, strict=True):
        for span, (_, weight) in zip(part, theirs, strict=True):
            assert span.weight == pytest.approx(weight, rel=1e-9)


def test_brackets_that_undo_each_other_leave_exactly_one() -> None:
    assert parse("a ([b]) [(c)] [[((d))]]") == ((("a b c d", 1.0),),)
    for depth in range(40):
        assert parse("(" * depth + "[" * depth + "a" + "]" * depth + ")" * depth) == ((("a", 1.0),),)


PIECES = [*"ab ()[]:\\.,-01\n\u96ea", "BREAK", " BREAK ", ":1.3)"]
PROMPTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@settings(deadline=None)
@given(st.text() | PROMPTS)
def test_escaped_text_is_itself(text: str) -> None:
    assert parse(escape(text)) == (((text, 1.0),) if text else (),)


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="\\()[]")).filter(lambda text: "BREAK" not in text))
def test_text_without_syntax_is_itself(text: str) -> None:
    assert parse(text) == (((text, 1.0),) if text else (),)
    assert escape(text) == text


@settings(deadline=None)
@given(st.text() | PROMPTS)
def test_any_text_is_a_prompt(prompt: str) -> None:
    parts = parse(prompt)
    assert parts
    for part in parts:
        assert all(span.text and abs(span.weight) <= LIMIT and math.isfinite(span.weight) for span in part)
        assert all(one.weight != two.weight for one, two in zip(part, part[1:], strict=False))


@settings(deadline=None)
@given(PROMPTS.filter(bool), st.floats(0.01, 9).map(lambda number: round(number, 3)))
def test_a_bracket_multiplies_all_within_it(text: str, factor: float) -> None:
    assert parse(f"({escape(text)}:{factor})") == (((text, factor),),)
    ((first, *_),) = parse(f"(({escape(text)}:{factor}) [{escape(text)}])x")
    assert first.text.startswith(text)
    assert first.weight == pytest.approx(1.1 * factor)


@settings(deadline=None)
@given(st.lists(st.sampled_from([*"ab()[]()[]", ":1.5)", ":0.5)", "\\(", "\\]"]), max_size=30))
def test_weights_are_those_of_multiplying_ranges(tokens: list[str]) -> None:
    """A1111's way: each bracket that closes, or never does, multiplies all since it opened."""
    letters: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(kind: str, factor: float) -> None:
        start = opened[kind].pop()
        letters[start:] = [(letter, weight * factor) for letter, weight in letters[start:]]

    for token in tokens:
        if token in opened:
            opened[token].append(len(letters))
        elif token[-1] == ")" and token[0] != "\\" and opened["("]:
            close("(", 1.1 if token == ")" else float(token[1:-1]))
        elif token == "]" and opened["["]:
            close("[", 1 / 1.1)
        else:
            letters += [(letter, 1.0) for letter in token.removeprefix("\\")]
    while opened["("]:
        close("(", 1.1)
    while opened["["]:
        close("[", 1 / 1.1)

    (part,) = parse("".join(tokens))
    ours = [(letter, span.weight) for span in part for letter in span.text]
    assert [letter for letter, _ in ours] == [letter for letter, _ in letters]
    assert [weight for _, weight in ours] == pytest.approx([weight for _, weight in letters])


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        ")",
        "[",
        "]",
        "(a",
        "[(",
        "((a)",
        "(a:0",
        ":1)",
        "()",
        "\\",
        "\\(",
        " ",
        ": ",
        ":1",
        ":",
        "BREAK ",
        "1",
        ".",
    ],
)
@pytest.mark.parametrize("before", ["", ":", "(:", "((((((((((", "BREAK"])
def test_long_prompts_take_linear_time(pattern: str, before: str) -> None:
    prompt = before + (pattern * 20_000)[:20_000]
    times: list[float] = []
    for _ in range(3):
        start = time.process_time()
        parse(prompt)
        times.append(time.process_time() - start)
    assert min(times) < 0.05  # a quadratic form would take seconds
