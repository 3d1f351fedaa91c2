"""Labelled grids of pictures."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 6
LINE = 14  # pixels of a line of words
PAPER, INK = (236, 236, 236), (0, 0, 0)


def grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str]) -> Image.Image:
    """Rows of pictures of one size, each under its name; at the bottom a caption for each column, in two lines."""
    width, height = rows[0][1][0].size
    across, down = width + GAP, height + LINE + GAP
    sheet = Image.new("RGB", (len(captions) * across + GAP, len(rows) * down + 2 * LINE + GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (name, pictures) in enumerate(rows):
        pen.text((GAP, number * down + 2), name, fill=INK, font=font)
        for column, picture in enumerate(pictures):
            assert picture.size == (width, height)
            sheet.paste(picture, (GAP + column * across, number * down + LINE + 2))
    for column, words in enumerate(captions):
        lines = _lines(words, width, font)
        pen.multiline_text((GAP + column * across, len(rows) * down), lines, fill=INK, font=font, spacing=1)
    return sheet


def _lines(words: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Words broken where the next would not fit."""
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
