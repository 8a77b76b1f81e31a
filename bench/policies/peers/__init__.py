"""Management policies of others, each as its source says, to be compared with ours.

One file a rule: it names the source and version it follows, writes the rule down, and says what it had to
assume. Unlike ours these remember what they saw. registry.py lists them with their published defaults and a
sweep of their main knob; actuators.py carries a rule out without and with a stopped pool.
"""
