"""A program that makes and uses a transport before it forks; forked.py runs it in gunicorn and in Celery.

The parent reads a stream of 15 s while its children start, work and end, and writes down in PARENT_SAYS how
that ended.
"""

import json
import os
import threading
from collections.abc import Callable, Generator, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.clients.programs import FLEET, LATE_S, MODEL, QUESTION, STORY, TOOL, through_fleet

OPENAI = import_module("openai")
CLIENT = OPENAI.OpenAI(
    api_key="unused",
    base_url=f"{FLEET}/v1",
    timeout=120,
    max_retries=0,  # so that a request that is lost is seen
    http_client=through_fleet(os.environ["LOADBALANCER"]),
)


def ask(text: str = QUESTION, **more: Any) -> Any:
    return CLIENT.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}], **more)


def pieces(text: str, **more: Any) -> Generator[str]:
    for event in ask(text, stream=True, **more):
        yield from (one.delta.content for one in event.choices if one.delta.content)


def chat() -> str:
    assert ask(max_tokens=8).choices[0].message.content
    return str(os.getpid())


def stream() -> str:
    return str(len(list(pieces(QUESTION, max_tokens=8))))


def tools() -> str:
    call = ask(tools=[TOOL]).choices[0].message.tool_calls[0].function
    return str(json.loads(call.arguments)["city"])


def cancel() -> str:
    begun = pieces(STORY)
    next(begun)
    begun.close()
    return chat()


def late() -> str:
    try:
        ask(STORY, timeout=LATE_S)
    except OPENAI.APITimeoutError:
        return "late"
    return "it waited for the whole answer"


ASKED: dict[str, Callable[[], str]] = {
    "chat": chat,
    "stream": stream,
    "tools": tools,
    "cancel": cancel,
    "late": late,
}


def application(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterator[bytes]:
    """Answer what the path names (WSGI, for gunicorn); /story is a stream that takes 15 s."""
    name = environ["PATH_INFO"].strip("/")
    start_response("200 OK", [("Content-Type", "text/plain")])
    if name == "story":
        yield from (piece.encode() for piece in pieces(STORY))
    else:
        yield ASKED[name]().encode()


def celery(folder: str) -> Any:
    """Return a Celery app whose queues are files in that folder."""
    made = import_module("celery").Celery(broker="filesystem://", backend=f"file://{folder}/results")
    for name in ("queue", "control", "results"):
        (Path(folder) / name).mkdir(exist_ok=True)
    where = {"data_folder_in": f"{folder}/queue", "data_folder_out": f"{folder}/queue"}
    made.conf.broker_transport_options = {**where, "control_folder": f"{folder}/control"}
    return made


def read_a_story(begun: threading.Event) -> None:
    try:
        count = 0
        for _ in pieces(STORY):
            count += 1
            begun.set()
        said = f"{count} pieces"
    except Exception as e:  # noqa: BLE001 what goes wrong is what is asked for
        said = f"{type(e).__name__}: {e}"
    Path(os.environ["PARENT_SAYS"]).write_text(said)


if "PARENT_SAYS" in os.environ:
    app = celery(os.environ["QUEUES"])
    for task, work in ASKED.items():
        app.task(work, name=task)
    chat()
    # Forked with the first part read: before, pydantic (under openai) holds a lock while it builds classes.
    first_part = threading.Event()
    threading.Thread(target=read_a_story, args=(first_part,), daemon=True).start()
    first_part.wait(60)
