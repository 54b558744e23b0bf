"""Colours of classes: RGB, whole numbers from 0 to 255."""

import colorsys
import operator
from typing import Any

Color = tuple[int, int, int]


def rgb(color: Any) -> Color:
    """Return a colour, of any type of sequence and whole numbers, as a tuple.

    Raise `ValueError` for what is none.
    """
    try:
        red, green, blue = (operator.index(value) for value in color)
        if all(0 <= value <= 255 for value in (red, green, blue)):
            return red, green, blue
    except (TypeError, ValueError):
        pass
    shown = repr(color)[:40]
    raise ValueError(f"ClassEntry: color={shown}: give three whole numbers from 0 to 255")


def made_up(number: int) -> Color:
    """Return the colour of the class of this number where it has none of its own."""
    # Hues a golden angle apart stay distinct however many there are; saturation and value cycle.
    hue = (0.13 + 0.618033988749895 * number) % 1.0
    saturation, value = (0.85, 0.6, 0.95)[number % 3], (0.9, 0.75, 0.6, 1.0)[number % 4]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue
