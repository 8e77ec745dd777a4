"""Which Host headers are ours, and which pages are."""

import pytest

from pixart.serving.guarding.hosts import Hosts


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:7860", "localhost", "localhost:7860", "LocalHost:1", "localhost.",
     "[::1]:7860", "127.0.0.9", "[::ffff:127.0.0.1]"],
)  # fmt: skip
def test_this_machine_is_known_by_its_own_names(host: str) -> None:
    assert Hosts().knows(host)


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example",
     "evil.localhost", "0.0.0.0", "0.0.0.0:7860", "[::]", "192.168.1.5", "169.254.169.254", "2130706433",
     "127.1", "0x7f.1", "localhost@evil.example", "evil.example#localhost", "localhost/evil",
     "localhost:x", "localhost:99999", "[::1", "::1]", "local host", "localhost,evil.example",
     "localhost\\evil", "lоcalhost", "localhost\x00", "%6cocalhost", ":7860", "http://localhost"],
)  # fmt: skip
def test_no_other_name_is_known(host: str) -> None:
    assert not Hosts().knows(host)


def test_further_names_are_given_and_no_more_than_these() -> None:
    hosts = Hosts("0.0.0.0", ("draw.example.org", "10.0.0.7"))
    assert hosts.knows("draw.example.org") and hosts.knows("DRAW.example.org:443")
    assert hosts.knows("10.0.0.7:80") and Hosts(names=("fe80::1",)).knows("[fe80::1]:80")
    assert not hosts.knows("example.org") and not hosts.knows("x.draw.example.org")
    assert not hosts.knows("0.0.0.0")


def test_an_address_is_ours_where_the_connection_came_in_at_it() -> None:
    hosts = Hosts("0.0.0.0")
    assert hosts.knows("192.168.1.5:7860", "192.168.1.5")
    assert hosts.knows("192.168.1.5", "::ffff:192.168.1.5")
    assert not hosts.knows("192.168.1.6:7860", "192.168.1.5")
    assert not hosts.knows("evil.example", "192.168.1.5")


def test_the_host_that_is_listened_at_is_known() -> None:
    assert Hosts("192.168.1.5").knows("192.168.1.5")
    assert Hosts("fe80::1").knows("[fe80::1]:7860") and Hosts("machine").knows("machine:7860")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "https://draw.example.org",
        "draw.example.org:80",
        "a/b",
        "a b",
        "*",
        "*.example.org",
        "0.0.0.0",
        "::",
        "[::]",
        "a\nb",
        "a;b",
    ],
)
def test_a_name_is_a_host_and_nothing_more(name: str) -> None:
    with pytest.raises(ValueError, match="^--name must be a host without scheme, port and path"):
        Hosts(names=(name,))


@pytest.mark.parametrize(
    "origin, host, is_same",
    [
        ("http://127.0.0.1:7860", "127.0.0.1:7860", True),
        ("http://LOCALHOST:7860", "localhost:7860", True),
        ("http://localhost", "localhost", True),
        ("http://localhost:80", "localhost", True),
        ("https://draw.example.org", "draw.example.org", True),
        ("https://draw.example.org", "draw.example.org:443", True),
        ("https://draw.example.org:444", "draw.example.org", False),
        ("http://127.0.0.1:7861", "127.0.0.1:7860", False),
        ("http://localhost:7860", "127.0.0.1:7860", False),
        ("http://evil.example", "127.0.0.1:7860", False),
        ("http://127.0.0.1:7860.evil.example", "127.0.0.1:7860", False),
        ("http://127.0.0.1:7860@evil.example", "127.0.0.1:7860", False),
        ("null", "127.0.0.1:7860", False),
        ("", "127.0.0.1:7860", False),
        ("file://", "127.0.0.1:7860", False),
        ("chrome-extension://127.0.0.1:7860", "127.0.0.1:7860", False),
    ],
)
def test_a_page_is_ours_by_host_and_port(origin: str, host: str, is_same: bool) -> None:
    assert Hosts().is_same_origin(origin, host) is is_same
