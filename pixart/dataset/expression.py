"""Rules about pictures, as a user writes them: "min(width, height) >= 512 and not duplicate".

Read by Python's own parser and walked here; nothing of it is ever run. There are names, numbers, "texts",
comparisons (also 1 <= aspect < 2), and, or, not, + - * /, min and max. What `and` joins at the top are
rules of their own, in their order.
"""

import ast
import keyword
import math
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixart.files import check_text, short

TRUTH, NUMBER, TEXT = "true or false", "a number", "a text"
WHAT_THERE_IS = "names, numbers, texts, comparisons, and, or, not, + - * /, min(), max()"
_LONGEST, _DEEPEST = 10_000, 100  # characters, and nodes within nodes
_ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}


class NotMeasured(Exception):
    """A rule asks for what was not measured of a picture: the name is its text."""


@dataclass(frozen=True)
class Rule:
    """One condition. text: as written, in Python's own spacing."""

    text: str
    node: ast.expr

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it does for a picture's values. Raises NotMeasured where one that is asked for is None, no
        number, or absent, ValueError over a number that cannot be computed."""
        try:
            return bool(_value(self.node, values))
        except (ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"{self.text} cannot be computed ({error})") from error


def parse_rules(expression: str) -> list[Rule]:
    """The rules of an expression. ValueError, in one line, names the part that is none."""
    if len(expression) > _LONGEST:
        raise ValueError(
            f"--keep must have at most {_LONGEST:,} characters, got {len(expression):,}"
        )
    check_text("--keep", expression)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of 1and 2, which means what it seems to
            node = ast.parse(expression.strip(), mode="eval").body
        if _depth(node) > _DEEPEST:
            raise RecursionError
        parts = _joined(node)
        for part in parts:
            _check(part)
    except SyntaxError as error:
        place = f" at character {error.offset}" if error.offset else ""
        said = f"{error.msg}{place}"
        if "digits" in error.msg:  # Python tells how its own limit is raised
            said = "a number has too many digits"
        raise ValueError(f"--keep must be an expression, got {short(expression)}: {said}") from None
    except (RecursionError, MemoryError):
        raise ValueError(
            f"--keep must be nested at most {_DEEPEST} deep, got {short(expression)}"
        ) from None
    return [Rule(ast.unparse(part), part) for part in parts]


def is_name(text: str) -> bool:
    """Whether an expression can ask for a measurement of this name: Python reads names in Unicode's form NFKC."""
    is_plain = unicodedata.normalize("NFKC", text) == text
    return text.isidentifier() and is_plain and not keyword.iskeyword(text)


def is_of(kind: str, value: object) -> bool:
    """Whether a value is of a kind: a number is finite."""
    match value:
        case bool():
            return kind == TRUTH
        case int() | float():
            return kind == NUMBER and math.isfinite(value)
        case _:
            return kind == TEXT and isinstance(value, str)


def check_names(rules: Sequence[Rule], kinds: Mapping[str, str]) -> None:
    """ValueError unless all names of the rules are among those with a kind (TRUTH, NUMBER or TEXT), and are
    used as what they are."""
    for rule in rules:
        for name in sorted(names_of([rule]) - kinds.keys()):
            raise ValueError(f"--keep: there is no {name}; there are {', '.join(sorted(kinds))}")
        _want(rule.node, TRUTH, kinds)


def names_of(rules: Iterable[Rule]) -> set[str]:
    """The measurements that rules ask for."""
    nodes = [node for rule in rules for node in ast.walk(rule.node)]
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    return {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in called}


def _depth(node: ast.AST) -> int:
    level, depth = [node], 0
    while level and depth <= _DEEPEST:
        level = [inner for outer in level for inner in ast.iter_child_nodes(outer)]
        depth += 1
    return depth


def _joined(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        return [part for value in node.values for part in _joined(value)]
    return [node]


def _check(node: ast.expr) -> None:
    """Refuse what is no part of the language."""
    match node:
        case ast.Name() | ast.Constant(value=str()):
            return
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            if not (abs(value) <= 1e308 and math.isfinite(value)):
                raise _refusal(node, "it is too large")
        case ast.BoolOp():
            for part in node.values:
                _check(part)
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.UAdd()):
            _check(node.operand)
        case ast.BinOp() if type(node.op) in _ARITHMETIC:
            _check(node.left)
            _check(node.right)
        case ast.Compare() if all(type(op) in _COMPARISONS for op in node.ops):
            for part in (node.left, *node.comparators):
                _check(part)
        case ast.Call(func=ast.Name(id="min" | "max"), keywords=[]):
            if len(node.args) < 2:
                raise _refusal(node, "min and max take two at least")
            for part in node.args:
                _check(part)
        case _:
            raise _refusal(node, f"there are {WHAT_THERE_IS}")


def _refusal(node: ast.expr, reason: str) -> ValueError:
    try:
        text = short(ast.unparse(node))
    except ValueError:  # Python writes no number of more than 4,300 digits
        text = "a number of so many digits"
    return ValueError(f"--keep cannot have {text}: {reason}")


def _want(node: ast.expr, wanted: str, kinds: Mapping[str, str]) -> None:
    kind = _kind(node, kinds)
    if kind != wanted:
        raise _refusal(node, f"it must be {wanted} there, it is {kind}")


def _kind(node: ast.expr, kinds: Mapping[str, str]) -> str:
    match node:
        case ast.Name():
            return kinds[node.id]
        case ast.Constant():
            return TEXT if isinstance(node.value, str) else NUMBER
        case ast.BoolOp():
            parts, kind, gives = node.values, TRUTH, TRUTH
        case ast.UnaryOp(op=ast.Not()):
            parts, kind, gives = [node.operand], TRUTH, TRUTH
        case ast.UnaryOp():
            parts, kind, gives = [node.operand], NUMBER, NUMBER
        case ast.BinOp():
            parts, kind, gives = [node.left, node.right], NUMBER, NUMBER
        case ast.Call():
            parts, kind, gives = node.args, NUMBER, NUMBER
        case ast.Compare():
            parts, gives = [node.left, *node.comparators], TRUTH
            kind = _kind(node.left, kinds)
            if kind != NUMBER and not all(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops):
                raise _refusal(node, "only numbers have an order")
        case _:
            raise AssertionError(node)
    for part in parts:
        _want(part, kind, kinds)
    return gives


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.Name():
            value = values.get(node.id)
            if value is None or (isinstance(value, float) and not math.isfinite(value)):
                raise NotMeasured(node.id)
            return value
        case ast.Constant():
            return node.value if isinstance(node.value, str) else float(node.value)  # type: ignore[arg-type]
        case ast.BoolOp():
            # As in Python the rest is not looked at once it is decided, and may be unmeasured.
            found = (bool(_value(part, values)) for part in node.values)
            return all(found) if isinstance(node.op, ast.And) else any(found)
        case ast.UnaryOp():
            value = _value(node.operand, values)
            return not value if isinstance(node.op, ast.Not) else _signed(node.op, value)
        case ast.BinOp():
            return _computed(node.op, _value(node.left, values), _value(node.right, values))
        case ast.Call(func=ast.Name(id=name)):
            given = [_value(part, values) for part in node.args]
            return min(given) if name == "min" else max(given)
        case ast.Compare():
            left = _value(node.left, values)
            for op, part in zip(node.ops, node.comparators, strict=True):
                right = _value(part, values)
                if not _COMPARISONS[type(op)](left, right):
                    return False
                left = right
            return True
    raise AssertionError(node)


def _signed(op: ast.unaryop, value: float) -> float:
    return -value if isinstance(op, ast.USub) else value


def _computed(op: ast.operator, left: float, right: float) -> float:
    left, right = float(left), float(right)
    match op:
        case ast.Add():
            value = left + right
        case ast.Sub():
            value = left - right
        case ast.Mult():
            value = left * right
        case _:
            value = left / right
    if not math.isfinite(value):
        raise OverflowError("the number is too large")
    return value
