"""What is read from a row of the listing."""

from dataclasses import replace
from typing import Any

import pytest

from tests.vast_answers import ROW, instance, offer
from vast.errors import ProtocolError
from vast.rows import Fields, offer_of, row_of


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"ports": None, "public_ipaddr": None}, {"ports": {}, "public_ip": None}),
        ({"ports": {"70000/udp": [{"HostPort": "1"}], "22/tcp": None, "8000/tcp": []}}, {"ports": {}}),
        ({"actual_status": None, "label": None}, {"actual_status": None, "label": None}),
        ({"instance": {"totalHour": 0.013}}, {"price_now_usd_h": 0.013}),
        ({"instance": None}, {"price_now_usd_h": 0.21}),
        ({"instance": None, "cur_state": "stopped"}, {"price_now_usd_h": 0.01, "cur_state": "stopped"}),
        (
            {"storage_total_cost": None, "storage_cost": 0.18, "disk_space": 40.0, "dph_base": None},
            {"storage_usd_h": 40.0 * 0.18 / 720, "dph_base": 0.21 - 40.0 * 0.18 / 720},
        ),
        ({"end_date": None, "start_date": None}, {"end_date": None, "start_date": None}),
    ],
)
def test_what_a_row_does_not_say_is_none_or_computed(
    changed: dict[str, object], expected: dict[str, Any]
) -> None:
    row = row_of(Fields("vastai show instances", "instance", instance(**changed)))
    assert row == replace(ROW, **expected)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        *(({"num_gpus": n}, {"num_gpus": 1}) for n in (0, -3, 10**9, True, "8", None)),
        *(({"ssh_port": n}, {"ssh_port": None}) for n in (0, -1, 65_536, 99_999_999, "22")),
        *(({"machine_id": n}, {"machine_id": None, "odd": "it lacks machine_id"}) for n in (-1, "7", 2**60)),
        *(
            ({"public_ipaddr": text}, {"public_ip": None})
            for text in ("a b", "user@host", "1.2.3.4/x", "x" * 300, "-o", "\ud800", "h#f", 5)
        ),
        ({"public_ipaddr": " 1.2.3.4\n"}, {"public_ip": "1.2.3.4"}),
        *(({"ssh_host": text}, {"ssh_host": None}) for text in ("-oProxyCommand=x", "a;b", "")),
        *(({"instance": {"totalHour": usd}}, {"price_now_usd_h": 0.21}) for usd in (-1, 1e300, 10**400, 1e5)),
        *(({"start_date": when}, {"start_date": None}) for when in (-1.0, 1e300, "2026-11-30", True)),
        (
            {"ports": {"8000/tcp": [{"HostPort": "70000"}], "22/tcp": [{"HostPort": "0"}]}},
            {"ports": {}},
        ),
        ({"ports": {"80000/tcp": [{"HostPort": "5"}], "22/tcp": [{"HostPort": "9" * 5000}]}}, {"ports": {}}),
    ],
)
def test_what_cannot_be_is_not_believed(changed: dict[str, object], expected: dict[str, Any]) -> None:
    """Field fault A3, of the cloud: a price of 1e300, a machine of -1, a host that is part of a URL."""
    row = row_of(Fields("vastai show instances", "instance", instance(**changed)))
    assert row == replace(ROW, **expected)


@pytest.mark.parametrize("price", [-5, 1e300, 10**400, float("nan"), float("inf"), "0.2", 10_001])
def test_a_row_whose_price_cannot_be_is_odd_and_not_priced(price: object) -> None:
    row = row_of(Fields("vastai show instances", "instance", instance(dph_total=price)))
    assert (row.priced, row.dph_total, row.odd) == (False, 0.0, "it lacks dph_total")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("dph_total", price) for price in (-0.1, 1e300, 10**400, float("nan"), 10_001)),
        *(("num_gpus", n) for n in (0, -1, 10**9)),
        *(("storage_cost", price) for price in (-0.1, 1e300)),
    ],
)
def test_an_offer_that_cannot_be_is_refused(name: str, value: object) -> None:
    changed: dict[str, Any] = {name: value}
    with pytest.raises(ProtocolError, match=name):
        offer_of(Fields("vastai search offers", "offer", offer(**changed)))
