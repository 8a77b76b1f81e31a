"""The status of the local cloud as a page for browsers."""

import html
from collections.abc import Mapping
from typing import Any

HEADS = (
    "id",
    "label",
    "machine",
    "GPU",
    "state",
    "model on disk",
    "$/h",
    "$ so far",
    "processes",
    "message",
)


def render(status: Mapping[str, Any]) -> str:
    """Return the local cloud's status as a page of HTML; renters' texts in it are escaped."""
    rows = "".join(f"<tr>{''.join(map(_cell, _row(i)))}</tr>" for i in status["instances"])
    head = "".join(f"<th>{h}</th>" for h in HEADS)
    faults = html.escape(", ".join(f["name"] for f in status["faults"]) or "none")
    engine = html.escape(str(status["engine"]))
    return (
        "<!doctype html><meta charset=utf-8><meta http-equiv=refresh content=2><title>local cloud</title>"
        "<style>body{font:14px system-ui;margin:2em}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left}</style>"
        f"<h1>local cloud, {engine} engine</h1>"
        "<p>This is not Vast.ai: machines, prices and answers are made up, one computer plays them all.</p>"
        f"<p>times divided by {status['speedup']:g} · credit ${status['credit_usd']:.2f} · "
        f"burning ${status['burn_usd_h']:.3f}/h · spent ${status['spent_usd']['total']:.5f} · "
        f"faults: {faults}</p>"
        f"<table><tr>{head}</tr>{rows}</table>"
    )


def _row(i: Mapping[str, Any]) -> tuple[object, ...]:
    return (
        i["id"],
        i["label"] or "",
        i["machine_id"],
        i["gpu"],
        i["state"],
        "yes" if i["model_on_disk"] else "no",
        f"{i['usd_h_now']:.3f}",
        f"{i['usd']['total']:.5f}",
        " ".join(str(p) for p in i["pids"]),
        i["status_msg"] or "",
    )


def _cell(value: object) -> str:
    return f"<td>{html.escape(str(value))}</td>"
