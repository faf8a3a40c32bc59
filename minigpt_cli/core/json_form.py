"""JSON from another process, checked before it is used: its sender may be broken, or a stranger."""

import json
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict


def parse_json(content: bytes, form: Any) -> Any:
    """Parse JSON of a known form.

    Args:
        content: From elsewhere.
        form: None, bool, int, float, str, Any, a list[...], a dict[str, ...], a tuple[...] (a list
            of this length), a TypedDict, or a union of these.

    Returns:
        The value; see ``printable`` for its strings.

    Raises:
        ValueError: It is no JSON, or has another form.
    """
    try:
        return _checked(json.loads(content), form)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def printable(text: str) -> str:
    """Return a text without control characters, which could rewrite a terminal; lines remain."""
    return "".join(c for c in text if c.isprintable() or c == "\n")


def _checked(value: Any, form: Any) -> Any:
    if isinstance(form, UnionType):
        for each in get_args(form):
            try:
                return _checked(value, each)
            except ValueError:
                continue
    elif is_typeddict(form):
        forms = get_type_hints(form)
        if isinstance(value, dict) and value.keys() == forms.keys():
            return {name: _checked(value[name], each) for name, each in forms.items()}
    elif get_origin(form) is list:
        if isinstance(value, list):
            return [_checked(each, get_args(form)[0]) for each in value]
    elif get_origin(form) is tuple:
        if isinstance(value, list) and len(value) == len(get_args(form)):
            pairs = zip(value, get_args(form), strict=True)
            return tuple(_checked(each, its_form) for each, its_form in pairs)
    elif get_origin(form) is dict:
        if isinstance(value, dict):
            return {printable(n): _checked(each, get_args(form)[1]) for n, each in value.items()}
    elif form is Any:
        return value
    elif form is str and isinstance(value, str):
        return printable(value)
    elif type(value) is (NoneType if form is None else form):  # True is no integer
        return value
    raise ValueError(f"expected {form}")
