"""What is read from a row of the listing."""

from dataclasses import replace
from typing import Any

import pytest

from tests.vast_answers import ROW, instance
from vast.rows import Fields, row_of


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
