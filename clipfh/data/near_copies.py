"""Near copies among photos: the same picture mirrored, cropped, framed, rescaled, re-encoded or a little brighter.

A near copy shows a window of the other photo (all of it, where nothing was cut off), perhaps mirrored. So each photo is
looked for by windows of itself among whole photos, in three steps, each slower than the one before and of fewer pairs:

1. Means of 8 x 8 cells of a window and of a whole photo are compared by their cosine. They are split into their even
   part and the size of their odd part, which mirroring leaves as they are. Whole photos lie in buckets, each around one
   of them, and a window is compared with those in the nearest buckets alone: there is no table of all pairs.
2. The nearest photos are compared at 12 x 12, upright and mirrored.
3. The window is moved and stretched until it fits best (Lucas & Kanade 1981), first at 16 x 16, then at 32 x 32. Then
   the two are compared in colour, part by part, but for a gain and an offset of the light: two photos of one garment
   before the same wall agree in most parts, copies in all.

A photo is held as (SIDE, SIDE, 3) uint8, stretched to a square, which may be a file mapped into memory, and as a grey
thumbnail, (THUMB, THUMB) uint8: 12 KiB and 1 KiB each.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from clipfh.config import cores

SIDE, THUMB = 64, 32
CELLS = 8
FLAT = 4.0
"""Standard deviation of grey levels below which a window shows nothing to compare."""
COSINE, NEAREST = 0.86, 8
"""Least cosine of step 1, and how many pairs of each photo go on from there."""
PROBES = 3
"""Number of buckets that a window is compared with."""
CORRELATION, ORIENTED = 0.86, 4
"""Least correlation of step 2, and how many pairs of each photo go on from there."""
ROUGH, FITTED = 0.65, 3
"""Largest difference of the fit at 16 x 16, and how many pairs of each photo go on from there."""
DIFFERENCE = 0.34
"""Largest difference of a near copy: that of the part of the picture that differs most, by the picture's contrast."""
DETAIL = 0.25
"""Largest detail that one photo has and the other lacks: a letter, an emblem on a flag; by the picture's contrast."""
GAIN = 1.35
"""Largest gain of the light between near copies: what is brighter or darker than that is another colour."""
CHUNK = 1024
"""Number of photos, or of pairs, that are worked on at a time."""
QUERIES = 256
"""Number of windows whose cosines with all buckets are held at a time: few enough for a core's cache."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of photos: photo `whole` shows the window of photo `larger`. (n,) each, and (n, 4)."""

    larger: np.ndarray
    whole: np.ndarray
    place: np.ndarray
    """Left, top, width and height of the window, as shares of the photo's sides."""
    is_mirrored: np.ndarray

    def __len__(self) -> int:
        return len(self.larger)

    def __getitem__(self, rows: slice | np.ndarray) -> Pairs:
        return Pairs(self.larger[rows], self.whole[rows], self.place[rows], self.is_mirrored[rows])


def small_picture(encoded: bytes) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8 of an encoded image."""
    with Image.open(io.BytesIO(encoded)) as image:
        return reduce_picture(image)


def reduce_picture(image: Image.Image) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8 of an opened image, which is decoded to its end, a JPEG at few pixels."""
    _, box = image.draft("RGB", (SIDE, SIDE)) or ("", (0, 0, *image.size))  # a JPEG's sides may end within a pixel
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX, box))


def thumbnails(pictures: np.ndarray) -> np.ndarray:
    """(n, THUMB, THUMB) uint8 grey thumbnails of pictures (n, SIDE, SIDE, 3)."""
    step = SIDE // THUMB
    rows = pictures.reshape(len(pictures), THUMB, step, -1).sum(2, np.float32).reshape(len(pictures), THUMB, THUMB, -1)
    return (rows @ np.full(3 * step, 1 / (3 * step * step), np.float32)).astype(np.uint8)


Read = Callable[[np.ndarray], np.ndarray]
"""Function from row numbers (n,) of photos to their pixels, (n, S, S) or (n, S, S, C) uint8."""


def find_near_copies(
    thumbs: np.ndarray, read_pictures: Read, progress: Callable[[float], None] = lambda share: None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of near copies among N photos: two row numbers, the first the smaller, and the difference; (n,) each.

    Args:
        thumbs: (N, THUMB, THUMB) uint8.
        read_pictures: function from row numbers (n,) to pictures, (n, SIDE, SIDE, 3) uint8.
        progress: called with the share of the photos that were looked for.
    """
    buckets = _Buckets(np.concatenate([_describe(thumbs[rows], _WHOLE)[:, 0] for rows in _chunks(len(thumbs))]))

    def search(rows: slice) -> tuple[Pairs, np.ndarray]:
        pairs = _orient(_candidates(buckets, thumbs[rows], rows.start), thumbs.__getitem__)
        pairs, difference = _fit(pairs, thumbs.__getitem__, 16, ROUGH, steps=2)
        nearest = _first_of_each(pairs.larger, difference, FITTED)
        return pairs[nearest], difference[nearest]

    with ThreadPoolExecutor(cores.available()) as pool:
        parts = []
        for rows, part in zip(_chunks(len(thumbs)), pool.map(search, _chunks(len(thumbs))), strict=True):
            parts.append(part)
            progress(rows.stop / len(thumbs))
        pairs = _one_of_each(*_join(parts))
        fits = pool.map(lambda rows: _fit(pairs[rows], read_pictures, 32, DIFFERENCE, steps=3), _chunks(len(pairs)))
        pairs, difference = _join(fits)
        details = pool.map(lambda rows: _detail(pairs[rows], read_pictures), _chunks(len(pairs)))
        same = np.concatenate([np.zeros(0), *details]) <= DETAIL
    pairs, difference = pairs[same], difference[same]
    return np.minimum(pairs.larger, pairs.whole), np.maximum(pairs.larger, pairs.whole), difference


def _join(parts: Iterable[tuple[Pairs, np.ndarray]]) -> tuple[Pairs, np.ndarray]:
    """Pairs and their differences as one."""
    pairs, difference = [_NO_PAIRS], [np.zeros(0)]
    for part in parts:
        pairs.append(part[0])
        difference.append(part[1])
    columns = zip(*((each.larger, each.whole, each.place, each.is_mirrored) for each in pairs), strict=True)
    return Pairs(*map(np.concatenate, columns)), np.concatenate(difference)


_NO_PAIRS = Pairs(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4), np.float32), np.zeros(0, bool))


def _one_of_each(pairs: Pairs, difference: np.ndarray) -> Pairs:
    """Of pairs of the same two photos, whichever is the larger, the one that differs least."""
    low, high = np.minimum(pairs.larger, pairs.whole), np.maximum(pairs.larger, pairs.whole)
    return pairs[_first_of_each(low << 32 | high, difference, 1)]


def _chunks(count: int, size: int = CHUNK) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _first_of_each(group: np.ndarray, value: np.ndarray, number: int) -> np.ndarray:
    """The rows with the `number` smallest values of each group."""
    rows = np.lexsort((value, group))
    starts = np.flatnonzero(np.diff(group[rows], prepend=-1))
    place = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
    return rows[place < number]


# Step 1: means of cells, in buckets


def _grid() -> np.ndarray:
    """Windows to look by, (W, 4): left, top, width and height, as shares of the photo's sides."""
    windows = [(0.0, 0.0, 1.0, 1.0)]
    for side, steps in ((0.9, 3), (0.83, 3), (0.79, 5)):
        starts = np.linspace(0, 1 - side, steps)
        windows += [(left, top, side, side) for top in starts for left in starts]
    framed = (0.083, 0.065, 0.834, 0.87)  # what is within a frame as wide on all sides, of an upright photo of 3 to 4
    lying = (framed[1], framed[0], framed[3], framed[2])
    return np.array([*windows, framed, lying], np.float32)


def _weights(start: np.ndarray, length: np.ndarray, cells: int, pixels: int) -> np.ndarray:
    """Matrices (n, cells, pixels) to the means of equal cells, from the pixels of a side with stretches of it."""
    edges = (start[:, None] + length[:, None] * np.linspace(0, 1, cells + 1)) * pixels
    covered = edges.astype(np.float32)[:, :, None] - np.arange(pixels, dtype=np.float32)
    np.clip(covered, 0, 1, out=covered)
    return np.diff(covered, axis=1) * (cells / (pixels * length)).astype(np.float32)[:, None, None]


def _description(windows: np.ndarray) -> np.ndarray:
    """Matrix (THUMB * THUMB, W * CELLS * CELLS) from a thumbnail to the even and the odd parts of windows.

    They are those of the means of CELLS x CELLS cells, without the mean of these.
    """
    across = _weights(windows[:, 0], windows[:, 2], CELLS, THUMB)
    down = _weights(windows[:, 1], windows[:, 3], CELLS, THUMB)
    means = np.einsum("wai,wbj->ijwab", down, across)
    means -= means.mean((3, 4), keepdims=True)
    left, right = means[..., : CELLS // 2], means[..., : CELLS // 2 - 1 : -1]
    return np.stack([left + right, left - right], axis=3).reshape(THUMB * THUMB, -1)


_GRID = _grid()
_WINDOWS, _WHOLE = _description(_GRID), _description(_GRID[:1])


def _describe(thumbs: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Unit vectors (n, W, CELLS * CELLS) of windows of thumbnails, which mirroring leaves as they are; 0 if flat."""
    parts = (thumbs.reshape(len(thumbs), -1).astype(np.float32) @ matrix).reshape(len(thumbs), -1, 2, CELLS**2 // 2)
    np.abs(parts[:, :, 1], out=parts[:, :, 1])
    vectors = parts.reshape(len(thumbs), -1, CELLS**2)
    length = np.sqrt(np.einsum("nwd,nwd->nw", vectors, vectors))
    is_flat = length < FLAT * CELLS * np.sqrt(2)
    vectors *= np.where(is_flat, 0, 1 / np.maximum(length, 1e-9))[:, :, None]
    return vectors


def _largest(values: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns (n, number) of the largest values of each row, and these; it overwrites them. Faster than a partition."""
    columns, rows, largest = np.empty((len(values), number), int), np.arange(len(values)), []
    for slot in range(number):
        columns[:, slot] = values.argmax(1)
        largest.append(values[rows, columns[:, slot]])
        values[rows, columns[:, slot]] = -np.inf
    return columns, np.stack(largest, axis=1)


class _Buckets:
    """Unit vectors (N, D) in about 2 sqrt(N) buckets, each around one of the vectors."""

    def __init__(self, vectors: np.ndarray) -> None:
        count = min(len(vectors), int(2 * np.sqrt(len(vectors))) + 1)
        self.vectors = vectors
        self.centres = vectors[np.random.default_rng(0).choice(len(vectors), count, replace=False)]
        bucket = np.concatenate([(vectors[rows] @ self.centres.T).argmax(1) for rows in _chunks(len(vectors))])
        self.members = bucket.argsort(kind="stable")
        self.ends = np.searchsorted(bucket[self.members], np.arange(count + 1))

    def nearest(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The nearest two of each near bucket, of a cosine of at least COSINE: query, vector and cosine, (m,) each."""
        probes = min(PROBES, len(self.centres))
        near = [_largest(queries[rows] @ self.centres.T, probes)[0] for rows in _chunks(len(queries), QUERIES)]
        bucket = np.concatenate(near).ravel()
        order = bucket.argsort(kind="stable")
        ends = np.searchsorted(bucket[order], np.arange(len(self.centres) + 1))
        full = np.flatnonzero(np.diff(ends) * np.diff(self.ends))
        if not len(full):
            return np.zeros(0, int), np.zeros(0, int), np.zeros(0)
        asked = (order[ends[number] : ends[number + 1]] // probes for number in full)
        parts = [self._nearest_in(number, rows, queries) for number, rows in zip(full.tolist(), asked, strict=True)]
        query, vector, cosine = (np.concatenate(part) for part in zip(*parts, strict=True))
        return query, vector, cosine

    def _nearest_in(
        self, bucket: int, rows: np.ndarray, queries: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        members = self.members[self.ends[bucket] : self.ends[bucket + 1]]
        cosines = queries[rows] @ self.vectors[members].T
        best, values = _largest(cosines, min(2, len(members)))
        row, slot = np.nonzero(values >= COSINE)
        return rows[row], members[best[row, slot]], values[row, slot]


def _candidates(buckets: _Buckets, thumbs: np.ndarray, first: int) -> Pairs:
    """The NEAREST whole photos to windows of each of some photos, whose row numbers begin with `first`."""
    windows = _describe(thumbs, _WINDOWS)
    query, whole, cosine = buckets.nearest(windows.reshape(-1, windows.shape[2]))
    larger, window = first + query // len(_GRID), query % len(_GRID)
    differ = np.flatnonzero(larger != whole)
    rows = differ[_first_of_each((larger << 32 | whole)[differ], -cosine[differ], 1)]
    rows = rows[_first_of_each(larger[rows], -cosine[rows], NEAREST)]
    return Pairs(larger[rows], whole[rows], _GRID[window[rows]], np.zeros(len(rows), bool))


# Steps 2 and 3: pixels


def _sample(images: np.ndarray, place: np.ndarray, side: int) -> np.ndarray:
    """Windows (n, 4) of images (n, C, S, S), at (n, C, side, side): each pixel the mean of what it covers."""
    across, down = (_weights(place[:, axis], place[:, axis + 2], side, images.shape[2]) for axis in (0, 1))
    return down[:, None] @ images @ across[:, None].transpose(0, 1, 3, 2)


def _take(read: Read, rows: np.ndarray) -> np.ndarray:
    """Photos to compute with: (n, C, S, S) float32."""
    taken = read(rows).astype(np.float32)
    return taken[:, None] if taken.ndim == 3 else np.ascontiguousarray(taken.transpose(0, 3, 1, 2))


_WHOLE_PLACE = np.array([[0.0, 0.0, 1.0, 1.0]], np.float32)


def _inner(place: np.ndarray) -> np.ndarray:
    """Windows (n, 4) without a sixteenth at each edge, where the pixels of a frame run into those of the photo."""
    return np.concatenate([place[:, :2] + place[:, 2:] / 16, place[:, 2:] * 14 / 16], axis=1)


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Pearson's of each of n images with another, (n,)."""
    one, other = (each.reshape(len(each), -1) for each in (one, other))
    one, other = one - one.mean(1, keepdims=True), other - other.mean(1, keepdims=True)
    return (one * other).sum(1) / np.maximum(np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1), 1e-9)


def _orient(pairs: Pairs, read: Read) -> Pairs:
    """The pairs whose window and photo correlate most, upright or mirrored: ORIENTED of each photo."""
    parts = []
    for rows in _chunks(len(pairs)):
        part = pairs[rows]
        larger, whole = (_take(read, each) for each in (part.larger, part.whole))
        window, whole = _sample(larger, part.place, 12), _sample(whole, _WHOLE_PLACE, 12)
        upright, mirrored = _correlation(window, whole), _correlation(window[..., ::-1], whole)
        part = replace(part, is_mirrored=mirrored > upright)
        parts.append((part, np.maximum(upright, mirrored)))
    pairs, correlation = _join(parts)
    nearest = _first_of_each(pairs.larger, -correlation, ORIENTED)
    return pairs[nearest[correlation[nearest] >= CORRELATION]]


def _fit(pairs: Pairs, read: Read, side: int, most: float, steps: int) -> tuple[Pairs, np.ndarray]:
    """Move and stretch the windows until they fit, at `side` pixels, in some steps.

    Returns the pairs whose difference is then `most` or less, and their differences.
    """
    parts = []
    for rows in _chunks(len(pairs)):
        part = pairs[rows]
        larger, whole = (_take(read, each) for each in (part.larger, part.whole))
        larger[part.is_mirrored] = larger[part.is_mirrored, ..., ::-1]
        target = _sample(whole.mean(1, keepdims=True), _WHOLE_PLACE, side)[:, 0]
        place = _align(larger.mean(1), target, _mirror(part.place, part.is_mirrored), steps)
        window, middle = _sample(larger, _inner(place), 16), _sample(whole, _inner(_WHOLE_PLACE), 16)
        difference = _difference(window, middle)
        part = replace(part, place=_mirror(place, part.is_mirrored))
        near = difference <= most
        parts.append((part[near], difference[near]))
    return _join(parts)


def _detail(pairs: Pairs, read: Read) -> np.ndarray:
    """How much of their difference (n,) at 32 x 32 no shift explains, in the worst of 8 x 8 parts, by the contrast.

    A window that lies a little wrong differs where both photos have an edge, by what their grey levels change within a
    pixel. A detail of one photo differs where the other is flat. Photos whose light differs by more than GAIN differ
    infinitely.
    """
    larger, whole = (_take(read, rows).mean(1, keepdims=True) for rows in (pairs.larger, pairs.whole))
    larger[pairs.is_mirrored] = larger[pairs.is_mirrored, ..., ::-1]
    window = _sample(larger, _inner(_mirror(pairs.place, pairs.is_mirrored)), 32)[:, 0]
    whole = _sample(whole, _inner(_WHOLE_PLACE), 32)[:, 0]
    one, other = (each - each.mean((1, 2), keepdims=True) for each in (window, whole))
    gain = (one * other).sum((1, 2)) / np.maximum((one**2).sum((1, 2)), 1e-9)
    one *= gain[:, None, None]
    beyond = np.maximum(np.abs(one - other) - np.minimum(_slope(one), _slope(other)), 0)
    squares = (beyond**2).reshape(len(pairs), 8, 4, 8, 4).mean((2, 4)).max((1, 2))
    is_alike = (gain < GAIN) & (gain > 1 / GAIN)
    return np.where(is_alike, np.sqrt(squares) / np.maximum(other.std((1, 2)), 1e-9), np.inf)


def _slope(images: np.ndarray) -> np.ndarray:
    """The largest step between neighbours in images (n, S, S) within a pixel around each, (n, S, S)."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)), mode="edge")
    across, down = np.abs(np.diff(padded, axis=2))[:, 1:-1], np.abs(np.diff(padded, axis=1))[:, :, 1:-1]
    side = images.shape[1]
    steps = [across[:, y : y + side, x : x + side] for y in range(3) for x in range(4)]
    steps += [down[:, y : y + side, x : x + side] for y in range(4) for x in range(3)]
    return np.max(steps, axis=0)


def _mirror(place: np.ndarray, is_mirrored: np.ndarray) -> np.ndarray:
    """Windows (n, 4), of mirrored photos where it says so."""
    left = np.where(is_mirrored, 1 - place[:, 0] - place[:, 2], place[:, 0])
    return np.concatenate([left[:, None], place[:, 1:]], axis=1)


def _align(images: np.ndarray, targets: np.ndarray, place: np.ndarray, steps: int) -> np.ndarray:
    """Windows (n, 4) of images (n, S, S) that fit targets (n, side, side), from windows near them.

    A target is taken for gain * window + offset, to first order in the window's place: each step solves for all six.
    Pixels at the edges have no say, since those of a frame run into them.
    """
    side = targets.shape[1]
    along = ((np.arange(1, side - 1) + 0.5) / side).astype(np.float32)
    goal = targets[:, 1:-1, 1:-1].reshape(len(targets), -1, 1)
    slopes = np.ones((len(images), 6, side - 2, side - 2), np.float32)
    across, down, widening, lengthening, level, _ = slopes.swapaxes(0, 1)
    slope = slopes.reshape(len(images), 6, -1)
    for _ in range(steps):
        window = _sample(images[:, None], place, side)[:, 0]
        step = side / 2 / place[:, 2:, None, None]
        np.multiply(window[:, 1:-1, 2:] - window[:, 1:-1, :-2], step[:, 0], out=across)
        np.multiply(window[:, 2:, 1:-1] - window[:, :-2, 1:-1], step[:, 1], out=down)
        np.multiply(along, across, out=widening)
        np.multiply(along[:, None], down, out=lengthening)
        level[:] = window[:, 1:-1, 1:-1]
        normal = (slope @ slope.transpose(0, 2, 1)).astype(np.float64)
        normal += np.eye(6) * 1e-6 * (1 + np.trace(normal, axis1=1, axis2=2)[:, None, None])
        answer = np.linalg.solve(normal, slope @ goal)[..., 0].astype(np.float32)
        gain = np.maximum(answer[:, 4:5], 0.2)
        place = place + np.clip(answer[:, :4] / gain, -0.05, 0.05)
        place[:, 2:] = np.clip(place[:, 2:], 0.6, 1)
        place[:, :2] = np.clip(place[:, :2], 0, 1 - place[:, 2:])
    return place


def _difference(window: np.ndarray, whole: np.ndarray, parts: int = 4) -> np.ndarray:
    """Difference (n,) of images (n, C, side, side): root mean square in the worst of 4 x 4 parts, by the contrast.

    A gain and an offset, the same everywhere, are no difference.
    """
    count, channels, side, _ = whole.shape
    one, other = window.reshape(count, -1), whole.reshape(count, -1)
    one, other = one - one.mean(1, keepdims=True), other - other.mean(1, keepdims=True)
    gain = (one * other).sum(1, keepdims=True) / np.maximum((one**2).sum(1, keepdims=True), 1e-9)
    squares = ((gain * one - other) ** 2).reshape(count, channels, parts, side // parts, parts, -1)
    return np.sqrt(squares.mean((1, 3, 5)).max((1, 2))) / np.maximum(other.std(1), 1e-9)
