-- Report to the application that a connection ended, unless another server has it by now.
--
-- KEYS  1 requests: stream   2 owners: hash connection -> server   3 prefix of the servers' hashes
-- ARGV  1 connection   2 server
-- Returns 1 = reported, 0 = it is not this server's any more.

if redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[2] then return 0 end
local report = redis.call('HGET', KEYS[3] .. ARGV[2], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[3] .. ARGV[2], ARGV[1])
if report then redis.call('XADD', KEYS[1], '*', 'p', report) end
return 1
