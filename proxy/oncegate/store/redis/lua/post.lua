#!lua flags=allow-oom
-- Puts a note into the mailbox of a proxy; a note that is there already stays one.
-- KEYS: mailbox
-- ARGV: tag note lasts_ms
-- Returns: {tag, 'posted'}
local tag, note, lasts = ARGV[1], ARGV[2], ARGV[3]
redis.call('HSET', KEYS[1], note, '')
redis.call('PEXPIRE', KEYS[1], lasts)
return {tag, 'posted'}
