"""`preference judge`: a model looks at every pair, in both orders. What it said is kept and not asked again."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING

from pixart.evaluation.preference.judgements import (
    MOST_FLIPS,
    ORDERS,
    Judgement,
    read_judgements,
    verdicts,
)
from pixart.evaluation.preference.judges import CheckerOfPairs, EndpointOfPairs, JudgeOfPairs
from pixart.evaluation.preference.log import appending
from pixart.evaluation.preference.options import Judge
from pixart.evaluation.preference.study import (
    JUDGEMENTS,
    Pair,
    Study,
    check_pictures,
    read_study,
)
from pixart.pictures import open_rgb
from pixart.progress import Bar

if TYPE_CHECKING:
    from PIL.Image import Image

Task = tuple[Pair, str, str]  # with the order, and the digest of what is asked

MOST_WORKERS, MOST_TOKENS = 256, 1_000_000


def judge(options: Judge) -> str:
    """Judge what has not been; returns a sentence with the share of flips. RuntimeError at the end if some
    could not be judged: the same command tries them again."""
    study = read_study(options.study)
    check_pictures(study)
    judge = open_judge(options)
    faults = []
    with appending(study.folder / JUDGEMENTS) as log:
        tasks = list(_tasks(study, judge))
        with Bar("judge", len(tasks)) as bar:
            for result in _results(tasks, lambda task: _one(study, judge, task), judge.workers):
                if isinstance(result, Judgement):
                    log.append(result.to_dict())
                else:
                    faults.append(result)
                bar.advance()
    if faults:
        raise RuntimeError(
            f"{len(faults)} of {len(tasks)} judgements failed, the others are kept; the same command tries "
            f"them again (first: {faults[0]})"
        )
    return summary(study, judge.id, len(tasks))


def _tasks(study: Study, judge: JudgeOfPairs) -> Iterator[Task]:
    """What has not been judged yet, by this judge and in these words."""
    known = {(one.pair, one.order, one.model, one.prompt) for one in read_judgements(study)}
    for pair in study.pairs:
        digest = hashlib.sha256(judge.asked(pair.prompt).encode()).hexdigest()[:16]
        for order in ORDERS:
            if (pair.id, order, judge.id, digest) not in known:
                yield pair, order, digest


def open_judge(options: Judge) -> JudgeOfPairs:
    """By the options. ValueError for none, or for several."""
    for name, most in (("workers", MOST_WORKERS), ("max_tokens", MOST_TOKENS)):
        if not 1 <= (given := getattr(options, name)) <= most:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be from 1 to {most:,}, got {given:,}")
    if options.judge is not None:
        if options.model is not None or options.endpoint is not None:
            raise ValueError("--judge stands alone, got --model or --endpoint with it")
        return CheckerOfPairs()
    if options.model is None:
        raise ValueError("--model must be given, or --judge checker")
    if options.endpoint is not None:
        key = os.environ.get("OPENAI_API_KEY")
        return EndpointOfPairs(
            options.endpoint, options.model, key, options.max_tokens, options.workers
        )
    from pixart.evaluation.preference.local_judge import open_local

    return open_local(options)


def summary(study: Study, model: str, new: int) -> str:
    """What a judge has said so far, and whether it can be used."""
    found = [one for one in verdicts(read_judgements(study)) if one.model == model]
    flips = ", ".join(
        f"{one.question} {100 * one.flip_rate:.0f} %{'' if one.is_usable else ' (unusable)'}"
        for one in found
    )
    line = (
        f"{model}: {new} new judgements, {len(found[0].sides)} of {len(study.pairs)} pairs in both orders; "
        f"the other order gives another answer: {flips}"
    )
    if all(one.is_usable for one in found):
        return line
    return f"{line}. More than {100 * MOST_FLIPS:.0f} %: it judges the place and not the picture"


def _one(study: Study, judge: JudgeOfPairs, task: Task) -> Judgement | str:
    """The judgement, or why there is none."""
    pair, order, digest = task
    left, right = (_opened(study, name) for name in (pair.left, pair.right))
    first, second = (left, right) if order == "left-first" else (right, left)
    try:
        verdict = judge.compare(pair.prompt, first, second)
    except ValueError as error:
        return f"pair {pair.id}, {order}: {error}"
    return Judgement(pair.id, order, judge.id, digest, **verdict)


def _opened(study: Study, name: str) -> "Image":
    path = study.picture(name)
    return open_rgb(path, str(path))


def _results(
    tasks: list[Task], work: Callable[[Task], Judgement | str], workers: int
) -> Iterator[Judgement | str]:
    """As they come. What ends one ends all, and waits for no request that is under way."""
    if workers == 1:  # a model of this process
        yield from map(work, tasks)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        waiting = [pool.submit(work, task) for task in tasks]
        for done in as_completed(waiting):
            yield done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
