"""The lines of model.log that mean something: vLLM's own, and those that we add."""

ANSWERS = b"fleet: the model server answers"
"""Added when the model server answers and no line of its own has said so: versions word it differently."""

READY = b"Application startup complete."
"""uvicorn's, under vLLM 0.11 to 0.33."""

READY_LINES = (READY, ANSWERS)

GIVING_UP = b"fleet: giving up"
ENDED = b"fleet: the model server ended"

NO_INTERNET = "no internet on this machine"

LASTING = (
    # Not mended by another start. First those of the machine, then those of what was ordered.
    (b"forward compatibility was attempted on non supported HW", "its driver is too old for the image"),
    (b"NVIDIA driver on your system is too old", "its driver is too old for the image"),
    (b"CUDA driver version is insufficient", "its driver is too old for the image"),
    (b"No CUDA GPUs are available", "no GPU in the container"),
    (b"no CUDA-capable device is detected", "no GPU in the container"),
    (b"Found no NVIDIA driver on your system", "no GPU in the container"),
    (b"Failed to infer device type", "no GPU in the container"),
    (b"No space left on device", "No space left on device"),
    (b"You are trying to access a gated repo", "You are trying to access a gated repo"),
    (b"must have access to it and be authenticated", "You are trying to access a gated repo"),
    (b"not in the authorized list", "You are trying to access a gated repo"),
    (b"Invalid credentials in Authorization header", "Invalid credentials in Authorization header"),
    (b"is not a valid model identifier", "is not a valid model identifier"),
    (b"RepositoryNotFoundError", "is not a valid model identifier: RepositoryNotFoundError"),
    (b"does not recognize this architecture", "vLLM does not recognize this architecture"),
    (b"Value error, Model architectures", "vLLM has no such Model architectures"),
    (b"The supplied chat template", "The supplied chat template cannot be read"),
    (b"error: unrecognized arguments", "error: unrecognized arguments of vLLM"),
    (b"error: argument ", "error: argument of vLLM with a wrong value"),
)
"""Pairs (what a log says, our words for it), which count at the first death of a model server."""

NETWORK = (
    b"Temporary failure in name resolution",
    b"Name or service not known",
    b"Network is unreachable",
    b"We couldn't connect to",
    b"Failed to establish a new connection",
    b"LocalEntryNotFoundError",
)
"""What is logged when the hub cannot be reached; an outage may be over soon."""

_LOOK_BYTES = 2**20
"""Of the end of a log, in which the reason of a death stands."""


def has_ready_line(path: str) -> bool:
    """Return whether a log has a ready line; False for a file that somebody removed."""
    try:
        with open(path, "rb") as log:
            return any(ready in line for line in log for ready in READY_LINES)
    except OSError:
        return False


def read_end(path: str) -> bytes:
    """Return the end of a log; nothing of a file that somebody removed."""
    try:
        with open(path, "rb") as log:
            log.seek(0, 2)
            log.seek(max(0, log.tell() - _LOOK_BYTES))
            return log.read()
    except OSError:
        return b""


def cause_of_death(log: bytes) -> tuple[str, bool]:
    """Return the reason that a model server's log has for its end, in our words, and whether it lasts.

    ("", False) where it has none that is known. Nothing of the log itself is repeated: it may quote requests.
    """
    for text, why in LASTING:
        if text in log:
            return why, True
    return (NO_INTERNET if any(text in log for text in NETWORK) else ""), False
