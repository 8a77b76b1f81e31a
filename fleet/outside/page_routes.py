"""The routes behind the operator's page: how things stand, how they came about, and what is done by hand."""

from collections.abc import Callable
from typing import Any

from flask import Flask, Response, jsonify, request

from fleet.outside.by_hand import Act, ActRefused, ByHand
from fleet.outside.engine_log import EngineLog
from fleet.outside.market_view import MarketView
from fleet.outside.operator_acts import OperatorActs
from fleet.outside.overview import Overview
from fleet.outside.what_if_runs import WhatIfRefused, WhatIfRuns
from process.errors import InstanceError
from web.answers import error
from web.app import MAX_ID, QueryNumber, body, check_query, requires
from web.direct import Asker, client_name
from web.keys import AccessKeys
from web.messages.operator import BanBody, WhatIfBody
from web.page_files import PageToken, add_page_files

HISTORY_S, MOST_HISTORY_S = 3600.0, 8 * 86_400.0
"""Seconds of history that are shown, unless asked for more; the ledger keeps no more."""

POINTS, MOST_POINTS = 360, 2000
"""Points of a picture: about one for two pixels of a wide screen."""

FROM = QueryNumber("from", "Begin of the window, epoch seconds.", 0.0, 1e12)
TO = QueryNumber("to", "End of the window, epoch seconds.", 0.0, 1e12)
OF_POINTS = QueryNumber("points", "Points of a picture.", 1, MOST_POINTS, whole=True)


INSTANCE = QueryNumber("instance", "Id of an instance.", 0, MAX_ID, whole=True)

ENGINE_LOG, MARKET = "/log", "/market"
"""Paths of the routes that ask an instance over ssh, and the cloud: they may take ten seconds."""

WHAT_IF = "/what-if"


def asked_by(keys: AccessKeys) -> str:
    """Return the name of the operator who sent the request being served: of the key, else the address."""
    peer = request.remote_addr or "?"
    if not keys.for_operator():
        return peer
    shown = request.headers.get("Authorization", "")
    return keys.names.get(shown[7:]) or client_name(Asker(shown, peer, {}))


def add_page(
    app: Flask,
    overview: Overview,
    acts: OperatorActs,
    keys: AccessKeys,
    token: PageToken,
    health: Callable[[], dict[str, Any]],
) -> None:
    """Register the routes of the operator's page. health: returns the answer of GET /health."""
    add_page_files(app, token)
    _add_pictures(app, overview, keys, health)
    _add_engine_log(app, acts.engine_log, keys)
    _add_acts(app, acts.by_hand, keys, token)
    _add_market(app, acts.market, keys)
    _add_what_if(app, acts.what_if, keys, token)


def _add_pictures(
    app: Flask, overview: Overview, keys: AccessKeys, health: Callable[[], dict[str, Any]]
) -> None:
    operator = requires(keys.for_operator)

    @app.get("/overview")
    @operator
    def how_things_stand() -> Response:
        return jsonify(overview.now(health()))

    @app.get("/history")
    @operator
    def how_it_came_about() -> Response:
        check_query(FROM, TO, OF_POINTS)
        to_s = TO.asked(overview.clock())
        from_s = FROM.asked(max(0.0, to_s - HISTORY_S))
        points = int(OF_POINTS.asked(POINTS))
        return jsonify(overview.history(max(from_s, to_s - MOST_HISTORY_S), to_s, points))


def _add_engine_log(app: Flask, engine_log: EngineLog | None, keys: AccessKeys) -> None:
    @app.get(ENGINE_LOG)
    @requires(keys.for_operator)
    def beginning() -> Response:
        check_query(INSTANCE)
        if engine_log is None:
            return error(404, "no_ssh", "this process has no ssh key")
        try:
            found = engine_log.beginning(int(INSTANCE.asked(0)))
        except KeyError as e:
            return error(404, "no_such_instance", f"the fleet has no instance {e}")
        except InstanceError as e:
            return error(502, "no_log", str(e))
        return jsonify(lines=found.lines, ready=found.ready)


def _add_acts(app: Flask, by_hand: ByHand, keys: AccessKeys, token: PageToken) -> None:
    operator = requires(keys.for_operator)

    @app.post("/instances/<id:instance_id>/<act>")
    @operator
    @token.required
    def act(instance_id: int, act: str) -> Response:
        if act not in set(Act):
            return error(404, "not_found", f"an instance can be asked to {', '.join(Act)}")
        try:
            label = by_hand.act(Act(act), instance_id, asked_by(keys))
        except KeyError:
            return error(404, "no_such_instance", f"the fleet has no instance {instance_id}")
        except ActRefused as e:
            return error(409, "not_now", str(e))
        return jsonify(instance=instance_id, label=label, act=act)

    @app.post("/machines/<id:machine_id>/ban")
    @operator
    @token.required
    def ban(machine_id: int) -> Response:
        hours = body(BanBody).hours
        by_hand.ban(machine_id, hours * 3600.0, asked_by(keys))
        return jsonify(machine=machine_id, banned_hours=hours)

    @app.post("/machines/<id:machine_id>/forgive")
    @operator
    @token.required
    def forgive(machine_id: int) -> Response:
        return jsonify(machine=machine_id, was_banned=by_hand.forgive(machine_id, asked_by(keys)))


def _add_market(app: Flask, market: MarketView | None, keys: AccessKeys) -> None:
    @app.get(MARKET)
    @requires(keys.for_operator)
    def offers() -> Response:
        if market is None:
            return error(404, "no_market", "this process cannot ask the cloud")
        try:
            return jsonify(market.offers())
        except LookupError as e:
            return error(502, "cloud_fails", f"the cloud cannot be searched: {e.args[0]}")


def _add_what_if(app: Flask, what_if: WhatIfRuns | None, keys: AccessKeys, token: PageToken) -> None:
    operator = requires(keys.for_operator)

    @app.post(WHAT_IF)
    @operator
    @token.required
    def ask() -> Response:
        asked = body(WhatIfBody)
        if what_if is None:
            return error(404, "no_runs", "this process plays nothing in virtual time")
        try:
            what_if.ask(asked)
        except WhatIfRefused as e:
            return error(409, "not_now", str(e))
        return jsonify(what_if.state())

    @app.get(WHAT_IF)
    @operator
    def answer() -> Response:
        return jsonify({"state": "none"} if what_if is None else what_if.state())

    @app.get(f"{WHAT_IF}/<which>.html")
    @operator
    def report(which: str) -> Response:
        page = None if what_if is None else what_if.page(which)
        if page is None:
            return error(404, "no_report", "there is no such report")
        # It stands alone: nothing in it may act on this server.
        headers = {"Content-Security-Policy": "sandbox allow-scripts", "X-Content-Type-Options": "nosniff"}
        return Response(page, mimetype="text/html", headers=headers)
