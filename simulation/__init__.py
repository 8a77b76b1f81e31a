"""sim: users of a live fleet, the local stack, virtual time, traces, reports."""
