-- Take requests out of the queue, and start what waited for them.
--
-- KEYS  1 to 4 as in lanes.lua
-- ARGV  1 as in lanes.lua   2 group   3, 4 and on: id in the stream, connection or "" = in no lane

for index = 3, #ARGV, 2 do
  redis.call('XACK', KEYS[1], ARGV[2], ARGV[index])
  redis.call('XDEL', KEYS[1], ARGV[index])
  if ARGV[index + 1] ~= '' then release(ARGV[index + 1], ARGV[index]) end
end
