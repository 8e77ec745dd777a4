"""The picture of a report in README.md: its top in a wide light window, its pictures in a narrow dark one.

python tests/builders/report_picture.py ev/shapes     # writes pixart/evaluation/report.png
"""

import sys
from pathlib import Path

from browser import start
from PIL import Image

PICTURE = Path(__file__).parent.parent.parent / "pixart" / "evaluation" / "report.png"
HEIGHT, GAP = 1000, 24
WINDOWS = ((1080, False, "body"), (390, True, "#pictures"))  # width, dark, what is on top
COLOURS = 224


def main(folder: Path) -> None:
    browser = start()
    shots = []
    for width, dark, top in WINDOWS:
        browser.show(folder / "report.html", width=width, dark=dark)
        shot = Image.open(browser.screenshot(f"readme-{width}")).convert("RGB")
        y = round(browser.evaluate(f"document.querySelector('{top}').getBoundingClientRect().top"))
        shots.append(shot.crop((0, y, width, y + HEIGHT)))
    browser.driver.quit()
    whole = Image.new("RGB", (sum(width for width, *_ in WINDOWS) + GAP, HEIGHT), (128, 132, 138))
    x = 0
    for shot in shots:
        whole.paste(shot, (x, 0))
        x += shot.width + GAP
    whole.quantize(COLOURS, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
