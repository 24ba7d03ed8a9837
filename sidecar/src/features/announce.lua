-- For a cluster, where the counter lies in another slot than the rows: one message for many rows.
-- KEYS[1] the counter. ARGV: 1 channel, 2 the rows' names, one a line. Answers the message's number.
local number = next_number(KEYS[1])
redis.call('PUBLISH', ARGV[1], number .. ' ' .. ARGV[2])
return number
