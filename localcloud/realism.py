"""How unkind the local cloud is: one field for each thing in which the marketplace is harder than a test.

    NONE    every machine is as ordered, nobody else rents, nothing costs time or money but what is billed
    MILD    what everybody meets on the first day, at sizes that a demonstration survives
    HARSH   all of it, at the sizes that operators report (docs/reference/vast-contract.md 6)

A field is switched on alone by `only`, or by `--realism harsh --only FIELD`: so a test shows what one
unkindness does. Times are those of the real service: the local cloud divides them by its speedup.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from process.errors import ConfigError


@dataclass(frozen=True)
class Realism:
    """The unkindnesses of a local cloud; the default of each field is the kind value.

    rate_limits: calls faster than the service's thresholds get 429 (vast-contract 1.3), as by the fault
    rate-limits.
    """

    rate_limits: bool = False

    def only(self, names: Collection[str]) -> "Realism":
        """Return this realism with all fields kind but those named; raise ConfigError for an unknown name."""
        known = {f.name for f in fields(self)}
        for name in names:
            if name not in known:
                raise ConfigError(f"unknown unkindness {name!r:.60}; known: {', '.join(sorted(known))}")
        return Realism(**{name: getattr(self, name) for name in names})


NONE = Realism()
MILD = Realism(rate_limits=True)
HARSH = Realism(rate_limits=True)

LEVELS: Mapping[str, Realism] = MappingProxyType({"none": NONE, "mild": MILD, "harsh": HARSH})
"""The values of the flag --realism."""
