#!lua flags=allow-oom
-- Decides a key for an operator, if this token still owns it, and fences the owner; a repeat changes nothing more.
-- KEYS: record
-- ARGV: tag token action seen_lease (action is 'answer' or 'release'), then
--   seen_lease: when the lease ended that was seen, 0 of an unknown outcome; it has to be the same and over. '' for any
--   answer: retention_ms meta body tombstone_ms more (more: what is kept with the record, else '')
--   release: operator fence (operator: a token that fences the owner)
-- Returns: {tag, 'resolved' or 'released' or 'absent' or 'complete' or 'fenced' or 'running'}
-- The index of open keys (see store/redis/layouts/open_index.py). It never fails a decision.
local index = 'once:open'
local tag, token, action, seen_lease = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local fields = redis.pcall('HMGET', KEYS[1], 'token', 'state', 'meta', 'lease')
local owner, state, complete, lease = fields[1], fields[2], fields[3], fields[4]
if fields.err then
  local value = redis.call('GET', KEYS[1]) or redis.call('HMGET', KEYS[1], 'meta')
  owner, complete = value:sub(2, 17), value:byte() ~= 4 and value
  -- The places are in store/redis/layouts/packed.py.
  state = value:sub(71, 71) == 'i' and 'in_flight' or 'unknown'
  lease = (tonumber(value:sub(47, 59)) or 0) + (tonumber(value:sub(60, 69)) or 0)
end
lease = state == 'in_flight' and tonumber(lease) or 0
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if complete then
  if action == 'answer' and complete:sub(2, 17) == ARGV[6]:sub(2, 17) then
    return {tag, 'resolved'}
  end
  return {tag, 'complete'}
elseif not owner then
  return {tag, 'absent'}
elseif state == 'released' then
  if action == 'release' and owner == ARGV[5] then
    return {tag, 'released'}
  end
  return {tag, 'absent'}
elseif owner ~= token then
  return {tag, 'fenced'}
elseif seen_lease ~= '' and (lease > now or lease ~= tonumber(seen_lease)) then
  return {tag, 'running'}
end
if index then
  redis.pcall('ZREM', index, KEYS[1])
end
if action == 'answer' then
  local retention, meta, body, tombstone = ARGV[5], ARGV[6], ARGV[7], tonumber(ARGV[8])
  redis.call('UNLINK', KEYS[1])
  redis.call('HSET', KEYS[1], 'meta', meta)
  if body ~= '' then
    redis.call('HSET', KEYS[1], 'b0', body)
  end
  if ARGV[9] ~= '' then
    redis.call('HSET', KEYS[1], 'more', ARGV[9])
  end
  if tombstone > 0 then
    redis.call('HSET', KEYS[1], 'until', now + retention)
  end
  redis.call('PEXPIRE', KEYS[1], retention + tombstone)
  return {tag, 'resolved'}
end
-- A record has to stay, because an owner that finds none writes its own.
local operator = ARGV[5]
local left = redis.call('PTTL', KEYS[1])
redis.call('UNLINK', KEYS[1])
redis.call('HSET', KEYS[1], 'state', 'released', 'token', operator, 'fence', ARGV[6])
redis.call('PEXPIRE', KEYS[1], math.max(left, 1))
return {tag, 'released'}
