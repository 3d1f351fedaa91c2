"""BERT's list of word pieces and T5's sentence pieces, read from their files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

from calotype.checkpoint.tokenizer_files import kind, prompt_tokenizer, read_tokenizer, sentencepiece_tokenizer
from calotype.errors import DamagedFile, LoadError
from calotype.text.tokenizers import PromptTokenizer

PIECES = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fox", "##es", "雪", "狐", "cafe", "É", ","]


def words(folder: Path, pieces: list[str] = PIECES, end: str = "\n", **config: object) -> PromptTokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_bytes((end.join(pieces) + end).encode())
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = read_tokenizer(folder)
    assert found is not None
    assert kind(found) == "bert"
    return prompt_tokenizer(found, folder, "bert", len(pieces), {"bos_token_id": 0, "eos_token_id": 2})


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_word_pieces_are_numbered_by_lines(tmp_path: Path, end: str) -> None:
    made = words(tmp_path, end=end)
    assert (made.start, made.end, made.padding) == (3, 4, 0)
    assert made.words("A foxes,雪狐 zebra café") == [6, 7, 8, 13, 9, 10, 2, 11]
    assert made("fox [SEP] a", 8).tolist() == [[3, 7, 4, 6, 4, 0, 0, 0]]
    ids, mask = made.masked("fox " * 20, 5)
    assert (ids.tolist(), mask.tolist()) == ([[3, 7, 7, 7, 4]], [[True] * 5])
    assert made.masked("", 4)[1].tolist() == [[True, True, False, False]]


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    """Real lists hold pieces that Unicode calls ends of lines."""
    made = words(tmp_path, [*PIECES[:7], "\u2028", "x\x85", "fox"])
    assert made.words("fox") == [9]


def test_case_and_accents_are_kept_on_request(tmp_path: Path) -> None:
    assert words(tmp_path / "a").words("É Fox") == [2, 7]
    kept = words(tmp_path / "b", do_lower_case=False, strip_accents=False)
    assert kept.words("É Fox") == [12, 2]
    apart = words(tmp_path / "c", tokenize_chinese_chars=False)
    assert apart.words("雪狐") == [2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"\[PAD\] is not among its 0 pieces"),
        ("\n".join(PIECES[:3]).encode(), r"\[CLS\] is not among its 3 pieces"),
        (b"\xff\xfe\n", "not text in UTF-8"),
    ],
)
def test_damaged_lists_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(DamagedFile, match=said):
        read_tokenizer(tmp_path)


def sentences(path: Path, **settings: object) -> None:
    made = io.BytesIO()
    options: dict[str, object] = {
        "model_type": "unigram",
        "vocab_size": 300,
        "byte_fallback": True,
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    text = ["the red fox in the snow", "two cats on a blue table", "a dog and an apple"] * 20
    SentencePieceTrainer.Train(sentence_iterator=iter(text), model_writer=made, **{**options, **settings})
    path.write_bytes(made.getvalue())


def test_sentence_pieces(tmp_path: Path) -> None:
    assert sentencepiece_tokenizer(tmp_path, "t5", 400) is None
    sentences(tmp_path / "spiece.model")
    made = sentencepiece_tokenizer(tmp_path, "t5", 400)
    assert made is not None
    assert (made.start, made.end, made.padding) == (None, 1, 0)
    own = made.words("the fox")
    ids, mask = made.masked("the fox", len(own) + 3)
    assert ids.tolist() == [[*own, 1, 0, 0]]
    assert mask.tolist() == [[True] * (len(own) + 1) + [False] * 2]
    assert made("fox " * 30, 6)[0, -1] == 1


def test_letters_that_the_vocabulary_lacks_are_one_unknown_token(tmp_path: Path) -> None:
    """sentencepiece itself would give three bytes for each."""
    sentences(tmp_path / "spiece.model")
    made = sentencepiece_tokenizer(tmp_path, "t5", 400)
    assert made is not None
    assert len(made.processor.encode("雪狐")) > 6
    for prompt, count in (("雪", 1), ("雪狐", 1), ("雪 狐", 2), ("fox雪fox", 1), ("fox", 0)):
        assert made.words(prompt).count(2) == count, prompt
        assert not any(made.processor.IsByte(number) for number in made.words(prompt))


def test_other_models_pieces_are_refused(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"no such thing")
    with pytest.raises(DamagedFile, match="not a sentencepiece model, or cut short"):
        sentencepiece_tokenizer(tmp_path, "t5", 400)
    sentences(tmp_path / "spiece.model")
    with pytest.raises(LoadError, match="but the t5 encoder knows 200 tokens: it belongs to another model"):
        sentencepiece_tokenizer(tmp_path, "t5", 200)
    sentences(tmp_path / "spiece.model", eos_id=-1)
    with pytest.raises(DamagedFile, match="no end token"):
        sentencepiece_tokenizer(tmp_path, "t5", 400)


def test_a_published_tokenizer_of_a_smaller_encoder_is_refused(tmp_path: Path) -> None:
    """T5's beside mT5: no id would be too large, and no word right."""
    pieces = [*PIECES, *(f"word{number}" for number in range(32_100))]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    found = read_tokenizer(tmp_path)
    assert found is not None
    assert prompt_tokenizer(found, tmp_path, "bert", 47_020, {}).start == 3
    with pytest.raises(LoadError, match="but the bert encoder knows 250112 tokens"):
        prompt_tokenizer(found, tmp_path, "bert", 250_112, {})
