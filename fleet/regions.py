"""Where machines may be: countries, and the groups of countries that an operator may name instead.

The service knows two-letter country codes only. The groups that its own Python package has (vastai 1.9.1,
`georegion`) count Russia to EU and miss Ireland, so they are not used.
"""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from process.errors import ConfigError

_EU = {
    *(
        "AT",
        "BE",
        "BG",
        "HR",
        "CY",
        "CZ",
        "DK",
        "EE",
        "FI",
        "FR",
        "DE",
        "GR",
        "HU",
        "IE",
        "IT",
        "LV",
        "LT",
        "LU",
    ),
    *("MT", "NL", "PL", "PT", "RO", "SK", "SI", "ES", "SE"),
}
_EEA = _EU | {"IS", "LI", "NO"}
_NEIGHBOURS = {"AD", "AL", "BA", "CH", "GB", "MC", "MD", "ME", "MK", "RS", "SM", "UA", "VA", "XK"}

REGIONS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "EU": frozenset(_EU),
        "EEA": frozenset(_EEA),
        "EUROPE": frozenset(_EEA | _NEIGHBOURS),
        "NORTH-AMERICA": frozenset({"CA", "US"}),
    }
)
"""Members of the European Union and of the European Economic Area, where one law of data protection holds
(2026), and two continents, Russia and Belarus left out."""


def countries_of(named: Iterable[str]) -> frozenset[str]:
    """Return the country codes of the countries and regions that are named; raise ConfigError for another."""
    found: set[str] = set()
    for name in named:
        code = name.strip().upper()
        if code not in REGIONS and not re.fullmatch("[A-Z]{2}", code):
            known = ", ".join(REGIONS)
            raise ConfigError(f"{name!r:.40}: wanted a country as two letters, or one of {known}")
        found |= REGIONS.get(code, {code})
    return frozenset(found)


def country_of(geolocation: str | None) -> str | None:
    """Return the country code in an offer's place, such as "Texas, US"; None where it has none."""
    code = (geolocation or "").rpartition(",")[2].strip().upper()
    return code if re.fullmatch("[A-Z]{2}", code) else None
