-- The twin of calendar_window.py: N units in each unit of the calendar.
--
-- A count is a string of five numbers: the start and the end of the window, the units used in it, its mark, its epoch.
-- Zones cannot be computed here. The client sends the edges of a few windows; where the time is in none of them, it is
-- told the time and asks again.

algorithms.calendar = (function()
  local calendar = {}

  -- The start and the end of the window that holds a moment; nil if the client sent others.
  local function window(limit, now)
    local edges = limit.edges
    for i = 2, #edges do
      if edges[i - 1] <= now and now < edges[i] then return edges[i - 1], edges[i] end
    end
  end

  -- Whether the windows that a question may need are known.
  function calendar.knows(limit, now)
    return window(limit, now) ~= nil
  end

  function calendar.load(key)
    local count = {key = key, epoch = 0}
    local kept = redis.call('GET', key)
    if kept then
      count.start, count.stop, count.used, count.mark, count.epoch = struct.unpack('<ddddd', kept)
    end
    return count
  end

  function calendar.save(count, limit, now, slack)
    if count.start then
      local kept = struct.pack('<ddddd', count.start, count.stop, count.used, count.mark, count.epoch)
      redis.call('SET', count.key, kept, 'PX', math.ceil(math.max(count.stop - now, 0) / 1000) + slack)
    end
  end

  local function used(count, now)
    return count.start and count.start <= now and now < count.stop and count.used or 0
  end

  function calendar.fits(count, limit, need, now, start, before)
    if need > limit.capacity then return nil end
    local _, stop = window(limit, now)
    if start >= stop or used(count, now) + before <= limit.capacity - need then return 0, 0 end
    return stop - start, 0
  end

  function calendar.fits_without(count, limit, charges, need, now)
    local back = 0
    for _, charge in ipairs(charges) do
      if charge.mark == count.mark then back = back + charge.units end
    end
    return math.max(0, used(count, now) - back) <= limit.capacity - need
  end

  function calendar.take(count, limit, cost, now)
    local start, stop = window(limit, now)
    if count.start ~= start then
      count.mark = count.start and math.max(start, count.mark + 1) or start
      count.start, count.stop, count.used = start, stop, 0
    end
    count.used = count.used + cost
    return count.mark
  end

  function calendar.adjust(count, limit, mark, delta, now)
    if count.mark == mark and now < count.stop then
      count.used = math.max(0, count.used + delta)
    end
  end

  -- Whether the count was newer than now and is dated now.
  function calendar.redate(count, limit, now)
    if not count.start or count.start <= now then return false end
    local start, stop = window(limit, now)
    if not start then return false end -- a settlement, which goes by the mark
    count.start, count.stop = start, stop
    return true
  end

  function calendar.used(count, limit, now)
    return used(count, now)
  end

  function calendar.whole_in(count, limit, now)
    if used(count, now) == 0 then return 0, 0 end
    return count.stop - now, 0
  end

  function calendar.reset(count)
    if count.start then
      count.used, count.epoch = 0, count.epoch + 1
    end
  end

  return calendar
end)()
