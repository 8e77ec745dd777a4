"""A voter without a browser: what urllib sends to a server of a study."""

import http.client
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlencode

from pixart.evaluation.preference.booth import Booth, Passes
from pixart.evaluation.preference.log import appending
from pixart.evaluation.preference.options import Serve
from pixart.evaluation.preference.server import Server
from pixart.evaluation.preference.study import VOTES, Key, Study
from pixart.evaluation.preference.votes import read_votes


@contextmanager
def served(study: Study, key: Key, **options: object) -> Iterator[Server]:
    """A server of the study on a free port, in a thread."""
    with appending(study.folder / VOTES) as log:
        booth = Booth(study, log, *read_votes(study))
        settings = Serve(study.folder, port=0, **options)  # type: ignore[arg-type]
        with Server(settings, booth, Passes(key.secret)) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield server
            server.shutdown()


class Voter:
    """Keeps the cookie of one browser. headers: what is sent with everything, Host too."""

    def __init__(self, server: Server, **headers: str) -> None:
        self.port = int(server.server_address[1])
        self.headers = headers
        self.cookie = ""

    def ask(
        self, method: str, path: str, body: str | bytes | None = None, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, str]:
        """Status, headers and text of an answer; no redirect is followed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {
            **self.headers,
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        if self.cookie:
            sent.setdefault("Cookie", self.cookie)
        connection.request(method, path, body, sent)
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
        if given := answer.headers.get("Set-Cookie"):
            self.cookie = given.partition(";")[0]
        connection.close()
        return answer.status, answer.headers, text

    def get(self, path: str, **headers: str) -> str:
        """The text of a page that must be there."""
        status, _, text = self.ask("GET", path, **headers)
        assert status == 200, (status, text)
        return text

    def post(self, path: str, **headers: str | dict[str, str]) -> tuple[int, str]:
        """Status and text, or the place where it leads. fields: of the form."""
        fields = headers.pop("fields")
        sent = {"Content_Type": "application/x-www-form-urlencoded", **headers}
        status, answer, text = self.ask("POST", path, urlencode(fields), **sent)  # type: ignore[arg-type]
        return status, answer.get("Location", text)

    def begin(self) -> dict[str, str]:
        """Take a cookie if there is none; the hidden fields of the pair that is shown."""
        if not self.cookie:
            self.get("/")
        return hidden(self.get("/vote"))

    def vote(self, quality: str = "left", alignment: str = "right") -> str:
        """Vote on the pair that is shown; returns it."""
        fields = self.begin() | {"quality": quality, "alignment": alignment}
        assert self.post("/vote", fields=fields) == (303, "/vote")
        return fields["pair"]


def hidden(text: str) -> dict[str, str]:
    """The hidden fields of the form for votes."""
    form = text.partition('id="ballot"')[2].partition("</form>")[0]
    return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form))
