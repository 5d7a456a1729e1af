-- Schema version 1: tables, then one function a verb. Every statement is safe to run again.
-- Names are unqualified: search_path is the schema. Times: ms of clock_timestamp() since 1970. Days: since 1970, UTC.

-- The version of the schema is the highest one.
CREATE TABLE IF NOT EXISTS schema_version (
    version    int PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE OR REPLACE FUNCTION now_ms() RETURNS bigint LANGUAGE sql VOLATILE AS
$$ SELECT floor(date_part('epoch', clock_timestamp()) * 1000)::bigint $$;

-- The days (since 1970) that have a partition. CASE: a column may be computed before WHERE leaves its row out (seen).
CREATE OR REPLACE FUNCTION partition_days(parent text) RETURNS SETOF int LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN child.relname ~ '_[0-9]{8}$' THEN to_date(right(child.relname, 8), 'YYYYMMDD') - date '1970-01-01' END
    FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
    WHERE inhparent = parent::regclass AND NOT inhdetachpending
$$;

-- The day whose partition takes rows of today: today where there is one, else the nearest day before, else the nearest
-- after. So no claim fails for want of a partition.
CREATE OR REPLACE FUNCTION partition_day(parent text, today int) RETURNS int LANGUAGE plpgsql STABLE AS $$
BEGIN
    -- No statement of its own: this is asked with each claim. A partition that is being detached has another root.
    IF pg_partition_root(to_regclass(parent || to_char(date '1970-01-01' + today, '_YYYYMMDD'))) = parent::regclass THEN
        RETURN today;
    END IF;
    RETURN coalesce(
        (SELECT max(day) FROM partition_days(parent) AS day WHERE day <= today),
        (SELECT min(day) FROM partition_days(parent) AS day)
    );
END
$$;

-- The days from today to the last partition; negative where that is over.
CREATE OR REPLACE FUNCTION partition_days_left(parent text) RETURNS int LANGUAGE sql STABLE AS $$
    SELECT max(day) - (now_ms() / 86400000)::int FROM partition_days(parent) AS day
$$;

-- One row a key, in one table: with 16 partitions by hash, a settle of one row costs seven times as much (measured), as
-- a statement locks and prepares them all. No index but the primary key: an update of an indexed column cannot be HOT.
-- Columns that a settle changes come last: an update writes only what differs to the WAL, from the first changed byte to
-- the last.
CREATE TABLE IF NOT EXISTS record (
    key          bytea    NOT NULL,                -- 24 bytes
    tenant       bytea    NOT NULL DEFAULT '',     -- 16 bytes
    self         bytea    NOT NULL DEFAULT '',     -- 16 bytes: digest over what must not change
    fingerprint  bytea    NOT NULL DEFAULT '',     -- 16 bytes
    token        bytea    NOT NULL DEFAULT '',     -- 16 bytes; empty: the owner freed the key
    kept         bytea,                            -- of the request, for operators and replays: store/kept.py
    fence        bigint   NOT NULL DEFAULT 0,
    created      bigint   NOT NULL DEFAULT 0,
    lease_ms     int      NOT NULL DEFAULT 0,
    bucket       int      NOT NULL DEFAULT 0,      -- the partition of its chunks: `chunk.day`
    mode         smallint NOT NULL DEFAULT 0,      -- 1 hold, 2 retry, 3 cancelled
    stage        smallint NOT NULL DEFAULT 0,      -- 0 never renewed, 1 claimed, 2 sent, 3 answered
    lease        bigint   NOT NULL DEFAULT 0,      -- end of the lease; 0 of an unknown outcome
    expires      bigint   NOT NULL DEFAULT 0,      -- end of the response's retention
    frees        bigint   NOT NULL DEFAULT 0,      -- from then on the key is free
    bytes        bigint   NOT NULL DEFAULT 0,      -- of the appended chunks
    chunks       int      NOT NULL DEFAULT 0,      -- appended
    state        smallint NOT NULL,                -- 1 in flight, 2 unknown, 3 complete, 4 released, 5 expired
    status       smallint NOT NULL DEFAULT 0,      -- of the response that came; 0 for none
    audit_no     bigint   NOT NULL DEFAULT 0,      -- the last entry: its number, time (which names its place), digest
    audit_at     bigint   NOT NULL DEFAULT 0,
    audit_digest bytea    NOT NULL DEFAULT '',
    why          bytea,                            -- of an unknown outcome
    meta         bytea,                            -- of a complete record: store/record.py
    body         bytea,                            -- of a small response
    PRIMARY KEY (key)
) WITH (
    -- Room for rows as they grow: an update that stays on its page touches no index. With heads and bodies of 300 bytes,
    -- 100 % of the settles stay at 20, and 68 % at 30, where the table is larger too (measured).
    fillfactor = 20, toast_tuple_target = 8160, autovacuum_vacuum_scale_factor = 0.05
);

-- The index of open keys: one row for each record that is in flight or unknown, made and removed with its change. What
-- `score` says is in store/open_keys/scores.py. Not unique: a row that is left behind must not stop a claim, and readers ask
-- the record. Unlogged, so that it costs no WAL: a crash or a failover empties it, and `open_complete` with it, until a proxy
-- has looked through the records.
CREATE UNLOGGED TABLE IF NOT EXISTS open_key (
    key   bytea  NOT NULL,
    score bigint NOT NULL
) WITH (
    -- As many rows come and go as there are claims. Space is reused at once, before the table and its index grow.
    fillfactor = 50, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 0
);
CREATE INDEX IF NOT EXISTS open_key_key ON open_key (key);
CREATE UNLOGGED TABLE IF NOT EXISTS open_complete (
    place   smallint PRIMARY KEY DEFAULT 1 CHECK (place = 1),
    is_done boolean  NOT NULL
);

-- Bodies that do not fit into their record. Partitions by day (`chunk_20260101`), dropped as a whole.
CREATE TABLE IF NOT EXISTS chunk (
    day    int   NOT NULL,
    key    bytea NOT NULL,
    token  bytea NOT NULL,
    index  int   NOT NULL,
    bytes  bytea NOT NULL,
    PRIMARY KEY (day, key, token, index)
) PARTITION BY RANGE (day);
ALTER TABLE chunk ALTER COLUMN bytes SET STORAGE EXTERNAL;

-- Append-only. Partitions by day (`audit_20260101`). An entry is found by its time: `before_at` is that of the entry before.
CREATE TABLE IF NOT EXISTS audit (
    at        bigint   NOT NULL,
    no        bigint   NOT NULL,                   -- of the key's entries, from 1
    before_at bigint   NOT NULL,                   -- 0 of the first
    fence     bigint   NOT NULL,
    size      bigint   NOT NULL DEFAULT 0,
    status    int      NOT NULL DEFAULT 0,
    day       int      NOT NULL,                   -- the partition
    -- 1 claimed 2 taken over 3 renewed from unknown 4 stored 5 released 6 unknown 7 cancelled 8 withdrawn 9 resolved
    -- 10 freed 11 expired 12 purged
    event     smallint NOT NULL,
    key       bytea    NOT NULL,
    token     bytea    NOT NULL,
    actor     bytea    NOT NULL,
    rule      bytea    NOT NULL DEFAULT '',
    detail    bytea    NOT NULL DEFAULT '',
    digest    bytea    NOT NULL
) PARTITION BY RANGE (day);
CREATE INDEX IF NOT EXISTS audit_at ON audit USING brin (at) WITH (pages_per_range = 32);

-- Greater than every fence given before, also where the clock fell. Behind a loss it is set anew: `inspect_1`.
CREATE SEQUENCE IF NOT EXISTS fence;
SELECT setval('fence', greatest((SELECT last_value FROM fence), (extract(epoch FROM clock_timestamp()) * 1000000)::bigint));

-- The proxies that write here: `prefix` begins their tokens, `name` tells operators who they are, `counter` must never
-- fall. `settings` and `rules` say how they name keys; `identity` is the digest of the settings.
CREATE TABLE IF NOT EXISTS proxy (
    prefix       bytea  PRIMARY KEY,
    counter      bigint NOT NULL,
    name         bytea  NOT NULL,
    retention_ms bigint NOT NULL,
    at_ms        bigint NOT NULL,
    identity     bytea,
    settings     bytea,
    rules        bytea
);
-- Work that one proxy at a time does.
CREATE TABLE IF NOT EXISTS lease (
    name  bytea  PRIMARY KEY,
    owner bytea  NOT NULL,
    until bigint NOT NULL
);
-- From process to process; may be lost.
CREATE UNLOGGED TABLE IF NOT EXISTS mark (
    name    bytea  PRIMARY KEY,
    value   bytea  NOT NULL,
    expires bigint NOT NULL
);

-- Functions. One a verb, its number the schema version that brought it; a change of its signature is a new name.
-- A call is one statement and one transaction. Its array has one element a key, in the order of the keys, and no key twice.
-- What a statement costs beside its rows is the larger part of what a call costs: so the usual call is one statement with
-- few steps, no step joins two of the others, and what is rare has a function of its own.
-- The partition of today is looked up in a subquery: once, and only where a row needs it.
-- No statement waits for a row: what another transaction holds is `busy`. Lookups are LATERAL with a LIMIT, so that they
-- stay lookups whatever the planner believes of the tables' sizes. Sessions set the rest of what plans need; where bodies
-- are read or written, plans are made for their day, so that no other day's partition is locked.

-- What the functions are called with. CREATE TYPE knows no IF NOT EXISTS.
-- `lock`: see `is_ours`. Of take_1 alone: `expected` and `window_ms`.
DO $$ BEGIN
    CREATE TYPE claim_call AS (
        key bytea, lock bigint, token bytea, fingerprint bytea, tenant bytea, self bytea, mode smallint, lease_ms int,
        retention bigint, not_after bigint, rule bytea, kept bytea, expected bytea, window_ms bigint
    );
EXCEPTION WHEN duplicate_object THEN END $$;
DO $$ BEGIN
    CREATE TYPE renew_call AS (key bytea, token bytea, lease_ms int, stage smallint);
EXCEPTION WHEN duplicate_object THEN END $$;
-- event: 4 store, 5 release, 8 withdraw (a release), 6 unknown, 7 cancelled. A store has its body in `body` (null: none) if
-- it lies in the record, or the last chunk in `tail` (null: it was appended).
DO $$ BEGIN
    CREATE TYPE settle_call AS (
        key bytea, lock bigint, token bytea, event smallint, retention bigint, tombstone bigint, status smallint, fence bigint,
        created bigint, mode smallint, fingerprint bytea, tenant bytea, self bytea, meta bytea, digest bytea,
        chunk_count int, size bigint, body bytea, tail bytea, why bytea, kept bytea
    );
EXCEPTION WHEN duplicate_object THEN END $$;
-- What claim_1 and take_1 return. `tag`: 0 claimed, 1 in flight, 2 unknown, 3 complete, 4 free but for take_1, 5 expired,
-- 6 no record, because the claim came late, 7 busy, 8 see tag_of.
DO $$ BEGIN
    CREATE TYPE claim_reply AS (
        token bytea, tag int, now bigint, fence bigint, created bigint, owner bytea, mode smallint, fingerprint bytea,
        self bytea, lease_left bigint, status smallint, meta bytea, body bytea, kept bytea
    );
EXCEPTION WHEN duplicate_object THEN END $$;

-- Whether a row says no more than a missing one. A renewal leaves `frees` alone, so its time is added.
CREATE OR REPLACE FUNCTION is_free(
    state smallint, created bigint, lease bigint, lease_ms int, frees bigint, now bigint
) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE state
        WHEN 1 THEN lease < now AND frees + greatest(lease - lease_ms - created, 0) < now
        WHEN 4 THEN true
        ELSE frees <= now
    END
$$;

-- The tag of a record in the results of claim_1 and take_1: its state, or 4 free, 5 expired, 8 in flight with a lease
-- that is longer than a whole one, because the clock stepped back, 9 a state that nobody knows.
CREATE OR REPLACE FUNCTION tag_of(
    state smallint, created bigint, lease bigint, lease_ms int, expires bigint, frees bigint, now bigint
) RETURNS int LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN is_free(state, created, lease, lease_ms, frees, now) THEN 4
        WHEN state = 3 AND expires <= now THEN 5
        WHEN state = 1 AND lease - now > lease_ms THEN 8
        WHEN state IN (1, 2, 3, 5) THEN state
        ELSE 9
    END
$$;

-- The digest of an audit entry: HMAC-SHA-256 (RFC 2104) over its fields and the digest of the key's entry before.
-- `pads`: the inner and the outer block of the secret, 64 bytes each. One expression, so that calls become part of plans.
CREATE OR REPLACE FUNCTION audit_digest_of(
    pads bytea, before bytea, key bytea, no bigint, at bigint, event int, token bytea, fence bigint, actor bytea,
    rule bytea, status int, size bigint, detail bytea
) RETURNS bytea LANGUAGE sql IMMUTABLE AS $$
    SELECT sha256(substr(pads, 65) || sha256(substr(pads, 1, 64)
        || before || key || int8send(no) || int8send(at) || int2send(event::smallint)
        || int4send(octet_length(token)) || token || int8send(fence)
        || int4send(octet_length(actor)) || actor || int4send(octet_length(rule)) || rule
        || int4send(status) || int8send(size) || int4send(octet_length(detail)) || detail))
$$;

-- Takes the right to insert a key until the end of the transaction. A schema has locks of its own in its database.
CREATE OR REPLACE FUNCTION is_ours(lock bigint) RETURNS boolean LANGUAGE sql VOLATILE AS
$$ SELECT pg_try_advisory_xact_lock(lock # ('record'::regclass::oid::bigint << 32)) $$;

-- Whether a key has a record, be it one that another transaction holds.
CREATE OR REPLACE FUNCTION is_there(wanted bytea) RETURNS boolean LANGUAGE plpgsql VOLATILE AS
$$ BEGIN RETURN EXISTS (SELECT FROM record WHERE key = wanted); END $$;

-- Gives a key the entry that it should have in the index of open keys.
CREATE OR REPLACE FUNCTION note_open(opened bytea, new_score bigint) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    UPDATE open_key SET score = new_score WHERE key = opened;
    IF NOT FOUND THEN
        INSERT INTO open_key (key, score) VALUES (opened, new_score);
    END IF;
    RETURN true;
END
$$;

-- The score of a key whose outcome is unknown in this mode.
CREATE OR REPLACE FUNCTION unknown_score(mode smallint, created bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS
$$ SELECT created - CASE mode WHEN 1 THEN 10000000000000 ELSE 20000000000000 END $$;

-- Claims keys that have no record, and reads the records of the others. Past `not_after` it only reads.
-- An insert would wait for one that is not committed: the lock says so first. A key that came between the read and the lock
-- breaks the primary key, and undoes the call.
CREATE OR REPLACE FUNCTION claim_1(calls claim_call[], actor bytea, audited boolean, pads bytea) RETURNS SETOF claim_reply
LANGUAGE plpgsql VOLATILE AS $$
#variable_conflict use_column
DECLARE
    began bigint := now_ms();
    today int := (began / 86400000)::int;
BEGIN
    RETURN QUERY
    WITH asked AS MATERIALIZED (
        SELECT f.*, CASE WHEN audited AND f.fence IS NOT NULL
            THEN audit_digest_of(pads, '', f.key, 1, began, 1, f.token, f.fence, actor, f.rule, 0, 0, '') ELSE '' END AS digest
        FROM (
            SELECT u.*, r.state AS r_state, r.token AS r_token, r.fence AS r_fence, r.created AS r_created,
                r.mode AS r_mode, r.fingerprint AS r_fingerprint, r.tenant || r.self AS r_self, r.lease AS r_lease,
                r.lease_ms AS r_lease_ms, r.expires AS r_expires, r.frees AS r_frees, r.status AS r_status,
                r.meta AS r_meta, r.body AS r_body, r.kept AS r_kept,
                CASE WHEN r.state IS NULL AND began <= u.not_after AND is_ours(u.lock) THEN nextval('fence') END AS fence
            FROM unnest(calls) AS u
            LEFT JOIN LATERAL (SELECT * FROM record WHERE record.key = u.key LIMIT 1) r ON true
            OFFSET 0
        ) f
    ), made AS (
        INSERT INTO record (key, tenant, self, fingerprint, token, kept, fence, created, lease_ms, bucket, mode,
            lease, expires, frees, state, audit_no, audit_at, audit_digest)
        SELECT a.key, a.tenant, a.self, a.fingerprint, a.token, a.kept, a.fence, began, a.lease_ms,
            (SELECT partition_day('chunk', today)), a.mode, began + a.lease_ms,
            began + a.retention, began + a.retention, 1, audited::int, CASE WHEN audited THEN began ELSE 0 END, a.digest
        FROM asked a WHERE a.fence IS NOT NULL
    ), opened AS (
        INSERT INTO open_key (key, score) SELECT a.key, began + a.lease_ms FROM asked a WHERE a.fence IS NOT NULL
    ), entries AS (
        INSERT INTO audit (day, at, no, before_at, fence, event, key, token, actor, rule, digest)
        SELECT (SELECT partition_day('audit', today)), began, 1, 0, a.fence, 1, a.key, a.token, actor, a.rule, a.digest
        FROM asked a WHERE audited AND a.fence IS NOT NULL
    )
    SELECT a.token,
        CASE WHEN a.fence IS NOT NULL THEN 0
            WHEN a.r_state IS NOT NULL
            THEN tag_of(a.r_state, a.r_created, a.r_lease, a.r_lease_ms, a.r_expires, a.r_frees, began)
            WHEN began > a.not_after THEN 6
            ELSE 7
        END,
        now_ms(), coalesce(a.fence, a.r_fence), coalesce(a.r_created, began), a.r_token, a.r_mode, a.r_fingerprint, a.r_self,
        least(a.r_lease - began, a.r_lease_ms), a.r_status, a.r_meta, a.r_body, a.r_kept
    FROM asked a;
END
$$;

-- Takes over records that are open and of the expected token, which may be the claim's own: then its lease begins anew.
-- The caller has decided that the record is open, after checking it as a whole. It is decided here again, as of now.
-- Tag 6 also for a key that has no record any more.
CREATE OR REPLACE FUNCTION take_1(calls claim_call[], actor bytea, audited boolean, pads bytea) RETURNS SETOF claim_reply
LANGUAGE plpgsql VOLATILE AS $$
#variable_conflict use_column
DECLARE
    began bigint := now_ms();
    today int := (began / 86400000)::int;
BEGIN
    RETURN QUERY
    WITH asked AS MATERIALIZED (
        SELECT u.*, r.state AS r_state, r.token AS r_token, r.fence AS r_fence, r.created AS r_created, r.mode AS r_mode,
            r.fingerprint AS r_fingerprint, r.tenant || r.self AS r_self, r.lease AS r_lease, r.lease_ms AS r_lease_ms,
            r.expires AS r_expires, r.frees AS r_frees, r.status AS r_status, r.meta AS r_meta, r.body AS r_body,
            r.kept AS r_kept, r.audit_at AS r_audit_at,
            -- Its lease had ended, so that its outcome counted as unknown.
            audited AND r.state = 1 AND r.token = u.token AND r.lease <= began AS is_back,
            CASE
                WHEN r.state IS NULL OR r.token <> u.expected THEN 'keep'
                WHEN r.state = 1 AND r.token = u.token AND began <= u.not_after THEN 'extend'
                -- Also for one who claims nothing: else nobody would see the end of the lease while duplicates wait.
                WHEN r.state = 1 AND r.lease - began > r.lease_ms THEN 'restart'
                WHEN began > u.not_after THEN 'keep'
                WHEN is_free(r.state, r.created, r.lease, r.lease_ms, r.frees, began) THEN 'claim'
                WHEN r.state IN (3, 5) AND u.window_ms <> 0 AND r.created + u.window_ms < began THEN 'take'
                WHEN (r.state = 2 OR r.state = 1 AND r.lease <= began) AND r.mode = 2 AND r.fingerprint = u.fingerprint
                THEN 'take'
                ELSE 'keep'
            END AS verdict
        FROM unnest(calls) AS u
        LEFT JOIN LATERAL (
            SELECT * FROM record WHERE record.key = u.key LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
        ) r ON true
    ), extended AS (
        UPDATE record r SET lease = began + CASE a.verdict WHEN 'extend' THEN a.lease_ms ELSE r.lease_ms END,
            audit_no = r.audit_no + a.is_back::int,
            audit_at = CASE WHEN a.is_back THEN began ELSE r.audit_at END,
            audit_digest = CASE WHEN a.is_back THEN audit_digest_of(pads, r.audit_digest, r.key, r.audit_no + 1, began, 3,
                r.token, r.fence, actor, a.rule, 0, 0, '') ELSE r.audit_digest END
        FROM asked a WHERE r.key = a.key AND a.verdict IN ('extend', 'restart')
        RETURNING note_open(r.key, r.lease), r.key, r.token, r.fence, r.audit_no, r.audit_digest, a.is_back, a.rule, a.r_audit_at
    ), returns AS (
        INSERT INTO audit (day, at, no, before_at, fence, event, key, token, actor, rule, digest)
        SELECT (SELECT partition_day('audit', today)), began,
            e.audit_no, e.r_audit_at, e.fence, 3, e.key, e.token, actor, e.rule, e.audit_digest
        FROM extended e WHERE e.is_back
    ), taken AS (
        UPDATE record r SET tenant = a.tenant, self = a.self, fingerprint = a.fingerprint, token = a.token, kept = a.kept,
            fence = a.fence, created = began, lease_ms = a.lease_ms, bucket = (SELECT partition_day('chunk', today)), mode = a.mode,
            lease = began + a.lease_ms,
            expires = began + a.retention, frees = began + a.retention, bytes = 0, chunks = 0, stage = 0, state = 1, status = 0,
            why = NULL, meta = NULL, body = NULL,
            audit_no = r.audit_no + audited::int,
            audit_at = CASE WHEN audited THEN began ELSE r.audit_at END,
            audit_digest = CASE WHEN audited THEN audit_digest_of(pads, r.audit_digest, r.key, r.audit_no + 1, began, a.event,
                a.token, a.fence, actor, a.rule, 0, 0, a.r_token) ELSE r.audit_digest END
        FROM (
            SELECT *, greatest(r_fence + 1, nextval('fence')) AS fence, CASE verdict WHEN 'take' THEN 2 ELSE 1 END AS event
            FROM asked WHERE verdict IN ('take', 'claim') OFFSET 0
        ) a
        WHERE r.key = a.key
        RETURNING note_open(r.key, r.lease), r.key, r.token, r.fence, r.audit_no, r.audit_digest, a.event, a.rule, a.r_token,
            a.r_audit_at
    ), entries AS (
        INSERT INTO audit (day, at, no, before_at, fence, event, key, token, actor, rule, detail, digest)
        SELECT (SELECT partition_day('audit', today)), began,
            t.audit_no, t.r_audit_at, t.fence, t.event, t.key, t.token, actor, t.rule, t.r_token,
            t.audit_digest
        FROM taken t WHERE audited
    )
    SELECT a.token,
        CASE WHEN a.verdict IN ('extend', 'claim', 'take') THEN 0
            WHEN a.r_state IS NULL THEN CASE WHEN is_there(a.key) THEN 7 ELSE 6 END
            WHEN a.verdict = 'restart' THEN 1
            ELSE tag_of(a.r_state, a.r_created, a.r_lease, a.r_lease_ms, a.r_expires, a.r_frees, began)
        END,
        now_ms(), coalesce(t.fence, a.r_fence), CASE WHEN t.key IS NULL THEN a.r_created ELSE began END, a.r_token, a.r_mode,
        a.r_fingerprint, a.r_self, least(a.r_lease - began, a.r_lease_ms), a.r_status, a.r_meta, a.r_body, a.r_kept
    FROM asked a LEFT JOIN taken t ON t.key = a.key;
END
$$;


-- Extends the leases of owners and notes how far their exchanges got. A lapsed lease comes back if the token still owns
-- the key. tag: 1 renewed, 2 absent, 3 unknown, 4 complete, 5 fenced, 7 busy.
CREATE OR REPLACE FUNCTION renew_1(
    calls renew_call[], actor bytea, audited boolean, pads bytea
) RETURNS TABLE (token bytea, tag int, now bigint)
LANGUAGE plpgsql VOLATILE AS $$
#variable_conflict use_column
DECLARE
    began bigint := now_ms();
    today int := (began / 86400000)::int;
BEGIN
    RETURN QUERY
    WITH asked AS MATERIALIZED (
        SELECT u.*, r.lease <= began AND audited AS is_back, r.audit_at AS r_audit_at,
            CASE
                WHEN r.state IS NULL THEN CASE WHEN is_there(u.key) THEN 7 ELSE 2 END
                WHEN r.token = '' THEN 2
                WHEN r.token <> u.token THEN 5
                WHEN r.state IN (3, 5) THEN 4
                WHEN r.state <> 1 THEN 3
                ELSE 1
            END AS tag
        FROM unnest(calls) AS u
        LEFT JOIN LATERAL (
            SELECT * FROM record WHERE record.key = u.key LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
        ) r ON true
    ), renewed AS (
        UPDATE record r SET lease = began + a.lease_ms, stage = a.stage,
            audit_no = r.audit_no + a.is_back::int,
            audit_at = CASE WHEN a.is_back THEN began ELSE r.audit_at END,
            audit_digest = CASE WHEN a.is_back THEN audit_digest_of(pads, r.audit_digest, r.key, r.audit_no + 1, began, 3,
                r.token, r.fence, actor, '', 0, 0, '') ELSE r.audit_digest END
        FROM asked a WHERE r.key = a.key AND a.tag = 1
        RETURNING r.key, r.lease, r.token, r.fence, r.audit_no, r.audit_digest, a.is_back, a.r_audit_at
    ), open AS (
        UPDATE open_key o SET score = n.lease FROM renewed n WHERE o.key = n.key
    ), entries AS (
        INSERT INTO audit (day, at, no, before_at, fence, event, key, token, actor, digest)
        SELECT (SELECT partition_day('audit', today)), began,
            n.audit_no, n.r_audit_at, n.fence, 3, n.key, n.token, actor, n.audit_digest
        FROM renewed n WHERE n.is_back
    )
    SELECT a.token, a.tag, began FROM asked a;
END
$$;

-- Keeps the last chunk of a body.
CREATE OR REPLACE FUNCTION keep_tail(day int, call settle_call) RETURNS boolean
LANGUAGE plpgsql VOLATILE SET plan_cache_mode = force_custom_plan AS $$
BEGIN
    INSERT INTO chunk AS c (day, key, token, index, bytes)
    VALUES (keep_tail.day, call.key, call.token, call.chunk_count - 1, call.tail)
    ON CONFLICT ON CONSTRAINT chunk_pkey DO UPDATE SET bytes = excluded.bytes;
    RETURN true;
END
$$;

-- Adds the entry of a key whose outcome is unknown to the index of open keys.
CREATE OR REPLACE FUNCTION note_unknown(opened bytea, mode smallint, created bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    INSERT INTO open_key (key, score) VALUES (opened, unknown_score(mode, created));
    RETURN true;
END
$$;

-- Settles a key whose record is gone. tag: 0 settled, 7 busy.
CREATE OR REPLACE FUNCTION settle_anew(call settle_call, began bigint, actor bytea, audited boolean, pads bytea) RETURNS int
LANGUAGE plpgsql VOLATILE AS $$
#variable_conflict use_column
DECLARE
    today int := (began / 86400000)::int;
    day int := partition_day('chunk', today);
    digest bytea := '';
BEGIN
    IF NOT is_ours(call.lock) THEN
        RETURN 7;
    END IF;
    IF audited THEN
        digest := audit_digest_of(pads, '', call.key, 1, began, call.event, call.token, call.fence, actor, '', call.status,
            call.size, coalesce(call.why, ''));
        INSERT INTO audit (day, at, no, before_at, fence, size, status, event, key, token, actor, detail, digest)
        VALUES (partition_day('audit', today), began, 1, 0, call.fence, call.size, call.status, call.event, call.key, call.token,
            actor, coalesce(call.why, ''), digest);
    END IF;
    INSERT INTO record (key, tenant, self, fingerprint, token, kept, fence, created, bucket, mode, expires, frees, state,
        status, chunks, bytes, why, meta, body, audit_no, audit_at, audit_digest)
    VALUES (call.key, call.tenant, call.self, call.fingerprint, call.token, call.kept, call.fence, call.created, day, call.mode,
        began + call.retention, began + call.retention + call.tombstone, CASE call.event WHEN 4 THEN 3 ELSE 2 END, call.status,
        call.chunk_count, call.size, call.why, call.meta, call.body, audited::int, CASE WHEN audited THEN began ELSE 0 END, digest);
    IF call.tail IS NOT NULL THEN
        PERFORM keep_tail(day, call);
    END IF;
    IF call.event IN (6, 7) THEN
        PERFORM note_open(call.key, unknown_score(call.mode, call.created));
    ELSE
        DELETE FROM open_key o WHERE o.key = call.key;
    END IF;
    RETURN 0;
END
$$;

-- Ends claims: stores the response, frees the key, or marks it unknown; a repeat changes nothing more.
-- tag: 1 stored, 2 released, 3 unknown, 4 torn, 5 complete, 6 fenced, 7 busy; `found`: whether there was a record.
-- A withdrawal that is repeated has a commit of its own, for standbys to confirm: it locks the row.
CREATE OR REPLACE FUNCTION settle_1(
    calls settle_call[], actor bytea, audited boolean, pads bytea
) RETURNS TABLE (token bytea, tag int, now bigint, found boolean)
LANGUAGE plpgsql VOLATILE AS $$
#variable_conflict use_column
DECLARE
    began bigint := now_ms();
    today int := (began / 86400000)::int;
BEGIN
    RETURN QUERY
    WITH asked AS MATERIALIZED (
        SELECT u AS call, u.key, u.token, u.event, r.state IS NOT NULL AND r.token <> '' AS found, r.state IS NULL AS is_new,
            r.audit_at AS r_audit_at,
            CASE
                WHEN r.state IS NULL AND is_there(u.key) THEN 7
                WHEN r.token <> u.token AND r.token <> '' THEN 6
                WHEN u.event IN (5, 8) AND (r.state IS NULL OR r.token = '') THEN 2
                WHEN u.event = 4 AND r.state = 3 AND r.token <> '' AND substr(r.meta, 50, 16) = u.digest
                    AND r.expires > began THEN 1
                WHEN r.state IN (3, 5) AND r.token <> '' THEN 5
                WHEN u.event = 4 AND u.body IS NULL AND u.chunk_count > 0
                    AND (coalesce(r.chunks, 0) <> u.chunk_count - (u.tail IS NOT NULL)::int
                        OR coalesce(r.bytes, 0) + coalesce(octet_length(u.tail), 0) <> u.size)
                    AND NOT (u.chunk_count = 1 AND coalesce(octet_length(u.tail), -1) = u.size) THEN 4
                WHEN r.state IS NULL THEN settle_anew(u, began, actor, audited, pads)
                ELSE 0
            END AS verdict
        FROM unnest(calls) AS u
        LEFT JOIN LATERAL (
            SELECT * FROM record WHERE record.key = u.key LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
        ) r ON true
    ), changed AS (
        UPDATE record r SET tenant = (a.call).tenant, self = (a.call).self, fingerprint = (a.call).fingerprint,
            mode = (a.call).mode, token = CASE WHEN a.event IN (5, 8) THEN '' ELSE a.token END,
            fence = greatest(r.fence, (a.call).fence), created = (a.call).created, expires = began + (a.call).retention,
            frees = began + (a.call).retention + (a.call).tombstone,
            state = CASE a.event WHEN 4 THEN 3 WHEN 6 THEN 2 WHEN 7 THEN 2 ELSE 4 END,
            lease = CASE WHEN a.event IN (6, 7) THEN 0 ELSE r.lease END,
            status = CASE WHEN a.event IN (5, 8) THEN 0 ELSE (a.call).status END,
            chunks = (a.call).chunk_count, bytes = (a.call).size, why = (a.call).why, meta = (a.call).meta,
            body = (a.call).body, kept = CASE WHEN a.event IN (5, 8) THEN NULL ELSE r.kept END,
            audit_no = r.audit_no + audited::int,
            audit_at = CASE WHEN audited THEN began ELSE r.audit_at END,
            audit_digest = CASE WHEN audited THEN audit_digest_of(pads, r.audit_digest, r.key, r.audit_no + 1, began, a.event,
                a.token, (a.call).fence, actor, '', (a.call).status, (a.call).size, coalesce((a.call).why, ''))
                ELSE r.audit_digest END
        FROM asked a WHERE r.key = a.key AND a.verdict = 0 AND NOT a.is_new
        RETURNING a.call, r.audit_no, r.audit_digest, a.r_audit_at,
            CASE WHEN (a.call).tail IS NOT NULL THEN keep_tail(r.bucket, a.call) END,
            -- Beside the row that goes: the statement does not see this one.
            CASE WHEN a.event IN (6, 7) THEN note_unknown(r.key, r.mode, r.created) END
    ), closed AS (
        DELETE FROM open_key o USING changed c WHERE o.key = (c.call).key
    ), entries AS (
        INSERT INTO audit (day, at, no, before_at, fence, size, status, event, key, token, actor, detail, digest)
        SELECT (SELECT partition_day('audit', today)), began, c.audit_no, c.r_audit_at, (c.call).fence, (c.call).size,
            (c.call).status, (c.call).event, (c.call).key, (c.call).token, actor, coalesce((c.call).why, ''), c.audit_digest
        FROM changed c WHERE audited
    )
    SELECT a.token,
        CASE
            WHEN a.verdict > 0 THEN a.verdict
            WHEN a.event = 4 THEN 1
            WHEN a.event IN (6, 7) THEN 3
            ELSE 2
        END,
        began, a.found
    FROM asked a;
END
$$;

-- Stores one more chunk of a response for the owner, whose renewals keep the lease; a repeat with the same bytes adds nothing.
-- tag: 1 appended, 2 absent, 3 torn (another chunk is there), 4 complete, 5 fenced, 7 busy.
CREATE OR REPLACE FUNCTION append_1(
    key bytea, token bytea, index bigint, bytes bytea
) RETURNS int
LANGUAGE plpgsql VOLATILE SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    r RECORD;
    there bytea;
BEGIN
    SELECT * INTO r FROM record WHERE record.key = append_1.key FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN CASE WHEN EXISTS (SELECT FROM record WHERE record.key = append_1.key) THEN 7 ELSE 2 END;
    ELSIF r.token <> append_1.token THEN
        RETURN CASE WHEN r.token = '' THEN 2 ELSE 5 END;
    ELSIF r.state IN (3, 5) THEN
        RETURN 4;
    END IF;
    INSERT INTO chunk VALUES (r.bucket, append_1.key, append_1.token, append_1.index, append_1.bytes) ON CONFLICT DO NOTHING;
    IF FOUND THEN
        UPDATE record SET chunks = r.chunks + 1, bytes = r.bytes + octet_length(append_1.bytes)
        WHERE record.key = append_1.key;
        RETURN 1;
    END IF;
    SELECT c.bytes INTO there FROM chunk c
    WHERE c.day = r.bucket AND c.key = append_1.key AND c.token = append_1.token AND c.index = append_1.index;
    RETURN CASE WHEN there = append_1.bytes THEN 1 ELSE 3 END;
END
$$;

-- Returns the next chunks of a complete response in their order, as many as fit in `room` bytes, at least one.
-- tag: 1 a chunk, 2 gone (the key has another record, or none, or its retention is over), 3 torn (it lacks the chunk).
CREATE OR REPLACE FUNCTION read_1(key bytea, token bytea, first bigint, room bigint) RETURNS TABLE (tag int, bytes bytea)
LANGUAGE plpgsql VOLATILE SET plan_cache_mode = force_custom_plan AS $$
#variable_conflict use_column
DECLARE
    r RECORD;
    at int;
    sent int := 0;
BEGIN
    SELECT * INTO r FROM record
    WHERE record.key = read_1.key AND record.token = read_1.token AND record.state = 3 AND record.expires > now_ms();
    IF NOT FOUND THEN
        tag := 2;
        RETURN NEXT;
        RETURN;
    END IF;
    tag := 1;
    IF r.body IS NOT NULL AND first = 0 THEN
        bytes := r.body;
        RETURN NEXT;
        RETURN;
    END IF;
    FOR at, bytes IN
        SELECT c.index, c.bytes FROM chunk c
        WHERE c.day = r.bucket AND c.key = read_1.key AND c.token = read_1.token AND c.index >= first AND c.index < r.chunks
        ORDER BY c.index
    LOOP
        EXIT WHEN at <> first + sent OR sent > 0 AND octet_length(bytes) > room;
        room := room - octet_length(bytes);
        sent := sent + 1;
        RETURN NEXT;
    END LOOP;
    IF sent = 0 THEN
        tag := 3;
        bytes := NULL;
        RETURN NEXT;
    END IF;
END
$$;

-- Decides a key for an operator, if this token still owns it: completes it (`meta` is not null) or frees it, and fences
-- the owner. A freed record stays: an owner that finds none would write its own. `new_self` names its new owner.
-- tag: 1 resolved, 2 absent, 3 released, 4 complete, 5 fenced, 7 busy.
CREATE OR REPLACE FUNCTION resolve_1(
    key bytea, token bytea, new_token bytea, new_fence bigint, new_self bytea, meta bytea, body bytea, tail bytea, retention bigint,
    tombstone bigint, status bigint, actor bytea, audited boolean, pads bytea
) RETURNS int
LANGUAGE plpgsql VOLATILE SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    began bigint := now_ms();
    r RECORD;
    event int := CASE WHEN meta IS NULL THEN 10 ELSE 9 END;
    size bigint := coalesce(octet_length(body), octet_length(tail), 0);
    digest bytea;
BEGIN
    SELECT * INTO r FROM record WHERE record.key = resolve_1.key FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN CASE WHEN EXISTS (SELECT FROM record WHERE record.key = resolve_1.key) THEN 7 ELSE 2 END;
    ELSIF r.state IN (3, 5) THEN
        RETURN 4;
    ELSIF r.state > 3 THEN
        RETURN 2;
    ELSIF r.token <> resolve_1.token THEN
        RETURN 5;
    END IF;
    UPDATE record SET token = new_token, fence = greatest(r.fence, new_fence), self = new_self,
        state = CASE event WHEN 9 THEN 3 ELSE 4 END,
        expires = CASE event WHEN 9 THEN began + retention ELSE r.expires END,
        -- Renewals leave `frees` alone: see `is_free`.
        frees = CASE event WHEN 9 THEN began + retention + tombstone
            ELSE r.frees + greatest(r.lease - r.lease_ms - r.created, 0) END,
        lease = 0, bytes = size,
        kept = CASE event WHEN 9 THEN r.kept END,
        chunks = CASE WHEN size > 0 THEN 1 ELSE 0 END, status = resolve_1.status, why = NULL, meta = resolve_1.meta, body = resolve_1.body
    WHERE record.key = resolve_1.key;
    DELETE FROM open_key o WHERE o.key = resolve_1.key;
    IF tail IS NOT NULL THEN
        INSERT INTO chunk VALUES (r.bucket, resolve_1.key, new_token, 0, tail) ON CONFLICT DO NOTHING;
    END IF;
    IF audited THEN
        digest := audit_digest_of(pads, r.audit_digest, resolve_1.key, r.audit_no + 1, began, event, resolve_1.token, r.fence,
            actor, '', status::int, size, '');
        UPDATE record SET audit_no = r.audit_no + 1, audit_at = began, audit_digest = digest WHERE record.key = resolve_1.key;
        INSERT INTO audit (day, at, no, before_at, fence, size, status, event, key, token, actor, digest)
        VALUES (partition_day('audit', (began / 86400000)::int), began, r.audit_no + 1, r.audit_at, r.fence, size, status,
            event, resolve_1.key, resolve_1.token, actor, digest);
    END IF;
    RETURN CASE event WHEN 9 THEN 1 ELSE 3 END;
END
$$;

-- Drops the response of a complete record whose retention is over, or that an operator purges. Its tombstone stays.
-- A purge also drops what came of a response that was not kept, or whose outcome was marked unknown.
-- tag: 1 dropped, 2 kept (its retention is not over), 3 absent, 4 fenced, 7 busy.
CREATE OR REPLACE FUNCTION drop_1(
    key bytea, token bytea, purge boolean, actor bytea, audited boolean, pads bytea
) RETURNS int
LANGUAGE plpgsql VOLATILE SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    began bigint := now_ms();
    r RECORD;
    event int := CASE WHEN purge THEN 12 ELSE 11 END;
BEGIN
    SELECT * INTO r FROM record WHERE record.key = drop_1.key FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN CASE WHEN EXISTS (SELECT FROM record WHERE record.key = drop_1.key) THEN 7 ELSE 3 END;
    ELSIF r.state NOT IN (3, 5)
            AND NOT (purge AND r.state = 2 AND r.chunks = 0 AND r.token = drop_1.token) THEN
        RETURN 3;
    ELSIF r.token <> drop_1.token THEN
        RETURN 4;
    ELSIF r.state = 5 THEN
        RETURN 1;
    ELSIF NOT purge AND r.expires > began THEN
        RETURN 2;
    END IF;
    DELETE FROM chunk WHERE day = r.bucket AND chunk.key = drop_1.key AND (purge OR r.body IS NULL AND r.chunks > 0);
    IF r.state = 2 AND NOT FOUND THEN
        RETURN 3;
    END IF;
    IF audited THEN
        r.audit_digest := audit_digest_of(pads, r.audit_digest, r.key, r.audit_no + 1, began, event, r.token, r.fence, actor, '',
            r.status, r.bytes, '');
        INSERT INTO audit (day, at, no, before_at, fence, size, status, event, key, token, actor, digest)
        VALUES (partition_day('audit', (began / 86400000)::int), began, r.audit_no + 1, r.audit_at, r.fence, r.bytes, r.status,
            event, r.key, r.token, actor, r.audit_digest);
        r.audit_no := r.audit_no + 1;
        r.audit_at := began;
    END IF;
    UPDATE record SET state = CASE r.state WHEN 2 THEN 2 ELSE 5 END, chunks = 0, bytes = 0, meta = NULL, body = NULL,
        kept = CASE r.state WHEN 2 THEN r.kept END,
        audit_no = r.audit_no, audit_at = r.audit_at, audit_digest = r.audit_digest
    WHERE record.key = drop_1.key;
    RETURN 1;
END
$$;

-- Housekeeping of one stretch of the table: drops the responses whose retention is over, and removes the rows of keys that
-- are free by now. It goes by where rows lie on the disk, because an index on a time would be one more thing to update.
-- `holder` must have the work's lease, or it must be free; else `blocks` is null. `latest`: the caller's own time. The
-- server's clock alone removes nothing, because it may have stepped ahead.
-- blocks: of the whole table. behind: ms since the first of these rows was due. life: how many ms the one among them is
-- kept that is kept for the shortest time.
CREATE OR REPLACE FUNCTION sweep_1(
    first bigint, most bigint, latest bigint, holder bytea, term bigint, audited boolean, pads bytea,
    OUT blocks bigint, OUT expired bigint, OUT removed bigint, OUT behind bigint, OUT life bigint
) LANGUAGE plpgsql VOLATILE AS $$
#variable_conflict use_column
DECLARE
    began bigint := least(now_ms(), latest);
    audit_day int := partition_day('audit', (now_ms() / 86400000)::int);
    start tid := format('(%s,0)', first)::tid;
    past tid := format('(%s,0)', first + most)::tid;
BEGIN
    INSERT INTO lease AS held (name, owner, until) VALUES ('housekeeping', holder, now_ms() + term)
    ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, until = excluded.until
    -- Longer than a whole lease from now: the clock stepped back.
    WHERE held.owner = excluded.owner OR held.until NOT BETWEEN now_ms() + 1 AND now_ms() + term;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    WITH due AS MATERIALIZED (
        SELECT r.key, r.audit_at AS before_at, r.bytes, r.frees - r.created AS life,
            coalesce(audited AND r.state < 4, false) AS is_told,
            CASE WHEN r.state = 4 THEN r.frees <= began
                ELSE is_free(r.state, r.created, r.lease, r.lease_ms, r.frees, began) END AS is_over,
            began - CASE r.state WHEN 3 THEN r.expires WHEN 1 THEN greatest(r.lease, r.frees) ELSE r.frees END AS late
        FROM record r
        WHERE r.ctid >= start AND r.ctid < past AND (
            r.state = 3 AND r.expires <= began
            OR r.frees <= began AND (r.state IN (2, 4, 5)
                OR r.state = 1 AND is_free(r.state, r.created, r.lease, r.lease_ms, r.frees, began)))
        FOR UPDATE SKIP LOCKED
    ), dropped AS (
        UPDATE record r SET state = 5, chunks = 0, bytes = 0, meta = NULL, body = NULL, kept = NULL,
            audit_no = r.audit_no + d.is_told::int,
            audit_at = CASE WHEN d.is_told THEN began ELSE r.audit_at END,
            audit_digest = CASE WHEN d.is_told THEN audit_digest_of(pads, r.audit_digest, r.key, r.audit_no + 1, began, 11, r.token,
                r.fence, holder, '', r.status, d.bytes, '') ELSE r.audit_digest END
        FROM due d WHERE r.key = d.key AND NOT d.is_over
        RETURNING r.key, r.token, r.fence, r.status, r.audit_no, r.audit_digest, d.bytes, d.before_at, d.is_told
    ), gone AS (
        DELETE FROM record r USING due d WHERE r.key = d.key AND d.is_over
        RETURNING r.key, r.token, r.fence, r.status, r.audit_no + 1 AS audit_no,
            CASE WHEN d.is_told THEN audit_digest_of(pads, r.audit_digest, r.key, r.audit_no + 1, began, 11, r.token, r.fence,
                holder, '', r.status, d.bytes, '') END AS audit_digest,
            d.bytes, d.before_at, d.is_told
    ), entries AS (
        INSERT INTO audit (day, at, no, before_at, fence, size, status, event, key, token, actor, digest)
        SELECT audit_day, began, e.audit_no, e.before_at, e.fence, e.bytes, e.status, 11, e.key, e.token, holder, e.audit_digest
        FROM (SELECT * FROM dropped UNION ALL SELECT * FROM gone) e WHERE e.is_told
    )
    SELECT pg_relation_size('record') / current_setting('block_size')::bigint, count(*) FILTER (WHERE NOT is_over),
        count(*) FILTER (WHERE is_over), coalesce(max(late), 0), coalesce(min(due.life), 0)
    INTO blocks, expired, removed, behind, life FROM due;
    -- Marks last for minutes, so that their table is small.
    IF first = 0 THEN
        DELETE FROM mark WHERE expires <= began;
    END IF;
END
$$;

-- One row: the data set, the run of the server that it was last seen on, and the end of its quarantine.
CREATE TABLE IF NOT EXISTS epoch (
    place smallint PRIMARY KEY DEFAULT 1 CHECK (place = 1),
    id    bytea    NOT NULL,
    run   bytea    NOT NULL,
    until bigint   NOT NULL
);

-- What one proxy says of itself to the others, and what it is told. It writes its rules, its counter, and its settings
-- (`mode` 1: only if others have the same, 2: if they or none have settings, 3: in any case).
-- `run` names the run of the server; empty: another run has lost nothing. `begins`: the caller has found a loss.
-- agreement: same, accepted, free, or differs with the settings of others. before: the counter as it was.
CREATE OR REPLACE FUNCTION inspect_1(
    prefix bytea, name bytea, counter bigint, retention bigint, identity bytea, settings bytea, mode int,
    rules bytea, live bigint, fresh bytea, run bytea, quarantine bigint, begins boolean,
    OUT agreement bytea[], OUT rules_differ boolean, OUT is_founded boolean, OUT is_moved boolean, OUT epoch bytea,
    OUT left_ms bigint, OUT before bigint
) LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    began bigint := now_ms();
    known RECORD;
    others bytea[];
    is_known boolean;
    agrees boolean;
BEGIN
    INSERT INTO epoch (id, run, until) VALUES (fresh, inspect_1.run, began + quarantine) ON CONFLICT DO NOTHING;
    is_founded := FOUND;
    SELECT * INTO known FROM epoch;
    is_moved := inspect_1.run <> '' AND known.run <> '' AND known.run <> inspect_1.run;
    IF is_moved OR begins OR known.run = '' AND inspect_1.run <> '' THEN
        UPDATE epoch AS e SET run = inspect_1.run,
            until = CASE WHEN is_moved OR begins THEN greatest(e.until, began + quarantine) ELSE e.until END
        RETURNING e.* INTO known;
    END IF;
    inspect_1.epoch := known.id;
    -- An end further off than a whole quarantine means that the clock stepped back.
    left_ms := least(greatest(known.until - began, 0), quarantine);

    SELECT p.counter, p.identity = inspect_1.identity INTO before, is_known FROM proxy p WHERE p.prefix = inspect_1.prefix;
    IF is_moved OR begins OR coalesce(before, 0) < inspect_1.counter - 1 THEN
        -- The sequence may have gone back with the rest. One at a time, as two calls could set it back.
        PERFORM FROM epoch FOR UPDATE;
        PERFORM setval('fence', now_ms() * 1000) FROM fence WHERE last_value < now_ms() * 1000;
    END IF;
    IF is_known IS NOT TRUE THEN
        -- One proxy at a time writes settings for the first time, and sees what those before it wrote.
        PERFORM FROM epoch FOR UPDATE;
        DELETE FROM proxy p WHERE began - p.at_ms > p.retention_ms AND p.prefix <> inspect_1.prefix;
    END IF;
    -- Settings by which no record is named any more are gone with their proxies.
    SELECT coalesce(array_agg(DISTINCT p.settings) FILTER (WHERE p.identity <> inspect_1.identity), '{}'),
           coalesce(bool_or(p.identity = inspect_1.identity), false)
    INTO others, is_known
    FROM proxy p WHERE began - p.at_ms <= p.retention_ms AND p.identity IS NOT NULL AND p.prefix <> inspect_1.prefix
        OR p.prefix = inspect_1.prefix AND p.identity = inspect_1.identity;
    IF NOT is_known AND others <> '{}' AND mode <> 3 THEN
        agreement := array_prepend('differs'::bytea, others);
    ELSIF NOT is_known AND others = '{}' AND mode = 1 THEN
        agreement := ARRAY['free'::bytea];
    ELSE
        agrees := true;
        agreement := ARRAY[CASE WHEN is_known OR others = '{}' THEN 'same' ELSE 'accepted' END::bytea];
    END IF;
    rules_differ := EXISTS (SELECT FROM proxy p WHERE p.prefix <> inspect_1.prefix AND p.rules <> inspect_1.rules
        AND began - p.at_ms BETWEEN -live AND live);
    INSERT INTO proxy (prefix, counter, name, retention_ms, at_ms, identity, settings, rules)
    VALUES (inspect_1.prefix, inspect_1.counter, inspect_1.name, retention, began,
        CASE WHEN agrees THEN inspect_1.identity END, CASE WHEN agrees THEN inspect_1.settings END, inspect_1.rules)
    ON CONFLICT ON CONSTRAINT proxy_pkey DO UPDATE SET counter = excluded.counter, name = excluded.name,
        retention_ms = excluded.retention_ms, at_ms = began, identity = excluded.identity, settings = excluded.settings,
        rules = excluded.rules;
END
$$;
