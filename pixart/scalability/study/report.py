"""The study's report: README.md from results.json and a template, and its plots."""

from collections import Counter
from pathlib import Path
from string import Template
from typing import Any

from pixart.evaluation.report.markdown import table
from pixart.evaluation.statistics.student import student_share
from pixart.files import read_json, write_bytes
from pixart.scalability.laws import Law
from pixart.scalability.pareto import Optimum
from pixart.scalability.study import fits, tables
from pixart.scalability.study.claims import CLAIMS, judged
from pixart.scalability.study.plan import BATCH, CAPTIONS, SHOWN, SIZES, UNETS
from pixart.scalability.study.store import PICTURES, RESULTS, Store, picture_name
from pixart.scalability.study.verdicts import DECIDES, Difference, Results
from pixart.shapes.caption import KINDS

TEMPLATE = Path(__file__).with_name("template.md")


def check_drawing() -> None:
    """ValueError where plots cannot be drawn: to know before hours of training."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ValueError("study needs matplotlib; pip install 'pixart-fast[train]'")


def write_report(store: Store) -> None:
    """README.md and plots of a folder, from its results.json."""
    from pixart.scalability.study.plots import draw_all

    results = read_json(store.folder / RESULTS)
    draw_all(Results(results), store.folder / "plots")
    write_bytes(store.folder / "README.md", compose(results).encode())


def compose(told: dict[str, Any]) -> str:
    """The report as Markdown."""
    results = Results(told)
    law, data_law = fits.loss_law(results), fits.data_law(results)
    parts = {
        "made": _made(told),
        "missing": _missing(told).strip(),
        "spread": _spread(results),
        "sizes": tables.sizes(results),
        "loss_law": fits.law_in_words(law, "C"),
        "loss_claim": _law_claim(law, "the loss falls as a power of compute, above a floor"),
        "kinds": tables.kinds(results),
        "accuracy_laws": _accuracy_laws(results),
        "accuracy_claim": _law_claim(
            fits.accuracy_law(results, "compute"), "statements hold more often with more compute"
        ),
        "best": _best(results),
        "shapes": tables.shapes(results),
        "data": tables.data(results),
        "data_law": fits.law_in_words(data_law, "D"),
        "data_claim": _law_claim(data_law, "the loss falls as a power of scenes, above a floor"),
        "captions": tables.captions(results),
        "caption_kinds": tables.kinds(results, (SIZES[2], *CAPTIONS)),
        "quality": tables.quality(results),
        "denoisers": tables.denoisers(results),
        "denoiser_kinds": tables.kinds(results, (SIZES[2], UNETS[0])),
        "pictures": _pictures(results),
        "seeds": tables.seeds(results),
        "batch": str(BATCH),
        "scenes": str(told["scale"]["scenes"]),
        "caption_count": str(told["scale"]["captions"]),
        "pool": f"{told['scale']['pool']:,}",
    }
    for claim in CLAIMS:
        key = f"claims_{claim.section}"
        before = f"{parts[key]}\n\n" if key in parts else ""
        parts[key] = before + judged(claim, results)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(parts)


def _made(told: dict[str, Any]) -> str:
    machine, libraries = told["machine"], told["machine"]["libraries"]
    spent = sum(run["cpu_seconds"] for run in told["runs"]) / 60
    runs = Counter(run["processor"] for run in told["runs"])
    shares = [f"{count} runs on {processor}" for processor, count in runs.most_common()]
    return (
        f"in {told['seconds'] / 60:.0f} minutes on {machine['cores']} cores, {spent:.0f} CPU-minutes of "
        f"training and measuring ({', '.join(shares)}), torch {libraries['torch']}, diffusers "
        f"{libraries['diffusers']}, {told['date']}"
    )


def _missing(told: dict[str, Any]) -> str:
    share = told["scale"]["share"]
    tried = (
        "" if share == 1 else f" **To try the command out**: {share:g} of every TFLOP was computed."
    )
    if not told["missing"]:
        return f"All {len(told['runs'])} runs were trained.{tried}"
    return tried + _absent(told["missing"])


def _absent(names: list[str]) -> str:
    return (
        f" **Not whole**: {', '.join(names)} {'has' if len(names) == 1 else 'have'} not been run."
    )


def _spread(results: Results) -> str:
    loss, accuracy = results.loss_spread(), results.accuracy_spread()
    if loss is None or accuracy is None:
        return "No run was repeated, so that no comparison of runs is decided."
    by_chance = 2 - 2 * student_share(DECIDES, loss.freedom)
    return (
        f"Between runs that differ in the seed alone the loss at the end has a standard deviation of "
        f"{loss.deviation:.1%}, the share of statements that hold one of {accuracy.deviation:.3f}, each "
        f"pooled from {loss.freedom} degrees of freedom: so few that 2 standard errors are "
        f"passed by chance in {by_chance:.0%} of comparisons without a difference, if the "
        "error of the scenes is small."
    )


def _law_claim(law: Law | None, claim: str) -> str:
    if law is None:
        return f"**Not run**: {claim}."
    if not law.identified:
        return f"**Not decided here**: {claim}: {'; '.join(law.reasons)}."
    exponent = law.parameters["b"]
    found = Difference(exponent.value, max(exponent.value - exponent.low, 0.0) / 2)
    return f"**{found.verdict}**: {claim}. b is {exponent.value:.3g} [{exponent.low:.3g}, {exponent.high:.3g}]."


def _accuracy_laws(results: Results) -> str:
    rows = []
    for kind in (None, *KINDS):
        of_compute = fits.law_in_words(fits.accuracy_law(results, "compute", kind), "C")
        of_size = fits.law_in_words(fits.accuracy_law(results, "params", kind), "N")
        rows.append([kind or "all statements", of_compute, of_size])
    return table(["", "against C in TFLOP", "against N in millions, at the end of each run"], rows)


def _best(results: Results) -> str:
    rows = []
    for level in results.told["scale"]["levels"]:
        rows.append([f"{level:g}", _optimum(fits.best_size(results, level))])
    return table(["TFLOP", "N* in parameters"], rows)


def _optimum(found: Optimum | None) -> str:
    if found is None:
        return "not run"
    if not found.identified or found.size is None:
        return f"not identified: {'; '.join(found.reasons)}"
    return fits.interval(found.size)


def _pictures(results: Results) -> str:
    names = [run.name for run in (*SIZES, UNETS[0]) if run.name in SHOWN and run.name in results]
    if not names:
        return "None was drawn."
    cells = [f"![{name}]({PICTURES}/{picture_name(name)})" for name in names]
    levels = [", ".join(results.runs[name]["levels"]) for name in names]
    return table(names, [cells, [f"rows: {level} TFLOP" for level in levels]])
