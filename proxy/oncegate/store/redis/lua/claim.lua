-- Claims a key that is free, or open and still of the expected token; otherwise, and after not_after, returns its record.
-- KEYS: record
-- ARGV: tag token fingerprint self mode lease_ms retention_ms not_after_ms inline_bytes window_ms expected_token
-- Returns: {tag, 'claimed', now_ms, fence, created_ms}
--        | {tag, 'late', now_ms}
--        | {tag, 'complete', now_ms, meta, body or false}
--        | {tag, 'expired', now_ms, meta}
--        | {tag, state, now_ms, token, fence, mode, fingerprint, self, lease_left_ms, created_ms, status or false}
local tag, token, fingerprint, self = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local lease_ms, window_ms, expected_token = tonumber(ARGV[6]), tonumber(ARGV[10]), ARGV[11]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local late = now > tonumber(ARGV[8])
local fields = redis.call('HMGET', KEYS[1], 'meta', 'state', 'token', 'fence', 'mode', 'fingerprint', 'self',
  'lease', 'created', 'lease_ms', 'status', 'until')
local meta, state, fence, created = fields[1], fields[2], fields[4], now
local ours = fields[3] == token and state == 'in_flight'

-- The caller has decided that the record is open, after checking it as a whole. It is decided here again, as of now.
if meta then
  -- The first bytes of meta have fixed places: version, token, fence, created (see store/record.py).
  local past = window_ms > 0 and (tonumber(meta:sub(34, 49)) or now) + window_ms < now
  if not past or late or expected_token == '' or meta:sub(2, 17) ~= expected_token then
    -- Past its retention a record is its tombstone, whether its response has been dropped or not.
    if meta:byte() == 3 or (tonumber(fields[12]) or math.huge) <= now then
      return {tag, 'expired', now, meta}
    end
    -- A body of one chunk comes along. The first of several chunks alone would be of no use.
    local small = redis.call('HLEN', KEYS[1]) <= (fields[12] and 3 or 2) and redis.call('HSTRLEN', KEYS[1], 'b0') <= tonumber(ARGV[9])
    local body = small and redis.call('HGET', KEYS[1], 'b0')
    return {tag, 'complete', now, meta, body}
  end
  fence = meta:sub(18, 33)
elseif ours then
  created = tonumber(fields[9])
elseif state ~= 'released' and (state or redis.call('EXISTS', KEYS[1]) == 1) then
  local left, whole = (tonumber(fields[8]) or 0) - now, tonumber(fields[10]) or lease_ms
  if state == 'in_flight' and left > whole then
    -- The clock stepped back. The lease begins anew, so that a dead owner's ends after one lease: a live one renews it.
    -- HDEL is allowed at the memory limit, and so is every command behind it in a script. A write first is refused.
    left = whole
    redis.call('HDEL', KEYS[1], 'lease')
    redis.call('HSET', KEYS[1], 'lease', now + whole)
  end
  local ended = state == 'unknown' or (state == 'in_flight' and left <= 0)
  local open = ended and fields[5] == 'retry' and fields[6] == fingerprint and expected_token ~= '' and fields[3] == expected_token
  if not open or late then
    return {tag, state, now, fields[3], fence, fields[5], fields[6], fields[7], left, fields[9], fields[11]}
  end
end

if late then
  return {tag, 'late', now}
end
if ours then
  redis.call('HSET', KEYS[1], 'lease', now + lease_ms)
else
  -- Greater than every fence given before, also across releases, which leave no record behind.
  fence = string.format('%.0f', math.max((tonumber(fence) or 0) + 1, time[1] * 1000000 + time[2]))
  if meta or state then
    -- UNLINK is allowed at the memory limit, and so is every command behind it in a script. A write first is refused.
    redis.call('HSET', KEYS[1], 'lease', 0)
    redis.call('UNLINK', KEYS[1])
  end
  redis.call('HSET', KEYS[1], 'state', 'in_flight', 'token', token, 'fence', fence, 'mode', ARGV[5],
    'fingerprint', fingerprint, 'self', self, 'lease', now + lease_ms, 'created', now, 'lease_ms', lease_ms)
end
redis.call('PEXPIRE', KEYS[1], ARGV[7])
return {tag, 'claimed', now, fence, created}
