-- Enter a connection, and report it to the application if it is new.
--
-- KEYS  1 requests: stream   2 owners: hash connection -> server   3 prefix of the servers' hashes
-- ARGV  1 connection   2 server   3 report of its begin   4 report of its end, kept until then
-- Returns 1 = reported, 0 = it was there already: resumed, here or from another server.

local owner = redis.call('HGET', KEYS[2], ARGV[1])
if owner then redis.call('HDEL', KEYS[3] .. owner, ARGV[1]) end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[3] .. ARGV[2], ARGV[1], ARGV[4])
if owner then return 0 end
redis.call('XADD', KEYS[1], '*', 'p', ARGV[3])
return 1
