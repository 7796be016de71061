-- Store a request for a worker, unless it is known already or the queue is full.
--
-- KEYS  1 requests: stream   2 claim of the request
-- ARGV  1 payload            2 queue size             3 claim ttl, ms
-- Returns 1 = stored, 2 = known, 3 = full.

if redis.call('EXISTS', KEYS[2]) == 1 then return 2 end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[2]) then return 3 end
redis.call('XADD', KEYS[1], '*', 'p', ARGV[1])
redis.call('SET', KEYS[2], '1', 'PX', ARGV[3])
return 1
