#!lua flags=allow-oom
-- Writes what a proxy says of itself, and returns what the live proxies on this store agree on.
-- KEYS: members
-- ARGV: tag identity rules before layout live_ms retention_ms found prefix name
--   identity, rules: digests of what it names keys by. prefix: of its tokens. name: what operators call it
--   before: the rules that it wrote last. layout: the highest layout of records that it lets others write
--   found: 'new' if it founded the store, 'older' if an older version is or was on it, else ''
-- Returns: {tag, 'same' or 'differ', layout, age_ms, quiet_ms, new, now_ms, seen_ms, identities}
--   layout: the highest that all of them let others write. identities: of all, with spaces between them
--   age_ms: since when proxies say this of themselves here. quiet_ms: since when no older version was found
--   seen_ms: when one of them last did, 0 for never
local tag, identity, rules, layout, live_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[5], tonumber(ARGV[6])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local written = string.format('%.0f', now)
if ARGV[4] ~= rules then
  -- Proxies that still have these rules write them again.
  redis.call('HDEL', KEYS[1], identity .. ' ' .. ARGV[4] .. ' ' .. layout)
end
if ARGV[8] == 'older' then
  redis.call('HSET', KEYS[1], 'older', written)
  redis.call('HDEL', KEYS[1], 'new')
elseif ARGV[8] == 'new' then
  redis.call('HSET', KEYS[1], 'new', written)
end
local facts = redis.call('HMGET', KEYS[1], 'since', 'older', 'new', 'seen')
local since, seen = tonumber(facts[1]) or now, tonumber(facts[4]) or 0
redis.call('HSET', KEYS[1], 'since', string.format('%.0f', since), 'seen', written,
  identity .. ' ' .. rules .. ' ' .. layout, written, 'name:' .. ARGV[9], written .. ' ' .. ARGV[10])
redis.call('PEXPIRE', KEYS[1], ARGV[7])
local differ, lowest, identities = false, tonumber(layout), {}
local entries = redis.call('HGETALL', KEYS[1])
for at = 1, #entries, 2 do
  local whose, by, reads = entries[at]:match('^(%S*) (%S*) (%d+)$')
  if (whose or entries[at]:sub(1, 5) == 'name:') and now - (tonumber(entries[at + 1]:match('^%d+')) or 0) > live_ms then
    redis.call('HDEL', KEYS[1], entries[at])
  elseif whose then
    differ = differ or by ~= rules
    lowest = math.min(lowest, tonumber(reads))
    identities[#identities + 1] = whose
  end
end
local age, quiet = math.max(now - since, 0), math.max(now - (tonumber(facts[2]) or since), 0)
return {tag, differ and 'differ' or 'same', lowest, age, quiet, facts[3], now, seen, table.concat(identities, ' ')}
