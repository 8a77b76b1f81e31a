"""The error that an operator must act on."""


class ConfigError(Exception):
    """A wrong flag, a missing key, a port in use. One line, exit 2, no traceback."""
