-- For a cluster, where the counter lies in another slot than the rows: one message for many rows.
-- KEYS[1] the counter. ARGV: 1 channel, 2 the rows' names, one a line.
-- Where the counter cannot rise, 0 is a gap to all who hear it.
local number = redis.pcall('INCR', KEYS[1])
if type(number) ~= 'number' then number = 0 end
redis.call('PUBLISH', ARGV[1], number .. ' ' .. ARGV[2])
return number
