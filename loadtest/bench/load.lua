-- For wrk: wrk ... URL PATH KEY unique|same|new|many AUTHORIZATION BODY. A request's text is made once; only the key
-- changes, and with new a field beside it, so that no head comes twice. With many the same 500 keys come in turns.
local head, tail, unique, new, n, most

function init(args)
  local path, key, body
  path, key, unique, body, n = args[1], args[2], args[3] ~= "same", args[5], 0
  new, most = args[3] == "new", args[3] == "many" and 500 or math.huge
  head = "POST " .. path .. " HTTP/1.1\r\nHost: " .. wrk.host .. ":" .. wrk.port ..
    "\r\nContent-Type: application/json\r\nAuthorization: " .. args[4]
  if key ~= "" then head = head .. "\r\nIdempotency-Key: " .. key end
  tail = "\r\nContent-Length: " .. #body .. "\r\n\r\n" .. body
end

function request()
  if not unique then return head .. tail end
  n = n < most and n + 1 or 1
  return head .. "-" .. n .. (new and "\r\nX-Request-Id: " .. n or "") .. tail
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format("RESULT %d %d %d %d %d %d\n", summary.requests, summary.duration, e.status,
    e.connect + e.read + e.write + e.timeout, latency:percentile(50), latency:percentile(99)))
end
