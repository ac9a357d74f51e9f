"""Near copies among photos: the same picture mirrored, cropped, framed, rescaled, re-encoded or a little brighter.

A near copy shows a window of the other photo (all of it, where nothing was cut off), perhaps mirrored. So windows of
each photo are compared with whole photos, in three steps, each slower than the one before and for fewer pairs:

1. Means of 8 x 8 cells of a window and of a whole photo are compared by their cosine. They are split into their even
   part and the size of their odd part, which mirroring leaves as they are. Whole photos lie in buckets around their
   means, and some windows are compared with the photos in the nearest buckets alone: there is no table of all pairs.
2. The nearest photos are compared with all windows, upright and mirrored: by the cells with the sign of the odd part.
3. The window is moved and stretched until it fits best (Lucas & Kanade 1981), first at 16 x 16, then at 32 x 32. Then
   the two are compared in colour, part by part, up to a gain and an offset of the light: two photos of one garment
   before the same wall agree in most parts, copies in all.

A photo is held as (SIDE, SIDE, 3) uint8, stretched to a square, which may be a file mapped into memory, and as a grey
thumbnail, (THUMB, THUMB) uint8: 12 KiB and 1 KiB each.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image

from clipfh.config import cores

SIDE, THUMB = 64, 32
CELLS = 8
FLAT = 4.0
"""Standard deviation of grey levels below which a window shows nothing to compare."""
COSINE, NEAREST = 0.8, 12
"""Least cosine of step 1, and how many pairs of each photo go on from there."""
PROBES, ROUNDS, SAMPLE = 3, 4, 64
"""Buckets that a window is compared with; rounds in which their means are found; photos a bucket that rounds use."""
CORRELATION, ORIENTED = 0.92, 4
"""Least correlation of step 2, and how many pairs of each photo go on from there."""
ROUGH, FITTED = 0.6, 3
"""Largest difference of the fit at 16 x 16, and how many pairs of each photo go on from there."""
DIFFERENCE = 0.34
"""Largest difference of a near copy, in the part that differs most, divided by the picture's contrast."""
FINE = ((0.75, 0), (0.48, 1), (DIFFERENCE, 2))
"""Largest differences at 32 x 32 as the fit goes on, and the steps before each is asked for: the first two spare most
pairs the later steps, and lose one copy of a thousand."""
DETAIL = 0.25
"""Largest detail that one photo has and the other lacks (a letter, an emblem on a flag), divided by the contrast."""
GAIN = 1.35
"""Largest gain of the light between near copies: a larger one is another colour."""
CHUNK, FEW = 1024, 128
"""Number of photos or pairs in work at a time: where thumbnails are compared, and where pictures are."""
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
    rows = pictures.reshape(-1, THUMB, step, 3 * SIDE).sum(2, np.float32).reshape(-1, THUMB, THUMB, 3 * step)
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
        progress: called with the share of the photos that are done.
    """
    buckets = _Buckets(np.concatenate([_describe(thumbs[rows], _WHOLE)[:, 0] for rows in _chunks(len(thumbs))]))

    def search(rows: slice) -> tuple[Pairs, np.ndarray]:
        pairs = _candidates(buckets, thumbs[rows], rows.start)
        pairs, difference = _fit(pairs, thumbs.__getitem__, 16, ROUGH, steps=2)
        nearest = _first_of_each(pairs.larger, difference, FITTED)
        return pairs[nearest], difference[nearest]

    with ThreadPoolExecutor(cores.available()) as pool:
        parts = []
        for rows, part in zip(_chunks(len(thumbs)), pool.map(search, _chunks(len(thumbs))), strict=True):
            parts.append(part)
            progress(rows.stop / len(thumbs))
        pairs = _one_of_each(*_join(parts))
        for most, steps in FINE:
            fit = partial(_fit, read=read_pictures, side=32, most=most, steps=steps)
            pairs, difference = _join(pool.map(fit, [pairs[rows] for rows in _chunks(len(pairs), FEW)]))
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
    """For each two photos the pair that differs least, whichever photo is the larger."""
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


# Steps 1 and 2: means of cells


def _grid() -> np.ndarray:
    """Windows of a photo to compare, (W, 4): left, top, width and height, as shares of the photo's sides."""
    windows = [(0.0, 0.0, 1.0, 1.0)]
    for side, steps in ((0.9, 3), (0.83, 3), (0.79, 5)):
        starts = np.linspace(0, 1 - side, steps)
        windows += [(left, top, side, side) for top in starts for left in starts]
    framed = (0.083, 0.065, 0.834, 0.87)  # what is within a frame as wide on all sides, of an upright photo of 3 to 4
    lying = (framed[1], framed[0], framed[3], framed[2])
    return np.array([*windows, framed, lying], np.float32)


def _weights(start: np.ndarray, length: np.ndarray, cells: int, pixels: int) -> np.ndarray:
    """Matrices (n, cells, pixels) from a side's pixels to the means of equal cells of n stretches of the side."""
    edges = (start[:, None] + length[:, None] * np.linspace(0, 1, cells + 1)) * pixels
    covered = edges.astype(np.float32)[:, :, None] - np.arange(pixels, dtype=np.float32)
    np.clip(covered, 0, 1, out=covered)
    return np.diff(covered, axis=1) * (cells / (pixels * length)).astype(np.float32)[:, None, None]


def _description(windows: np.ndarray) -> np.ndarray:
    """Matrix (THUMB * THUMB, W * CELLS * CELLS) from a thumbnail to the even and the odd parts of windows.

    These are parts of the means of CELLS x CELLS cells, less the mean of all cells.
    """
    across = _weights(windows[:, 0], windows[:, 2], CELLS, THUMB)
    down = _weights(windows[:, 1], windows[:, 3], CELLS, THUMB)
    means = np.einsum("wai,wbj->ijwab", down, across)
    means -= means.mean((3, 4), keepdims=True)
    left, right = means[..., : CELLS // 2], means[..., : CELLS // 2 - 1 : -1]
    return np.stack([left + right, left - right], axis=3).reshape(THUMB * THUMB, -1)


_GRID = _grid()
_COARSE = [0, 5, *range(19, 44, 2), 44, 45]
"""The windows of the grid that are compared with buckets: every other one of the small ones."""
_WINDOWS, _WHOLE = _description(_GRID), _description(_GRID[:1])


def _describe(thumbs: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Unit vectors (n, W, CELLS * CELLS) of windows of thumbnails, the even half and the odd half; 0 if flat."""
    vectors = (thumbs.reshape(len(thumbs), -1).astype(np.float32) @ matrix).reshape(len(thumbs), -1, CELLS**2)
    length = np.sqrt(np.einsum("nwd,nwd->nw", vectors, vectors))
    is_flat = length < FLAT * CELLS * np.sqrt(2)
    vectors *= np.where(is_flat, 0, 1 / np.maximum(length, 1e-9))[:, :, None]
    return vectors


_HALF = CELLS**2 // 2


def _fold(vectors: np.ndarray) -> np.ndarray:
    """The vectors (..., CELLS * CELLS) with the size of their odd half, which mirroring leaves as they are."""
    return np.concatenate([vectors[..., :_HALF], np.abs(vectors[..., _HALF:])], axis=-1)


def _largest(values: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns (n, number) and values of the largest in each row. Overwrites `values`. Faster than a partition."""
    columns, rows, largest = np.empty((len(values), number), int), np.arange(len(values)), []
    for slot in range(number):
        columns[:, slot] = values.argmax(1)
        largest.append(values[rows, columns[:, slot]])
        values[rows, columns[:, slot]] = -np.inf
    return columns, np.stack(largest, axis=1)


class _Buckets:
    """Vectors (N, D) of whole photos in about 2 sqrt(N) buckets. Folded vectors are in the bucket of nearest mean."""

    def __init__(self, vectors: np.ndarray) -> None:
        count, rng = min(len(vectors), int(2 * np.sqrt(len(vectors))) + 1), np.random.default_rng(0)
        sample = _fold(vectors[rng.choice(len(vectors), min(len(vectors), SAMPLE * count), replace=False)])
        self.vectors, self.centres = vectors, sample[:count]
        for _ in range(ROUNDS):
            members, ends = self._assign(sample)
            full = np.flatnonzero(np.diff(ends))
            sums = np.add.reduceat(sample[members], ends[full])
            self.centres[full] = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
        self.members, self.ends = self._assign(vectors)

    def _assign(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of vectors by their buckets, and where in these each bucket ends."""
        bucket = np.concatenate([(_fold(vectors[rows]) @ self.centres.T).argmax(1) for rows in _chunks(len(vectors))])
        members = bucket.argsort(kind="stable")
        return members, np.searchsorted(bucket[members], np.arange(len(self.centres) + 1))

    def nearest(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The photos nearest to folded vectors, up to two from each near bucket, with a cosine of at least COSINE.

        Returns query, photo and cosine, (m,) each.
        """
        probes = min(PROBES, len(self.centres))
        near = [_largest(queries[rows] @ self.centres.T, probes)[0] for rows in _chunks(len(queries), QUERIES)]
        bucket = np.concatenate(near).ravel()
        order = bucket.argsort(kind="stable")
        ends = np.searchsorted(bucket[order], np.arange(len(self.centres) + 1))
        full = np.flatnonzero(np.diff(ends) * np.diff(self.ends))
        if not len(full):
            return np.zeros(0, int), np.zeros(0, int), np.zeros(0)
        rows = (order[ends[number] : ends[number + 1]] // probes for number in full)
        parts = [self._nearest_in(number, own, queries) for number, own in zip(full.tolist(), rows, strict=True)]
        query, vector, cosine = (np.concatenate(part) for part in zip(*parts, strict=True))
        return query, vector, cosine

    def _nearest_in(
        self, bucket: int, rows: np.ndarray, queries: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        members = self.members[self.ends[bucket] : self.ends[bucket + 1]]
        cosines = queries[rows] @ _fold(self.vectors[members]).T
        asking = np.flatnonzero(cosines.max(1) >= COSINE)
        best, values = _largest(cosines[asking], min(2, len(members)))
        row, slot = np.nonzero(values >= COSINE)
        return rows[asking[row]], members[best[row, slot]], values[row, slot]


def _candidates(buckets: _Buckets, thumbs: np.ndarray, first: int) -> Pairs:
    """Whole photos that windows of photos `first`, `first` + 1, ... may show, ORIENTED for each of these."""
    windows = _describe(thumbs, _WINDOWS)
    query, whole, cosine = buckets.nearest(_fold(windows[:, _COARSE]).reshape(-1, windows.shape[2]))
    larger = query // len(_COARSE)
    differ = np.flatnonzero(first + larger != whole)
    rows = differ[_first_of_each((larger << 32 | whole)[differ], -cosine[differ], 1)]
    rows = rows[_first_of_each(larger[rows], -cosine[rows], NEAREST)]
    return _orient(windows, buckets.vectors, larger[rows], whole[rows], first)


def _orient(windows: np.ndarray, vectors: np.ndarray, larger: np.ndarray, whole: np.ndarray, first: int) -> Pairs:
    """The pairs whose window and whole photo correlate most, upright or mirrored; `larger` is sorted."""
    place = np.arange(len(larger)) - np.searchsorted(larger, larger)
    slots = np.full((len(windows), NEAREST), -1)
    slots[larger, place] = whole
    even, odd = np.split(vectors[slots].swapaxes(1, 2), 2, axis=1)
    even, odd = windows[..., :_HALF] @ even, windows[..., _HALF:] @ odd
    correlation = np.where(slots[:, None] < 0, -np.inf, even + np.abs(odd))
    window = correlation.argmax(1)
    best = np.take_along_axis(correlation, window[:, None], 1)[:, 0]
    is_mirrored = np.take_along_axis(odd, window[:, None], 1)[:, 0] < 0
    row, slot = np.nonzero(best >= CORRELATION)
    nearest = _first_of_each(row, -best[row, slot], ORIENTED)
    row, slot = row[nearest], slot[nearest]
    return Pairs(first + row, slots[row, slot], _GRID[window[row, slot]], is_mirrored[row, slot])


# Step 3: pixels


_WHOLE_PLACE = np.array([[0.0, 0.0, 1.0, 1.0]], np.float32)


def _sample(images: np.ndarray, place: np.ndarray, side: int) -> np.ndarray:
    """Windows (n, 4) of images (n, S, S, C), at (n, side, C, side): each pixel the mean of what it covers."""
    across, down = (_weights(place[:, axis], place[:, axis + 2], side, images.shape[1]) for axis in (0, 1))
    count, height, width, channels = images.shape
    rows = down @ images.reshape(count, height, width * channels)
    return rows.reshape(count, side, width, channels).swapaxes(2, 3) @ across.transpose(0, 2, 1)[:, None]


def _sample_whole(
    images: np.ndarray, is_mirrored: np.ndarray, side: int, place: np.ndarray = _WHOLE_PLACE
) -> np.ndarray:
    """Images (n, S, S, C) at (n, side, C, side), some of them mirrored."""
    windows = _sample(images, place, side)
    windows[is_mirrored] = windows[is_mirrored, ..., ::-1]
    return windows


def _take(read: Read, rows: np.ndarray) -> np.ndarray:
    """Photos to compute with: (n, S, S, C) float32."""
    photos = read(rows).astype(np.float32)
    return photos[..., None] if photos.ndim == 3 else photos


def _grey(images: np.ndarray) -> np.ndarray:
    """Images (n, S, S, C) as (n, S, S, 1)."""
    channels = images.shape[3]
    return images if channels == 1 else images @ np.full((channels, 1), 1 / channels, np.float32)


def _inner(place: np.ndarray) -> np.ndarray:
    """Windows (n, 4) without a sixteenth at each edge, where the pixels of a frame run into those of the photo."""
    return np.concatenate([place[:, :2] + place[:, 2:] / 16, place[:, 2:] * 14 / 16], axis=1)


def _fit(pairs: Pairs, read: Read, side: int, most: float, steps: int) -> tuple[Pairs, np.ndarray]:
    """Move and stretch the windows until they fit, at `side` pixels, in some steps.

    Returns the pairs whose difference is then `most` or less, and their differences.
    """
    parts = []
    for rows in _chunks(len(pairs)):
        part = pairs[rows]
        larger, whole = (_take(read, each) for each in (part.larger, part.whole))
        if steps:
            target = _sample_whole(_grey(whole), part.is_mirrored, side)[:, :, 0]
            part = replace(part, place=_align(_grey(larger), target, part.place, steps))
        window = _sample(larger, _inner(part.place), 16)
        difference = _difference(window, _sample_whole(whole, part.is_mirrored, 16, _inner(_WHOLE_PLACE)))
        near = difference <= most
        parts.append((part[near], difference[near]))
    return _join(parts)


def _detail(pairs: Pairs, read: Read) -> np.ndarray:
    """The part of the difference (n,) at 32 x 32 that no shift explains, in the worst of 8 x 8 parts, by the contrast.

    A window that lies a little wrong differs where both photos have an edge, by what their grey levels change within a
    pixel. A detail of one photo differs where the other is flat. Photos whose light differs by more than GAIN differ
    infinitely.
    """
    larger, whole = (_grey(_take(read, rows)) for rows in (pairs.larger, pairs.whole))
    window = _sample(larger, _inner(pairs.place), 32)[:, :, 0]
    whole = _sample_whole(whole, pairs.is_mirrored, 32, _inner(_WHOLE_PLACE))[:, :, 0]
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


def _align(images: np.ndarray, targets: np.ndarray, place: np.ndarray, steps: int) -> np.ndarray:
    """Windows (n, 4) of images (n, S, S, 1) that fit targets (n, side, side), from windows near them.

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
        window = _sample(images, place, side)[:, :, 0]
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
    """Difference (n,) of images (n, side, C, side): root mean square in the worst of 4 x 4 parts, by the contrast.

    A gain and an offset, the same everywhere, are no difference.
    """
    count, side, channels, _ = whole.shape
    one, other = window.reshape(count, -1), whole.reshape(count, -1)
    one, other = one - one.mean(1, keepdims=True), other - other.mean(1, keepdims=True)
    gain = (one * other).sum(1, keepdims=True) / np.maximum((one**2).sum(1, keepdims=True), 1e-9)
    squares = ((gain * one - other) ** 2).reshape(count, parts, side // parts * channels, parts, -1)
    return np.sqrt(squares.mean((2, 4)).max((1, 2))) / np.maximum(other.std(1), 1e-9)
