"""`preference fit`: what people and judges prefer, how strong each model is, and whether they agree.

    fit.json  README.md  report.html  plots/preference.svg  plots/preference.png

All of it is decided by the study, its votes and judgements, and the options: the same again, bit for bit.
"""

import json

from pixart.evaluation.preference.figure import check_matplotlib, draw_figure
from pixart.evaluation.preference.options import Fit
from pixart.evaluation.preference.outcome import gather
from pixart.evaluation.preference.report import as_dict, as_html, as_markdown, as_text
from pixart.evaluation.preference.study import read_key, read_study
from pixart.files import check_writable, write_bytes, write_json


def fit(options: Fit) -> str:
    """Write the results; returns them in words. ValueError where nobody has voted or judged, or models that
    were compared are not connected."""
    study = read_study(options.study)
    if options.figure:
        check_matplotlib()
    check_writable(study.folder / "fit.json")
    results = gather(study, read_key(study), options)
    values = as_dict(results, options)
    if options.figure:
        draw_figure(results, study.folder / "plots")
    write_bytes(study.folder / "README.md", as_markdown(results, options).encode())
    write_bytes(study.folder / "report.html", as_html(results, options).encode())
    write_json(study.folder / "fit.json", values, indent=1)
    return (
        json.dumps(values, indent=1, ensure_ascii=False)
        if options.json
        else as_text(results, options)
    )
