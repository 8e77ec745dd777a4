"""A process that draws with a model and says how long that takes: a question as JSON on standard input, the
answer on standard output.

    echo '{"model": "shapes"}' | python -m pixart.scalability.one_picture
"""

import json
import statistics
import sys
from typing import Any

from pixart.device import choose_device
from pixart.files import parse_json
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.scalability.meter import Meter

# One each, as what was read once is not read again. The first is not counted: it sets libraries up.
PROMPTS = tuple(f"a large {colour} circle on white" for colour in ("black", "red", "green", "blue"))
STAGES = ("text", "denoise", "decode")


def main() -> None:
    question = parse_json(sys.stdin.read(), "the question")
    meter = Meter(choose_device(None))
    pipe = Pipeline.from_pretrained(question["model"], cache_dir=None)
    kept = [pipe.draw(Request(prompt)) for prompt in PROMPTS][1:]
    request = kept[0].request
    answer: dict[str, Any] = {
        "size": list(kept[0].image.size),
        "steps": request.steps,
        "guidance": request.guidance,
        "pictures": len(kept),
        "seconds": {
            stage: statistics.median(one.seconds.get(stage, 0.0) for one in kept)
            for stage in STAGES
        },
        "peak_bytes": meter.peak(),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
