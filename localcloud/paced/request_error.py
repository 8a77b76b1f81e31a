"""A refusal in vLLM's shape."""

from typing import Any


class RequestError(Exception):
    """A request that the engine refuses, answered in vLLM's shape; param: the wrong field, if it is one."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, kind: str = "BadRequestError"
    ) -> None:
        """Make a refusal with a message for the client; the default is that of a bad request."""
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param

    @property
    def said(self) -> dict[str, Any]:
        """The body of the error answer, as vLLM writes it."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}
        return {"error": error}
