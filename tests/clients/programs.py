"""One client library, tried: `programs.py NAME BASE_URL [LOADBALANCER]`, in the environment .venv-clients.

Prints one JSON object: check -> "" when it works, else what went wrong; "-" where the library has no such.
With a loadbalancer the library goes through fleet_client instead of the gateway.
"""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, NoReturn

MODEL, QUESTION = "vllm-13", "Hello"
STORY = "Count to 168."
"""A prompt whose answer has 1,155 tokens on the paced engine, some 15 s: to be cancelled and to be late."""

AT_ONCE = 16
LATE_S = 0.5
"""Seconds for which the check of timeouts waits for an answer that takes 15."""

PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Name of the city"}},
    "required": ["city"],
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather of a city", "parameters": PLACE},
}

Check = Callable[[], object] | None

KEY = os.environ.get("OPENAI_API_KEY", "unused")
FLEET = "http://fleet"
"""The address for programs that go through fleet_client; nothing looks it up."""


def wrong(message: str) -> NoReturn:
    raise AssertionError(message)


def named_late(call: Callable[[], object]) -> None:
    """Check that the call ends by itself, soon, and with an error that says so."""
    begun = time.monotonic()
    try:
        call()
    except Exception as e:  # noqa: BLE001 every library has its own
        names = " ".join(f"{type(one).__name__} {one}" for one in (e, e.__cause__, e.__context__)).lower()
        if "time" not in names:
            wrong(f"not a timeout: {names:.150}")
    else:
        wrong("it waited for the whole answer")
    if time.monotonic() - begun > 8.0:
        wrong(f"only after {time.monotonic() - begun:.1f} s")


def at_once(call: Callable[[], object]) -> None:
    """Check that so many calls at once all have an answer."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        if not all(pool.map(lambda _: call(), range(AT_ONCE))):
            wrong("an answer was empty")


def through_fleet(lb: str) -> Any:
    """Return an HTTP client of the transport."""
    return import_module("httpx2").Client(transport=import_module("fleet_client").FleetTransport(lb))


def some(pieces: list[Any]) -> None:
    if len(pieces) < 2:
        wrong(f"{len(pieces)} pieces")


def openai(base: str, lb: str | None) -> dict[str, Check]:
    library = import_module("openai")
    more: dict[str, Any] = {"api_key": KEY, "base_url": base, "max_retries": 2, "timeout": 120}
    if lb:
        more |= {"base_url": f"{FLEET}/v1", "http_client": through_fleet(lb)}
    client = library.OpenAI(**more)
    chats = client.chat.completions

    def ask(text: str = QUESTION, **more: Any) -> Any:
        return chats.create(model=MODEL, messages=[{"role": "user", "content": text}], **more)

    def chat() -> object:
        return ask(max_tokens=8).choices[0].message.content or wrong("no text")

    def tools() -> None:
        call = ask(tools=[TOOL]).choices[0].message.tool_calls[0].function
        json.loads(call.arguments)["city"]
        stream = ask(tools=[TOOL], tool_choice="required", stream=True)
        some([c for event in stream for one in event.choices for c in one.delta.tool_calls or ()])

    def cancel() -> object:
        begun = time.monotonic()
        stream = ask(STORY, stream=True)
        next(iter(stream))
        if time.monotonic() - begun > 8.0:
            wrong("the stream was held back")
        stream.close()
        return chat()

    return {
        "chat": chat,
        "stream": lambda: some(list(ask(max_tokens=8, stream=True))),
        "tools": tools,
        "cancel": cancel,
        "timeout": lambda: named_late(
            lambda: client.with_options(timeout=LATE_S, max_retries=0).chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": STORY}]
            )
        ),
        "16 at once": lambda: at_once(chat),
    }


def anthropic(base: str, lb: str | None) -> dict[str, Check]:
    library = import_module("anthropic")
    given: dict[str, Any] = {"api_key": KEY, "base_url": base.removesuffix("/v1"), "timeout": 120}
    if lb:
        given |= {"base_url": FLEET, "http_client": through_fleet(lb)}
    client = library.Anthropic(**given)
    messages = [{"role": "user", "content": QUESTION}]

    def ask(**more: Any) -> Any:
        return client.messages.create(**{"model": MODEL, "max_tokens": 8, "messages": messages, **more})

    def chat() -> object:
        return ask().content[0].text

    def stream(**more: Any) -> Any:
        return client.messages.stream(**{"model": MODEL, "max_tokens": 8, "messages": messages, **more})

    def streamed() -> None:
        with stream() as events:
            some(list(events.text_stream))

    def tools() -> None:
        tool = {"name": "weather", "description": "Weather of a city", "input_schema": PLACE}
        block = ask(max_tokens=200, tools=[tool]).content[0]
        block.input["city"]
        with stream(max_tokens=200, tools=[tool]) as events:
            events.get_final_message().content[0].input["city"]

    def cancel() -> object:
        with stream(max_tokens=1500, messages=[{"role": "user", "content": STORY}]) as events:
            next(iter(events))
        return chat()

    late = client.with_options(timeout=LATE_S, max_retries=0)
    story = {"model": MODEL, "max_tokens": 1500, "messages": [{"role": "user", "content": STORY}]}
    return {
        "chat": chat,
        "stream": streamed,
        "tools": tools,
        "cancel": cancel,
        "timeout": lambda: named_late(lambda: late.messages.create(**story)),
        "16 at once": lambda: at_once(chat),
    }


def langchain(base: str, lb: str | None) -> dict[str, Check]:
    library = import_module("langchain_openai")
    given: dict[str, Any] = {
        "model": MODEL,
        "api_key": KEY,
        "base_url": base,
        "timeout": 120,
        "max_retries": 2,
    }
    if lb:
        given |= {"base_url": f"{FLEET}/v1", "http_client": through_fleet(lb)}
    model = library.ChatOpenAI(**given, max_tokens=8)
    long = library.ChatOpenAI(**given)

    def chat() -> object:
        return model.invoke(QUESTION).content or wrong("no text")

    def cancel() -> object:
        pieces = long.stream(STORY)
        next(pieces)
        pieces.close()
        return chat()

    late = library.ChatOpenAI(**given | {"timeout": LATE_S, "max_retries": 0})
    return {
        "chat": chat,
        "stream": lambda: some(list(model.stream(QUESTION))),
        "tools": lambda: long.bind_tools([TOOL]).invoke(QUESTION).tool_calls[0]["args"]["city"],
        "cancel": cancel,
        "timeout": lambda: named_late(lambda: late.invoke(STORY)),
        "16 at once": lambda: at_once(chat),
    }


def llamaindex(base: str, lb: str | None) -> dict[str, Check]:
    library = import_module("llama_index.llms.openai_like")
    tools_of = import_module("llama_index.core.tools")
    given: dict[str, Any] = {"model": MODEL, "api_base": base, "api_key": KEY, "is_chat_model": True}
    given |= {"context_window": 4096, "timeout": 120.0, "max_retries": 2, "is_function_calling_model": True}
    if lb:
        given |= {"api_base": f"{FLEET}/v1", "http_client": through_fleet(lb)}
    model = library.OpenAILike(**given, max_tokens=8)
    long = library.OpenAILike(**given)

    def weather(city: str) -> str:
        """Weather of a city."""
        return city

    def chat() -> object:
        return model.complete(QUESTION).text or wrong("no text")

    def tools() -> None:
        answer = long.chat_with_tools([tools_of.FunctionTool.from_defaults(weather)], user_msg=QUESTION)
        long.get_tool_calls_from_response(answer)[0].tool_kwargs["city"]

    def cancel() -> object:
        pieces = long.stream_complete(STORY)
        next(pieces)
        pieces.close()
        return chat()

    late = library.OpenAILike(**given | {"timeout": LATE_S, "max_retries": 0})
    return {
        "chat": chat,
        "stream": lambda: some(list(model.stream_complete(QUESTION))),
        "tools": tools,
        "cancel": cancel,
        "timeout": lambda: named_late(lambda: late.complete(STORY)),
        "16 at once": lambda: at_once(chat),
    }


def litellm(base: str, lb: str | None) -> dict[str, Check]:
    library: Any = import_module("litellm")
    if lb:
        base, library.client_session = f"{FLEET}/v1", through_fleet(lb)

    def ask(text: str = QUESTION, **more: Any) -> Any:
        given = {
            "model": f"openai/{MODEL}",
            "api_base": base,
            "api_key": KEY,
            "timeout": 120,
            "num_retries": 0,
        }
        return library.completion(**{**given, "messages": [{"role": "user", "content": text}], **more})

    def chat() -> object:
        return ask(max_tokens=8).choices[0].message.content or wrong("no text")

    def cancel() -> object:
        next(iter(ask(STORY, stream=True)))
        return chat()

    return {
        "chat": chat,
        "stream": lambda: some(list(ask(max_tokens=8, stream=True))),
        "tools": lambda: json.loads(ask(tools=[TOOL]).choices[0].message.tool_calls[0].function.arguments)[
            "city"
        ],
        "cancel": cancel,
        "timeout": lambda: named_late(lambda: ask(STORY, timeout=LATE_S)),
        "16 at once": lambda: at_once(chat),
    }


def instructor(base: str, lb: str | None) -> dict[str, Check]:
    library, pydantic = import_module("instructor"), import_module("pydantic")
    given: dict[str, Any] = {"api_key": KEY, "base_url": base, "timeout": 120}
    if lb:
        given |= {"base_url": f"{FLEET}/v1", "http_client": through_fleet(lb)}
    client = import_module("openai").OpenAI(**given)
    place = pydantic.create_model("Place", city=(str, ...), days=(int, ...))
    messages = [{"role": "user", "content": QUESTION}]

    def extract(mode: Any = None, **more: Any) -> Any:
        wrapped = library.from_openai(client, mode=mode or library.Mode.TOOLS)
        return wrapped.chat.completions.create(model=MODEL, response_model=place, messages=messages, **more)

    def parts() -> Any:
        wrapped = library.from_openai(client, mode=library.Mode.TOOLS)
        return wrapped.chat.completions.create_partial(model=MODEL, response_model=place, messages=messages)

    return {
        "chat": lambda: extract(library.Mode.JSON_SCHEMA).city,
        "stream": lambda: some(list(parts())),
        "tools": lambda: extract().city,
        "cancel": None,  # it reads the whole stream before it gives a part of it
        "timeout": lambda: named_late(lambda: extract(timeout=0.001, max_retries=0)),
        "16 at once": lambda: at_once(lambda: extract().city),
    }


def pydantic_ai(base: str, lb: str | None) -> dict[str, Check]:
    library = import_module("pydantic_ai")
    models, providers = (
        import_module("pydantic_ai.models.openai"),
        import_module("pydantic_ai.providers.openai"),
    )
    seen: list[str] = []

    def weather(city: str) -> str:
        """Weather of a city."""
        seen.append(city)
        return city

    def agent(**more: Any) -> Any:
        given: dict[str, Any] = {"base_url": base, "api_key": KEY, "timeout": 120, "max_retries": 2}
        if lb:
            transport = import_module("fleet_client").AsyncFleetTransport(lb)
            given |= {
                "base_url": f"{FLEET}/v1",
                "http_client": import_module("httpx2").AsyncClient(transport=transport),
            }
        client = import_module("openai").AsyncOpenAI(**given)
        provider = providers.OpenAIProvider(openai_client=client)
        return library.Agent(models.OpenAIChatModel(MODEL, provider=provider), **more)

    def chat() -> object:
        return agent(model_settings={"max_tokens": 8}).run_sync(QUESTION).output

    def tools() -> None:
        agent(tools=[weather]).run_sync(QUESTION)
        if not seen:
            wrong("the tool was not called")

    async def streamed() -> None:
        async with agent(model_settings={"max_tokens": 8}).run_stream(QUESTION) as answer:
            some([piece async for piece in answer.stream_text(delta=True, debounce_by=None)])

    async def begun() -> None:
        async with agent().run_stream(STORY) as answer:
            await anext(answer.stream_text(delta=True))

    async def many() -> None:
        one = agent(model_settings={"max_tokens": 8})
        await asyncio.gather(*(one.run(QUESTION) for _ in range(AT_ONCE)))

    def cancel() -> object:
        asyncio.run(begun())
        return chat()

    settings = {"timeout": LATE_S}
    return {
        "chat": chat,
        "stream": lambda: asyncio.run(streamed()),
        "tools": tools,
        "cancel": cancel,
        "timeout": lambda: named_late(lambda: agent(model_settings=settings).run_sync(STORY)),
        "16 at once": lambda: asyncio.run(many()),
    }


CLIENTS = {
    "openai": openai,
    "anthropic": anthropic,
    "langchain-openai": langchain,
    "llama-index": llamaindex,
    "litellm": litellm,
    "instructor": instructor,
    "pydantic-ai": pydantic_ai,
}


def main(name: str, base: str, lb: str | None = None) -> None:
    """Try one library and print what works."""
    found = {}
    for check, call in CLIENTS[name](base, lb).items():
        try:
            if call is None:
                found[check] = "-"
                continue
            call()
            found[check] = ""
        except (Exception, asyncio.CancelledError) as e:  # noqa: BLE001 what goes wrong is asked for
            found[check] = f"{type(e).__name__}: {e}".replace("\n", " ")[:200]
    print(json.dumps(found), flush=True)
    if threading.active_count() > 1:
        os._exit(0)  # a library's own thread may wait for ever


if __name__ == "__main__":
    main(*sys.argv[1:])
