"""How pages write numbers and times."""

import pytest

from oncegate.admin.formats import age, clock, count, decimal, duration, iso_time, line, money, size


@pytest.mark.parametrize(
    ("ms", "written"),
    [
        (-5, "0 s"),
        (999, "0 s"),
        (59_999, "59 s"),
        (61_000, "1 min 1 s"),
        (3_599_000, "59 min"),
        (7_500_000, "2 h 5 min"),
        (172_799_000, "47 h 59 min"),
        (183_600_000, "2 d 3 h"),
    ],
)
def test_ages(ms, written):
    """An age has its two largest units."""
    assert age(ms) == written


def test_numbers():
    """A number has as many digits as tell something."""
    assert count(1234567.4) == "1\u202f234\u202f567"
    assert [decimal(one) for one in (0, 0.123, 1, 2.5, 12.34, 1234)] == ["0", "0.12", "1", "2.5", "12.3", "1\u202f234"]
    assert [duration(one) for one in (0.0005, 0.25, 2.5)] == ["0.5 ms", "250 ms", "2.5 s"]
    assert [money(one) for one in (0, 0.0031, 1234.5)] == ["0.00", "0.0031", "1\u202f234.50"]
    sizes = [size(one) for one in (0, 1023, 1024, 1.5 * 1024**2, 3 * 1024**3, 5 * 1024**5)]
    assert sizes == ["0 bytes", "1023 bytes", "1 KiB", "1.5 MiB", "3 GiB", "5\u202f120 TiB"]


def test_times():
    """A time is in UTC; a damaged one is empty."""
    assert iso_time(1_764_547_200_123) == "2025-12-01T00:00:00+00:00"
    assert clock(1_764_547_200_123) == "2025-12-01 00:00:00 UTC"
    assert clock(1 << 62) == iso_time(-(1 << 62)) == ""


def test_a_line_through_values():
    """The highest value is at the top and 0 at the bottom, also where nothing happened."""
    assert line([]) == line([1.0]) == ""
    assert line([0.0, 0.0, 0.0]) == "0.0,23.0 60.0,23.0 120.0,23.0"
    assert line([0.0, 5.0, 10.0]) == "0.0,23.0 60.0,12.0 120.0,1.0"
