"""Who is next: clients in turn, a picture each."""

from collections import deque
from dataclasses import dataclass


@dataclass
class _Ticket:
    id: str
    left: int  # pictures


_Lines = dict[str, deque[_Ticket]]  # by client; first the one whose turn it is


class Turns:
    """Orders that are not finished, by client. Not locked: its queue is.

    A turn is one picture, not one order: whoever wants sixteen holds up nobody who wants one, and the models
    stay where they are in between. A client's own orders come one after the other. Who has had a turn goes
    behind all who wait.
    """

    def __init__(self) -> None:
        self._lines: _Lines = {}
        self._is_taken = False
        self._drawn: str | None = None  # while a turn is taken, unless it was removed meanwhile

    def add(self, id: str, owner: str, pictures: int) -> None:
        self._lines.setdefault(owner, deque()).append(_Ticket(id, pictures))

    def take(self) -> str | None:
        """Begin a turn: the order that it is for, None where there is none. `give_back` ends it."""
        if not self._lines:
            return None
        self._is_taken, self._drawn = True, _first(self._lines).id
        return self._drawn

    def give_back(self) -> None:
        """The picture of this turn is drawn, or never will be."""
        _pass_on(self._lines, self._drawn)
        self._is_taken, self._drawn = False, None

    def remove(self, id: str) -> None:
        """An order that ends early. If it is drawn, its turn goes on until it is given back."""
        if id == self._drawn:
            self._drawn = None
        for number, (owner, line) in enumerate([*self._lines.items()]):
            self._lines[owner] = deque(ticket for ticket in line if ticket.id != id)
            has_turn = number == 0 and self._is_taken
            if not self._lines[owner] and not has_turn:
                del self._lines[owner]

    def positions(self) -> dict[str, int]:
        """By order, how many others come before it: those that have a turn before its next one. 0 for the
        one that is drawn."""
        lines = {
            owner: deque(_Ticket(one.id, one.left) for one in line)
            for owner, line in self._lines.items()
        }
        if self._is_taken:
            _pass_on(lines, self._drawn)
        count = sum(map(len, lines.values()))
        found: dict[str, int] = {}
        while len(found) < count:
            id = _first(lines).id
            found.setdefault(id, len(found))
            _pass_on(lines, id)
        return found if self._drawn is None else found | {self._drawn: 0}


def _first(lines: _Lines) -> _Ticket:
    return next(iter(lines.values()))[0]


def _pass_on(lines: _Lines, drawn: str | None) -> None:
    """After a picture of this order, or none: the first client goes behind all others."""
    owner = next(iter(lines))
    line = lines.pop(owner)
    if drawn is not None:
        line[0].left -= 1
        if not line[0].left:
            line.popleft()
    if line:
        lines[owner] = line
