"""Who asks: a token's name, a browser's cookie, or whoever is on this machine."""

from starlette.requests import HTTPConnection


def owner_of(connection: HTTPConnection) -> str:
    """The client of a request that has passed the guard: what its jobs belong to. For `Depends`."""
    return str(connection.state.owner)
