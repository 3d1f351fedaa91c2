"""Edges and lines by classical means, on arrays: exact, deterministic, without learned weights."""

# h w: rows, columns.  c: channels.  dx, dy: slopes along columns and rows.

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

TAN_22_5 = round(math.tan(math.radians(22.5)) * 2**15)  # in 15 bits, as OpenCV compares slopes
NEIGHBOURS = ((0, 1), (1, -1), (1, 0), (1, 1))  # of a pixel's eight, those after it: each pair is met once


def canny(pixels: Bytes, low: float, high: float) -> NDArray[np.bool_]:
    """h w c -> h w, True on edges one pixel wide.

    J. Canny, A Computational Approach to Edge Detection, 1986, in OpenCV's arithmetic (3 x 3 Sobel slopes, |dx| + |dy|
    of the channel where it is largest, whole numbers throughout): the same pixels as `cv2.Canny(pixels, low, high)`.
    Edges above `high` are kept, and those above `low` that touch a kept one.
    """
    padded = np.pad(pixels.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    dx, dy = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]
    steepest = np.argmax(np.abs(dx) + np.abs(dy), axis=2)[..., None]
    dx, dy = (np.take_along_axis(slope, steepest, axis=2)[..., 0] for slope in (dx, dy))
    found = np.where(_is_crest(dx, dy), np.abs(dx) + np.abs(dy), 0)
    return _connected(found > math.floor(low), found > math.floor(high))


def _is_crest(dx: NDArray[np.int32], dy: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where the slope is not less than on either side across the edge; of two equal neighbours, the former."""
    height, width = dx.shape
    across, along = np.abs(dx), np.abs(dy)
    slope = across + along
    around = np.pad(slope, 1)

    def beside(row: int, column: int) -> NDArray[np.int32]:
        return around[1 + row : 1 + row + height, 1 + column : 1 + column + width]

    # 64 bits: 15 for the tangent on top of 2040.
    rise, flat = along.astype(np.int64) << 15, across.astype(np.int64) * TAN_22_5
    steep = flat + (across.astype(np.int64) << 16)  # tan 67.5 = tan 22.5 + 2
    falling = (dx < 0) != (dy < 0)
    before = np.where(falling, beside(-1, 1), beside(-1, -1))
    after = np.where(falling, beside(1, -1), beside(1, 1))
    crest = (slope > before) & (slope > after)
    crest = np.where(rise > steep, (slope > beside(-1, 0)) & (slope >= beside(1, 0)), crest)
    return np.where(rise < flat, (slope > beside(0, -1)) & (slope >= beside(0, 1)), crest)


def _connected(candidates: NDArray[np.bool_], strong: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The candidates in an eight-connected group that has a strong one in it."""
    height, width = candidates.shape
    places = np.flatnonzero(candidates)
    number = np.full((height + 1, width + 2), -1, np.int64)  # a border that belongs to nobody
    number[:height, 1:-1][candidates] = np.arange(len(places))
    here = number[:height, 1:-1]
    pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for down, right in NEIGHBOURS:
        there = number[down : down + height, 1 + right : 1 + right + width]
        both = (here >= 0) & (there >= 0)
        pairs.append((here[both], there[both]))
    group = _groups(len(places), np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]))
    kept = np.zeros(len(places), np.bool_)
    kept[group[strong.ravel()[places]]] = True
    found = np.zeros(height * width, np.bool_)
    found[places] = kept[group]
    return found.reshape(height, width)


def _groups(count: int, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of `count` things the least of those that pairs (a, b) join it with: union-find on whole arrays.

    Each round hooks every root under its least neighbour and flattens the trees, so roots fall at least by half.
    """
    root = np.arange(count)
    while len(a):
        one, other = root[a], root[b]
        apart = one != other
        a, b, one, other = a[apart], b[apart], one[apart], other[apart]
        np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(above := root[root], root):
            root = above
    return root


def lines(pixels: Floats, width: float) -> Floats:
    """h w c in 0..1 -> h w, how much darker than its surroundings a line `width` pixels across is; 0 elsewhere.

    H. Kang et al., Coherent Line Drawing, 2007, with the smoothed structure tensor of J. E. Kyprianidis and J. Döllner,
    Image Abstraction by Structure Adaptive Filtering, 2008, as the flow: a difference of Gaussians across it, in the
    channel where it is largest, averaged along it. Places one `width` apart are looked at, in a picture blurred by half
    of that.
    """
    smooth = np.stack([blurred(channel, width / 2) for channel in np.moveaxis(pixels, 2, 0)], axis=2)
    across_x, across_y = _across(smooth, 2.5 * width)
    rows, columns = np.indices(pixels.shape[:2], np.float32)
    taps = range(-5, 6)
    narrow, wide = (np.array([math.exp(-(tap**2) / (2 * s**2)) for tap in taps]) for s in (1, 1.6))
    weights = wide / wide.sum() - narrow / narrow.sum()
    darker = np.zeros_like(pixels)
    for tap, weight in zip(taps, weights, strict=True):
        step = np.float32(tap * width)
        darker += np.float32(weight) * _sampled(smooth, rows + step * across_y, columns + step * across_x)
    step = np.float32(width)
    return np.maximum(_along(np.max(darker, axis=2), -step * across_y, step * across_x), 0)


def _across(pixels: Floats, spread: float) -> tuple[Floats, Floats]:
    """The direction in which a picture changes most around each place, as a unit vector (x, y)."""
    dx, dy = gradient(np.moveaxis(pixels, 2, 0))
    xx, xy, yy = (blurred(np.sum(a * b, axis=0), spread) for a, b in ((dx, dx), (dx, dy), (dy, dy)))
    angle = np.arctan2(2 * xy, xx - yy) / 2
    return np.cos(angle), np.sin(angle)


def _along(values: Floats, flow_x: Floats, flow_y: Floats) -> Floats:
    """The mean of values along the flow, weighted by a Gaussian three of its steps wide."""
    total, weights = values.copy(), 1.0
    for side in (1, -1):
        rows, columns = np.indices(values.shape, np.float32)
        step_x, step_y = side * flow_x, side * flow_y
        for step in range(1, 7):
            rows, columns = rows + step_y, columns + step_x
            weight = math.exp(-(step**2) / (2 * 3**2))
            total += np.float32(weight) * _sampled(values[..., None], rows, columns)[..., 0]
            weights += weight
            # A direction has no sign: go on, not back.
            next_x, next_y = _nearest(flow_x, rows, columns), _nearest(flow_y, rows, columns)
            turn = np.where(next_x * step_x + next_y * step_y < 0, np.float32(-1), np.float32(1))
            step_x, step_y = turn * next_x, turn * next_y
    return total / np.float32(weights)


def _nearest(values: Floats, rows: Floats, columns: Floats) -> Floats:
    height, width = values.shape
    row, column = ((np.clip(at, 0, end - 1) + 0.5).astype(np.int32) for at, end in ((rows, height), (columns, width)))
    return values.ravel()[row * width + column]


def _sampled(values: Floats, rows: Floats, columns: Floats) -> Floats:
    """h w c between its pixels, linearly; outside, what is at the border."""
    height, width, channels = values.shape
    rows, columns = np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)
    top, left = rows.astype(np.int32), columns.astype(np.int32)
    down, right = (rows - top).astype(np.float32)[..., None], (columns - left).astype(np.float32)[..., None]
    flat, corner = values.reshape(-1, channels), top * width + left
    beside, below = (left < width - 1).astype(np.int32), (top < height - 1).astype(np.int32) * width
    upper = flat[corner] * (1 - right) + flat[corner + beside] * right
    corner += below
    return upper * (1 - down) + (flat[corner] * (1 - right) + flat[corner + beside] * right) * down


def soft_edges(pixels: Floats, width: float) -> Floats:
    """h w c in 0..1 -> h w: how steep a picture is, where it is so at several scales at once.

    The geometric mean of scale-normalised slopes (T. Lindeberg, Edge Detection and Ridge Detection with Automatic Scale
    Selection, 1998) over three scales from `width` pixels: contours are steep at all of them, texture at the finest.
    """
    product = np.ones(pixels.shape[:2], np.float32)
    for scale in (width, 2 * width, 4 * width):
        dx, dy = gradient(np.stack([blurred(channel, scale) for channel in np.moveaxis(pixels, 2, 0)]))
        product *= np.float32(scale) * np.max(np.hypot(dx, dy), axis=0)
    return np.cbrt(product)


def gradient(values: Floats) -> tuple[Floats, Floats]:
    """The slopes of the last two dimensions, per pixel: (along columns, along rows)."""
    edge = ((0, 0),) * (values.ndim - 2)
    padded = np.pad(values, (*edge, (1, 1), (1, 1)), mode="edge")
    dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    return dx, (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2


def blurred(values: Floats, spread: float) -> Floats:
    """h w under a Gaussian of this standard deviation in pixels; the border's values go on outside."""
    if spread <= 0:
        return values
    reach = math.ceil(3 * spread)
    taps = [math.exp(-(tap**2) / (2 * spread**2)) for tap in range(-reach, reach + 1)]
    for axis in (0, 1):
        margin = [(0, 0), (0, 0)]
        margin[axis] = (reach, reach)
        padded = np.pad(values, margin, mode="edge")
        length = values.shape[axis]
        parts: Any = padded if axis == 0 else padded.T
        total = np.zeros_like(values if axis == 0 else values.T)
        for start, weight in enumerate(taps):
            total += np.float32(weight / sum(taps)) * parts[start : start + length]
        values = total if axis == 0 else total.T
    return values
