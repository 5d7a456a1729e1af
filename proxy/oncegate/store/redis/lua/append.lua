-- Stores one more chunk of a response for the owner, whose renewals keep the lease; a repeat with the same bytes changes nothing.
-- KEYS: record
-- ARGV: tag token index chunk retention_ms layout head
--   layout: the one that the record most probably has, 'packed' or 'hash'
--   head: of the response, for those who follow it, with the first chunk alone; may be left out
-- Returns: tag .. ' appended' or ' read' or ' torn' or ' absent' or ' complete' or ' fenced'
--   read: appended, and somebody follows the response
local tag, token, field = ARGV[1], ARGV[2], 'b' .. ARGV[3]
local fields = {}
local likely = ARGV[6] == 'packed'
local value = likely and redis.pcall('GET', KEYS[1])
if type(value) ~= 'string' then
  fields = redis.pcall('HMGET', KEYS[1], 'token', 'readers_until', 'meta', field, 'bytes')
  value = fields.err and (redis.call('GET', KEYS[1]) or redis.call('HMGET', KEYS[1], 'meta'))
end
local owner, complete = fields[1], fields[3]
if value then
  owner, complete = value:sub(2, 17), value:byte() ~= 4
elseif complete then
  owner = complete:sub(2, 17)
end
if not owner then
  return tag .. ' absent'
elseif owner ~= token then
  return tag .. ' fenced'
elseif complete then
  return tag .. ' complete'
elseif fields[4] and fields[4] ~= ARGV[4] then
  return tag .. ' torn'
end
if value then
  -- A packed claim has no chunks: its first one makes it a hash. The places are in store/redis/layouts/packed.py.
  local modes, stages = {h = 'hold', r = 'retry', c = 'cancelled'}, {c = 'claimed', s = 'sent', a = 'answered', d = 'dropped'}
  local state, lease_ms = value:sub(71, 71) == 'i' and 'in_flight' or 'unknown', tonumber(value:sub(60, 69)) or 0
  local lease = state == 'in_flight' and (tonumber(value:sub(47, 59)) or 0) + lease_ms or 0
  -- UNLINK is allowed at the memory limit, and so is every command behind it in a script. A write first is refused.
  redis.call('APPEND', KEYS[1], '')
  redis.call('UNLINK', KEYS[1])
  local written = {'state', state, 'token', token, 'fence', value:sub(18, 33), 'mode', modes[value:sub(72, 72)] or '',
    'fingerprint', value:sub(105, 120), 'self', value:sub(73, 104), 'lease', string.format('%d', lease),
    'created', value:sub(34, 46), 'bytes', #ARGV[4], field, ARGV[4]}
  local at, stage = #written, stages[value:sub(70, 70)]
  if state == 'in_flight' then
    written[at + 1], written[at + 2], at = 'lease_ms', lease_ms, at + 2
  end
  if stage then
    written[at + 1], written[at + 2], at = 'stage', stage, at + 2
  end
  if ARGV[7] then
    written[at + 1], written[at + 2], at = 'head', ARGV[7], at + 2
  end
  if #value > 122 then
    written[at + 1], written[at + 2] = 'more', value:sub(123)
  end
  redis.call('HSET', KEYS[1], unpack(written))
  redis.call('PEXPIRE', KEYS[1], ARGV[5])
elseif not fields[4] then
  -- One write for all: if it is refused at the memory limit, chunks and count still agree.
  local bytes = string.format('%d', (tonumber(fields[5]) or 0) + #ARGV[4])
  if ARGV[7] then
    redis.call('HSET', KEYS[1], field, ARGV[4], 'bytes', bytes, 'head', ARGV[7])
  else
    redis.call('HSET', KEYS[1], field, ARGV[4], 'bytes', bytes)
  end
end
if fields[2] then
  local time = redis.call('TIME')
  if (tonumber(fields[2]) or 0) > time[1] * 1000 + math.floor(time[2] / 1000) then
    return tag .. ' read'
  end
end
return tag .. ' appended'
