"""Management policies of others, each as its source says, to be compared with ours.

One file a rule: it names the source and version it follows, writes the rule down, and says what it had to
assume. Unlike ours these remember what they saw. `PEERS` lists them with their published defaults and a sweep
of their main knob; `AsIs` and `WithPool` carry a rule out without and with a stopped pool.
"""

from bench.peers.actuators import AsIs, WithPool
from bench.peers.registry import PEERS, Factory, Peer, runs
from bench.peers.rule import PeerPolicy

__all__ = ["PEERS", "AsIs", "Factory", "Peer", "PeerPolicy", "WithPool", "runs"]
