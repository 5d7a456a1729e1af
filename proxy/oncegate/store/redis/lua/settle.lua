#!lua flags=allow-oom
-- Ends a claim: stores the response, frees the key, or marks it unknown; a repeat changes nothing more.
-- KEYS: record
-- ARGV: tag token action retention_ms (action is 'store', 'release' or 'unknown'), then
--   store: meta digest chunks bytes last tombstone_ms (last: the bytes of the last chunk if it was not appended, else '')
--   unknown: fence mode fingerprint self created why status (status: of the response that came, 0 for none)
-- Returns: {tag, 'stored' or 'released' or 'unknown', 'found' or 'absent'}
--        | {tag, 'torn' or 'complete' or 'fenced'}
local tag, token, action, retention = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local fields = redis.call('HMGET', KEYS[1], 'token', 'state', 'meta', 'bytes', 'why', 'stage', 'lease_ms', 'status',
  'until')
local owner, state, meta = fields[1], fields[2], fields[3]
if meta then
  owner, state = meta:sub(2, 17), 'complete'
end
if owner and owner ~= token then
  return {tag, 'fenced'}
end
local before = owner and 'found' or 'absent'

if action == 'store' then
  local digest, chunks, bytes, last = ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9]
  local tombstone = tonumber(ARGV[10])
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  if state == 'complete' then
    -- Past its retention a record is its tombstone, which has no response.
    if meta:sub(50, 65) == digest and (tonumber(fields[9]) or math.huge) > now then
      return {tag, 'stored', 'found'}
    end
    return {tag, 'complete'}
  end
  if chunks == 0 or (chunks == 1 and #last == bytes) then
    -- A new hash, because one that has been large does not return to the compact encoding.
    redis.call('UNLINK', KEYS[1])
    redis.call('HSET', KEYS[1], 'meta', ARGV[5])
  else
    -- Beside the chunks there are eight fields of a claim and 'bytes', 'lease_ms' and after a renewal 'stage' if in
    -- flight, 'why' and perhaps 'status' if unknown.
    local appended = chunks - (last ~= '' and 1 or 0)
    local stored = tonumber(fields[4]) or 0
    local others = 9 + (fields[5] and 1 or 0) + (fields[6] and 1 or 0) + (fields[7] and 1 or 0) + (fields[8] and 1 or 0)
    if redis.call('HLEN', KEYS[1]) ~= appended + others or stored + #last ~= bytes then
      return {tag, 'torn'}
    end
    redis.call('HDEL', KEYS[1], 'state', 'token', 'fence', 'mode', 'fingerprint', 'self', 'lease', 'created',
      'lease_ms', 'bytes', 'why', 'stage', 'status')
    redis.call('HSET', KEYS[1], 'meta', ARGV[5])
  end
  if last ~= '' then
    redis.call('HSET', KEYS[1], 'b' .. (chunks - 1), last)
  end
  if tombstone > 0 then
    redis.call('HSET', KEYS[1], 'until', now + retention)
  end
  redis.call('PEXPIRE', KEYS[1], retention + tombstone)
  return {tag, 'stored', before}
end

if state == 'complete' then
  return {tag, 'complete'}
elseif action == 'release' then
  redis.call('UNLINK', KEYS[1])
  return {tag, 'released', before}
end
redis.call('UNLINK', KEYS[1])
redis.call('HSET', KEYS[1], 'state', 'unknown', 'token', token, 'fence', ARGV[5], 'mode', ARGV[6],
  'fingerprint', ARGV[7], 'self', ARGV[8], 'lease', 0, 'created', ARGV[9], 'why', ARGV[10])
if ARGV[11] ~= '0' then
  redis.call('HSET', KEYS[1], 'status', ARGV[11])
end
redis.call('PEXPIRE', KEYS[1], retention)
return {tag, 'unknown', before}
