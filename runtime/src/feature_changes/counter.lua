#!lua flags=allow-oom
-- The number of the last change, KEYS[1], raised to ARGV[1] where it is lower: a Redis that has lost changes
-- goes on above all numbers that it ever gave. Compared as they are written, since doubles are not exact.
local number = redis.call('GET', KEYS[1]) or '0'
if #number < #ARGV[1] or (#number == #ARGV[1] and number < ARGV[1]) then
  number = ARGV[1]
  redis.call('SET', KEYS[1], number)
end
return number
