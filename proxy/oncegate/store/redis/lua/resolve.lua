#!lua flags=allow-oom
-- Decides a key for an operator, if this token still owns it: completes or frees it, and fences the owner.
-- KEYS: record
-- ARGV: tag token action (action is 'answer' or 'release'), then
--   answer: retention_ms meta body tombstone_ms more (more: what is kept with the record, else '')
--   release: operator fence (operator: a token that fences the owner)
-- Returns: {tag, 'resolved' or 'released' or 'absent' or 'complete' or 'fenced'}
-- The index of open keys (see store/redis/layouts/open_index.py). It never fails a decision.
local index = 'once:open'
local tag, token, action = ARGV[1], ARGV[2], ARGV[3]
local fields = redis.pcall('HMGET', KEYS[1], 'token', 'state', 'meta')
local owner, state, complete = fields[1], fields[2], fields[3]
if fields.err then
  local value = redis.call('GET', KEYS[1]) or redis.call('HMGET', KEYS[1], 'meta')
  owner, complete = value:sub(2, 17), value:byte() ~= 4
end
if complete then
  return {tag, 'complete'}
elseif not owner or state == 'released' then
  return {tag, 'absent'}
elseif owner ~= token then
  return {tag, 'fenced'}
end
if index then
  redis.pcall('ZREM', index, KEYS[1])
end
if action == 'answer' then
  local retention, meta, body, tombstone = ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7])
  redis.call('UNLINK', KEYS[1])
  redis.call('HSET', KEYS[1], 'meta', meta)
  if body ~= '' then
    redis.call('HSET', KEYS[1], 'b0', body)
  end
  if ARGV[8] ~= '' then
    redis.call('HSET', KEYS[1], 'more', ARGV[8])
  end
  if tombstone > 0 then
    local time = redis.call('TIME')
    redis.call('HSET', KEYS[1], 'until', time[1] * 1000 + math.floor(time[2] / 1000) + retention)
  end
  redis.call('PEXPIRE', KEYS[1], retention + tombstone)
  return {tag, 'resolved'}
end
-- A record has to stay, because an owner that finds none writes its own.
local operator = ARGV[4]
local left = redis.call('PTTL', KEYS[1])
redis.call('UNLINK', KEYS[1])
redis.call('HSET', KEYS[1], 'state', 'released', 'token', operator, 'fence', ARGV[5])
redis.call('PEXPIRE', KEYS[1], math.max(left, 1))
return {tag, 'released'}
