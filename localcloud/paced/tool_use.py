"""Tools, response formats and logprobs of a request, read as vLLM reads them, and refused in its words."""

import json
from collections.abc import Mapping
from typing import Any

from localcloud.paced.request_error import RequestError
from localcloud.paced.served_model import ServedModel
from localcloud.paced.shapes import PLACEHOLDER, Shape, least, of_call, of_text

MOST_LOGPROBS = 20
"""vLLM's --max-logprobs."""

NO_AUTO = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'


def read_shape(said: Mapping[str, Any], model: ServedModel) -> Shape:
    """Return what the answer to a chat must be; raise RequestError."""
    tools = _tools(said)
    choice = said.get("tool_choice")
    if choice not in (None, "none") and not tools:
        raise RequestError(
            "When using `tool_choice`, `tools` must be set. (parameter=tool_choice)", "tool_choice"
        )
    if tools and choice != "none" and (shape := _call(tools, choice, said, model)) is not None:
        return shape
    return _format(said)


def _tools(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schemas of the arguments by the names of the tools."""
    tools = said.get("tools")
    if tools is None:
        return {}
    if not isinstance(tools, list):
        raise _invalid("tools", "list_type", "Input should be a valid list")
    if not tools:
        raise RequestError(
            "`tools` must not be an empty array. Either provide at least one tool or omit the field "
            "entirely. (parameter=tools)",
            "tools",
        )
    found = {}
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise _invalid(f"tools.{place}.function", "missing", "Field required")
        if not isinstance(function.get("name"), str):
            raise _invalid(f"tools.{place}.function.name", "missing", "Field required")
        found[function["name"]] = function.get("parameters")
    return found


def _invalid(where: str, kind: str, message: str) -> RequestError:
    """Return the error of a body that has a field of a wrong type, or lacks one."""
    text = f"1 validation error:\n  {{'type': '{kind}', 'loc': 'body.{where}', 'msg': '{message}'}}"
    return RequestError(text, f"body.{where}", kind="Bad Request")


def _call(
    tools: Mapping[str, Any], choice: object, said: Mapping[str, Any], model: ServedModel
) -> Shape | None:
    """Return the call that is made, None: text instead."""
    first = next(iter(tools))
    if choice in (None, "auto"):
        if not (model.auto_tools and model.tool_parser):
            raise RequestError(NO_AUTO)
        last = said["messages"][-1]
        if isinstance(last, dict) and last.get("role") == "tool":
            return None
        return of_call(first, tools[first], "tool_calls")
    if choice == "required":
        if not model.tool_parser:
            raise RequestError('tool_choice="required" requires --tool-call-parser to be set')
        return of_call(first, tools[first], "tool_calls")
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in tools:
        raise RequestError(
            "The tool specified in `tool_choice` does not match any of the specified `tools` "
            "(parameter=tool_choice)",
            "tool_choice",
        )
    if not model.tool_parser:
        raise RequestError(f'tool_choice=function "{name}" requires --tool-call-parser to be set')
    return of_call(name, tools[name], "stop")


def _format(said: Mapping[str, Any]) -> Shape:
    """Return the shape that response_format or vLLM's own fields ask for."""
    wanted = said.get("response_format") or {}
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if wanted and kind not in ("text", "json_object", "json_schema"):
        raise _invalid(
            "response_format.type", "literal_error", "Input should be text, json_object or json_schema"
        )
    if kind == "json_object":
        return of_text(json.dumps({"placeholder": True}))
    if kind == "json_schema":
        schema = wanted.get("json_schema")
        if not isinstance(schema, dict):
            raise RequestError(
                "When response_format type is 'json_schema', the 'json_schema' field must be provided. "
                "(parameter=response_format)",
                "response_format",
            )
        return of_text(json.dumps(least(schema.get("schema"))))
    outputs = said.get("structured_outputs") or {}
    own = {name: said.get(f"guided_{name}") for name in ("json", "choice", "regex", "grammar")}
    own |= {name: value for name, value in outputs.items() if value is not None} if outputs else {}
    if own["json"] is not None:
        schema = own["json"]
        return of_text(json.dumps(least(json.loads(schema) if isinstance(schema, str) else schema)))
    if own["choice"]:
        return of_text(str(own["choice"][0]))
    for name in ("regex", "grammar"):
        if own[name]:
            raise RequestError(f"{name}: the paced engine of localcloud does not have it", name)
    return PLACEHOLDER


def read_logprobs(said: Mapping[str, Any], *, chat: bool) -> int | None:
    """Return how many other tokens are shown with each token, None: no logprobs; raise RequestError."""
    wanted = said.get("logprobs")
    if chat:
        top = said.get("top_logprobs")
        if top and not wanted:
            raise RequestError(
                "when using `top_logprobs`, `logprobs` must be set to true. (parameter=top_logprobs)",
                "top_logprobs",
            )
        wanted = (top or 0) if wanted else None
    if wanted is None or wanted is False:
        return None
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 0:
        raise RequestError("logprobs: wanted a whole number from 0 on", "logprobs")
    if wanted > MOST_LOGPROBS:
        raise RequestError(
            f"Requested sample logprobs of {wanted}, which is greater than max allowed: {MOST_LOGPROBS} "
            f"(parameter=logprobs, value={wanted})",
            "logprobs",
        )
    if not chat and said.get("echo"):
        raise RequestError(
            "logprobs: with echo the paced engine of localcloud does not have them", "logprobs"
        )
    return wanted
