"""The rights of the role that the proxies connect as: what their statements need, and no more. Pure.

The audit trail is out of the proxies' reach: they read it and add to it. Nobody has rights on a partition of its own,
because PostgreSQL asks for those on its parent alone.
"""

# Whether a role has not the owner's rights as well; no row for no such role. $1: the role.
IS_APART = "SELECT NOT rolsuper AND NOT pg_has_role(rolname, current_user, 'USAGE') FROM pg_roles WHERE rolname = $1"
# One row: all statements in one transaction, because a proxy without a right would refuse its requests.
_GRANTS = """\
SELECT format('GRANT USAGE ON SCHEMA %1$I TO %2$I; REVOKE ALL ON ALL TABLES IN SCHEMA %1$I FROM %2$I;'
    ' GRANT SELECT, UPDATE ON ALL SEQUENCES IN SCHEMA %1$I TO %2$I; ', current_schema(), {role})
    || string_agg(format('GRANT %s ON %I TO %I', rights, relname, {role}), '; ' ORDER BY relname)
FROM pg_class, LATERAL (SELECT CASE relname
    WHEN 'audit' THEN 'SELECT, INSERT'
    WHEN 'schema_version' THEN 'SELECT'
    ELSE 'SELECT, INSERT, UPDATE, DELETE' END AS rights) AS one
WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p')
    AND NOT relispartition AND relname !~ '^(audit|chunk)_'"""


def grants(role: str) -> str:
    """Return the query for the statements that give a role its rights, and take all others away."""
    return _GRANTS.format(role=literal(role))


def literal(text: str) -> str:
    """Return a text as SQL has it, with standard_conforming_strings."""
    return "'{}'".format(text.replace("'", "''"))
