"""CLIP's and T5's tokenizers against transformers' on 500 mixed prompts.

The reference is transformers 5. Its CLIPTokenizer is the fast one of transformers 4 (CLIPTokenizerFast) but for a mark
in capitals ("<|ENDOFTEXT|>"). The slow CLIPTokenizer of transformers 4, which diffusers used to load, differs where a
prompt has curly quotes, ligatures, control characters or HTML entities (mended by ftfy where that was installed, else
control characters dropped and Chinese characters set apart), and in the Greek final sigma.
"""

from __future__ import annotations

import importlib.util
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from calotype.checkpoint.tokenizer_files import prompt_tokenizer, read_tokenizer
from calotype.errors import DamagedFile
from calotype.text.clip_prompts import chunks
from calotype.text.prompts import escape
from calotype.text.tokenizers import PromptTokenizer

transformers = pytest.importorskip("transformers", minversion="5.0")

BY_HAND = (
    "",
    " ",
    "a red fox in the snow",
    "  spaces   and\nlines\t\r\n tabs\u3000wide\u00a0hard ",
    "It's 3 o'clock, isn't it? We've, they'll, I'm, you'd, they're: 100% (yes)!",
    "IT'S THE END'S 'S 's'' '",
    "hello! wow!!! a ! b !c! ?!",
    "café CRÈME naïve ﬁancé cafe\u0301 A\u030angstrom \u212bngström",
    "一只红色的狐狸在雪地里，高清，8K。",
    "雪の中の狐 🦊 — \u00abguillemets\u00bb 가나다",
    "👨\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 👍\U0001f3fd",
    "\u05e9\u05d5\u05e2\u05dc \u05d0\u05d3\u05d5\u05dd \u0627\u0644\u062b\u0639\u0644\u0628 "
    "\u202b\u0645\u062b\u0627\u0644\u202c 123",
    "İstanbul ı Σίσυφος ΟΔΟΣ straße STRASSE ẞ",
    "a\x00b\x07c\x1bd\x7fe \u200b\u200d\ufeff\u2028\u2029\x85 f�g",
    "&amp; &lt;b&gt; &quot;x&quot; &#39;y&#39; &eacute; &nbsp;",
    "\u201cquoted\u201d \u2018single\u2019 it\u2019s … – —",
    "1 12 123 1,234.56 1e-5 0x7f \u0661\u0662\u0663 ½ Ⅳ ² 4k 8K 35mm f/1.8",
    "<|endoftext|>",
    "<|startoftext|> a <|endoftext|> b<|endoftext|>c",
    "<|ENDOFTEXT|> <|StartOfText|> <|endoftext| >",
    "</s> <pad> <unk> <extra_id_0> <extra_id_99>",
    "</w> a</w> ,</w> Ġ Ċ",
    "(masterpiece:1.2), [low] {curly} <lora:x:0.8> a|b \\(c\\) BREAK d",
    "https://example.org/?a=b&c=d#e user@example.org #tag @name snake_case kebab-case camelCase",
    "a" * 300,
    "supercalifragilisticexpialidocious" * 4,
    "!" * 200,
    "a, " * 120,
    "雪" * 200,
    "🦊" * 120,
    "e\u0301" * 150,
    "z\u0351\u0352\u0353\u0354\u0355a\u0334\u0335\u0336lgo",
    "𝕏𝓪\U0001d7d8 𠀀\U000e0001 \ue000 \U0010ffff",
)
ALPHABETS: dict[str, str] = {
    "latin": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'-",
    "accents": "àáâãäåæçèéêëñöüœšžÀÉÜ\u0301\u0308\u0327aeiou",
    "chinese": "".join(map(chr, range(0x4E00, 0x9FFF, 37))),
    "kana": "".join(map(chr, range(0x3041, 0x30FF))),
    "hangul": "".join(map(chr, range(0xAC00, 0xD7A3, 97))),
    "cyrillic": "".join(map(chr, range(0x400, 0x460))),
    "greek": "".join(map(chr, (*range(0x391, 0x3A2), *range(0x3A3, 0x3CA)))),
    "right to left": "".join(map(chr, (*range(0x5D0, 0x5EB), *range(0x620, 0x64B)))),
    "indic": "".join(map(chr, (*range(0x904, 0x94E), *range(0xE01, 0xE3B)))),
    "digits": "0123456789\u0663½Ⅷ",
    "marks": "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~…—\u201c\u2019",
    "emoji": "🦊🐱❄\ufe0f\U0001f3fd\u200d👩🚀❤",
    "control": "\x00\x01\x07\x08\x0b\x0c\x1b\x1c\x7f\x80\x85\xad\u200b\u200e\u202e\u2028\ufeff�",
}
WORDS = re.findall(
    r"\S+",
    "a photo of the red fox girl castle in snow, oil painting; 8k highly-detailed portrait by Greg's "
    "trending on ArtStation unreal_engine &amp; isn't they'd (masterpiece) 1girl f/1.8 café",
)


def prompts() -> list[str]:
    """500: those above, words in natural mixtures, and words of letters drawn from one script, or from several."""
    rng = random.Random(20)
    made: list[str] = list(BY_HAND)
    while len(made) < 300:
        words = [
            rng.choice(WORDS) if rng.random() < 0.8 else drawn(rng, rng.choice(list(ALPHABETS)))
            for _ in range(rng.randint(1, 40))
        ]
        made.append(rng.choice((" ", " ", ", ", "\n")).join(words))
    while len(made) < 500:
        scripts = rng.sample(list(ALPHABETS), rng.choice((1, 1, 2, 4)))
        words = [drawn(rng, rng.choice(scripts)) for _ in range(rng.randint(1, 8))]
        made.append(rng.choice((" ", "", ",", "  ", "\t")).join(words))
    return made


def drawn(rng: random.Random, script: str) -> str:
    return "".join(rng.choices(ALPHABETS[script], k=rng.choice((1, 2, 3, 5, 8, 30))))


PROMPTS = prompts()
VOCABULARY = {"clip_l": 49408, "clip_g": 49408, "t5": 32128}


def published(*names: str) -> Path:
    """A published tokenizer's folder, where a library that ships them is installed (which is not imported)."""
    spec = importlib.util.find_spec("diffsynth")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the tokenizers that diffsynth 1.1 ships")
    return Path(next(iter(spec.submodule_search_locations))).joinpath("tokenizer_configs", *names)


def ours(folder: Path, role: str, *, shared: bool = False) -> PromptTokenizer:
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None
    return prompt_tokenizer(tokenizer, folder, role, VOCABULARY[role], {}, shared=shared)


def assert_equal(mine: PromptTokenizer, theirs: Any, length: int) -> None:
    wanted = theirs(PROMPTS, padding="max_length", max_length=length, truncation=True).input_ids
    wrong = [
        prompt
        for prompt, ids in zip(PROMPTS, wanted, strict=True)
        if mine(prompt, length).tolist() != [ids]
        or mine.words(prompt) != theirs.encode(prompt, add_special_tokens=False)
    ]
    assert wrong == []


CLIPS = [
    ("clip_l", ("stable_diffusion", "tokenizer")),
    ("clip_l", ("flux", "tokenizer_1")),
    ("clip_l", ("stable_diffusion_3", "tokenizer_1")),
    ("clip_g", ("stable_diffusion_3", "tokenizer_2")),  # the same as stable_diffusion_xl's, which is damaged there
]


@pytest.mark.parametrize(("role", "names"), CLIPS)
def test_clip_equals_transformers(role: str, names: tuple[str, ...]) -> None:
    folder = published(*names)
    mine = ours(folder, role)
    assert (mine.start, mine.end, mine.padding) == (49406, 49407, 0 if role == "clip_g" else 49407)
    assert_equal(mine, transformers.CLIPTokenizer.from_pretrained(folder), 77)


@pytest.mark.parametrize(("role", "names"), CLIPS)
def test_clip_as_one_file_equals_transformers(role: str, names: tuple[str, ...], tmp_path: Path) -> None:
    theirs = transformers.CLIPTokenizer.from_pretrained(published(*names))
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert_equal(ours(tmp_path, role), theirs, 77)


@pytest.mark.parametrize(("role", "names"), CLIPS)
def test_a_chunk_is_what_transformers_pads(role: str, names: tuple[str, ...]) -> None:
    folder = published(*names)
    mine, theirs = ours(folder, role), transformers.CLIPTokenizer.from_pretrained(folder)
    short = [prompt for prompt in PROMPTS if len(mine.words(prompt)) <= 75]
    assert len(short) > 250
    wanted = theirs(short, padding="max_length", max_length=77).input_ids
    for prompt, ids in zip(short, wanted, strict=True):
        made = chunks(escape(prompt), mine)
        assert [chunk.ids.tolist() for chunk in made] == [[ids]], prompt


def test_t5_equals_sentencepiece() -> None:
    """But for marks, which sentencepiece does not know, and two slips of the published tokenizer.json.

    It takes several combining marks on a letter as one, and U+0085 at the end as white space.
    """
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = published("flux", "tokenizer_2")
    mine = ours(folder, "t5")
    assert (mine.start, mine.end, mine.padding) == (None, 1, 0)
    theirs = sentencepiece.SentencePieceProcessor(str(folder / "spiece.model"))
    wrong = [prompt for prompt in PROMPTS if "<pad>" not in prompt and mine.words(prompt) != theirs.encode(prompt)]
    assert all(re.search(r"\x85|[\u0301\u0308\u0327]{2}", prompt) for prompt in wrong)
    assert len(wrong) < 10


def test_t5_equals_transformers() -> None:
    """But for control characters, at which transformers 5 cuts words; neither transformers 4 nor sentencepiece does."""
    folder = published("flux", "tokenizer_2")
    mine, theirs = ours(folder, "t5"), transformers.T5TokenizerFast.from_pretrained(folder)
    plain = [prompt for prompt in PROMPTS if not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", prompt)]
    assert len(plain) > 400
    wanted = theirs(plain, padding="max_length", max_length=128, truncation=True).input_ids
    for prompt, ids in zip(plain, wanted, strict=True):
        assert mine(prompt, 128).tolist() == [ids], prompt


def test_the_shared_tokenizer_pads_bigg_with_zero() -> None:
    """As open_clip does; there "!" is no mark, but the token "!" of a word's end (256)."""
    mine = ours(published("flux", "tokenizer_1"), "clip_g", shared=True)
    assert mine.padding == 0
    assert mine("no!", 6).tolist() == [[49406, 871, 256, 49407, 0, 0]]
    assert ours(published("flux", "tokenizer_1"), "clip_l", shared=True).padding == 49407


def test_merges_that_were_cut_short_are_refused() -> None:
    """diffsynth 1.1.9 ships this very file cut at 416 KiB, within a line."""
    with pytest.raises(DamagedFile, match=r"merges.txt: (line 40213 is not two tokens|cut short)"):
        read_tokenizer(published("stable_diffusion_xl", "tokenizer_2"))


@pytest.mark.parametrize("text", ["a, ", "a", "!", "雪", "🦊", "1 ", "e\u0301", "(a:1.1)", "\x00", " \n", "BREAK "])
def test_long_prompts_are_quick(text: str) -> None:
    mine = ours(published("stable_diffusion", "tokenizer"), "clip_l")
    prompt = (text * 20_000)[:20_000]
    start = time.process_time()
    chunks(prompt, mine)
    assert time.process_time() - start < 5
