#!lua flags=allow-oom
-- Ends a claim: stores the response, frees the key, or marks it unknown; a repeat changes nothing more.
-- KEYS: record
-- ARGV: tag token action retention_ms (action is 'put', 'store', 'release' or 'unknown'), then
--   put: value tombstone_ms (value: a packed record, complete or unknown, see store/redis/layouts/packed.py)
--   store: meta digest chunks bytes last tombstone_ms more (last: the bytes of the last chunk if it was not appended,
--     else ''; more: what is kept with the record, else '')
--   release: layout (the one that the claim most probably has, 'packed' or 'hash')
--   unknown: fence mode fingerprint self created why status more (status: of the response that came, 0 for none)
-- Returns: tag .. ' stored ' or ' released ' or ' unknown ' .. 'found' or 'absent'
--        | tag .. ' torn' or ' complete' or ' fenced'
-- The index of open keys (see store/redis/layouts/open_index.py). It never fails a settle.
local index = 'once:open'
local tag, token, action, retention = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local owner, state, digest, fields
local ends = math.huge
-- The layout that the record most probably has is asked for first.
local found = (action == 'put' or (action == 'release' and ARGV[5] == 'packed')) and redis.pcall('GET', KEYS[1])
if type(found) ~= 'string' then
  fields = redis.pcall('HMGET', KEYS[1], 'token', 'state', 'meta', 'bytes', 'until', 'why', 'stage', 'lease_ms',
    'status', 'more', 'head', 'readers_until')
  found = fields.err and (redis.call('GET', KEYS[1]) or redis.call('HMGET', KEYS[1], 'meta'))
end
if found then
  owner = found:sub(2, 17)
  if found:byte() ~= 4 then
    state, digest = 'complete', found:sub(18, 33)
    ends = found:byte() == 6 and tonumber(found:sub(-13)) or ends
  end
else
  owner, state = fields[1], fields[2]
  if fields[3] then
    owner, state, digest = fields[3]:sub(2, 17), 'complete', fields[3]:sub(50, 65)
    ends = tonumber(fields[5]) or ends
  end
end
if owner and owner ~= token then
  return tag .. ' fenced'
end
local before = owner and 'found' or 'absent'

if action == 'put' then
  local value, tombstone = ARGV[5], ARGV[6]
  local unknown = value:byte() == 4
  if state == 'complete' then
    -- Past its retention a record is its tombstone, which has no response.
    local time = redis.call('TIME')
    if not unknown and digest == value:sub(18, 33) and ends > time[1] * 1000 + math.floor(time[2] / 1000) then
      return tag .. ' stored ' .. 'found'
    end
    return tag .. ' complete'
  end
  if tombstone ~= '0' then
    local time = redis.call('TIME')
    value = value .. string.format('%013.0f', time[1] * 1000 + math.floor(time[2] / 1000) + retention)
    retention = retention + tombstone
  end
  redis.call('SET', KEYS[1], value, 'PX', retention)
  if index and unknown then
    redis.pcall('ZADD', index, value:sub(34, 46) - (value:sub(72, 72) == 'h' and 1e13 or 2e13), KEYS[1])
  elseif index then
    redis.pcall('ZREM', index, KEYS[1])
  end
  local put = unknown and ' unknown ' or ' stored '
  return tag .. put .. before
end

if action == 'store' then
  local chunks, bytes, last = tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9]
  local tombstone = tonumber(ARGV[10])
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  if state == 'complete' then
    if digest == ARGV[6] and ends > now then
      return tag .. ' stored ' .. 'found'
    end
    return tag .. ' complete'
  end
  if chunks == 0 or (chunks == 1 and #last == bytes) then
    -- A new hash, because one that has been large does not return to the compact encoding.
    redis.call('UNLINK', KEYS[1])
  else
    -- Beside the chunks there are eight fields of a claim and 'bytes', and those that only some records have.
    local appended = chunks - (last ~= '' and 1 or 0)
    local stored, others = tonumber(fields[4]) or 0, 9
    for at = 6, 12 do
      others = others + (fields[at] and 1 or 0)
    end
    if found or redis.call('HLEN', KEYS[1]) ~= appended + others or stored + #last ~= bytes then
      return tag .. ' torn'
    end
    redis.call('HDEL', KEYS[1], 'state', 'token', 'fence', 'mode', 'fingerprint', 'self', 'lease', 'created',
      'lease_ms', 'bytes', 'why', 'stage', 'status', 'more', 'head', 'readers_until')
  end
  local written = {'meta', ARGV[5]}
  if last ~= '' then
    written[3], written[4] = 'b' .. (chunks - 1), last
  end
  if tombstone > 0 then
    written[#written + 1], written[#written + 2] = 'until', string.format('%d', now + retention)
  end
  if ARGV[11] ~= '' then
    written[#written + 1], written[#written + 2] = 'more', ARGV[11]
  end
  redis.call('HSET', KEYS[1], unpack(written))
  redis.call('PEXPIRE', KEYS[1], retention + tombstone)
  if index then
    redis.pcall('ZREM', index, KEYS[1])
  end
  return tag .. ' stored ' .. before
end

if state == 'complete' then
  return tag .. ' complete'
elseif action == 'release' then
  redis.call('UNLINK', KEYS[1])
  if index then
    redis.pcall('ZREM', index, KEYS[1])
  end
  if (found and found:sub(123, 125) or (fields[10] or ''):sub(1, 3)) == '\12\0\0' then
    -- The claim had taken the place of another record. The next one has to say so, too. The token is nobody's.
    redis.call('HSET', KEYS[1], 'state', 'released', 'token', ('\0'):rep(16), 'fence', '0')
    redis.call('PEXPIRE', KEYS[1], retention)
  end
  return tag .. ' released ' .. before
end
redis.call('UNLINK', KEYS[1])
redis.call('HSET', KEYS[1], 'state', 'unknown', 'token', token, 'fence', ARGV[5], 'mode', ARGV[6],
  'fingerprint', ARGV[7], 'self', ARGV[8], 'lease', 0, 'created', ARGV[9], 'why', ARGV[10])
if ARGV[11] ~= '0' then
  redis.call('HSET', KEYS[1], 'status', ARGV[11])
end
if ARGV[12] ~= '' then
  redis.call('HSET', KEYS[1], 'more', ARGV[12])
end
redis.call('PEXPIRE', KEYS[1], retention)
if index then
  redis.pcall('ZADD', index, ARGV[9] - (ARGV[6] == 'hold' and 1e13 or 2e13), KEYS[1])
end
return tag .. ' unknown ' .. before
