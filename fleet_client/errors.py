"""The failure that the operator must mend."""


class ConfigError(Exception):
    """The operator must act: a wrong flag, a missing key, a port in use. One line, exit 2, no traceback."""
