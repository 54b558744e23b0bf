"""Fields that carry their own check: numbers with bounds, words with fixed choices.

A dataclass declares them with `number` and `choice`. `check` holds a value against what its field
declares and `build` makes an object from JSON values, so that flags, config files, stored configs
and the configs of networks all pass the same checks.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import re
import reprlib
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

from segdiff_jax.errors import UserError

_LARGEST_INT = 2**31 - 1  # JAX's own integers end there
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and bytes of a command line that are no UTF-8


def number(default: Any, low: float, high: float | None = None, *, above: bool = False) -> Any:
    """A field for a number (or a tuple of them) from `low` to `high`; with `above`, not `low`.

    Without `high`, floats have no upper bound and integers that of 32 bits.
    """
    if high is None:
        first = default[0] if isinstance(default, tuple) else default
        high = math.inf if isinstance(first, float) else _LARGEST_INT
    return dataclasses.field(default=default, metadata={"bounds": (low, high, above)})


def choice(default: str, allowed: tuple[str, ...]) -> Any:
    """A field for one of a few words."""
    return dataclasses.field(default=default, metadata={"allowed": allowed})


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(dotted key, field, value) of every leaf, in the order of declaration.

    Of an object, or of a class with the defaults.
    """
    for item in dataclasses.fields(node):
        key = f"{prefix}{item.name}"
        if is_group(item.type):
            inner = item.type if isinstance(node, type) else getattr(node, item.name)
            yield from leaves(inner, f"{key}.")
        else:
            default = item.default if isinstance(node, type) else getattr(node, item.name)
            yield key, item, default


def is_group(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def check(key: str, item: dataclasses.Field[Any], value: Any) -> None:
    """Raises `UserError` if `value` has not the type of its field, or is out of its bounds."""
    if not has_type(value, item.type):
        example = f", such as {item.default!r}" if item.default not in ("", ()) else ""
        raise UserError(f"{key}={shown(value)}: must be {type_name(item.type)}{example}")
    allowed = item.metadata.get("allowed")
    if allowed and value not in allowed:
        raise UserError(f"{key}={shown(value)}: choose one of {', '.join(allowed)}")
    if "bounds" not in item.metadata:
        return
    low, high, above = item.metadata["bounds"]
    for part in value if isinstance(value, tuple) else (value,):
        if not low <= part <= high or (above and part == low):
            least = f"more than {low}" if above else f"at least {low}"
            bounds = least if high == math.inf else f"{least} and at most {high}"
            raise UserError(f"{key}={shown(value)}: must be {bounds}")


def has_type(value: Any, kind: Any) -> bool:
    """Whether `value` is a `kind`: a scalar type or a tuple of them. A whole number is a float."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, tuple) or (not value and kind == tuple[str, ...]):
            return False
        if inner[-1] is Ellipsis:
            inner = inner[:1] * len(value)
        return len(inner) == len(value) and all(map(has_type, value, inner))
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return _is_finite(value)
    if kind is str:
        return isinstance(value, str) and not _UNSTORABLE.search(value)
    return isinstance(value, kind)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def build(cls: type, values: Any, name: str) -> Any:
    """An object of the dataclass `cls` from JSON values; missing keys have their defaults.

    Raises `UserError` for an unknown key, a wrong type or a value out of its bounds; keys begin
    with `name` in the message.
    """
    if not isinstance(values, dict):
        first = dataclasses.fields(cls)[0].name
        raise UserError(f"{name}={shown(values)}: must be an object with keys such as {first!r}")
    known = {item.name: item for item in dataclasses.fields(cls)}
    built = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{name}.{shown(key)[1:-1]}: unknown key{suggestion(cls, key)}")
        item = known[key]
        if is_group(item.type):
            built[key] = build(item.type, value, f"{name}.{key}")  # type: ignore[arg-type]
        else:
            built[key] = from_json(value, item.type)
            check(f"{name}.{key}", item, built[key])
    return cls(**built)


def from_json(value: Any, kind: Any) -> Any:
    """JSON has no tuples, and may write a float without its point."""
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if kind is float and whole and _is_finite(value) else value


def texts_from(text: str) -> tuple[str, ...]:
    """A Python tuple of strings as it is; any other text as a tuple that holds just this text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return (text,)
    texts = isinstance(value, tuple | list) and all(isinstance(item, str) for item in value)
    return tuple(value) if texts else (text,)


def suggestion(cls: type, key: str, name: str = "") -> str:
    """ ": did you mean NAME.nearest?" for a key that a class and its groups do not have, or ""."""
    keys = [known for known, _, _ in leaves(cls)]
    last = key.rsplit(".", 1)[-1]
    near = [k for k in keys if k.rsplit(".", 1)[-1] == last]  # right name, wrong group
    near = near or difflib.get_close_matches(key, keys, n=1)
    near = near or [k for k in keys if difflib.get_close_matches(last, [k.rsplit(".", 1)[-1]])]
    return f": did you mean {name}{near[0]}?" if near else ""


def type_name(kind: Any) -> str:
    return str(kind) if isinstance(kind, types.GenericAlias) else kind.__name__


def shown(value: Any) -> str:
    """`repr(value)` for a message: of a long or deep value only the beginning."""
    return _Short().repr(value)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = 100
        self.maxlevel, self.maxtuple, self.maxlist, self.maxdict = 3, 8, 8, 4

    def repr_int(self, x: int, level: int) -> str:
        if abs(x) < 10**100:
            return repr(x)
        return "a number of more than 100 digits"  # of which Python may refuse to print them


def help_lines(group: Any, prefix: str = "") -> list[str]:
    """One line for each key below `group`: its type, default, comment in the source, choices."""
    remarks = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(group), re.MULTILINE))
    lines: list[str] = []
    groups: list[str] = []
    for item in dataclasses.fields(group):
        if is_group(item.type):
            groups += ["", *help_lines(item.type, f"{prefix}{item.name}.")]
            continue
        shown = f"{type_name(item.type)}, {item.default!r}"
        allowed = item.metadata.get("allowed", ())
        # Of more, as the layouts of data, the documents say what they are.
        listed = f"({', '.join(allowed)})" if 0 < len(allowed) <= 5 else ""
        remark = " ".join(filter(None, [remarks.get(item.name), listed]))
        lines.append(f"  {prefix + item.name:<36} {shown:<30} {remark}".rstrip())
    return lines + groups
