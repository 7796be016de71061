-- Take requests whose worker has given no sign of life, and count the delivery.
--
-- KEYS  1 requests: stream
-- ARGV  1 group   2 worker   3 lease, ms   4 at most so many
-- Returns {{id, delivery count, fields}...}.

local found = {}
for _, entry in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[3], '-', '+', ARGV[4])) do
  local id = entry[1]
  local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], id)
  if claimed[1] and claimed[1][2] then
    found[#found + 1] = {id, entry[4] + 1, claimed[1][2]}
  else
    -- Taken out of the stream by somebody else: nothing is left to be done for it.
    redis.call('XACK', KEYS[1], ARGV[1], id)
  end
end
return found
