"""Questions about the picture of a prompt, with the answers that are right.

A prompt's line of prompts.jsonl has them as meta["questions"], or a file has them for all prompts
(`--file questions=FILE`), a line each:

    {"prompt": "00017", "id": "3", "question": "Is the cat red?", "choices": ["yes", "no"],
     "answer": "yes", "type": "attribute - color", "parents": ["1"]}

"prompt" is the id of the prompt, in a file only. choices: yes and no by default. type: what kind of thing is
asked about. parents: questions of the same prompt without whose "yes" this one makes no sense. Prompts of
the embedded world need no questions: theirs are made of what the captions state.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from pixart.evaluation.judges.question import Question, checked, parse_question
from pixart.evaluation.judges.shapes_questions import shapes_questions
from pixart.evaluation.metric import Context
from pixart.evaluation.needs import MissingError, Need
from pixart.evaluation.store.entries import Prompt
from pixart.files import MAX_INDEX, digest, parse_json, read_bounded

EMBEDDED_SET = "shapes"  # the prompt set whose captions are questions enough


class Questions:
    """Of every prompt, wherever they are. Nothing is read before it is asked for."""

    def __init__(self, context: Context) -> None:
        self._file = context.files.get("questions")
        self._known: dict[str, tuple[Question, ...]] = {}

    def needs(self) -> Sequence[Need]:
        if self._file is not None and not self._file.is_file():
            return [Need(str(self._file), "whoever wrote the questions", "--file questions=FILE")]
        return ()

    @property
    def digest(self) -> str:
        """Of the file, "" where the prompts have them: then the prompts' own digest says it."""
        if self._file is None or not self._file.is_file():
            return ""
        return digest(self._file.read_bytes())[:16]

    def of(self, prompt: Prompt) -> tuple[Question, ...]:
        """At least one. ValueError for a prompt without questions, and for wrong ones."""
        if self._file is not None:
            found = self._by_prompt.get(prompt.id)
            if not found:
                raise ValueError(f"{self._file}: must have questions for prompt {prompt.id!r}")
            return found
        if prompt.id not in self._known:
            name = f"prompt {prompt.id!r}"
            values = prompt.meta.get("questions")
            if values is None and prompt.set == EMBEDDED_SET:
                values = [asdict(one) for one in shapes_questions(prompt.prompt)]
            if not isinstance(values, list | tuple) or not values:
                raise ValueError(
                    f"{name}: must have questions in meta.questions; give them as --file questions=FILE"
                )
            try:
                questions = list(map(parse_question, values))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            self._known[prompt.id] = checked(questions, name)
        return self._known[prompt.id]

    @property
    def first_prompt(self) -> str | None:
        """The id of the prompt that the file begins with."""
        return None if self._file is None else next(iter(self._by_prompt), None)

    @cached_property
    def _by_prompt(self) -> Mapping[str, tuple[Question, ...]]:
        assert self._file is not None
        return read_questions(self._file)


def read_questions(path: Path) -> dict[str, tuple[Question, ...]]:
    """A file of questions by prompt id. ValueError with file and line for what is wrong, MissingError where
    there is no file."""
    if not path.is_file():
        raise MissingError("questions", [Need(str(path), "whoever wrote them", str(path))])
    found: dict[str, list[Question]] = {}
    for place, values in lines_of(path):
        if not isinstance(values.get("prompt"), str):
            raise ValueError(f"{place}: must have the id of a prompt as prompt, it has none")
        try:
            question = parse_question(values)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        found.setdefault(values["prompt"], []).append(question)
    return {one: checked(each, f"{path}: prompt {one!r}") for one, each in found.items()}


def lines_of(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with where it is. ValueError for what is none."""
    for number, line in enumerate(read_bounded(path, MAX_INDEX).splitlines(), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        values = parse_json(line, place, unique=True)
        if not isinstance(values, dict):
            raise ValueError(f"{place}: must be a JSON object, got a {type(values).__name__}")
        yield place, values
