"""The admin listener without a proxy, for tests of its pages and of who may see them."""

from typing import Any

from oncegate.admin.parts import AdminParts, at_once
from oncegate.observe.metrics import GAUGES, Metrics
from oncegate.rules.loading import load_rules
from oncegate.settings.addresses import Address
from oncegate.settings.settings import Settings


def admin_parts(settings: dict[str, Any] | None = None, **parts: Any) -> AdminParts:
    """Return parts that have little to show; `settings` and `parts` replace some."""
    chosen = {"upstream": "http://127.0.0.1:9", "admin_listen": Address("127.0.0.1", 0)} | (settings or {})
    made = Settings(**chosen)
    ours: dict[str, Any] = {
        "settings": made,
        "store_url": "",
        "log": None,
        "metrics": at_once(lambda: Metrics("0", {name: lambda: 0.0 for name in GAUGES})),
        "not_ready_reasons": at_once(list),
        "notices": at_once(list),
        "rules": lambda: load_rules(made),
    }
    return AdminParts(**ours | parts)
