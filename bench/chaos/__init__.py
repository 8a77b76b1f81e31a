"""A campaign of faults against the whole stack, and an audit of what they did.

    python -m bench.chaos [--seed 1,2,3] [--minutes 12] [--json FILE] [--undo NAME]

    stack       local cloud, autoscaler, two loadbalancers, two gateways, links between them
    kinds       what goes wrong, each by a name, switched on and off while users ask
    users       steady users, each answer looked through token by token
    truth       what the cloud knows: machines, dollars, limits, and which machines we hurt
    campaign    a seeded schedule: storms of faults, and calms in which the fleet must come back
    audit       one line for each promise: the figure, its target, and whether it was kept

Everything is a real process on this machine, and only loopback is used. Times are those of a machine that
others may use, too, so compare figures of one run.
"""
