-- Notes a purge in the region's list, and tells all gateways.
-- KEYS: the list. ARGV: what is purged, the channel, how many are kept, ms that the list is kept.
-- Its number rises, and is not given twice even where the list was lost.
local time = redis.call('TIME')
local number = time[1] * 1000000 + time[2]
local last = redis.call('LINDEX', KEYS[1], 0)
last = last and tonumber(string.match(last, '^%d+'))
if last and last >= number then
  number = last + 1
end
local line = string.format('%.0f %s', number, ARGV[1])
redis.call('LPUSH', KEYS[1], line)
redis.call('LTRIM', KEYS[1], 0, ARGV[3] - 1)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PUBLISH', ARGV[2], line)
