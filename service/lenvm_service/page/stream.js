// A chat completion as a stream of chunks, and its failures as errors that can be shown.

export class RequestError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const failure = (payload, status) => new RequestError(payload?.error?.message ?? `The server answered ${status}`, status);

export async function fetchJson(path, key) {
  const response = await fetch(path, { headers: authorization(key) });
  const payload = await response.json().catch(() => null);
  if (!response.ok) throw failure(payload, response.status);
  return payload;
}

// Yields the parsed chunks up to [DONE]. Throws RequestError on an HTTP error, an error event or a cut stream.
export async function* streamChat(body, key, signal) {
  const headers = { "content-type": "application/json", ...authorization(key) };
  const options = { method: "POST", headers, body: JSON.stringify({ ...body, stream: true }), signal };
  const response = await fetch("/v1/chat/completions", options);
  if (!response.ok) throw failure(await response.json().catch(() => null), response.status);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw failure(chunk, response.status);
    yield chunk;
  }
  throw new RequestError("The answer broke off", response.status);
}

const authorization = (key) => (key ? { authorization: `Bearer ${key}` } : {});

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    const parts = (rest + read.value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}
