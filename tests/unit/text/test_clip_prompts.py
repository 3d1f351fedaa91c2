from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from calotype.errors import RequestError
from calotype.text.clip import ClipConfig, ClipEncoder, ClipStates, Inserted
from calotype.text.clip_prompts import BACKTRACK, ROWS, Chunk, chunks, encode
from calotype.text.tokenizers import PromptTokenizer

WORDS = ["!", "<s>", "</s>", ",", "a", "b", "c", "fox", "cat", "-", ".", "5", "bad", "hands", "snow", "red"]
START, END, PADDING, COMMA = 1, 2, 0, 3
CONFIG = ClipConfig(
    vocabulary=len(WORDS),
    width=16,
    layers=2,
    heads=2,
    mlp_width=32,
    positions=12,
    quick_gelu=False,
    projection=8,
    end=END,
)


def word_tokenizer() -> PromptTokenizer:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="!"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PromptTokenizer(made, start=START, end=END, padding=PADDING)


TOKENIZER = word_tokenizer()


@pytest.fixture(scope="module")
def encoder() -> ClipEncoder:
    made = tiny.scattered(ClipEncoder(CONFIG), seed=3, spread=0.4)
    assert isinstance(made, ClipEncoder)
    return made


def ids_of(prompt: str) -> list[int]:
    return TOKENIZER.words(prompt)


def own(chunk: Chunk) -> list[int]:
    """A chunk's ids without start, end and padding, all of which must be where they belong."""
    ids: list[int] = chunk.ids[0].tolist()
    end = ids.index(END)
    assert ids[0] == START
    assert set(ids[end + 1 :]) <= {PADDING}
    return ids[1:end]


def cut(prompt: str, length: int = 77) -> list[list[int]]:
    return [own(chunk) for chunk in chunks(prompt, TOKENIZER, length=length)]


def test_a_short_prompt_is_one_padded_chunk() -> None:
    (chunk,) = chunks("a red fox", TOKENIZER, length=8)
    assert chunk.ids.tolist() == [[START, *ids_of("a red fox"), END, PADDING, PADDING, PADDING]]
    assert chunk.ids.dtype == torch.int64
    assert chunk.weights.tolist() == [[1.0] * 8]
    assert chunk.weights.dtype == torch.float32
    assert chunk.inserted == ()


@pytest.mark.parametrize("prompt", ["", "  ", "()"])
def test_nothing_is_one_empty_chunk(prompt: str) -> None:
    assert cut(prompt) == [[]]


def test_75_tokens_are_one_chunk_and_76_two() -> None:
    assert [len(ids) for ids in cut("fox " * 75)] == [75]
    assert [len(ids) for ids in cut("fox " * 76)] == [75, 1]
    assert [len(ids) for ids in cut("fox " * 150)] == [75, 75]


@pytest.mark.parametrize("after", range(1, 25))
def test_a_long_prompt_is_cut_after_a_near_comma(after: int) -> None:
    """The comma is the last but `after - 1` of the chunk: up to 20 back it ends the chunk."""
    prompt = "fox " * (75 - after) + ", " + "cat " * 40
    first, second = cut(prompt)
    assert len(first) == (75 - after + 1 if after <= BACKTRACK else 75)
    assert first + second == ids_of(prompt)


def test_the_last_of_several_commas_is_taken() -> None:
    first, _ = cut("fox " * 60 + ", a, b " + "cat " * 40)
    assert len(first) == 63


def test_a_comma_that_begins_the_next_chunk_moves_nothing() -> None:
    assert [len(ids) for ids in cut("fox " * 60 + ", " + "fox " * 14 + ", a")] == [75, 2]


def test_a_prompt_that_fits_is_not_cut_at_its_commas() -> None:
    assert [len(ids) for ids in cut("fox " * 73 + ", a")] == [75]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["fox", ",", "a", "(red:1.5)", "[b]"]), max_size=200), st.integers(3, 30))
def test_cutting_loses_nothing(words: list[str], length: int) -> None:
    made = chunks(" ".join(words), TOKENIZER, length=length)
    plain = " ".join(words).translate(str.maketrans("", "", "()[]:.15"))
    assert [number for chunk in made for number in own(chunk)] == ids_of(plain)
    assert all(chunk.ids.shape == chunk.weights.shape == (1, length) for chunk in made)
    assert all(own(chunk) for chunk in made) or not words
    weights = {"red": 1.5, "b": 1 / 1.1}
    for chunk in made:
        for number, weight in zip(chunk.ids[0].tolist(), chunk.weights[0].tolist(), strict=True):
            assert weight == pytest.approx(weights.get(WORDS[number], 1.0))


def test_break_closes_a_chunk() -> None:
    assert cut("a fox BREAK a cat") == [ids_of("a fox"), ids_of("a cat")]
    assert cut("(a fox BREAK a cat:1.2)") == [ids_of("a fox"), ids_of("a cat")]
    assert cut("a fox BREAK") == [ids_of("a fox")]
    assert cut("BREAK a fox") == [[], ids_of("a fox")]
    assert cut("a BREAK BREAK b") == [ids_of("a"), [], ids_of("b")]
    assert cut("BREAK") == [[]]
    assert [len(ids) for ids in cut("fox " * 80 + "BREAK " + "cat " * 2)] == [75, 5, 2]


def test_chunks_to_match_another_prompt() -> None:
    empty = chunks("", TOKENIZER)[0]
    made = chunks("a fox", TOKENIZER, at_least=3)
    assert len(made) == 3
    assert [chunk.ids.tolist() for chunk in made[1:]] == [empty.ids.tolist()] * 2
    assert len(chunks("a BREAK b BREAK c", TOKENIZER, at_least=2)) == 3


# Textual inversion.


def vectors(count: int, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def placed(prompt: str, embeddings: dict[str, Tensor], length: int = 77) -> list[tuple[list[int], list[str]]]:
    """For each chunk its own ids, and which embeddings stand in it with where."""
    found: list[tuple[list[int], list[str]]] = []
    for chunk in chunks(prompt, TOKENIZER, length=length, embeddings=embeddings):
        names = [
            f"{name}@{place}"
            for place, inserted in chunk.inserted
            for name, tensor in embeddings.items()
            if torch.equal(torch.atleast_2d(tensor), inserted)
        ]
        found.append((own(chunk), names))
    return found


def test_a_keyword_becomes_its_vectors() -> None:
    known = {"snowy": vectors(3)}
    (made,) = placed("a snowy fox", known)
    assert made == ([*ids_of("a"), START, START, START, *ids_of("fox")], ["snowy@2"])


@pytest.mark.parametrize(
    "written", ["snowy", "SNOWY", "Snowy", "embedding:snowy", "(snowy)", "snowy,", ",snowy.", "<snowy>"]
)
def test_a_keyword_is_found_in_any_case_beside_any_mark(written: str) -> None:
    ((_, names),) = placed(f"fox {written} cat", {"snowy": vectors(2)})
    assert len(names) == 1


@pytest.mark.parametrize(
    "written", ["snowyy", "asnowy", "snowy_b", "snowy-b", "b-snowy", "snow y", "snowy5", "\u96easnowy"]
)
def test_a_keyword_is_a_word_of_its_own(written: str) -> None:
    ((_, names),) = placed(f"fox {written} cat", {"snowy": vectors(2)})
    assert names == []


def test_the_longest_keyword_is_taken() -> None:
    known = {"bad": vectors(1, seed=1), "bad-hands-5": vectors(2, seed=2), "bad hands": vectors(3, seed=3)}
    ((_, names),) = placed("bad-hands-5, bad hands, bad, bad-hands", known)
    assert names == ["bad-hands-5@1", "bad hands@4", "bad@8"]


def test_keywords_may_hold_any_characters() -> None:
    known = {"<cat-toy>": vectors(1, seed=1), "a.b*c": vectors(1, seed=2), "x(1)": vectors(1, seed=3)}
    ((_, names),) = placed(r"<cat-toy> a.b*c x\(1\) aXb*c", known)
    assert names == ["<cat-toy>@1", "a.b*c@2", "x(1)@3"]


@settings(deadline=None)
@given(st.text(st.sampled_from("snowSNOW\u017f\u0131\u0130iI \u00df-,"), max_size=12))
def test_letters_of_odd_cases_do_not_break_it(text: str) -> None:
    known = {"snow": vectors(1), "i": vectors(1, seed=1), "\u00df": vectors(1, seed=2)}
    assert len(placed(text, known)) == 1


@pytest.mark.parametrize("pattern", ["a", "!", "a, ", "word1 ", "embedding:", "-", "\u96ea", "<"])
def test_many_keywords_cost_little(pattern: str) -> None:
    known = {f"{'word' * (number % 20)}{number}": vectors(1) for number in range(500)}
    start = time.process_time()
    chunks((pattern * 20_000)[:20_000], TOKENIZER, embeddings=known)
    assert time.process_time() - start < 1.5


def test_one_vector_may_come_without_rows() -> None:
    ((ids, names),) = placed("snowy fox", {"snowy": vectors(1)[0]})
    assert (ids, names) == ([START, *ids_of("fox")], ["snowy@1"])


def test_vectors_are_weighted_as_their_word() -> None:
    (chunk,) = chunks("a (snowy:1.4) fox", TOKENIZER, length=8, embeddings={"snowy": vectors(2)})
    assert chunk.weights[0].tolist() == pytest.approx([1, 1, 1.4, 1.4, 1, 1, 1, 1])


def test_vectors_are_not_divided_between_chunks() -> None:
    known = {"snowy": vectors(4)}
    made = placed("fox " * 72 + "snowy cat", known)
    assert [len(ids) for ids, _ in made] == [72, 5]
    assert [names for _, names in made] == [[], ["snowy@1"]]
    ((ids, names),) = placed("fox " * 71 + "snowy", known)
    assert (len(ids), names) == (75, ["snowy@72"])


def test_vectors_that_do_not_fit_move_alone() -> None:
    """Only a full chunk is cut at its comma, as in A1111."""
    made = placed("fox " * 60 + ", " + "fox " * 12 + "snowy", {"snowy": vectors(4)})
    assert [len(ids) for ids, _ in made] == [73, 4]


def test_vectors_move_with_their_phrase() -> None:
    made = placed("fox " * 60 + ", snowy " + "cat " * 20, {"snowy": vectors(4)})
    assert [len(ids) for ids, _ in made] == [61, 24]
    assert made[1][1] == ["snowy@1"]


def test_vectors_that_fit_no_chunk_are_refused() -> None:
    assert len(chunks("snowy", TOKENIZER, embeddings={"snowy": vectors(75)})) == 1
    with pytest.raises(RequestError, match="prompt: got 'snowy'; allowed: embeddings of at most 75 vectors.* 76"):
        chunks("a snowy fox", TOKENIZER, embeddings={"snowy": vectors(76)})
    assert len(chunks("a fox", TOKENIZER, embeddings={"snowy": vectors(76)})) == 1


# Encoding.


def last(states: ClipStates) -> Tensor:
    return states.last


class Spy(ClipEncoder):
    """Remembers how many rows each pass had."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.rows: list[int] = []

    def forward(self, ids: Tensor, inserted: Sequence[Inserted] = ()) -> ClipStates:
        self.rows.append(len(ids))
        return super().forward(ids, inserted)


@pytest.fixture
def spy(encoder: ClipEncoder) -> Spy:
    made = Spy().eval().requires_grad_(False)
    made.load_state_dict(encoder.state_dict())
    return made


def test_a_plain_prompt_is_the_encoders_states(encoder: ClipEncoder) -> None:
    made = encode("a red fox", encoder, TOKENIZER, last)
    states = encoder(TOKENIZER("a red fox", 12))
    assert torch.equal(made.text, states.last)
    assert torch.equal(made.pooled, states.pooled)
    assert made.text.shape == (1, 12, 16)
    assert made.pooled.shape == (1, 8)


def test_chunks_stand_one_after_the_other(spy: Spy) -> None:
    made = encode("a red fox BREAK a cat BREAK snow", spy, TOKENIZER, lambda states: states.hidden[-2])
    assert made.text.shape == (1, 36, 16)
    assert spy.rows == [3]
    for number, prompt in enumerate(("a red fox", "a cat", "snow")):
        states = spy(TOKENIZER(prompt, 12))
        torch.testing.assert_close(made.text[:, 12 * number : 12 * number + 12], states.hidden[-2])
        if number == 0:
            torch.testing.assert_close(made.pooled, states.pooled)


def test_emphasis_scales_the_distance_from_the_empty_prompt(spy: Spy) -> None:
    made = encode("a (red:1.5) fox [cat]", spy, TOKENIZER, last)
    assert spy.rows == [2]
    plain, empty = spy(TOKENIZER("a red fox cat", 12)), spy(TOKENIZER("", 12)).last
    weights = torch.tensor([1, 1, 1.5, 1, 1 / 1.1] + [1] * 7)[None, :, None]
    torch.testing.assert_close(made.text, empty + weights * (plain.last - empty))
    torch.testing.assert_close(made.pooled, plain.pooled)


def test_a_weight_of_one_leaves_states_as_they_are(encoder: ClipEncoder) -> None:
    made = encode("a (red:1.5) fox", encoder, TOKENIZER, last).text
    both = encoder(torch.cat([TOKENIZER("a red fox", 12), TOKENIZER("", 12)])).last
    kept = [place for place in range(12) if place != 2]
    assert torch.equal(made[0, kept], both[0, kept])
    assert not torch.equal(made[0, 2], both[0, 2])


def test_a_weight_of_nothing_is_the_empty_prompt(encoder: ClipEncoder) -> None:
    made = encode("(a red fox:0)", encoder, TOKENIZER, last).text
    torch.testing.assert_close(made[:, :4], encoder(TOKENIZER("", 12)).last[:, :4])


@settings(max_examples=20, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3))
def test_emphasis_is_linear(first: float, second: float) -> None:
    encoder = tiny.scattered(ClipEncoder(CONFIG), seed=3, spread=0.4)
    assert isinstance(encoder, ClipEncoder)

    def at(weight: float) -> Tensor:
        return encode(f"a (red:{weight:.6f}) fox", encoder, TOKENIZER, last).text

    middle = at((round(first, 6) + round(second, 6)) / 2)
    torch.testing.assert_close(middle, (at(first) + at(second)) / 2, atol=1e-4, rtol=1e-4)


def test_the_empty_prompt_is_encoded_only_where_a_weight_asks_for_it(spy: Spy) -> None:
    encode("a red fox ([cat])", spy, TOKENIZER, last)
    encode("a (red) fox", spy, TOKENIZER, last)
    assert spy.rows == [1, 2]


def test_very_many_chunks_are_encoded_in_several_passes(spy: Spy) -> None:
    parts = ["a fox", "beast", "red", "(cat:1.3)", "snow"] * 4
    known = {"beast": spy.tokens.weight[ids_of("a cat")]}
    made = encode(" BREAK ".join(parts), spy, TOKENIZER, last, embeddings=known)
    assert spy.rows == [ROWS, 5]
    assert made.text.shape == (1, 20 * 12, 16)
    torch.testing.assert_close(made.text[:, 15 * 12 : 16 * 12], spy(TOKENIZER("a fox", 12)).last)
    torch.testing.assert_close(made.text[:, 16 * 12 : 17 * 12], spy(TOKENIZER("a cat", 12)).last)
    torch.testing.assert_close(made.text[:, 19 * 12 :], spy(TOKENIZER("snow", 12)).last)
    torch.testing.assert_close(made.pooled, spy(TOKENIZER("a fox", 12)).pooled)


def test_inserted_vectors_are_what_the_encoder_sees(encoder: ClipEncoder) -> None:
    """A word's own vectors, inserted under another name, give the word's own states."""
    known = {"beast": encoder.tokens.weight[ids_of("red fox")]}
    made = encode("a beast in snow BREAK (beast:1.3)", encoder, TOKENIZER, last, embeddings=known)
    wanted = encode("a red fox in snow BREAK (red fox:1.3)", encoder, TOKENIZER, last)
    assert torch.equal(made.text, wanted.text)
    assert torch.equal(made.pooled, wanted.pooled)
    other = encode("a red cat in snow", encoder, TOKENIZER, last)
    assert not torch.allclose(made.text[:, :12], other.text)


def test_inserted_vectors_belong_to_their_row(encoder: ClipEncoder) -> None:
    ids = torch.cat([TOKENIZER("a fox", 12)] * 2)
    both = encoder(ids, [(), ((1, vectors(2)),)]).last
    torch.testing.assert_close(both[:1], encoder(ids[:1]).last)
    torch.testing.assert_close(both[1:], encoder(ids[:1], [((1, vectors(2)),)]).last)
    assert not torch.allclose(both[0], both[1])


def test_gradients_reach_inserted_vectors(encoder: ClipEncoder) -> None:
    learned = vectors(2).requires_grad_()
    encode("a snowy fox", encoder, TOKENIZER, last, embeddings={"snowy": learned}).text.square().sum().backward()
    assert learned.grad is not None
    assert learned.grad.abs().min() > 0


def test_vectors_of_another_width_are_refused(encoder: ClipEncoder) -> None:
    known = {"snowy": vectors(2, width=24)}
    with pytest.raises(RequestError, match="an embedding of width 24.*width 16"):
        encode("a snowy fox", encoder, TOKENIZER, last, embeddings=known)
    encode("a red fox", encoder, TOKENIZER, last, embeddings=known)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(encoder: ClipEncoder, dtype: torch.dtype) -> None:
    half = ClipEncoder(CONFIG).requires_grad_(False).to(dtype)
    half.load_state_dict(encoder.state_dict())
    known = {"snowy": vectors(1)}
    made = encode("a (snowy:1.3) fox", half, TOKENIZER, last, embeddings=known)
    assert made.text.dtype == made.pooled.dtype == dtype
    exact = encode("a (snowy:1.3) fox", encoder, TOKENIZER, last, embeddings=known)
    assert float((made.text - exact.text).abs().max()) < 0.2
