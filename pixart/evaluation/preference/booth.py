"""Where votes are given: which pair a voter sees next, and what becomes of a vote. No HTTP here."""

import hashlib
import hmac
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping

from pixart.evaluation.preference.log import Log
from pixart.evaluation.preference.study import QUESTIONS, Pair, Study
from pixart.evaluation.preference.votes import (
    MAX_MS,
    MAX_ORDER,
    Standing,
    Vote,
    check_answer,
    take,
    undoing,
)

REMEMBERED = 10_000  # voters whose pair and time of showing are kept: anybody may ask for a page


class Booth:
    """Called from several threads. Everything that is lost with the process is cheap: votes are in the log
    before `vote` returns."""

    def __init__(self, study: Study, log: Log, standing: Standing, orders: dict[str, int]) -> None:
        self.study, self._log = study, log
        self._standing, self._orders = standing, orders
        self._counts = Counter(pair for _, pair in standing)
        self._shown: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._lock = threading.Lock()

    def next_pair(self, voter: str) -> Pair | None:
        """The pair with the fewest votes of those that the voter has not judged, of a prompt that the
        voter has met least; between equals the same one every time the voter asks. None when all are
        done."""
        with self._lock:
            done = self._done(voter)
            prompts = Counter(self.study.by_id[pair].prompt for pair in done)
            left = (pair for pair in self.study.pairs if pair.id not in done)
            return min(
                left,
                key=lambda pair: (
                    self._counts[pair.id],
                    prompts[pair.prompt],
                    hashlib.sha256(f"{voter} {pair.id}".encode()).digest(),
                ),
                default=None,
            )

    def show(self, voter: str, pair: Pair) -> None:
        """The voter gets to see a pair: its time runs."""
        with self._lock:
            self._shown[voter] = (pair.id, time.monotonic())
            self._shown.move_to_end(voter)
            if len(self._shown) > REMEMBERED:
                self._shown.popitem(last=False)

    def vote(self, voter: str, pair: str, answers: Mapping[str, str], agent: str) -> None:
        """Returns when the vote is on the disk. The same vote again changes nothing, another one about the
        same pair takes its place. ValueError for what is no vote, OSError if the disk refuses."""
        if pair not in self.study.by_id:
            raise ValueError("this pair is not of this study")
        for question in QUESTIONS:
            check_answer(question, answers.get(question))
        with self._lock:
            before = self._standing.get((voter, pair))
            if before and all(getattr(before, one) == answers[one] for one in QUESTIONS):
                return
            order = self._next_order(voter)
            ms = self._elapsed(voter, pair)
            vote = Vote(pair, voter, answers["quality"], answers["alignment"], ms, order, agent)
            self._append(vote.to_dict())

    def undo(self, voter: str) -> Pair | None:
        """Take the voter's last vote back; returns its pair, None if there is none."""
        with self._lock:
            done = self._done(voter)
            if not done:
                return None
            last = max(done.values(), key=lambda vote: vote.order)
            self._append(undoing(last, self._next_order(voter)))
            return self.study.by_id[last.pair]

    def done(self, voter: str) -> int:
        """How many pairs a voter has judged."""
        with self._lock:
            return len(self._done(voter))

    def tally(self) -> tuple[int, int, dict[int, int]]:
        """Votes in all, voters, and how many pairs have 0, 1, 2 ... votes."""
        with self._lock:
            voters = {voter for voter, _ in self._standing}
            spread = Counter(self._counts[pair.id] for pair in self.study.pairs)
            return len(self._standing), len(voters), dict(sorted(spread.items()))

    def close(self) -> None:
        """Waits for a vote that is being written, and takes no more."""
        self._log.close()

    def _done(self, voter: str) -> dict[str, Vote]:
        # Of one voter at most as many as pairs: short enough to look for.
        return {
            pair.id: vote
            for pair in self.study.pairs
            if (vote := self._standing.get((voter, pair.id))) is not None
        }

    def _next_order(self, voter: str) -> int:
        order = self._orders.get(voter, 0) + 1
        if order > MAX_ORDER:
            raise ValueError(f"a voter has {MAX_ORDER:,} votes at most")
        return order

    def _elapsed(self, voter: str, pair: str) -> int | None:
        shown, since = self._shown.get(voter, ("", 0.0))
        return min(MAX_MS, round((time.monotonic() - since) * 1000)) if shown == pair else None

    def _append(self, values: dict[str, object]) -> None:
        self._log.append(values)
        place = (str(values["voter"]), str(values["pair"]))
        self._counts[place[1]] -= place in self._standing
        take(self._standing, values)
        self._counts[place[1]] += place in self._standing
        self._orders[place[0]] = int(str(values["order"]))


class Passes:
    """Who a browser is: a random pass in a cookie, of which the voter's name is a digest, so that whoever
    reads the votes cannot vote as somebody else; and what shows that a form came from our page."""

    def __init__(self, secret: str) -> None:
        self._secret = bytes.fromhex(secret)

    def voter(self, ticket: str) -> str:
        return "s" + hashlib.sha256(ticket.encode()).hexdigest()[:16]

    def token(self, ticket: str) -> str:
        return hmac.digest(self._secret, b"form " + ticket.encode(), "sha256").hex()[:32]

    def is_token(self, ticket: str, token: str) -> bool:
        return hmac.compare_digest(self.token(ticket).encode(), token.encode())
