"""All pages with the role that each needs."""

from oncegate.admin.pages.now import now_routes
from oncegate.admin.parts import AdminParts
from oncegate.admin.roles import Route


def page_routes(parts: AdminParts) -> list[Route]:
    """Return the routes of all pages."""
    return [*now_routes(parts)]
