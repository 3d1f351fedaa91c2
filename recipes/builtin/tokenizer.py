"""The tokenizer of the built-in model: `python -m recipes.builtin.tokenizer --data FOLDER`.

One lower-casing BPE vocabulary of about 2,000 pieces over both text encoders, written in two ways:

    tokenizer.json        words </s>          the T5 role
    tokenizer-clip.json   <s> words </s>      the CLIP role

It learns from sampled captions, which make every word of the recipe a single piece, and from the English
names and tags of all emoji, which let other words be spelt from longer pieces.
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from recipes.builtin.colours import BACKGROUNDS, COLOURS
from recipes.builtin.fetch import DATA, NAMES, fetch
from recipes.builtin.objects import Object, load_objects
from recipes.builtin.scenes import FREE, IDLE, STAGES, caption, sample_scenes

SPECIAL = ("<pad>", "</s>", "<unk>", "<s>")
PIECES = 2048
LENGTH = 24  # pieces the text encoders are given, the end mark included


def train_tokenizer(
    data: Path = DATA, *, pieces: int = PIECES, captions: int = 200_000, large: bool = False
) -> Tokenizer:
    """The tokenizer in its T5 role, with exactly `pieces` pieces, for the words of the small or the large
    set.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=list(SPECIAL),
        initial_alphabet=list(string.ascii_lowercase + string.digits + ",.'-!?\u2581"),
        limit_alphabet=60,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(data, captions, load_objects(large=large)), trainer)
    return _framed(tokenizer, "$A </s>")


def clip_role(tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary with a mark at either end."""
    return _framed(Tokenizer.from_str(tokenizer.to_str()), "<s> $A </s>")


def _framed(tokenizer: Tokenizer, frame: str) -> Tokenizer:
    marks = [(mark, SPECIAL.index(mark)) for mark in ("<s>", "</s>") if mark in frame]
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=marks)
    return tokenizer


def _texts(data: Path, captions: int, objects: tuple[Object, ...]) -> Iterator[str]:
    """Captions of the freest stage, every word of the recipe often enough to become one piece, and emoji
    names.
    """
    for thing in objects:
        yield from (thing.name, thing.plural, *thing.synonyms) * 2000
    yield from (*COLOURS, *BACKGROUNDS, *IDLE) * 2000
    rng, variety = np.random.default_rng(0), replace(FREE, unknown=0.0)  # nonsense words deserve no piece
    for _ in range(captions // 1000):
        for scene in sample_scenes(rng, 1000, variety, objects):
            yield caption(scene, rng, variety)
    entries: list[dict[str, Any]] = json.loads((fetch(NAMES, data) / "en" / "data.json").read_text("utf-8"))
    for entry in entries:
        yield from (entry["label"], *entry.get("tags", ())) * 5


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tokenizer.")
    parser.add_argument("--data", type=Path, default=DATA, help="cache folder; the files go there too")
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--pieces", type=int, default=PIECES)
    parser.add_argument("--large", action="store_true", help="the large set of objects")
    options = parser.parse_args()
    tokenizer = train_tokenizer(options.data, pieces=options.pieces, captions=options.captions, large=options.large)
    tokenizer.save(str(options.data / "tokenizer.json"))
    clip_role(tokenizer).save(str(options.data / "tokenizer-clip.json"))
    print(f"{tokenizer.get_vocab_size()} pieces")
    for name, variety in STAGES.items():
        rng = np.random.default_rng(1)
        texts = [
            caption(scene, rng, variety)
            for scene in sample_scenes(rng, 5000, variety, load_objects(large=options.large))
        ]
        lengths = np.array([len(line.ids) for line in tokenizer.encode_batch(texts)])
        print(
            f"{name}: {lengths.mean():.1f} pieces on average, 95 % within {np.quantile(lengths, 0.95):.0f}, "
            f"longest {lengths.max()}, {np.mean(lengths > LENGTH):.2%} over {LENGTH}"
        )


if __name__ == "__main__":
    main()
