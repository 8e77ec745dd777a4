"""`preference add`: votes that were saved from a page. What a file says is believed about its own voter only,
and only as far as it is a vote of this study."""

import re
from pathlib import Path
from typing import Any

from pixart.evaluation.preference.log import appending
from pixart.evaluation.preference.options import Add
from pixart.evaluation.preference.study import VOTES, Study, read_study
from pixart.evaluation.preference.votes import Vote, check_line, read_votes
from pixart.files import printable, read_json
from pixart.locks import occupied

FORMAT = "pixart-votes"
MAX_FILE = 2**24  # bytes
_KEYS = {"format", "version", "study", "voter", "votes"}
_VOTE_KEYS = {"pair", "quality", "alignment", "ms", "order", "agent"}


def add(options: Add) -> str:
    """Append the votes that are new; returns a sentence. ValueError names a file that is none of this
    study's, and then nothing is added, of the others neither."""
    if not options.files:
        raise ValueError("FILES must be given: what voters saved from the page")
    study = read_study(options.study)
    files = [read_saved(path, study) for path in options.files]
    new = known = 0
    with occupied(study.folder, "adds votes"), appending(study.folder / VOTES) as log:
        standing, _ = read_votes(study)
        for vote in (vote for votes in files for vote in votes):
            before = standing.get((vote.voter, vote.pair))
            # What the voter changed later has a higher number: an older file takes nothing back.
            if before is not None and vote.order <= before.order:
                known += 1
                continue
            log.append(vote.to_dict())
            standing[vote.voter, vote.pair] = vote
            new += 1
    return f"{new} votes added to {log.path}, {known} were there"


def read_saved(path: Path, study: Study) -> list[Vote]:
    """The votes of a file, in the order in which they were given. ValueError for any other file."""
    values = read_json(path, MAX_FILE)
    if set(values) != _KEYS or values["format"] != FORMAT or values["version"] != 1:
        raise ValueError(f"{path}: must be votes saved from a page of pixart.preference")
    if values["study"] != study.id:
        raise ValueError(f"{path}: must be of study {study.id}, it is of {_said(values['study'])}")
    voter, listed = values["voter"], values["votes"]
    if not isinstance(voter, str) or not re.fullmatch("p[0-9a-f]{16}", voter):
        raise ValueError(f"{path}: voter must be p and 16 hexadecimal digits, got {_said(voter)}")
    if not isinstance(listed, list) or len(listed) > len(study.pairs):
        raise ValueError(f"{path}: votes must be a list, of one vote a pair at most")
    votes = [_vote(f"{path} vote {k}", one, voter, study) for k, one in enumerate(listed, 1)]
    if len({vote.pair for vote in votes}) < len(votes):
        raise ValueError(f"{path}: votes must be of one vote a pair at most")
    if len({vote.order for vote in votes}) < len(votes):
        raise ValueError(f"{path}: votes must have an order of their own each")
    return sorted(votes, key=lambda vote: vote.order)


def _vote(place: str, values: Any, voter: str, study: Study) -> Vote:
    if not isinstance(values, dict) or set(values) != _VOTE_KEYS:
        raise ValueError(f"{place}: must have {', '.join(sorted(_VOTE_KEYS))}")
    line = {**values, "voter": voter}
    try:
        check_line(line, study)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return Vote(**line)


def _said(value: object) -> str:
    return printable(repr(value), 60)
