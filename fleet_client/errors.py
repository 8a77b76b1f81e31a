"""The error that tells an operator of a mistake in the settings."""


class ConfigError(Exception):
    """A mistake of the operator: a wrong flag, a missing key, a port in use. One line, exit 2."""
