"""What the runs of the study say together: laws of loss and accuracy, and the size that does best."""

from dataclasses import asdict
from typing import Any, Literal

from pixart.evaluation.statistics.estimate import Estimate
from pixart.scalability.laws import Law, fit_power_law
from pixart.scalability.measurements import Measurement
from pixart.scalability.pareto import Optimum, compute_optimal
from pixart.scalability.study.plan import AGAIN, BATCH, DATA, SIZES, TERA
from pixart.scalability.study.verdicts import Results

FLOORED, POWER = "a*x^-b+c", "a*x^b"


def measurements(runs: dict[str, dict[str, Any]], pool: int) -> list[dict[str, Any]]:
    """What `pixart scaling fit` reads of results.json: the runs that differ in size and seed alone."""
    found = []
    for one in (*SIZES, *AGAIN):
        if run := runs.get(one.name):
            found += [asdict(_measurement(run, mark, pool)) for mark in run["marks"]]
    return found


def _measurement(run: dict[str, Any], mark: dict[str, Any], pool: int) -> Measurement:
    drawn = next((one for one in run["accuracy"] if one["step"] == mark["step"]), None)
    kinds = {} if drawn is None else {kind: a / b for kind, (a, b) in drawn["by_kind"].items()}
    return Measurement(
        run=run["name"],
        params=run["parameters"],
        compute=mark["tflop"] * TERA,
        images=mark["step"] * BATCH,
        step=mark["step"],
        loss=mark["loss"],
        scenes=run["scenes"] or pool,
        accuracy={kind: round(share, 4) for kind, share in kinds.items()},
    )


def _of_sizes(results: Results) -> list[dict[str, Any]]:
    names = {run.name for run in SIZES}
    return [one for one in results.told["measurements"] if one["run"] in names]


def loss_law(results: Results) -> Law | None:
    """Loss against compute in TFLOP on the front of all sizes; None where nothing was run."""
    points = _of_sizes(results)
    if not points:
        return None
    compute = [one["compute"] / TERA for one in points]
    loss, runs = [one["loss"] for one in points], [one["run"] for one in points]
    return fit_power_law(compute, loss, FLOORED, runs=runs, front="lower")


def accuracy_law(
    results: Results, against: Literal["compute", "params"], kind: str | None = None
) -> Law | None:
    """Share of statements of a kind that hold, None for all kinds, against "compute" in TFLOP, or against
    "params" in millions at the end of each run. Sizes of which nothing held do not count: they have no
    logarithm."""
    points = []
    for run in (results.runs[one.name] for one in SIZES if one.name in results):
        measured = run["accuracy"] if against == "compute" else run["accuracy"][-1:]
        for drawn in measured:
            counts = [of for name, of in drawn["by_kind"].items() if kind in (None, name)]
            right, of = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
            compute, params = results.mark(run, drawn["step"])["tflop"], run["parameters"] / 1e6
            if right:
                points.append(
                    (compute if against == "compute" else params, right / of, run["name"])
                )
    if not points:
        return None
    x, y, runs = zip(*points, strict=True)
    return fit_power_law(x, y, POWER, runs=runs)


def data_law(results: Results) -> Law | None:
    """The final loss against scenes."""
    runs = [results.runs[run.name] for run in DATA if run.name in results]
    runs += results.seeds(SIZES[2].name)
    if not runs:
        return None
    pool = results.told["scale"]["pool"]
    x = [run["scenes"] or pool for run in runs]
    names = [run["name"] for run in runs]
    return fit_power_law(x, [run["marks"][-1]["loss"] for run in runs], FLOORED, runs=names)


def best_size(results: Results, level: float) -> Optimum | None:
    """N* at so many TFLOP; None where no size was run."""
    points = _of_sizes(results)
    if not points:
        return None
    at = level * results.told["scale"]["share"] * TERA
    return compute_optimal(
        [one["params"] for one in points],
        [_at_level(one, at) for one in points],
        [one["loss"] for one in points],
        [one["run"] for one in points],
        at,
    )


def _at_level(point: dict[str, Any], at: float) -> float:
    """The compute of a measurement: that of the level, where no step of its run is nearer, as steps are whole.
    Many a run ends at a level that it misses by less than a step."""
    compute: float = point["compute"]
    return at if abs(compute - at) <= 0.51 * compute / point["step"] else compute


def law_in_words(law: Law | None, x: str) -> str:
    """The law with its intervals, or why it is none. x: its variable's name."""
    if law is None:
        return "not run"
    written = ", ".join(f"{name} = {interval(one)}" for name, one in law.parameters.items())
    form = law.form.replace("x", x)
    if not law.identified:
        return f"{form} is not identified: {'; '.join(law.reasons)}"
    fit = f"{form} with {written}; {law.points} points of {law.runs} runs, R² of the logs {law.r2:.3f}"
    if law.held_out is None:
        return fit
    return f"{fit}; the largest {law.held_out.points} predicted to {law.held_out.error:.0%}"


def interval(one: Estimate) -> str:
    """A number with its 95 % interval."""
    return f"{one.value:.3g} [{one.low:.3g}, {one.high:.3g}]"
