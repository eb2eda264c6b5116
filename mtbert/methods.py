"""A method of surgery or of weighting, made from its name and options in the configuration."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError, validate_call

from mtbert.errors import UserError, to_install


def build_method(section: str, methods: Mapping[str, Callable[..., Any]], method: str, options: dict[str, Any]) -> Any:
    """`methods[method](**options)`, with every mistake told as one of `section`'s keys `method` and `options`.

    Raises `UserError` for an unknown method or option, a value it does not take, or a missing pip extra.
    """
    if method not in methods:
        raise UserError(f"{section}.method {method!r}: no such method; valid: {_nearest_first(method, methods)}")
    factory = methods[method]
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{section}.options.{name}: should be a finite number (got {value})")
    try:
        return validate_call(factory)(**options)
    except ImportError:
        raise UserError(f"{section}.method {method}: its solver is not installed: {to_install('surgery')}") from None
    except ValidationError as error:
        raise UserError(_explain(section, method, list(inspect.signature(factory).parameters), error)) from None
    except ValueError as error:
        raise UserError(f"{section}.options of {method}: {error}") from None


def _explain(section: str, method: str, valid: list[str], error: ValidationError) -> str:
    first = error.errors()[0]
    option = str(first["loc"][0])
    where = f"{section}.options.{option}"
    if first["type"] == "unexpected_keyword_argument":
        takes = f"valid: {_nearest_first(option, valid)}" if valid else "it takes none"
        return f"{where}: {method} has no such option; {takes}"
    if first["type"] == "missing_keyword_only_argument":
        return f"{where}: {method} needs it, there is no default"
    return f"{where}: {first['msg']} (got {first['input']!r})"


def _nearest_first(given: str, valid: Iterable[str]) -> str:
    return ", ".join(sorted(valid, key=lambda name: -difflib.SequenceMatcher(None, given.lower(), name).ratio()))
