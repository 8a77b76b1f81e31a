// openai for JavaScript, or Vercel's AI SDK: `node chat.mjs openai|ai BASE_URL`, in .venv-clients/node. Prints one JSON
// object, as programs.py does.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [, , name, base] = process.argv;
const require = createRequire(pathToFileURL(process.cwd() + "/"));
const load = (what) => import(pathToFileURL(require.resolve(what)).href);
const MODEL = "vllm-13", STORY = "Count to 168.", QUESTION = "Hello";
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const wrong = (what) => { throw new Error(what); };
const late = async (call) => {
  const begun = Date.now();
  try { await call(); } catch (e) {
    if (!/time|abort/i.test(`${e.name} ${e.message}`)) throw e;
    return Date.now() - begun > 8000 ? wrong("only after a while") : undefined;
  }
  wrong("it waited for the whole answer");
};

const checks = {
  openai: async () => {
    const { default: OpenAI } = await load("openai");
    const client = new OpenAI({ baseURL: base, apiKey: "unused", timeout: 120000 });
    const ask = (text, more = {}, options = {}) =>
      client.chat.completions.create({ model: MODEL, messages: [{ role: "user", content: text }], ...more }, options);
    const chat = async () => (await ask(QUESTION, { max_tokens: 8 })).choices[0].message.content || wrong("no text");
    return {
      chat,
      stream: async () => {
        let pieces = 0;
        for await (const event of await ask(QUESTION, { max_tokens: 8, stream: true })) pieces += event.choices.length;
        if (pieces < 2) wrong(`${pieces} pieces`);
      },
      tools: async () => {
        const tools = [{ type: "function", function: { name: "weather", parameters } }];
        const call = (await ask(QUESTION, { tools })).choices[0].message.tool_calls[0].function;
        JSON.parse(call.arguments).city || wrong("no city");
      },
      cancel: async () => {
        const stream = await ask(STORY, { stream: true });
        for await (const _ of stream) break;
        await chat();
      },
      timeout: () => late(() => ask(STORY, {}, { timeout: 500, maxRetries: 0 })),
      "16 at once": () => Promise.all(Array.from({ length: 16 }, chat)),
    };
  },
  ai: async () => {
    const { generateText, streamText, tool, jsonSchema } = await load("ai");
    const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
    const model = createOpenAICompatible({ name: "fleet", baseURL: base, apiKey: "unused" })(MODEL);
    const chat = async () => (await generateText({ model, prompt: QUESTION, maxOutputTokens: 8 })).text || wrong("no text");
    return {
      chat,
      stream: async () => {
        let pieces = 0;
        for await (const _ of streamText({ model, prompt: QUESTION, maxOutputTokens: 8 }).textStream) pieces++;
        if (pieces < 2) wrong(`${pieces} pieces`);
      },
      tools: async () => {
        const weather = tool({ description: "Weather", inputSchema: jsonSchema(parameters) });
        const found = await generateText({ model, prompt: QUESTION, tools: { weather } });
        found.toolCalls[0].input.city || wrong("no city");
      },
      cancel: async () => {
        const stop = new AbortController();
        for await (const _ of streamText({ model, prompt: STORY, abortSignal: stop.signal, onError() {} }).textStream) break;
        stop.abort();
        await chat();
      },
      timeout: () => late(() => generateText({ model, prompt: STORY, abortSignal: AbortSignal.timeout(500), maxRetries: 0 })),
      "16 at once": () => Promise.all(Array.from({ length: 16 }, chat)),
    };
  },
};

const found = {};
for (const [check, call] of Object.entries(await checks[name]())) {
  try { await call(); found[check] = ""; } catch (e) { found[check] = `${e.name}: ${e.message}`.replaceAll("\n", " ").slice(0, 200); }
}
console.log(JSON.stringify(found));
process.exit(0);
