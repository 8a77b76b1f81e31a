"""The three kinds of failure, named by who must act on them.

Anything else that is raised is a bug and is logged with its traceback at the loop that meets it.
"""

from fleet_client.errors import ConfigError

__all__ = ["CloudError", "ConfigError", "InstanceError"]


class CloudError(Exception):
    """The cloud did not do, or may not have done, what was asked; try again next turn."""


class InstanceError(Exception):
    """One instance did not answer as it must; other instances are not concerned."""
