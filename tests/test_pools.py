"""One pool for each upstream; what no rule names any more lives as long as somebody uses it."""

import gc

from oncegate.upstream.pools import Pools


class Named:
    """Stands for a pool: all that Pools asks of one."""

    def __init__(self, name: str) -> None:
        self.name, self.cuts, self.closed = name, [], False

    def cut(self, detail: str) -> int:
        self.cuts.append(detail)
        return 1

    def close(self) -> None:
        self.closed = True


def test_equal_upstreams_share_a_pool():
    pools = Pools(Named)
    assert pools.of("a") is pools.of("a")
    assert pools.of("a") is not pools.of("b")


def test_a_forgotten_pool_is_still_reached_while_it_is_used():
    """The drain cuts what is under way on it; the same upstream named anew has a new one."""
    pools = Pools(Named)
    used, unused, kept = pools.of("a"), pools.of("b"), pools.of("c")
    pools.retain_only(["c"])
    del unused
    gc.collect()
    assert pools.of("c") is kept
    assert pools.cut("over") == 2
    assert used.cuts == kept.cuts == ["over"]
    assert pools.of("a") is not used
    pools.close()
    assert used.closed
