"""What can go wrong in a call to Vast.ai; each error says whether the call may have had its effect."""

from process.errors import CloudError
from process.safe_text import safe_text


class CloudTimeout(CloudError):
    """The service gave no answer within our time limit. What was asked may have happened."""


class TransportError(CloudError):
    """The service was not reached, or hung up. What was asked may have happened."""


class ProtocolError(CloudError):
    """A run of the vastai command ended as neither a success nor a reported error.

    Nothing is known of its effect.
    """


class ApiError(CloudError):
    """The service refused. status: of HTTP, 200 for `success: false`; msg: the service's words."""

    def __init__(self, text: str, status: int, msg: str) -> None:
        """Make the error with a message for a person, and the service's HTTP status and own words."""
        super().__init__(text)
        self.status = status
        self.msg = msg


class CloudAuthError(ApiError):
    """The service refused the API key. A change was not made."""


class RateLimited(ApiError):
    """The service was called too often. A change was not made."""


class NoSuchInstance(ApiError):
    """The service has no instance of that id."""


class OfferGone(ApiError):
    """The offer is rented already; it may be rented by us.

    A create whose reply was lost and that is sent again gets this answer although the first one rented
    the machine (vast-contract 0.9). We send a create once, a proxy on the way may not: only the
    listing, by label, tells.
    """


def unexpected(command: str, expected: str, got: str) -> ProtocolError:
    """Return an error that names the command, what was expected and what came."""
    return ProtocolError(f"{command}: expected {expected}, got {got}")


def short(text: str) -> str:
    """Return the first line of a text made safe for a message, cut to 200 characters."""
    return safe_text(text[:10_000].strip().partition("\n")[0], 200)
