"""Traces, that is request arrivals with their lengths: read from logs, or made up."""
