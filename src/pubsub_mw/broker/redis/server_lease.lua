-- Say that a server lives, and report the end of the connections of one that does not.
--
-- KEYS  1 requests: stream   2 owners: hash connection -> server   3 prefix of the servers' hashes
--       4 leases: sorted set server -> ms since 1970 until when it is taken to live
-- ARGV  1 server   2 lease, ms   3 connections reported at most in one call
-- Returns how many were reported, and 1 if the server's own lease had run out, or was not there, else 0.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease, most = tonumber(ARGV[2]), tonumber(ARGV[3])
local own = redis.call('ZSCORE', KEYS[4], ARGV[1])
local lapsed = (own and tonumber(own) > now) and 0 or 1
-- When no lease is valid any more, it was Redis that could not be reached, or all servers were down: each gets its
-- chance to come back before it is taken for dead.
local last = redis.call('ZRANGE', KEYS[4], -1, -1, 'WITHSCORES')[2]
if last and tonumber(last) <= now then
  for _, server in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do
    redis.call('ZADD', KEYS[4], now + lease, server)
  end
end
redis.call('ZADD', KEYS[4], now + lease, ARGV[1])
local found = 0
for _, server in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now, 'LIMIT', 0, 10)) do
  local held = KEYS[3] .. server
  -- Not HSCAN: on a large hash it meets the places of those that were just deleted again and again.
  local reports = redis.call('HRANDFIELD', held, most, 'WITHVALUES')
  for index = 1, #reports, 2 do
    redis.call('HDEL', held, reports[index])
    if redis.call('HGET', KEYS[2], reports[index]) == server then
      redis.call('HDEL', KEYS[2], reports[index])
      redis.call('XADD', KEYS[1], '*', 'p', reports[index + 1])
    end
    found = found + 1
  end
  if redis.call('EXISTS', held) == 0 then redis.call('ZREM', KEYS[4], server) end
  if found >= most then break end
end
return {found, lapsed}
