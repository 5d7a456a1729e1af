-- Claims a key that is free, or open and still of the expected token; otherwise, and after not_after, returns its record.
-- KEYS: record
-- ARGV: tag token terms retention_ms not_after_ms layout window_ms expected_token
--   terms: of a packed claim, all from the length of its lease on (see store/redis/layouts/packed.py)
--   layout: in which the claim is written, 'packed' or 'hash'
--   expected_token: of the record that the claim may take over, else ''. With an 'h' behind it, a record in the mode hold
--     is open, too, and a key without a record is not: the claim would be late there.
-- Returns: tag .. ' claimed ' .. now_ms .. ' ' .. fence .. ' ' .. created_ms
--        | tag .. ' claimed ' .. now_ms .. ' ' .. fence .. ' ' .. created_ms .. ' replaced'
--        | tag .. ' late ' .. now_ms
--        | {tag, 'packed', now_ms, value}
--        | {tag, 'complete', now_ms, meta, body or false, more or false}
--        | {tag, 'expired', now_ms, meta}
--        | {tag, state, now_ms, token, fence, mode, fingerprint, self, lease_left_ms, created_ms, status or false, more or false}
--   replaced: the claim has taken the place of another record, and says so in a numbered field (see store/kept.py)
-- The index of open keys (see store/redis/layouts/open_index.py). It never fails a claim.
local index = 'once:open'
local tag, token, terms, layout = ARGV[1], ARGV[2], ARGV[3], ARGV[6]
local resends = #ARGV[8] > 16
local time = redis.call('TIME')
local micros = string.format('%010d%06d', time[1], time[2])
local created = micros:sub(1, 13)
local now = tonumber(created)
local late = now > tonumber(ARGV[5])
local value, fields
if layout == 'packed' then
  if late or resends then
    value = redis.pcall('GET', KEYS[1])
  else
    local claim = '\4' .. token .. micros .. created .. created .. terms
    value = redis.pcall('SET', KEYS[1], claim, 'NX', 'GET', 'PX', ARGV[4])
    if not value then
      if index then
        redis.pcall('ZADD', index, string.format('%d', now + terms:sub(1, 10)), KEYS[1])
      end
      return tag .. ' claimed ' .. created .. ' ' .. micros .. ' ' .. created
    end
  end
end
if type(value) ~= 'string' then
  -- The record is a hash, or the server refuses writes. The record is read all the same.
  fields = value ~= false and redis.pcall('HMGET', KEYS[1], 'meta', 'state', 'token', 'fence', 'mode', 'fingerprint',
    'self', 'lease', 'created', 'lease_ms', 'status', 'until', 'more') or {}
  value = fields.err and (redis.call('GET', KEYS[1]) or redis.call('HMGET', KEYS[1], 'meta'))
end

local lease_ms, window_ms, expected_token = tonumber(terms:sub(1, 10)), tonumber(ARGV[7]), ARGV[8]:sub(1, 16)
local self, fingerprint = terms:sub(14, 45), terms:sub(46, 61)
local fence, replaced, open = nil, '', false
-- The caller has decided that the record is open, after checking it as a whole. It is decided here again, as of now.
if value then
  -- A packed claim has from byte 2 on its token, 18 fence, 34 created, 47 leased, 60 length of the lease, 70 stage, 71 state,
  -- 72 mode, 73 self, 105 fingerprint (see store/redis/layouts/packed.py).
  local version, owner, state = value:byte(), value:sub(2, 17), value:sub(71, 71)
  if version == 4 then
    fence = value:sub(18, 33)
    if owner == token and state == 'i' then
      if late then
        return tag .. ' late ' .. created
      end
      redis.call('SETRANGE', KEYS[1], 46, created .. terms:sub(1, 10))
      redis.call('PEXPIRE', KEYS[1], ARGV[4])
      if index then
        redis.pcall('ZADD', index, now + lease_ms, KEYS[1])
      end
      replaced = value:sub(123, 125) == '\12\0\0' and ' replaced' or ''
      return tag .. ' claimed ' .. created .. ' ' .. fence .. ' ' .. value:sub(34, 46) .. replaced
    end
    local leased = tonumber(value:sub(47, 59)) or 0
    if state == 'i' and leased > now then
      -- The clock stepped back. The lease begins anew, so that a dead owner's ends after one lease: a live one renews it.
      -- PEXPIRE is allowed at the memory limit, and so is every command behind it in a script. Here it changes nothing.
      redis.call('PEXPIRE', KEYS[1], ARGV[4], 'NX')
      redis.call('SETRANGE', KEYS[1], 46, created)
      leased = now
      if index then
        redis.pcall('ZADD', index, now + (tonumber(value:sub(60, 69)) or 0), KEYS[1])
      end
      value = value:sub(1, 46) .. created .. value:sub(60)
    end
    local ended = state == 'u' or (state == 'i' and leased + (tonumber(value:sub(60, 69)) or 0) <= now)
    local mode = value:sub(72, 72)
    open = ended and (mode == 'r' or (resends and mode == 'h')) and value:sub(105, 120) == fingerprint
  elseif window_ms ~= 0 and #value > 49 then
    local made = now
    if version == 3 then
      fence, made = value:sub(18, 33), tonumber(value:sub(34, 49)) or now
    elseif version == 5 or version == 6 then
      fence, made = struct.unpack('>I8I8', value, 34)
    end
    open = made + window_ms < now
  end
  if late or not open or expected_token == '' or owner ~= expected_token then
    return {tag, 'packed', now, value}
  end
elseif fields[1] or fields[2] or redis.call('EXISTS', KEYS[1]) == 1 then
  local meta, state = fields[1], fields[2]
  fence = fields[4]
  if meta then
    -- The first bytes of meta have fixed places: version, token, fence, created (see store/record.py).
    local past = window_ms ~= 0 and (tonumber(meta:sub(34, 49)) or now) + window_ms < now
    if not past or late or expected_token == '' or meta:sub(2, 17) ~= expected_token then
      -- Past its retention a record is its tombstone, whether its response has been dropped or not.
      if meta:byte() == 3 or (tonumber(fields[12]) or math.huge) <= now then
        return {tag, 'expired', now, meta}
      end
      -- A body of one chunk comes along. The first of several chunks alone would be of no use.
      local most = 2 + (fields[12] and 1 or 0) + (fields[13] and 1 or 0)
      local small = redis.call('HLEN', KEYS[1]) <= most and redis.call('HSTRLEN', KEYS[1], 'b0') <= 65536
      local body = small and redis.call('HGET', KEYS[1], 'b0')
      return {tag, 'complete', now, meta, body, fields[13]}
    end
    fence = meta:sub(18, 33)
  elseif fields[3] == token and state == 'in_flight' then
    if late then
      return tag .. ' late ' .. created
    end
    redis.call('HSET', KEYS[1], 'lease', now + lease_ms)
    redis.call('PEXPIRE', KEYS[1], ARGV[4])
    if index then
      redis.pcall('ZADD', index, now + lease_ms, KEYS[1])
    end
    replaced = fields[13] and fields[13]:sub(1, 3) == '\12\0\0' and ' replaced' or ''
    local made = fields[9] or '0'
    return tag .. ' claimed ' .. created .. ' ' .. (fence or '0') .. ' ' .. made .. replaced
  elseif state ~= 'released' then
    local left, whole = (tonumber(fields[8]) or 0) - now, tonumber(fields[10]) or lease_ms
    if state == 'in_flight' and left > whole then
      -- As above: HDEL is allowed at the memory limit.
      left = whole
      redis.call('HDEL', KEYS[1], 'lease')
      redis.call('HSET', KEYS[1], 'lease', now + whole)
      if index then
        redis.pcall('ZADD', index, now + whole, KEYS[1])
      end
    end
    local ended = state == 'unknown' or (state == 'in_flight' and left <= 0)
    local takes = fields[5] == 'retry' or (resends and fields[5] == 'hold')
    open = ended and takes and fields[6] == fingerprint and expected_token ~= '' and fields[3] == expected_token
    if not open or late then
      return {tag, state, now, fields[3], fence, fields[5], fields[6], fields[7], left, fields[9], fields[11], fields[13]}
    end
  end
end

if late or (resends and not open) then
  return tag .. ' late ' .. created
end
-- Greater than every fence given before, also across releases, which leave no record behind.
fence = string.format('%016.0f', math.max((tonumber(fence) or 0) + 1, tonumber(micros)))
-- UNLINK is allowed at the memory limit, and so is every command behind it in a script. A write first is refused.
if value then
  redis.call('APPEND', KEYS[1], '')
elseif fields[1] or fields[2] then
  redis.call('HSET', KEYS[1], 'lease', 0)
end
if value or fields[1] or fields[2] then
  redis.call('UNLINK', KEYS[1])
  replaced = ' replaced'
  if terms:sub(64, 66) ~= '\12\0\0' then
    terms = terms:sub(1, 61) .. struct.pack('>I2', #terms - 60) .. '\12\0\0' .. terms:sub(64)
  end
end
if layout == 'packed' then
  redis.call('SET', KEYS[1], '\4' .. token .. fence .. created .. created .. terms, 'PX', ARGV[4])
else
  local mode = terms:sub(13, 13) == 'r' and 'retry' or 'hold'
  redis.call('HSET', KEYS[1], 'state', 'in_flight', 'token', token, 'fence', fence, 'mode', mode,
    'fingerprint', fingerprint, 'self', self, 'lease', now + lease_ms, 'created', created, 'lease_ms', lease_ms)
  if #terms > 63 then
    redis.call('HSET', KEYS[1], 'more', terms:sub(64))
  end
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
end
if index then
  redis.pcall('ZADD', index, now + lease_ms, KEYS[1])
end
return tag .. ' claimed ' .. created .. ' ' .. fence .. ' ' .. created .. replaced
