-- Returns what the record has of a response, for a reader that follows it, and notes for the owner that somebody reads.
-- KEYS: record
-- ARGV: tag token first limit_bytes reading_ms
--   first: of the chunks that are asked for. reading_ms: for how long somebody reads, 0 to note nothing
-- Returns: {tag, 'gone'}
--        | {tag, 'packed', now_ms, value}
--        | {tag, 'hash', now_ms, meta, until, state, lease, lease_ms, head, more, stage, count, chunk, ...}
--   gone: the key is free, or has another owner. count: of the chunks that there are. Those from meta to
--   stage are false where they are missing, and head where the first is another than 0
local tag, token, index = ARGV[1], ARGV[2], tonumber(ARGV[3])
local room, reading_ms = tonumber(ARGV[4]), tonumber(ARGV[5])
-- All that a hash may have beside its chunks.
local fields = redis.pcall('HMGET', KEYS[1], 'meta', 'until', 'state', 'lease', 'lease_ms', 'head', 'more',
  'stage', 'token', 'fence', 'mode', 'fingerprint', 'self', 'created', 'bytes', 'why', 'status', 'readers_until')
local value = fields.err and (redis.call('GET', KEYS[1]) or redis.call('HMGET', KEYS[1], 'meta'))
local owner = fields[9]
if value or fields[1] then
  owner = (value or fields[1]):sub(2, 17)
end
if owner ~= token or fields[3] == 'released' then
  return {tag, 'gone'}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if value then
  return {tag, 'packed', now, value}
end
local count = redis.call('HLEN', KEYS[1])
for at = 1, 18 do
  count = count - (fields[at] and 1 or 0)
end
local head = index == 0 and fields[6]
local reply = {tag, 'hash', now, fields[1], fields[2], fields[3], fields[4], fields[5], head, fields[7], fields[8], count}
local chunk = (tonumber(fields[2]) or math.huge) > now and redis.call('HGET', KEYS[1], 'b' .. index)
while chunk do
  reply[#reply + 1] = chunk
  room, index = room - #chunk, index + 1
  chunk = room >= redis.call('HSTRLEN', KEYS[1], 'b' .. index) and redis.call('HGET', KEYS[1], 'b' .. index)
end
-- An owner that gave no head is of a version that does not know this field, and would miscount its chunks.
if reading_ms > 0 and fields[6] and fields[3] == 'in_flight' then
  local left = (tonumber(fields[18]) or 0) - now
  if left < reading_ms - 1000 or left > reading_ms then
    -- A server at its memory limit refuses it, and serves the reader all the same.
    redis.pcall('HSET', KEYS[1], 'readers_until', now + reading_ms)
  end
end
return reply
