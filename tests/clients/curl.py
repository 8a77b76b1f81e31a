"""curl, tried: `curl.py BASE_URL [FLAG…]`. Prints one JSON object, as programs.py does."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

STORY = "Count to 168."
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PLACE}}


def main(base: str, *flags: str) -> None:
    """Try curl with those flags and print what works."""

    def ask(text: str = "Hello", *more: str, **fields: Any) -> str:
        said = {"model": "vllm-13", "messages": [{"role": "user", "content": text}], **fields}
        command = ["curl", "-sS", "--fail-with-body", *flags, *more, f"{base}/chat/completions", "-d", "@-"]
        command += ["-H", "Content-Type: application/json"]
        ran = subprocess.run(command, input=json.dumps(said), capture_output=True, text=True, check=False)
        if ran.returncode:
            raise ChildProcessError(f"exit status {ran.returncode}: {ran.stderr}{ran.stdout}")
        return ran.stdout

    def chat() -> object:
        return json.loads(ask(max_tokens=8))["choices"][0]["message"]["content"]

    def stream() -> None:
        assert ask(max_tokens=8, stream=True).count("data: {") == 9
        assert ask(max_tokens=8, stream=True).endswith("data: [DONE]\n\n")

    def tools() -> None:
        call = json.loads(ask(tools=[TOOL]))["choices"][0]["message"]["tool_calls"][0]["function"]
        assert json.loads(call["arguments"])["city"]

    def ends(status: int, call: Callable[[], object]) -> None:
        try:
            call()
        except ChildProcessError as e:
            if f"exit status {status}:" in str(e):
                return
            raise
        raise AssertionError("it waited for the whole answer")

    def cancel() -> None:
        ends(28, lambda: ask(STORY, "--max-time", "1", stream=True))
        chat()

    def at_once() -> None:
        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(lambda _: chat(), range(16)))

    checks: dict[str, Callable[[], object]] = {
        "chat": chat,
        "stream": stream,
        "tools": tools,
        "cancel": cancel,
        "timeout": lambda: ends(28, lambda: ask(STORY, "--max-time", "0.5")),
        "16 at once": at_once,
    }
    found = {}
    for name, call in checks.items():
        try:
            call()
            found[name] = ""
        except (AssertionError, ChildProcessError, LookupError, ValueError) as e:
            found[name] = f"{type(e).__name__}: {e}".replace("\n", " ")[:200]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
