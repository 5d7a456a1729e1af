-- Schema version 3: what was kept to ask an API about an open key is gone once the key is complete, and a decision can leave a
-- running lease alone and give its evidence. See 0001.sql for the rules of these files.
-- No table changes. settle_1 is as it was but for one thing: a complete record has the fields 13 and 14 no more. Proxies of the
-- version before write none, and decide by resolve_1 as they did.

-- The numbered fields that a complete record has. Those of an open key alone, 13 and 14, come before all others but 12
-- (store/kept.py): hardly any record has them, and one byte says so to whoever calls this.
CREATE OR REPLACE FUNCTION of_complete_3(kept bytea) RETURNS bytea LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    begins int := CASE WHEN is_replacing_2(kept) THEN 3 ELSE 0 END;
    at int := begins;
BEGIN
    WHILE CASE WHEN octet_length(kept) >= at + 3 THEN get_byte(kept, at) IN (13, 14) ELSE false END LOOP
        at := at + 3 + 256 * get_byte(kept, at + 1) + get_byte(kept, at + 2);
    END LOOP;
    RETURN nullif(substr(kept, 1, begins) || substr(kept, at + 1), '');
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
            body = (a.call).body,
            kept = CASE WHEN a.event = 4 AND r.kept >= '\x0c' THEN of_complete_3(r.kept) WHEN a.event NOT IN (5, 8) THEN r.kept
                WHEN is_replacing_2(r.kept) THEN replacing_2(NULL) END,
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

-- Decides a key for an operator, if this token still owns it: completes it (`meta` is not null) or frees it, and fences
-- the owner. A freed record stays: an owner that finds none would write its own. `new_self` names its new owner.
-- `seen_lease`: where the lease ended that was seen, 0 of an unknown outcome: nothing is changed where it runs or is another; null
-- for whatever it is. `evidence`: for the trail. A repeat changes nothing.
-- tag: 1 resolved, 2 absent, 3 released, 4 complete, 5 fenced, 6 running, 7 busy.
CREATE OR REPLACE FUNCTION resolve_3(
    key bytea, token bytea, new_token bytea, new_fence bigint, new_self bytea, meta bytea, body bytea, tail bytea, retention bigint,
    tombstone bigint, status bigint, seen_lease bigint, evidence bytea, actor bytea, audited boolean, pads bytea
) RETURNS int
LANGUAGE plpgsql VOLATILE SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    began bigint := now_ms();
    r RECORD;
    event int := CASE WHEN meta IS NULL THEN 10 ELSE 9 END;
    size bigint := coalesce(octet_length(body), octet_length(tail), 0);
    digest bytea;
BEGIN
    SELECT * INTO r FROM record WHERE record.key = resolve_3.key FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN CASE WHEN EXISTS (SELECT FROM record WHERE record.key = resolve_3.key) THEN 7 ELSE 2 END;
    ELSIF r.state IN (3, 5) THEN
        RETURN CASE WHEN event = 9 AND r.token = new_token THEN 1 ELSE 4 END;
    ELSIF r.state > 3 THEN
        RETURN CASE WHEN event = 10 AND r.token = new_token THEN 3 ELSE 2 END;
    ELSIF r.token <> resolve_3.token THEN
        RETURN 5;
    ELSIF seen_lease <> (CASE r.state WHEN 1 THEN r.lease ELSE 0 END)
            OR seen_lease IS NOT NULL AND r.state = 1 AND r.lease > began THEN
        RETURN 6;
    END IF;
    UPDATE record SET token = new_token, fence = greatest(r.fence, new_fence), self = new_self,
        state = CASE event WHEN 9 THEN 3 ELSE 4 END,
        expires = CASE event WHEN 9 THEN began + retention ELSE r.expires END,
        -- Renewals leave `frees` alone: see `is_free`.
        frees = CASE event WHEN 9 THEN began + retention + tombstone
            ELSE r.frees + greatest(r.lease - r.lease_ms - r.created, 0) END,
        lease = 0, bytes = size,
        kept = CASE event WHEN 9 THEN of_complete_3(r.kept) END,
        chunks = CASE WHEN size > 0 THEN 1 ELSE 0 END, status = resolve_3.status, why = NULL, meta = resolve_3.meta, body = resolve_3.body
    WHERE record.key = resolve_3.key;
    DELETE FROM open_key o WHERE o.key = resolve_3.key;
    IF tail IS NOT NULL THEN
        INSERT INTO chunk VALUES (r.bucket, resolve_3.key, new_token, 0, tail) ON CONFLICT DO NOTHING;
    END IF;
    IF audited THEN
        digest := audit_digest_of(pads, r.audit_digest, resolve_3.key, r.audit_no + 1, began, event, resolve_3.token, r.fence,
            actor, '', status::int, size, evidence);
        UPDATE record SET audit_no = r.audit_no + 1, audit_at = began, audit_digest = digest WHERE record.key = resolve_3.key;
        INSERT INTO audit (day, at, no, before_at, fence, size, status, event, key, token, actor, detail, digest)
        VALUES (partition_day('audit', (began / 86400000)::int), began, r.audit_no + 1, r.audit_at, r.fence, size, status,
            event, resolve_3.key, resolve_3.token, actor, evidence, digest);
    END IF;
    RETURN CASE event WHEN 9 THEN 1 ELSE 3 END;
END
$$;

-- As proxies of the version before call it.
CREATE OR REPLACE FUNCTION resolve_1(
    key bytea, token bytea, new_token bytea, new_fence bigint, new_self bytea, meta bytea, body bytea, tail bytea, retention bigint,
    tombstone bigint, status bigint, actor bytea, audited boolean, pads bytea
) RETURNS int
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN resolve_3(key, token, new_token, new_fence, new_self, meta, body, tail, retention, tombstone, status, NULL, '', actor,
        audited, pads);
END
$$;

-- Takes over records that are open and of the expected token, which may be the claim's own: then its lease begins anew.
-- The caller has decided that the record is open, after checking it as a whole. It is decided here again, as of now.
-- Tag 6 also for a key that has no record any more. With an 'h' behind the expected token, a record in the mode hold is open,
-- too: its request is sent once more to an API that recognizes the key. Proxies of the version before never write it.
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
                WHEN r.state IS NULL OR r.token <> substr(u.expected, 1, 16) THEN 'keep'
                WHEN r.state = 1 AND r.token = u.token AND began <= u.not_after THEN 'extend'
                -- Also for one who claims nothing: else nobody would see the end of the lease while duplicates wait.
                WHEN r.state = 1 AND r.lease - began > r.lease_ms THEN 'restart'
                WHEN began > u.not_after THEN 'keep'
                WHEN is_free(r.state, r.created, r.lease, r.lease_ms, r.frees, began)
                THEN CASE WHEN octet_length(u.expected) > 16 THEN 'keep' ELSE 'claim' END
                WHEN r.state IN (3, 5) AND u.window_ms <> 0 AND r.created + u.window_ms < began THEN 'take'
                WHEN (r.state = 2 OR r.state = 1 AND r.lease <= began) AND r.fingerprint = u.fingerprint
                    AND (r.mode = 2 OR r.mode = 1 AND octet_length(u.expected) > 16)
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
        UPDATE record r SET tenant = a.tenant, self = a.self, fingerprint = a.fingerprint, token = a.token,
            -- What an operator released, and a replacement that was given up, count until their time is over.
            kept = CASE WHEN a.verdict = 'take' OR a.r_frees > began AND (a.r_token <> '' OR is_replacing_2(a.r_kept))
                THEN replacing_2(a.kept) ELSE a.kept END,
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
        RETURNING note_open(r.key, r.lease), r.key, r.token, r.kept, r.fence, r.audit_no, r.audit_digest, a.event, a.rule,
            a.r_token, a.r_audit_at
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
        a.r_fingerprint, a.r_self, least(a.r_lease - began, a.r_lease_ms), a.r_status, a.r_meta, a.r_body,
        CASE WHEN t.key IS NULL THEN a.r_kept ELSE t.kept END
    FROM asked a LEFT JOIN taken t ON t.key = a.key;
END
$$;
