"""The likelihood of an answer, given a language model's numbers for its tokens.

An answer's likelihood is the product over its tokens, not their mean: a mean over tokens makes long answers
with a predictable end ("a fire hydrant") look better than short ones. The products of several answers can
be compared as long as no answer is the beginning of another ("red" and "red and blue"): then the end
of the answer belongs to it too.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def needs_end(answers: Sequence[Sequence[int]]) -> bool:
    """Whether one of the answers, in tokens, is the beginning of another. ValueError for two that are equal."""
    rows = sorted(map(tuple, answers))
    if len(set(rows)) < len(rows):
        raise ValueError(
            "choices must differ in the judge's own vocabulary, two are the same to it"
        )
    # What begins with a row follows it in the order of rows.
    return any(b[: len(a)] == a for a, b in zip(rows, rows[1:], strict=False))


def sequence_likelihood(logits: "Tensor", tokens: Sequence[int], ends: Sequence[int] = ()) -> float:
    """The probability of tokens, of which each follows those before it. logits: (tokens, vocabulary), row k
    the numbers for token k. ends: with them there is one more row, and any of them has to follow."""
    import torch

    logs = torch.log_softmax(logits.double(), -1)
    total = sum(logs[place, token] for place, token in enumerate(tokens))
    if ends:
        total = total + torch.logsumexp(logs[len(tokens), list(ends)], 0)
    return float(torch.as_tensor(total).exp())
