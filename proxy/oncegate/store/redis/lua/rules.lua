#!lua flags=allow-oom
-- Writes the rules by which a proxy names keys, and returns whether other live proxies name them by other rules.
-- KEYS: rules
-- ARGV: tag rules before live_ms (digests; before: what this proxy wrote last)
-- Returns: {tag, 'same' or 'differ'}
local tag, rules, before, live_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if before ~= rules then
  -- Proxies that still have these rules write them again.
  redis.call('HDEL', KEYS[1], before)
end
redis.call('HSET', KEYS[1], rules, string.format('%.0f', now))
redis.call('PEXPIRE', KEYS[1], live_ms)
local differ = false
local entries = redis.call('HGETALL', KEYS[1])
for at = 1, #entries, 2 do
  if now - (tonumber(entries[at + 1]) or 0) > live_ms then
    redis.call('HDEL', KEYS[1], entries[at])
  elseif entries[at] ~= rules then
    differ = true
  end
end
return {tag, differ and 'differ' or 'same'}
