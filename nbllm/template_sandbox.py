"""A Jinja environment for templates that nobody vouches for: no way out, and bounds on all work.

Templates come with models, so they are as trustworthy as a download. Jinja's sandbox keeps them
from Python's internals but bounds neither time nor memory. Here

- every turn of a loop and every call of a macro looks at the clock,
- every operation that can make something large (`+`, `*`, `%`, `~`, lists and dicts, calls of
  methods, filters) is checked before or after it, so that no value, written out, is longer than
  `MAX_SIZE`. What works on such values takes time in proportion to that.

What breaks a bound raises OverflowError or TimeoutError.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SIZE = 10_000_000  # characters and items of one value, written out
MAX_RANGE = 100_000
MAX_WIDTH = 10_000  # of padding and indentation
_MAX_INT_BITS = 10_000
_DROPPED_FILTERS = ("center", "pprint", "random", "urlize", "wordwrap", "xmlattr", "filesizeformat")

deadline: ContextVar[float] = ContextVar("deadline")
"""When rendering has to be over, in seconds of `time.monotonic()`."""

_sizes: ContextVar[dict[int, tuple[Any, int]]] = ContextVar("sizes")


def begin(seconds: float) -> None:
    """Start the clock of this context, and forget the sizes of earlier values."""
    deadline.set(time.monotonic() + seconds)
    _sizes.set({})


def check_time() -> None:
    """Raise TimeoutError if rendering takes too long."""
    if time.monotonic() > deadline.get():
        raise TimeoutError("it takes too long")


def size_of(value: Any) -> int:
    """Length of `value` written out, about; shared parts count each time that they occur.

    Containers are remembered, so that a list grown by one item costs one look-up per item.
    """
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3
    if not isinstance(value, (list, tuple, dict, set)):
        return 8
    known = _sizes.get().get(id(value))
    if known is not None and known[0] is value:
        return known[1]
    items: Iterable[Any] = value
    if isinstance(value, dict):
        items = [part for pair in value.items() for part in pair]
    size = 2
    for item in items:
        size += 2 + size_of(item)
        if size > MAX_SIZE:
            break
    _sizes.get()[id(value)] = (value, size)
    return size


def bounded(value: Any) -> Any:
    """`value`, unless it is too large."""
    if size_of(value) > MAX_SIZE:
        raise OverflowError(f"a value is longer than {MAX_SIZE}")
    return value


def _check_length(length: int, limit: int = MAX_SIZE) -> None:
    if length > limit:
        raise OverflowError(f"a length of {length}: more than {limit}")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja with bounds; see the module."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        _instrument(source)
        return super()._generate(source, *args, **options)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise OverflowError("powers are not allowed in chat templates")
        if operator == "*":
            _check_product(left, right)
        elif operator == "%" and isinstance(left, str):
            _check_format(left, [right])
        elif operator == "+":
            _check_length(size_of(left) + size_of(right))
        return bounded(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_method(owner, __obj.__name__, [*args, *kwargs.values()])
        return bounded(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's replacement of `str.format`, which can't reach attributes; with bounds."""
        safe_format = super().wrap_str_format(value)
        if safe_format is None:
            return None

        def checked_format(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, [*args, *kwargs.values()])
            return safe_format(*args, **kwargs)

        return checked_format


def _instrument(tree: nodes.Template) -> None:
    """Put a look at the clock into every loop and macro, and a check around what builds values."""
    for body_node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        assert isinstance(body_node, (nodes.For, nodes.Macro, nodes.CallBlock))
        tick = nodes.Output([_filter(nodes.Const(""), "_tick")])
        body_node.body.insert(0, tick.set_lineno(body_node.lineno))
    builders = list(tree.find_all((nodes.Concat, nodes.List, nodes.Tuple, nodes.Dict)))
    wrapped = {id(node) for node in builders if getattr(node, "ctx", "load") == "load"}
    _wrap_children(tree, wrapped)
    for concat in tree.find_all(nodes.Concat):
        concat.nodes = [_filter(node, "string") for node in concat.nodes]
    if tree.environment is not None:
        tree.set_environment(tree.environment)


def _wrap_children(node: nodes.Node, wrapped: set[int]) -> None:
    for name, child in node.iter_fields():
        if isinstance(child, nodes.Node):
            _wrap_children(child, wrapped)
            if id(child) in wrapped:
                setattr(node, name, _filter(child, "_bounded"))
        elif isinstance(child, list):
            for index, item in enumerate(child):
                if isinstance(item, nodes.Node):
                    _wrap_children(item, wrapped)
                    if id(item) in wrapped:
                        child[index] = _filter(item, "_bounded")


def _filter(node: nodes.Node, name: str) -> Any:
    return nodes.Filter(node, name, [], [], None, None).set_lineno(node.lineno or 1)


class GenerationTag(Extension):
    """{% generation %} marks the assistant's tokens for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (as declared by Jinja)

    def parse(self, parser: Any) -> Any:
        """Only the content is left."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


# -- operations -----------------------------------------------------------------------------------


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_length(left.bit_length() + right.bit_length(), _MAX_INT_BITS)
    for value, count in ((left, right), (right, left)):
        if isinstance(value, (str, list, tuple)) and isinstance(count, int):
            _check_length(len(value) * count, MAX_RANGE)


def _check_format(text: str, values: Iterable[Any]) -> None:
    """Formats can pad to any width: no long numbers, no widths from values."""
    _check_length(len(text) + sum(size_of(value) for value in values) * (1 + text.count("{")))
    digits = 0
    for char in text:
        digits = digits + 1 if char.isdigit() else 0
        if digits > 4:
            raise OverflowError("a format with a large number")
    if "{" in text.partition("{")[2].partition("}")[0] or ("*" in text and "%" in text):
        raise OverflowError("a format with a variable width")


def _check_method(owner: str, name: str, values: list[Any]) -> None:
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        widths = [value for value in values if isinstance(value, int)]
        _check_length(max(widths, default=8), MAX_WIDTH)
        _check_length(len(owner) + owner.count("\t") * MAX_WIDTH if name == "expandtabs" else 0)
    elif name == "replace" and len(values) >= 2:
        _check_replace(owner, values[0], values[1])
    elif name == "join":
        _check_join(owner, values[0] if values else ())
    elif name in ("format", "format_map"):
        _check_format(owner, values)
    elif name in ("split", "rsplit"):
        separator = values[0] if values and isinstance(values[0], str) and values[0] else None
        count = owner.count(separator) if separator else sum(map(owner.count, " \n\t\r\f\v"))
        _check_length(count, 10 * MAX_RANGE)
    elif name == "splitlines":
        _check_length(owner.count("\n") + owner.count("\r"), 10 * MAX_RANGE)
    elif name == "translate":
        raise OverflowError("translate is not allowed in chat templates")


def _check_replace(text: Any, old: Any, new: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    count = text.count(old) if old else len(text) + 1
    _check_length(len(text) + count * len(new))


def _check_join(separator: str, items: Any) -> None:
    if isinstance(items, (list, tuple, str, dict)):
        _check_length(size_of(items) + len(items) * len(separator))


# -- filters --------------------------------------------------------------------------------------


def _tick(value: Any) -> Any:
    check_time()
    return value


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    _check_replace(value, old, new)
    return str(value).replace(str(old), str(new), -1 if count is None else count)


def _guard(original: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    """`original` with its arguments checked first; keeps what Jinja hung on the function."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        values = [a for a in (*args, *kwargs.values()) if isinstance(a, (str, int, list, tuple))]
        check(values)
        return bounded(original(*args, **kwargs))

    for name, value in vars(original).items():
        setattr(guarded, name, value)
    return guarded


def _check_widths(values: list[Any]) -> None:
    lines = sum(value.count("\n") + 1 for value in values if isinstance(value, str))
    width = max((v if isinstance(v, int) else len(v) for v in values[1:]), default=4)
    _check_length(width, MAX_WIDTH)
    _check_length(lines * width)


def _check_join_filter(values: list[Any]) -> None:
    lists = [value for value in values if isinstance(value, (list, tuple))]
    separators = [value for value in values if isinstance(value, str)]
    _check_length(sum(map(size_of, lists)) + sum(map(len, lists)) * sum(map(len, separators)))


def _check_formats(values: list[Any]) -> None:
    if values and isinstance(values[0], str):
        _check_format(values[0], values[1:])


def _sum(values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    numbers = [value[attribute] if attribute is not None else value for value in values]
    if not all(isinstance(number, (int, float)) for number in [*numbers, start]):
        raise TypeError("sum is for numbers")
    return sum(numbers, start)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
) -> str:
    """JSON as `transformers` writes it: not escaped for HTML."""
    bounded(value)
    if indent is not None:
        _check_length(int(indent), 100)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    _check_length(len(numbers), MAX_RANGE)
    return numbers


def make_environment() -> Sandbox:
    """The environment; templates are compiled in it once and rendered from any thread."""
    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, loopcontrols],
        optimized=False,  # the optimizer would compute constants while it compiles
        finalize=lambda value: value if isinstance(value, str) else bounded(value),
    )
    filters = environment.filters
    for name in _DROPPED_FILTERS:
        filters.pop(name, None)
    for name, check in {
        "indent": _check_widths,
        "batch": _check_widths,
        "slice": _check_widths,
        "join": _check_join_filter,
        "format": _check_formats,
    }.items():
        filters[name] = _guard(filters[name], check)
    filters |= {"tojson": to_json, "replace": _replace, "sum": _sum}
    filters |= {"_tick": _tick, "_bounded": bounded}
    environment.globals.pop("lipsum", None)  # an unbounded text generator
    environment.globals |= {
        "range": _range,
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format[:1000]),
    }
    return environment
