// What llama.cpp (the npm package node-llama-cpp) makes of a GGUF file, for the certificate of
// scripts/convert_model.py: token ids of texts, greedy answers to prompts, and the likeliest next token at every
// place of given token lists. Arguments: folder of the package, GGUF file, file with the questions (JSON).
import fs from "fs";
import os from "os";
import path from "path";
import {pathToFileURL} from "url";

const [, , packageFolder, file, questions] = process.argv;
const entry = path.join(packageFolder, "dist", "index.js");
const {getLlama} = await import(pathToFileURL(entry).href);
const {texts, prompts, length, told} = JSON.parse(fs.readFileSync(questions, "utf8"));
const version = JSON.parse(fs.readFileSync(path.join(packageFolder, "package.json"), "utf8")).version;

// More threads than cores wait for each other: a hundred times as slow.
const maxThreads = os.availableParallelism();
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads});
const model = await llama.loadModel({modelPath: file});
const exact = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", flashAttention: false};
const context = await model.createContext({contextSize: 512, ...exact});
const sequence = context.getSequence();
const ids = texts.map((text) => [...model.tokenize(text, true)]);
const answers = [];
for (const prompt of prompts) {
    await sequence.clearHistory();
    const answer = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        answer.push(token);
        if (answer.length >= length || model.isEogToken(token)) break;
    }
    answers.push(answer);
}
const likeliest = [];
const next = {generateNext: {token: true, options: {temperature: 0}}};
for (const tokens of told) {
    await sequence.clearHistory();
    const results = await sequence.controlledEvaluate(tokens.map((token) => [token, next]));
    likeliest.push(results.map((result) => result.next.token));
}
console.log(JSON.stringify({version, ids, answers, likeliest}));
process.exit(0);
