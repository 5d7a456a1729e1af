#!lua flags=allow-oom
-- Writes what a proxy says of itself, and returns what the live proxies on this store agree on.
-- KEYS: members
-- ARGV: tag rules before layout live_ms retention_ms new (rules: the digest of those that it names keys by)
--   before: what it wrote last. layout: the highest layout of records that it lets others write
--   new: '1' if it founded the store, '0' if an older version is on it, else ''
-- Returns: {tag, 'same' or 'differ', layout, age_ms, new}
--   layout: the highest that all of them let others write. age_ms: since when proxies say this of themselves here
local tag, rules, before, layout, live_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local written, ours = string.format('%.0f', now), rules .. ' ' .. layout
if before ~= rules then
  -- Proxies that still have these rules write them again.
  redis.call('HDEL', KEYS[1], before .. ' ' .. layout)
end
redis.call('HSET', KEYS[1], ours, written)
if ARGV[7] ~= '' then
  redis.call('HSET', KEYS[1], 'new', ARGV[7])
end
redis.call('PEXPIRE', KEYS[1], ARGV[6])
local differ, lowest, since, new = false, tonumber(layout), nil, '0'
local entries = redis.call('HGETALL', KEYS[1])
for at = 1, #entries, 2 do
  local name, value = entries[at], entries[at + 1]
  if name == 'since' then
    since = tonumber(value)
  elseif name == 'new' then
    new = value
  elseif now - (tonumber(value) or 0) > live_ms then
    redis.call('HDEL', KEYS[1], name)
  else
    local other, reads = name:match('^(.*) (%d+)$')
    differ = differ or other ~= rules
    lowest = math.min(lowest, tonumber(reads) or 1)
  end
end
if not since then
  since = now
  redis.call('HSET', KEYS[1], 'since', written)
end
return {tag, differ and 'differ' or 'same', lowest, math.max(now - since, 0), new}
