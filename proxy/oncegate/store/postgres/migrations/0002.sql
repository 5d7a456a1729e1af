-- Schema version 2: a response can be followed while it runs, and records are read without a right to write. See 0001.sql for the rules of these files.
-- No table changes. take_1 and settle_1 are as they were but for one thing: a claim that takes the place of another notes
-- that. Proxies of the version before note it as well.

-- Numbered field 12, which is empty and comes first (store/kept.py): another execution may have come under the key before.
CREATE OR REPLACE FUNCTION replacing_2(kept bytea) RETURNS bytea LANGUAGE sql IMMUTABLE AS
$$ SELECT '\x0c0000'::bytea || coalesce(kept, '') $$;
CREATE OR REPLACE FUNCTION is_replacing_2(kept bytea) RETURNS boolean LANGUAGE sql IMMUTABLE AS
$$ SELECT coalesce(substr(kept, 1, 3) = '\x0c0000', false) $$;

-- Who reads a response while it runs is a mark, and not a column of its record: a reader must not lock what the owner is
-- about to write. A mark is not logged, so it costs no WAL.
CREATE OR REPLACE FUNCTION reading_name_2(key bytea, token bytea) RETURNS bytea LANGUAGE sql IMMUTABLE AS
$$ SELECT 'reading:'::bytea || key || token $$;

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
            body = (a.call).body, kept = CASE WHEN a.event NOT IN (5, 8) THEN r.kept WHEN is_replacing_2(r.kept) THEN replacing_2(NULL) END,
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

-- Returns what claim_1 does past `not_after`, also to a session that may not write: so known keys are told, whatever keeps new
-- ones from being claimed.
CREATE OR REPLACE FUNCTION peek_2(calls claim_call[], actor bytea, audited boolean, pads bytea) RETURNS SETOF claim_reply
LANGUAGE plpgsql VOLATILE AS $$
#variable_conflict use_column
DECLARE
    began bigint := now_ms();
BEGIN
    RETURN QUERY
    SELECT u.token,
        CASE WHEN r.state IS NULL THEN 6
            ELSE tag_of(r.state, r.created, r.lease, r.lease_ms, r.expires, r.frees, began) END,
        began, r.fence, coalesce(r.created, began), r.token, r.mode, r.fingerprint, r.tenant || r.self,
        least(r.lease - began, r.lease_ms), r.status, r.meta, r.body, r.kept
    FROM unnest(calls) AS u LEFT JOIN LATERAL (SELECT * FROM record WHERE record.key = u.key LIMIT 1) r ON true;
END
$$;

-- Stores one more chunk of a response for the owner, as append_1 does, and with the first one its head, as chunk -1: it lasts
-- as long as the chunks do. An empty head is none.
-- tag: 1 appended, 8 appended and somebody reads, 2 absent, 3 torn (another chunk is there), 4 complete, 5 fenced, 7 busy.
CREATE OR REPLACE FUNCTION append_2(key bytea, token bytea, index bigint, bytes bytea, head bytea) RETURNS int
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    r RECORD;
BEGIN
    SELECT o.state, o.token, o.bucket, o.chunks, o.bytes INTO r
    FROM record o WHERE o.key = append_2.key FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN CASE WHEN is_there(append_2.key) THEN 7 ELSE 2 END;
    ELSIF r.token <> append_2.token THEN
        RETURN CASE WHEN r.token = '' THEN 2 ELSE 5 END;
    ELSIF r.state IN (3, 5) THEN
        RETURN 4;
    END IF;
    -- An insert finds its partition by itself, and locks no other.
    INSERT INTO chunk (day, key, token, index, bytes)
    VALUES (r.bucket, append_2.key, append_2.token, append_2.index, append_2.bytes) ON CONFLICT DO NOTHING;
    IF FOUND THEN
        UPDATE record o SET chunks = r.chunks + 1, bytes = r.bytes + octet_length(append_2.bytes) WHERE o.key = append_2.key;
        IF head <> '' THEN
            INSERT INTO chunk (day, key, token, index, bytes) VALUES (r.bucket, append_2.key, append_2.token, -1, head)
            ON CONFLICT DO NOTHING;
        END IF;
    ELSIF NOT has_chunk_2(r.bucket, append_2.key, append_2.token, append_2.index, append_2.bytes) THEN
        RETURN 3;
    END IF;
    IF EXISTS (SELECT FROM mark m WHERE m.name = reading_name_2(append_2.key, append_2.token) AND m.expires > now_ms()) THEN
        RETURN 8;
    END IF;
    RETURN 1;
END
$$;

-- Whether a chunk that is there has these bytes.
CREATE OR REPLACE FUNCTION has_chunk_2(day int, key bytea, token bytea, index bigint, bytes bytea) RETURNS boolean
LANGUAGE plpgsql VOLATILE SET plan_cache_mode = force_custom_plan AS $$
BEGIN
    RETURN EXISTS (SELECT FROM chunk c WHERE c.day = has_chunk_2.day AND c.key = has_chunk_2.key
        AND c.token = has_chunk_2.token AND c.index = has_chunk_2.index AND c.bytes = has_chunk_2.bytes);
END
$$;

-- Returns the chunks from `first` to before `past` in their order, as many as fit in `room` bytes, at least one, and with
-- the first one the head. None where the first of them is not there.
CREATE OR REPLACE FUNCTION chunks_2(
    day int, key bytea, token bytea, first bigint, past bigint, room bigint, OUT head bytea, OUT chunks bytea[]
) LANGUAGE plpgsql VOLATILE SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    at int;
    bytes bytea;
    due bigint := first;
BEGIN
    FOR at, bytes IN
        SELECT c.index, c.bytes FROM chunk c
        WHERE c.day = chunks_2.day AND c.key = chunks_2.key AND c.token = chunks_2.token
            AND c.index >= CASE first WHEN 0 THEN -1 ELSE first END AND c.index < past
        ORDER BY c.index
    LOOP
        IF at < 0 THEN
            head := bytes;
            CONTINUE;
        END IF;
        EXIT WHEN at <> due OR due > first AND octet_length(bytes) > room;
        room := room - octet_length(bytes);
        due := due + 1;
        chunks := array_append(chunks, bytes);
    END LOOP;
END
$$;

-- What follow_2 is called with: `first` as in chunks_2; `reading`: for how many ms to note that somebody reads the response,
-- 0 for not.
DO $$ BEGIN
    CREATE TYPE follow_call_2 AS (key bytea, token bytea, first bigint, room bigint, reading bigint);
EXCEPTION WHEN duplicate_object THEN END $$;

-- Notes at most once a second that somebody reads. It waits for nobody that removes old marks, and what another statement is
-- about to write is left to it.
CREATE OR REPLACE FUNCTION note_reading_2(key bytea, token bytea, now bigint, reading bigint) RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    until bigint;
BEGIN
    SELECT m.expires INTO until FROM mark m WHERE m.name = reading_name_2(key, token);
    IF NOT FOUND THEN
        INSERT INTO mark (name, value, expires) VALUES (reading_name_2(key, token), '', now + reading) ON CONFLICT DO NOTHING;
    -- A time that is further off than a minute is one of a clock that stepped back.
    ELSIF until NOT BETWEEN now + reading - least(1000, reading / 2) AND now + 60000 THEN
        UPDATE mark m SET expires = now + reading
        WHERE m.name = (SELECT o.name FROM mark o WHERE o.name = reading_name_2(key, token) FOR NO KEY UPDATE SKIP LOCKED);
    END IF;
END
$$;

-- Returns the response of one claim as far as it is stored: see follow_2.
CREATE OR REPLACE FUNCTION follow_one_2(
    call follow_call_2, OUT tag int, OUT now bigint, OUT lease_left bigint, OUT count int, OUT replaced boolean,
    OUT stage smallint, OUT meta bytea, OUT head bytea, OUT chunks bytea[]
) LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    r RECORD;
BEGIN
    now := now_ms();
    SELECT o.bucket, o.lease, o.lease_ms, o.chunks, o.body, o.meta, o.kept, o.stage,
        tag_of(o.state, o.created, o.lease, o.lease_ms, o.expires, o.frees, now) AS tag
    INTO r FROM record o WHERE o.key = call.key AND o.token = call.token;
    tag := CASE WHEN FOUND AND r.tag NOT IN (4, 9) THEN r.tag ELSE 0 END;
    IF tag = 0 THEN
        RETURN;
    END IF;
    count := CASE WHEN tag <> 5 THEN r.chunks ELSE 0 END;
    replaced := is_replacing_2(r.kept);
    stage := r.stage;
    IF tag = 3 THEN
        meta := r.meta;
    ELSIF tag IN (1, 8) THEN
        lease_left := least(r.lease - now, r.lease_ms);
        IF call.reading > 0 THEN
            PERFORM note_reading_2(call.key, call.token, now, call.reading);
        END IF;
    END IF;
    IF r.body IS NOT NULL AND count > call.first THEN
        chunks := ARRAY[r.body];
    ELSIF count > call.first THEN
        SELECT c.head, c.chunks INTO head, chunks
        FROM chunks_2(r.bucket, call.key, call.token, call.first, count, call.room) c;
    END IF;
END
$$;

-- Returns the responses of claims as far as they are stored: the chunks from `first` on, as many as fit in `room` bytes, at
-- least one, and with the first chunk the head.
-- tag: as in claim_1, 1, 2, 3, 5 or 8; 0 gone, as the key has the record of another claim, or none.
CREATE OR REPLACE FUNCTION follow_2(calls follow_call_2[], actor bytea, audited boolean, pads bytea) RETURNS TABLE (
    token bytea, tag int, now bigint, lease_left bigint, count int, replaced boolean, stage smallint, meta bytea, head bytea,
    chunks bytea[]
) LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN QUERY SELECT u.token, f.* FROM unnest(calls) AS u, LATERAL follow_one_2(u) f;
END
$$;
