"""Command lines as nested plain values, all that is wrong with them at once.

tyro alone prints the help of `pixart train`, but does not read its options. It would make one whole
stage of them, where an option holds for several stages, each of which has defaults of its own: what
is given is merged into each stage's YAML, and the same strict check reads the sum. And it ends at
the first option that is wrong, where all are to be told at once, beside what is wrong in the file.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pixart.files import check_text
from pixart.training.problems import problems_of

VARIANT = "variant"  # beside fields of a whole that has a name: the whole that they change


def read_options(
    arguments: Sequence[str], kinds: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """`--batch.images 8 --no-aspect` as {"batch": {"images": 8}, "aspect": False}.

    kinds: the type of every option by its dotted name. A tuple takes all words up to the next option,
    a tuple of pairs gives a mapping, None is written None, and "-" may stand for "_". The last of
    several wins; `--size NAME --size.depth 2` is {"size": {"variant": NAME, "depth": 2}}, in any order.
    Beside the values, a line for each option that is wrong.
    """
    values: dict[str, Any] = {}
    wrong: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            wrong.append(f"no option takes {word!r}")
            continue
        flag, equals, value = word.partition("=")
        given = [value] if equals else _take(words)
        name, is_no = _name_of(flag, kinds)
        if name is None:
            wrong.append(_unknown(flag, kinds))
            continue
        if not_text := [
            line for one in given for line in problems_of(partial(check_text, flag, one))
        ]:
            wrong += not_text
            continue
        try:
            _put(values, name, _convert(kinds[name], given, is_no))
        except ValueError as error:
            got = " ".join(given) or "nothing"
            wrong.append(f"{flag} must be {error}, got {got}")
    return values, wrong


def _take(words: list[str]) -> list[str]:
    """The words up to the next option."""
    count = next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
    taken, words[:count] = words[:count], []
    return taken


def _name_of(flag: str, kinds: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The option that a flag names, and whether it says no to it."""
    name = flag.removeprefix("--").replace("-", "_")
    if name in kinds:
        return name, False
    *above, last = name.split(".")
    name = ".".join([*above, last.removeprefix("no_")])
    is_no = last.startswith("no_") and _plain(kinds.get(name))[0] is bool
    return (name, True) if is_no else (None, False)


def _unknown(flag: str, kinds: Mapping[str, Any]) -> str:
    known = [f"--{name.replace('_', '-')}" for name in kinds]
    near = get_close_matches(flag, known, 1) or [k for k in known if k.endswith(f".{flag[2:]}")][:1]
    return f"{flag}: unknown option; {f'did you mean {near[0]}' if near else '--help tells them'}"


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *above, last = name.split(".")
    for part in above:
        inside = values.setdefault(part, {})
        if not isinstance(inside, dict):  # the name of a whole, some fields of which are others
            inside = values[part] = {VARIANT: inside}
        values = inside
    inside = values.get(last)
    if isinstance(inside, dict) and isinstance(value, str):
        inside[VARIANT] = value
    else:
        values[last] = value


def _plain(kind: Any) -> tuple[Any, bool]:
    """A type without its annotations, and whether it may be None."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        others = [one for one in get_args(kind) if one is not type(None)]
        return _plain(others[0])[0], True
    return kind, False


def _convert(kind: Any, words: Sequence[str], is_no: bool) -> Any:
    """Words as a value; ValueError says what they must be."""
    kind, may_be_none = _plain(kind)
    if may_be_none and list(words) == ["None"]:
        return None
    if kind is bool:
        if words:
            raise ValueError("an option without a value")
        return not is_no
    if get_origin(kind) is not tuple:
        if len(words) != 1:
            raise ValueError("one value")
        return _number_or_text(kind, words[0])
    item = get_args(kind)[0]
    if get_origin(item) is not tuple:
        return [_number_or_text(item, word) for word in words]
    if len(words) % 2 or not words:
        raise ValueError("pairs of a name and a number")
    name, value = get_args(item)
    pairs = zip(words[::2], words[1::2], strict=True)
    return {_number_or_text(name, key): _number_or_text(value, one) for key, one in pairs}


def _number_or_text(kind: Any, word: str) -> Any:
    if get_origin(kind) is Literal:
        if word not in get_args(kind):
            raise ValueError(f"one of {', '.join(get_args(kind))}")
        return word
    if kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(what) from None
    return Path(word) if kind is Path else word
