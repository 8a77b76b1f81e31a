"""Rules of others for choosing a server, each as its source says, and the clairvoyant: compared with ours.

    requests ──► Router (one a loadbalancer) ──► ModelServer ──► first token, end
                   │    ▲ ▲                          │
                   rule │ └── own starts and ends ───┤
                        └── reports, fresh or old ───┘

A rule sees what a proxy sees: what it has sent, and when that has its first token and its end. Of the server
it knows what the last report said. One file a source (reference/peers.md); `RULES` lists them.
"""

from bench.dispatchers.registry import RULES, Entry
from bench.dispatchers.rule import Fleet, Report, Request, Rule
from bench.dispatchers.world import Router, Score, World

__all__ = ["RULES", "Entry", "Fleet", "Report", "Request", "Router", "Rule", "Score", "World"]
