"""The options of `python -m pixart.scaling table|fit|study|contrast`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Table:
    """Parameters and GMACs of UNets and diffusion transformers, beside what the paper printed."""

    only: tuple[str, ...] = ()
    """Names of rows, or the beginnings of names, such as SDXL or pixart-h1536. Default all."""
    size: int = 256
    """Side of the picture in pixels that is counted for, a multiple of 64. The paper's figures are of 256."""
    measure: bool = False
    """Also the time of a forward pass and the memory it takes, on this machine, from random weights."""
    batch: tuple[int, ...] = ()
    """With --measure: pictures of a pass, once for each. Default 1 and 8."""
    dtype: tuple[Literal["fp32", "bf16"], ...] = ()
    """With --measure: of a pass, once for each. Default fp32."""
    device: str | None = None
    """With --measure: where. Default CUDA when there is one. On a CPU rows above one billion parameters are
    left out, and named."""
    json: bool = False
    """Print the rows as JSON."""


@dataclass(frozen=True)
class Fit:
    """Fit a scaling law to runs, with intervals; what the runs do not tell is called not identified."""

    file: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="FILE")] = None
    """results.json of a study, .jsonl, or .csv with a header: a line for each measurement, with the run it is
    of. Without it, --published."""
    form: tuple[str, ...] = ("a*x^-b+c",)
    """a*x^b, a*x^-b+c, or chinchilla (E + A/N^alpha + B/D^beta); several to compare."""
    x: str = "compute"
    """The column of x. A column within an object has a dot: accuracy.colour."""
    y: str = "loss"
    """The column of y."""
    run: str = "run"
    """The column of runs, which the bootstrap draws: checkpoints of one are one cluster. "" where every line
    is a run of its own."""
    n: str = "params"
    """The column of N, of chinchilla and --optimal-at."""
    d: str = "images"
    """The column of D, of chinchilla."""
    se: str | None = None
    """The column of y's standard error, by which lines are weighted."""
    maximum: float | None = None
    """Of a score, the best there can be: fit what is missing, maximum - y, which falls."""
    higher_is_better: bool = False
    """y is a score: with --pareto its front is the upper one, with --optimal-at the best N has the highest."""
    pareto: bool = False
    """Fit the Pareto front only, the hull in log-log."""
    optimal_at: tuple[float, ...] = ()
    """Also the N with the lowest y at each of these x, which then is compute."""
    plot: Path | None = None
    """An .svg or .png to draw measurements and laws into; needs matplotlib."""
    published: bool = False
    """The paper's own laws, and what their digits can say."""
    resamples: int = 1000
    """Of the bootstrap."""
    seed: int = 0
    """Of the bootstrap."""
    json: bool = False
    """Print what was found as JSON."""


@dataclass(frozen=True)
class Study:
    """Train small transformers and a small UNet on the shapes world, and say which claims hold there."""

    output: Path = Path("runs/scaling")
    """Where results.json, README.md, plots and pictures go. What is there of the same study is not trained
    again, so that a second start goes on."""
    minutes: float = 60.0
    """Of wall time. A run that is not likely to end in them is not begun, one that does not is given up, and
    both are named in the report. How much a run trains does not depend on it."""
    processes: int = 2
    """Runs at the same time, each on one thread."""
    tiny: bool = False
    """A few runs of a few steps, to try the command out."""


@dataclass(frozen=True)
class Contrast:
    """MobileDiffusion beside PixArt-Σ: what was published, what is counted here, what is measured here."""

    measure: bool = False
    """Also seconds and memory on this machine."""
    json: bool = False
    """Print the table as JSON."""


Command = (
    Annotated[Table, tyro.conf.subcommand("table")]
    | Annotated[Fit, tyro.conf.subcommand("fit")]
    | Annotated[Study, tyro.conf.subcommand("study")]
    | Annotated[Contrast, tyro.conf.subcommand("contrast")]
)
