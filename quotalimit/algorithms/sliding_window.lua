-- The twin of sliding_window.py: in no half-open interval of one period are more than N units admitted.
--
-- While each charge is one unit that nobody holds, a count is a list of their times: ten bytes a call. From the first
-- other charge on it is a hash, a log of two levels: its field "log" holds the units of all charges, the time of the
-- newest, the shift of the log's timeline, whether the log is still of plain units, and the epoch; "chunks" the lower
-- bound and the units of each chunk; and a field for each chunk, named by its lower bound, the time and the units of
-- its charges. So no question and no change reads more than a few chunks.

algorithms.sliding = (function()
  local sliding = {}
  local PAIR = 16
  local MOST = 128
  local sub, pack, unpack, spread = string.sub, struct.pack, struct.unpack, unpack

  -- Pairs of a time and units in one string, the oldest first.

  local function pair(pairs, index)
    return unpack('<dd', pairs, PAIR * (index - 1) + 1)
  end

  -- How many pairs are older than a time.
  local function older(pairs, time)
    local low, high = 0, #pairs / PAIR
    while low < high do
      local middle = math.floor((low + high) / 2)
      if unpack('<d', pairs, PAIR * middle + 1) < time then low = middle + 1 else high = middle end
    end
    return low
  end

  -- The pairs with `gone` of them, after the first `kept`, replaced.
  local function spliced(pairs, kept, gone, new)
    return sub(pairs, 1, PAIR * kept) .. new .. sub(pairs, PAIR * (kept + gone) + 1)
  end

  -- A chunk of the log, by its lower bound.
  local function read(count, lower)
    local chunk = count.read[lower]
    if not chunk then
      chunk = redis.call('HGET', count.key, string.format('%.0f', lower))
      count.read[lower] = chunk
    end
    return chunk
  end

  local function write(count, lower, chunk)
    count.read[lower] = chunk
    count.written[lower] = true
  end

  -- What is out of the window: whole chunks, charges of the next chunk, and the units of all these.
  local function expired(count, horizon)
    local last = #count.chunks / PAIR
    local gone = 0
    for index = 1, last do
      local lower, units = pair(count.chunks, index)
      if index == last or pair(count.chunks, index + 1) > horizon then
        local chunk = read(count, lower)
        for place = 1, #chunk / PAIR do
          local time, cost = pair(chunk, place)
          if time > horizon then return index - 1, place - 1, gone end
          gone = gone + cost
        end
        return index, 0, gone
      end
      gone = gone + units
    end
    return 0, 0, 0
  end

  local function drop(count, index)
    local lower = pair(count.chunks, index)
    count.chunks = spliced(count.chunks, index - 1, 1, '')
    write(count, lower, false)
  end

  local function trim(count, horizon)
    local chunks, charges, units = expired(count, horizon)
    count.total = count.total - units
    for _ = 1, chunks do
      units = units - select(2, pair(count.chunks, 1))
      drop(count, 1)
    end
    if charges > 0 then
      local lower, all = pair(count.chunks, 1)
      write(count, lower, spliced(read(count, lower), 0, charges, ''))
      count.chunks = spliced(count.chunks, 0, 1, pack('<dd', lower, all - units))
    end
  end

  -- Charge units at a time, or give back up to what was charged then.
  local function add(count, time, delta)
    count.newest = math.max(count.newest, time)
    if #count.chunks == 0 then
      if delta > 0 then
        count.chunks = pack('<dd', time, delta)
        count.total = delta
        write(count, time, count.chunks)
      end
      return
    end
    local index = math.max(1, older(count.chunks, time + 1))
    local lower, units = pair(count.chunks, index)
    local chunk = read(count, lower)
    local place = older(chunk, time)
    local known, cost = 0, 0
    if PAIR * place < #chunk then
      local at, units_then = pair(chunk, place + 1)
      if at == time then known, cost = 1, units_then end
    end
    delta = math.max(delta, -cost)
    if delta == 0 then return end
    count.total = count.total + delta
    chunk = spliced(chunk, place, known, cost + delta > 0 and pack('<dd', time, cost + delta) or '')
    if chunk == '' then return drop(count, index) end
    if #chunk <= PAIR * MOST then
      count.chunks = spliced(count.chunks, index - 1, 1, pack('<dd', lower, units + delta))
      return write(count, lower, chunk)
    end
    local left, moved = sub(chunk, 1, PAIR * MOST / 2), 0
    local right = sub(chunk, #left + 1)
    for at = 1, #right / PAIR do moved = moved + select(2, pair(right, at)) end
    local bound = pair(right, 1)
    local halves = pack('<dddd', lower, units + delta - moved, bound, moved)
    count.chunks = spliced(count.chunks, index - 1, 1, halves)
    write(count, lower, left)
    write(count, bound, right)
  end

  -- Make a log of the list of the times of single units.
  local function to_log(count)
    if count.form == 'hash' then return end
    count.chunks, count.read, count.written = '', {}, {}
    count.total, count.shift, count.plain, count.epoch = 0, 0, 1, 0
    if count.form == 'list' then
      local pairs, units = {}, 0
      local times = redis.call('LRANGE', count.key, 0, -1)
      local function close()
        if #pairs > 0 then
          local lower = unpack('<d', pairs[1])
          write(count, lower, table.concat(pairs))
          count.chunks = count.chunks .. pack('<dd', lower, units)
          count.total = count.total + units
          pairs, units = {}, 0
        end
      end
      local cost = 0
      for index = 1, #times do
        cost = cost + 1
        if times[index] ~= times[index + 1] then
          pairs[#pairs + 1] = pack('<dd', tonumber(times[index]), cost)
          units = units + cost
          cost = 0
          if #pairs == MOST / 2 then close() end
        end
      end
      close()
      redis.call('DEL', count.key)
    end
    count.form = 'hash'
  end

  -- How many times of the list are out of the window.
  local function left_behind(count, horizon)
    local low, high = 0, 1
    local function is_out(index)
      local time = redis.call('LINDEX', count.key, index)
      return time and tonumber(time) <= horizon
    end
    while is_out(high - 1) do low, high = high, high * 2 end
    while low < high do
      local middle = math.floor((low + high) / 2)
      if is_out(middle) then low = middle + 1 else high = middle end
    end
    return low
  end

  function sliding.knows()
    return true
  end

  function sliding.load(key)
    local count = {key = key, form = redis.call('TYPE', key).ok, newest = 0, shift = 0, epoch = 0}
    if count.form == 'list' then
      count.newest = tonumber(redis.call('LINDEX', key, -1))
    elseif count.form == 'hash' then
      local kept = redis.call('HMGET', key, 'log', 'chunks')
      count.total, count.newest, count.shift, count.plain, count.epoch = unpack('<ddddd', kept[1])
      count.chunks, count.read, count.written = kept[2], {}, {}
    end
    return count
  end

  function sliding.save(count, limit, now, slack)
    if count.form == 'hash' then
      local log = pack('<ddddd', count.total, count.newest, count.shift, count.plain, count.epoch)
      local fields, gone = {'log', log, 'chunks', count.chunks}, {}
      for lower in pairs(count.written) do
        local name, chunk = string.format('%.0f', lower), count.read[lower]
        if chunk then
          fields[#fields + 1] = name
          fields[#fields + 1] = chunk
        else
          gone[#gone + 1] = name
        end
        if #fields > 1000 then
          redis.call('HSET', count.key, spread(fields))
          fields = {'log', log}
        end
        if #gone > 1000 then
          redis.call('HDEL', count.key, spread(gone))
          gone = {}
        end
      end
      redis.call('HSET', count.key, spread(fields))
      if #gone > 0 then redis.call('HDEL', count.key, spread(gone)) end
      count.written = {}
    end
    if count.form ~= 'none' then redis.call('PEXPIRE', count.key, math.ceil(limit.period / 1000) + slack) end
  end

  function sliding.fits(count, limit, need, now, start, before)
    local spare = limit.capacity - need
    if spare < 0 then return nil end
    if before > spare then return math.max(0, limit.period - (start - now)), 0 end
    spare = spare - before
    local youngest -- of the charges that must leave for no more than `spare` units to stay
    if count.form == 'list' then
      local time = redis.call('LINDEX', count.key, -1 - spare)
      youngest = time and tonumber(time)
    elseif count.form == 'hash' then
      local bound = count.total - spare
      if bound <= 0 then return 0, 0 end
      for index = 1, #count.chunks / PAIR do
        local lower, units = pair(count.chunks, index)
        if units >= bound then
          local chunk = read(count, lower)
          local place = 0
          repeat
            place = place + 1
            local time, cost = pair(chunk, place)
            youngest, bound = time - count.shift, bound - cost
          until bound <= 0
          break
        end
        bound = bound - units
      end
    end
    return youngest and math.max(0, limit.period - (start - youngest)) or 0, 0
  end

  function sliding.fits_without(count, limit, charges, need, now)
    local back = 0
    for _, charge in ipairs(charges) do
      if charge.mark > now + count.shift - limit.period then back = back + charge.units end
    end
    return sliding.used(count, limit, now) - back <= limit.capacity - need
  end

  function sliding.take(count, limit, cost, now, holds)
    if not holds and cost == 1 and count.form ~= 'hash' then
      local calls = redis.call('RPUSH', count.key, now)
      count.form, count.newest = 'list', now
      if calls % 8 == 0 then
        local time = redis.call('LINDEX', count.key, 15)
        if time and tonumber(time) <= now - limit.period then redis.call('LTRIM', count.key, 16, -1) end
      end
      return now
    end
    to_log(count)
    local mark = now + count.shift
    if cost == 0 and count.plain == 1 then return mark end
    if cost ~= 1 then count.plain = 0 end
    trim(count, mark - limit.period)
    add(count, mark, cost)
    return mark
  end

  function sliding.adjust(count, limit, mark, delta, now)
    if delta == 0 or mark <= now + count.shift - limit.period then return end
    to_log(count)
    count.plain = 0
    add(count, math.min(mark, now + count.shift), delta)
  end

  -- Whether the count was newer than now and is dated now.
  function sliding.redate(count, limit, now)
    if count.newest - count.shift <= now then return false end
    to_log(count)
    count.plain = 0
    count.shift = count.newest - now
    return true
  end

  function sliding.used(count, limit, now)
    if count.form == 'none' then return 0 end
    if count.form == 'list' then
      return redis.call('LLEN', count.key) - left_behind(count, now - limit.period)
    end
    local _, _, gone = expired(count, now + count.shift - limit.period)
    return count.total - gone
  end

  function sliding.whole_in(count, limit, now)
    if sliding.used(count, limit, now) == 0 then return 0, 0 end
    local newest = count.newest
    if count.form == 'hash' then
      local chunk = read(count, (pair(count.chunks, #count.chunks / PAIR)))
      newest = pair(chunk, #chunk / PAIR) - count.shift
    end
    return limit.period - (now - newest), 0
  end

  function sliding.reset(count)
    if count.form ~= 'none' then redis.call('DEL', count.key) end
    if count.form == 'hash' then -- charges that are open outlive it, and must find another epoch
      count.chunks, count.read, count.written = '', {}, {}
      count.total, count.plain, count.epoch = 0, 0, count.epoch + 1
    else
      count.form = 'none'
    end
  end

  return sliding
end)()
