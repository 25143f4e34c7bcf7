"""Delivery: the steps a body leaves in, for every pace a fault can ask."""

import pytest

from manta.testing.hub.delivery import End, Send, Step, Wait, plan
from manta.testing.hub.reply import Pace


@pytest.mark.parametrize(
    ("pace", "expected"),
    [
        (Pace(), [Send(0, 10)]),
        (Pace(stall_at=4, stall_s=1), [Send(0, 4), Wait(1), Send(4, 10)]),
        (Pace(stall_at=0, stall_s=1), [Wait(1), Send(0, 10)]),
        (Pace(stall_at=10, stall_s=1), [Send(0, 10), Wait(1)]),
        (Pace(reset_at=0), [End(reset=True)]),
        (Pace(reset_at=3), [Send(0, 3), End(reset=True)]),
        (Pace(cut_at=3), [Send(0, 3), End(reset=False)]),
        (Pace(cut_at=3, reset_at=7), [Send(0, 3), End(reset=False)]),
        (Pace(stall_at=3, stall_s=2, reset_at=3), [Send(0, 3), Wait(2), End(reset=True)]),
        (Pace(stall_at=8, stall_s=2, cut_at=3), [Send(0, 3), End(reset=False)]),
        (Pace(drip_at=0, drip_rate=5), [Send(0, 10, 5)]),
        (Pace(drip_at=4, drip_rate=5), [Send(0, 4), Send(4, 10, 5)]),
        (
            Pace(drip_at=2, drip_rate=5, stall_at=4, stall_s=1, cut_at=6),
            [Send(0, 2), Send(2, 4, 5), Wait(1), Send(4, 6, 5), End(reset=False)],
        ),
    ],
)
def test_plan_for_ten_bytes(pace: Pace, expected: list[Step]) -> None:
    assert plan(pace, 10) == expected


def test_plan_for_an_empty_body() -> None:
    assert plan(Pace(), 0) == []
    assert plan(Pace(stall_at=0, stall_s=1), 0) == [Wait(1)]
