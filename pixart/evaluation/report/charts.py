"""Which figures a report has: each number by category, and what a metric of several numbers is made of."""

from collections.abc import Sequence

from pixart.evaluation.metric import Estimate
from pixart.evaluation.report.columns import metrics_of, names_of, numbers_of
from pixart.evaluation.report.figures import bars
from pixart.evaluation.report.folder import Evaluated
from pixart.evaluation.report.markup import Html

SEVERAL = 3  # numbers of a metric that a figure is worth
MOST_GROUPS = 40


def charts(folders: Sequence[Evaluated]) -> dict[str, Html]:
    """Figures by a key that is unique: "METRIC" for all of its numbers, "METRIC-by-category"."""
    series = names_of(folders)
    found: dict[str, Html] = {}
    numbers = numbers_of(folders)
    for name, metric in metrics_of(folders).items():
        own = [one for one in numbers if one.metric.name == name]
        if len(own) >= SEVERAL:
            groups = {one.name.removeprefix(f"{name}/"): one.ours for one in own[:MOST_GROUPS]}
            found[name] = bars(f"{name}: its numbers", groups, series, metric.unit)
        groups = by_category(folders, name, metric.main)
        if groups:
            title = f"{metric.main} by category"
            told = {group: metric.paper.get(f"{group}/{metric.main}") for group in groups}
            paper = {group: one.value for group, one in told.items() if one is not None}
            found[f"{name}-by-category"] = bars(title, groups, series, metric.unit, paper)
    return found


def by_category(
    folders: Sequence[Evaluated], metric: str, number: str
) -> dict[str, tuple[Estimate | None, ...]]:
    """A number of each category, of each folder."""
    categories = [
        one.metrics[metric].categories if metric in one.metrics else {} for one in folders
    ]
    names = list(dict.fromkeys(name for one in categories for name in one))[:MOST_GROUPS]
    rows = {name: tuple(one.get(name, {}).get(number) for one in categories) for name in names}
    return {name: row for name, row in rows.items() if any(one is not None for one in row)}
