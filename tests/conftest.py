import signal
from pathlib import Path

import pytest
from browser import ARTEFACTS

REDUCED = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--exhaustive", action="store_true", help="and those marked exhaustive")
    parser.addoption("--wheel", type=Path, help="a built wheel for the packaging tests")
    parser.addoption(
        "--golden",
        type=Path,
        default=REDUCED,
        help="folder of golden files, for instance one with whole gradients (tests/golden)",
    )


def pytest_configure() -> None:
    # A shell starts what runs in the background deaf to Ctrl-C, and nohup deaf to a terminal that is closed;
    # tests send both to their children, which a handler of Python's is not passed on to.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    kept = sorted(ARTEFACTS.glob("*.png"))
    if kept:
        terminalreporter.write_line(f"{len(kept)} screenshots of pages lie in {ARTEFACTS}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Choosing with -m, for instance `-m slow`, is as explicit as --slow.
    if config.getoption("-m"):
        return
    for item in items:
        for marker in ("slow", "exhaustive"):
            if item.get_closest_marker(marker) and not config.getoption(f"--{marker}"):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: run with --{marker}"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--golden")
        files = [file for file in sorted(folder.glob("*.safetensors")) if file.stem != "pos_embed"]
        assert files, f"no golden files in {folder}"
        metafunc.parametrize("golden_file", files, ids=lambda file: file.stem)


@pytest.fixture
def golden_folder(request: pytest.FixtureRequest) -> Path:
    return request.config.getoption("--golden")
