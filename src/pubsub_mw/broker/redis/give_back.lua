-- Let other workers take what one took and has not begun, as if it never had, unless another has taken it meanwhile.
--
-- KEYS  1 requests: stream
-- ARGV  1 group   2 worker   3 lease, ms   4, 5 and on: id in the stream, its delivery count

for index = 4, #ARGV, 2 do
  local id, count = ARGV[index], tonumber(ARGV[index + 1])
  local held = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])[1]
  if held and held[4] == count then
    -- It stays where it is in the order, with a lease that is over.
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'IDLE', ARGV[3], 'RETRYCOUNT', count - 1, 'JUSTID')
  end
end
