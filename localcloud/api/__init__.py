"""The HTTP face of the local cloud: the service's API as `vastai` 1.9.1 uses it, and a few routes of our own.

It holds no state but when each endpoint may be called again: a view reads the request, asks the cloud, and
answers in the service's words (vast-contract 2).

    account       the user, ssh keys               instances   what an owner asks of a rental
    secrets       its secret variables
    offers        search, create                   logs        logs and commands, fetched in a moment
    listing       the rentals, page by page        control     status, faults, kill: ours, not the service's
    billing       what the account is charged, and price increases that hosts ask for
    others        templates, copies, and what the local cloud does not do
    calls         what is done before and after each view: key, faults of calls, limits, refusals
"""

from flask import Flask

from localcloud.api import account, billing, calls, control, instances, listing, logs, offers, others, secrets
from localcloud.world import World
from web.app import make_app


def create_app(world: World, api_key: str) -> Flask:
    """Return the Flask app with all routes of the local cloud.

    api_key: what an Authorization header must carry, except on the few open routes.
    """
    app = make_app("localcloud")
    # A page in somebody's browser can reach loopback under a name of its own (DNS rebinding).
    app.config["TRUSTED_HOSTS"] = ["127.0.0.1", "localhost", "[::1]"]
    calls.connect(app, world, api_key)
    for area in (account, billing, secrets, offers, listing, instances, logs, control, others):
        app.register_blueprint(area.routes)
    return app
