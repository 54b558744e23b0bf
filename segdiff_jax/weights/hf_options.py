"""The options of a published `config.json`, whatever they mean.

There are dozens. Those that our modules have are read; each of the others must have the value that
Stable Diffusion gives it, or the error names the key. An option nobody here has heard of is
accepted only while it is off.
"""

import dataclasses
from typing import Any

from segdiff_jax import fields
from segdiff_jax.errors import UserError

Json = dict[str, Any]
Allowed = tuple[Any, ...]

OFF: Allowed = (None, False, "", [], {})


def _is_off(value: Any) -> bool:
    """Return whether an option is nothing, or nothing for each level."""
    return value in OFF or (isinstance(value, list) and all(part in OFF for part in value))


def check(values: Json, fixed: dict[str, Allowed], file: str) -> None:
    """Raise `UserError` unless each key has an allowed value; one that is missing has the first."""
    for key, allowed in fixed.items():
        value = values.get(key, allowed[0])
        if value in allowed or (allowed is OFF and _is_off(value)):
            continue
        wanted = "it switched off" if allowed is OFF else " or ".join(map(repr, allowed))
        raise UserError(
            f"{file}: {key}={fields.shown(value)} is not supported: use a model with {wanted}"
        )


def check_unknown(values: Json, known: set[str], file: str) -> None:
    """Raise `UserError` for an option that is not known and not off."""
    for key in sorted(set(values) - known):
        if not key.startswith("_") and not _is_off(values[key]):
            raise UserError(
                f"{file}: {fields.shown(key)[1:-1]}={fields.shown(values[key])} is not supported: "
                "use another model"
            )


def read(cls: type, values: Json, renamed: dict[str, str], file: str, **defaults: Any) -> Any:
    """Build a `cls` of entries named as its fields, or `renamed`, each checked as declared.

    defaults: what missing entries mean, where it is not what they mean to `cls`.
    """
    made = {}
    for item in dataclasses.fields(cls):
        key = renamed.get(item.name, item.name)
        value = values.get(key, defaults.get(item.name, item.default))
        made[item.name] = fields.from_json(value, item.type)
        fields.check(f"{file}: {key}", item, made[item.name])
    return cls(**made)


def write(config: Any, renamed: dict[str, str]) -> Json:
    """Invert `read`."""
    values = dataclasses.asdict(config).items()
    return {renamed.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in values}


def same_everywhere(values: Json, keys: tuple[str, ...]) -> Json:
    """Return `values` with one number where the file has a list with the same for each level."""
    changed = dict(values)
    for key in keys:
        value = values.get(key)
        if isinstance(value, list) and value and all(n == value[0] for n in value):
            changed[key] = value[0]
    return changed
