"""What can go wrong in a call to Vast.ai, by what is known about its effect afterwards."""

from process.errors import CloudError
from process.safe_text import safe_text


class CloudTimeout(CloudError):
    """No answer within our limit. Whatever was asked may have happened."""


class TransportError(CloudError):
    """The service was not reached, or hung up. What was asked may have happened."""


class ProtocolError(CloudError):
    """The run ended as neither a success nor an error that the CLI reports. Nothing is known."""


class ApiError(CloudError):
    """The service said no. status: of HTTP, 200 for `success: false`; msg: its words."""

    def __init__(self, text: str, status: int, msg: str) -> None:
        """Keep status and msg beside text, the whole message for a person."""
        super().__init__(text)
        self.status = status
        self.msg = msg


class CloudAuthError(ApiError):
    """The key was refused. A change was not made."""


class RateLimited(ApiError):
    """Called too often. A change was not made."""


class NoSuchInstance(ApiError):
    """The service has no instance of that id."""


class OfferGone(ApiError):
    """The offer is rented already; it may be rented by us.

    A create whose reply was lost and that is sent again gets this answer although the first one rented
    the machine (vast-contract 0.9). We send a create once, a proxy on the way may not: only the
    listing, by label, tells.
    """


def unexpected(command: str, expected: str, got: str) -> ProtocolError:
    """Return the error that names the command, what was expected and what came."""
    return ProtocolError(f"{command}: expected {expected}, got {got}")


def short(text: str) -> str:
    """Return the first line made safe, cut to 200 characters."""
    return safe_text(text[:10_000].strip().partition("\n")[0], 200)
