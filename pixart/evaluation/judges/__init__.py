"""Who answers questions about a picture: `open_judge` opens one by its name.

checker               the exact checker of the embedded world (judges.checker)
http(s)://...#MODEL   a server that speaks OpenAI's chat completions (judges.server)
a folder or hub id    BLIP-VQA (judges.blip), or any image-text-to-text chat model (judges.chat)
"""

import re
from pathlib import Path

from pixart.evaluation.judges.judge import Judge
from pixart.evaluation.metric import Context

__all__ = ["Judge", "open_judge"]

BLIP = re.compile(r"blip-?vqa", re.IGNORECASE)


def open_judge(name: str | None, context: Context) -> Judge:
    """The judge of that name; nothing is loaded before it is asked. ValueError where there is no name."""
    if not name:
        raise ValueError(
            "judge must be named where questions are answered, got none; --judge checker for the "
            "embedded world, a folder or hub id, or http(s)://...#MODEL"
        )
    if name == "checker":
        from pixart.evaluation.judges.checker import CheckerJudge

        return CheckerJudge()
    if name.startswith(("http://", "https://")):
        from pixart.evaluation.judges.server import ServerJudge

        return ServerJudge(name)
    if _is_blip(name, context):
        from pixart.evaluation.judges.blip import BlipJudge

        return BlipJudge(name, context)
    from pixart.evaluation.judges.chat import ChatJudge

    return ChatJudge(name, context)


def _is_blip(name: str, context: Context) -> bool:
    """By what the folder says it is, or by a hub id where there is none."""
    from pixart.evaluation.needs import find_snapshot
    from pixart.files import read_json

    folder = find_snapshot(name, context)
    if folder is None:
        return bool(BLIP.search(Path(name).name))
    return "BlipForQuestionAnswering" in (
        read_json(folder / "config.json").get("architectures") or ()
    )
