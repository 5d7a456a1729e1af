-- Returns the next chunks of a complete response, as many as fit (at least one).
-- KEYS: record
-- ARGV: tag token first limit_bytes
-- Returns: {tag, 'chunks', chunk, ...} | {tag, 'gone'} | {tag, 'torn'}
--   gone: the key has another record, or none, or its retention is over; torn: the record lacks the chunk
local tag, token, index = ARGV[1], ARGV[2], tonumber(ARGV[3])
local room = tonumber(ARGV[4])
local fields = redis.call('HMGET', KEYS[1], 'meta', 'until')
local meta = fields[1]
if not meta or meta:sub(2, 17) ~= token or meta:byte() == 3 then
  return {tag, 'gone'}
end
if fields[2] then
  local time = redis.call('TIME')
  if (tonumber(fields[2]) or math.huge) <= time[1] * 1000 + math.floor(time[2] / 1000) then
    return {tag, 'gone'}
  end
end
local chunk = redis.call('HGET', KEYS[1], 'b' .. index)
if not chunk then
  return {tag, 'torn'}
end
local reply = {tag, 'chunks'}
while chunk do
  reply[#reply + 1] = chunk
  room, index = room - #chunk, index + 1
  if room < redis.call('HSTRLEN', KEYS[1], 'b' .. index) then
    break
  end
  chunk = redis.call('HGET', KEYS[1], 'b' .. index)
end
return reply
