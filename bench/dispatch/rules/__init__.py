"""Rules of others for choosing a server, each as its source says, and the clairvoyant: compared with ours.

    requests ──► Dispatcher (one a loadbalancer) ──► SteppedModelServer ──► first token, end
                   │    ▲ ▲                          │
                   rule │ └── own starts and ends ───┤
                        └── reports, fresh or old ───┘

A rule sees what a proxy sees: what it has sent, and when that has its first token and its end. Of the server
it knows what the last report said. One file a source (docs/reference/peers.md); registry.py lists them.
"""
