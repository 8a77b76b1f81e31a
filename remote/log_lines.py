"""The lines of model.log that mean something: vLLM's own, and those that the supervisor adds."""

READY = b"Application startup complete."
GIVING_UP = b"fleet: giving up"
ENDED = b"fleet: the model server ended"
