-- One call of a RedisStore. This part comes before the algorithms: the time, and the common call without any of them.
--
-- ARGV[1] is the header, six numbers: the time (0: the server's), a time known to have come, what is asked, how many
-- changes follow, the serial of the oldest change that the client does not know to be made, and whether the call is
-- plain. The changes follow, then the claims, each a string of numbers too. The answer is a string of whole numbers of
-- eight bytes: how it went, the time, and for each claim what the client asked for. Waits take two, of 53 bits each.

local DONE = 1
local now, not_before, asked, changes, oldest, plain = struct.unpack('<dddddd', ARGV[1])
local slack = 1000 -- milliseconds for which a key outlives its count
if now == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
else -- keys expire by the server's clock all the same
  slack = 3600000
end

-- Each claim of a plain call is one unit of a sliding window that nobody holds, and each has its own key, which is a
-- list of times (see sliding_window.lua) or new. Whatever is special, a refusal first of all, is left to the rest.
if plain == 1 then
  local at = math.max(now, not_before)
  local reply, format = {DONE, at}, '<i8i8'
  for place = 1, #KEYS do
    local capacity, period = struct.unpack('<dd', ARGV[place + 1], 17)
    local newest = redis.pcall('LINDEX', KEYS[place], -1)
    if newest then
      if type(newest) == 'table' or tonumber(newest) > at then reply = nil break end
      local last = redis.call('LINDEX', KEYS[place], -capacity)
      if last and at - last < period then reply = nil break end
    end
  end
  if reply then
    for place = 1, #KEYS do
      local key = KEYS[place]
      local _, period = struct.unpack('<dd', ARGV[place + 1], 17)
      local calls = redis.call('RPUSH', key, at)
      if calls % 8 == 0 then
        local time = redis.call('LINDEX', key, 15)
        if time and at - time >= period then redis.call('LTRIM', key, 16, -1) end
      end
      redis.call('PEXPIRE', key, math.ceil(period / 1000) + slack)
      reply[#reply + 1] = at
      reply[#reply + 1] = 0
      format = format .. 'i8i8'
    end
    return struct.pack(format, unpack(reply))
  end
end
