-- Takes a result, or the lease to make it.
-- KEYS: result, lease (one slot). ARGV: our token, which ends with our class as a digit (0 the most important); ms
-- of the lease, least sequence, least mark, most bytes, ms of the longest lease.
-- Gives {what, ms, microseconds of this clock, value, odd}: what is 1 a result that ends in ms; 2 we have the
-- lease; 3 another has it for ms; 4 Redis takes nothing; 5 one who comes after us has it. odd is 1 where something
-- lay there that is no result, or no lease.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local odd = 0
local size = redis.pcall('STRLEN', KEYS[1])
if type(size) == 'table' or size > tonumber(ARGV[5]) then
  odd = 1
elseif size > 0 then
  local head = redis.call('GETRANGE', KEYS[1], 0, 32)
  local sequence, mark = tonumber(string.sub(head, 2, 17)), tonumber(string.sub(head, 18, 33))
  if string.byte(head) ~= 1 or not sequence or not mark then
    odd = 1
  elseif sequence >= tonumber(ARGV[3]) and mark >= tonumber(ARGV[4]) then
    return {1, redis.call('PTTL', KEYS[1]), now, redis.call('GET', KEYS[1]), 0}
  end
end
local set = redis.pcall('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2])
if not set then
  local holder, left = redis.pcall('GET', KEYS[2]), redis.call('PTTL', KEYS[2])
  if type(holder) == 'string' and #holder == #ARGV[1] and left >= 0 and left <= tonumber(ARGV[6]) then
    local after = string.byte(holder, -1) > string.byte(ARGV[1], -1)
    return {after and 5 or 3, left, now, '', odd}
  end
  odd = 1
  redis.call('DEL', KEYS[2])
  set = redis.pcall('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
end
if set.err then
  return {4, 0, now, '', odd}
end
return {2, 0, now, '', odd}
