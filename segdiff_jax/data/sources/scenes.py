"""The procedural dataset: textured, lit shapes on cluttered backgrounds.

A class is a phrase such as "striped blue triangle": texture x colour x shape. A quarter of the
combinations is never drawn in training, although each of their words is seen in others, so that
validation measures whether the network reads the phrase or has memorised it. A scene is a pure
function of (seed, split, index).
"""

import itertools

import numpy as np

from segdiff_jax.config import ScenesConfig
from segdiff_jax.data import chance
from segdiff_jax.text.vocabulary import ClassEntry, Vocabulary

TEXTURES = ("plain", "striped")
COLORS = {
    "red": (205, 45, 45),
    "green": (45, 165, 60),
    "blue": (50, 80, 215),
    "yellow": (225, 195, 40),
}
SHAPES = ("ring", "bar", "triangle")
BACKGROUND = 0  # its class id; it is a trained class like any other

_COLOR_VALUES = np.array(list(COLORS.values()), np.float32)  # [4, 3]
_PALE = 225.0  # gray value between the stripes
_NUM_COLORS, _NUM_SHAPES = len(COLORS), len(SHAPES)
_COLOR_PAIRS = tuple(itertools.combinations(range(_NUM_COLORS), 2))


def class_parts(class_id: int) -> tuple[int, int, int]:
    """Return (texture, colour, shape) indices of a class id >= 1."""
    rest, shape = divmod(class_id - 1, _NUM_SHAPES)
    texture, color = divmod(rest, _NUM_COLORS)
    return texture, color, shape


def vocabulary() -> Vocabulary:
    """Return "background", then the 24 phrases."""
    phrases = [f"{t} {c} {s}" for t in TEXTURES for c in COLORS for s in SHAPES]
    entries = [ClassEntry("background", (), (96, 96, 96)), *(ClassEntry(p) for p in phrases)]
    return Vocabulary("scenes", tuple(entries))


def novel_classes() -> tuple[int, ...]:
    """Return the ids of the 6 phrases that training never shows.

    At most one shape is held out of each (texture, colour), turning so that every pair of words,
    in any two of the three places, is still seen in training.
    """
    ids = range(1, len(vocabulary()))
    return tuple(i for i in ids if sum(class_parts(i)[:2]) % _NUM_COLORS == class_parts(i)[2])


class ScenesSource:
    """Random access to scenes of `size` = (height, width)."""

    def __init__(self, config: ScenesConfig, size: tuple[int, int], train: bool, seed: int):
        self.vocabulary = vocabulary()
        self.novel = novel_classes()
        self.size = (size[0], size[1])
        self.length = config.train_examples if train else config.val_examples
        self.max_shapes = config.max_shapes
        self.seed = seed
        self.split = "train" if train else "val"
        hidden = self.novel if train else ()
        self.drawn = np.array([i for i in range(1, len(self.vocabulary)) if i not in hidden])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = self._rng(0, index)
        image, labels = render(rng, self._classes(rng, index), self.size)
        return {"image": image, "labels": labels, "name": self.name(index)}

    def name(self, index: int) -> str:
        return f"{self.split}_{index:06d}"

    def _rng(self, stream: int, index: int) -> np.random.Generator:
        return chance.generator(self.seed, self.split, stream, index)

    def _classes(self, rng: np.random.Generator, index: int) -> list[int]:
        # Two colours a scene, so that colour alone does not tell its shapes apart. Their phrases
        # are cards dealt from reshuffled decks, so that each class occurs about equally often
        # even in a small validation split.
        turn, pair = divmod(index, len(_COLOR_PAIRS))
        cards = [i for i in self.drawn if class_parts(i)[1] in _COLOR_PAIRS[pair]]
        count = int(rng.integers(min(2, self.max_shapes), self.max_shapes + 1))
        result = []
        for slot in range(turn * self.max_shapes, turn * self.max_shapes + count):
            deck, card = divmod(slot, len(cards))
            stream = 1 + pair + len(_COLOR_PAIRS) * deck
            result.append(int(self._rng(stream, 0).permutation(cards)[card]))
        return result


def render(
    rng: np.random.Generator, class_ids: list[int], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Render image uint8 [H, W, 3] and labels uint8 [H, W]; later shapes occlude earlier."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    image = _background(rng, height, width)  # [H, W, 3]
    labels = np.full(size, BACKGROUND, np.uint8)
    radii = rng.uniform(0.26, 0.34, len(class_ids)) * min(size)
    for class_id, radius, center in zip(class_ids, radii, _centers(rng, radii, size), strict=True):
        texture, color, shape = class_parts(class_id)
        angle = rng.uniform(-0.3, 0.3)
        cos, sin = np.cos(angle, dtype=np.float32), np.sin(angle, dtype=np.float32)
        dy, dx = (y - center[0]) / radius, (x - center[1]) / radius
        u, v = cos * dx + sin * dy, cos * dy - sin * dx  # [H, W]: the shape's own axes
        inside = _inside(shape, u, v)
        u, v, dx, dy = u[inside], v[inside], dx[inside], dy[inside]  # [n]
        paint = _texture(rng, texture, u * radius, v * radius, min(size))[:, None]
        base = _COLOR_VALUES[color] + rng.uniform(-18, 18, 3)
        light = rng.uniform(0, 2 * np.pi)
        shade = 1 + 0.22 * (np.cos(light) * dx + np.sin(light) * dy)
        image[inside] = shade[:, None] * (paint * base + (1 - paint) * _PALE)
        labels[inside] = class_id
    light = rng.uniform(0, 2 * np.pi)
    gradient = np.cos(light) * (x / width - 0.5) + np.sin(light) * (y / height - 0.5)
    image *= (rng.uniform(0.85, 1.1) * (1 + 0.35 * gradient))[..., None].astype(np.float32)
    image += 6.0 * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), labels


def _centers(rng: np.random.Generator, radii: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Choose centres [n, 2] (y, x), each the least crowded of a few: overlaps stay mild."""
    chosen = np.zeros((len(radii), 2))
    for i, radius in enumerate(radii):
        low = 0.8 * radius
        candidates = rng.uniform(low, np.array(size) - low, (8, 2))
        gaps = np.linalg.norm(candidates[:, None] - chosen[None, :i], axis=-1) - radii[None, :i]
        chosen[i] = candidates[np.argmax(gaps.min(axis=1, initial=np.inf))]
    return chosen


def _inside(shape: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return bool [H, W] in the shape's own axes, where its radius is 1 and v points down."""
    name = SHAPES[shape]
    if name == "ring":
        return np.abs(np.hypot(u, v) - 0.75) < 0.27
    if name == "bar":
        return (np.abs(u) < 1.0) & (np.abs(v) < 0.4)
    return (v < 0.85) & (v > 2.0 * np.abs(u) - 1.1)


def _texture(
    rng: np.random.Generator, texture: int, u: np.ndarray, v: np.ndarray, scale: int
) -> np.ndarray:
    """Return the share of the class's colour on a pale ground at offsets (u, v), float [n]."""
    period = scale / 6 * rng.uniform(0.9, 1.1)
    phase = rng.uniform(0, period)
    name = TEXTURES[texture]
    if name == "plain":
        return np.ones_like(u)
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * u + np.sin(angle) * v + phase
    return np.where(along % period < period / 2, 1.0, 0.2).astype(np.float32)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Paint muted colour blobs and thin lines, which belong to no shape: float32 [H, W, 3]."""
    grid = rng.uniform(70, 190, (4, 5, 1)) + rng.uniform(-32, 32, (4, 5, 3))
    rows, columns = _interpolation(height, 4), _interpolation(width, 5)
    image = np.einsum("hi,ijc->hjc", rows, grid)
    image = np.einsum("wj,hjc->hwc", columns, image).astype(np.float32)
    for _ in range(int(rng.integers(3, 8))):
        ends = rng.uniform(0, 1, (2, 2)) * (height - 1, width - 1)
        steps = np.linspace(0, 1, max(height, width))[:, None]
        line = np.rint(ends[0] + steps * (ends[1] - ends[0])).astype(int)
        image[line[:, 0], line[:, 1]] = rng.uniform(30, 220) + rng.uniform(-25, 25, 3)
    return image


def _interpolation(length: int, points: int) -> np.ndarray:
    """Return cosine interpolation weights [length, points] between evenly spaced points."""
    position = np.linspace(0, points - 1, length)[:, None]
    distance = np.minimum(np.abs(position - np.arange(points)), 1)
    return 0.5 + 0.5 * np.cos(np.pi * distance)
