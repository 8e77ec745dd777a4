"""The picture of the service's page in its guides: a wide light window, and a narrow dark one.

python tests/builders/page_picture.py     # writes pixart/assets/pictures/page.png
"""

from pathlib import Path

from browser import start
from page_visitor import Visitor
from PIL import Image
from serving import running_service

from pixart.serving.drawing.painter import PipelinePainter
from pixart.serving.options import Options
from pixart.serving.service import Offer

PICTURE = Path(__file__).parent.parent.parent / "pixart" / "assets" / "pictures" / "page.png"
PROMPT = "a large red circle on the left and a small blue star on the right on white"
WIDTH, NARROW, HEIGHT, GAP = 1280, 390, 900, 24
COLOURS = 128


def main() -> None:
    painter = PipelinePainter.open(Options(), {}, {})
    offer = Offer("shapes", painter.native, painter.multiple)
    browser = start()
    with running_service(painter, offer=offer, ui=True) as running:
        visitor = Visitor(browser, running.url, width=WIDTH, height=HEIGHT)
        visitor.write("prompt", PROMPT)
        visitor.write("seed", "4")
        visitor.draw()
        shown = "document.querySelector('#now img.picture')?.naturalWidth"
        shots = []
        for width, dark in ((WIDTH, False), (NARROW, True)):
            browser.look(width=width, height=HEIGHT, dark=dark)
            visitor.wait(lambda: browser.evaluate(shown) == painter.native)
            shot = Image.open(browser.screenshot(f"readme-page-{width}")).convert("RGB")
            shots.append(shot.crop((0, 0, width, HEIGHT)))
    browser.driver.quit()
    whole = Image.new("RGB", (WIDTH + GAP + NARROW, HEIGHT), (128, 132, 138))
    whole.paste(shots[0], (0, 0))
    whole.paste(shots[1], (WIDTH + GAP, 0))
    whole.quantize(COLOURS, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
