-- Say that a server lives, and report the end of the connections of one that does not.
--
-- KEYS  1 requests: stream   2 owners: hash connection -> server   3 prefix of the servers' hashes
--       4 leases: sorted set server -> ms since 1970 until when it is taken to live
-- ARGV  1 server   2 lease, ms   3 connections reported at most in one call
-- Returns how many were reported.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[4], now + tonumber(ARGV[2]), ARGV[1])
local reported, most = 0, tonumber(ARGV[3])
for _, server in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now, 'LIMIT', 0, 10)) do
  local found = redis.call('HSCAN', KEYS[3] .. server, 0, 'COUNT', most)[2]
  for index = 1, #found, 2 do
    redis.call('HDEL', KEYS[3] .. server, found[index])
    if redis.call('HGET', KEYS[2], found[index]) == server then
      redis.call('HDEL', KEYS[2], found[index])
      redis.call('XADD', KEYS[1], '*', 'p', found[index + 1])
      reported = reported + 1
    end
  end
  if redis.call('EXISTS', KEYS[3] .. server) == 0 then redis.call('ZREM', KEYS[4], server) end
  if reported >= most then break end
end
return reported
