-- Enter a connection, and report it to the application if it is new.
--
-- KEYS  1 requests: stream   2 owners: hash connection -> server   3 prefix of the servers' hashes
--       4 leases: sorted set server -> ms since 1970 until when it is taken to live
-- ARGV  1 connection   2 server   3 report of its begin   4 report of its end, kept until then   5 lease, ms
--       6 "1" = take it over from the server that holds it
-- Returns 1 = reported, 0 = it was there already: resumed, here or from another server.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- A server that has not kept its lease yet gets one, or nobody would hand in the reports it leaves behind.
redis.call('ZADD', KEYS[4], 'NX', now + tonumber(ARGV[5]), ARGV[2])
local owner = redis.call('HGET', KEYS[2], ARGV[1])
if owner and owner ~= ARGV[2] and ARGV[6] ~= '1' then return 0 end
if owner then redis.call('HDEL', KEYS[3] .. owner, ARGV[1]) end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[3] .. ARGV[2], ARGV[1], ARGV[4])
if owner then return 0 end
redis.call('XADD', KEYS[1], '*', 'p', ARGV[3])
return 1
