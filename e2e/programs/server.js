// server.js STEPS PACE_MS: a web server and its client in one process over one kept-alive connection, a worker thread and
// timers. Each step posts the newest link of a hash chain; server and worker each add theirs.
'use strict';
const fs = require('fs');
const http = require('http');
const crypto = require('crypto');
const { Worker } = require('worker_threads');

const [steps, pace] = process.argv.slice(2).map(Number);
const hash = (text) => crypto.createHash('sha256').update(text).digest('hex').slice(0, 32);

const worker = new Worker(`
  const { parentPort } = require('worker_threads');
  const crypto = require('crypto');
  parentPort.on('message', (text) => parentPort.postMessage(crypto.createHash('sha256').update('worker' + text).digest('hex').slice(0, 32)));
`, { eval: true });
const viaWorker = (text) => new Promise((resolve) => { worker.once('message', resolve); worker.postMessage(text); });

let served = 0;
let connections = 0;
const server = http.createServer((request, response) => {
  const parts = [];
  request.on('data', (part) => parts.push(part));
  request.on('end', () => response.end(hash(`${++served}${Buffer.concat(parts)}`)));
});
server.keepAliveTimeout = 0;
server.on('connection', () => connections++);
const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });

const post = (text) => new Promise((resolve, reject) => {
  const request = http.request({ agent, host: '127.0.0.1', port: server.address().port, method: 'POST' }, (response) => {
    const parts = [];
    response.on('data', (part) => parts.push(part));
    response.on('end', () => resolve(Buffer.concat(parts).toString()));
  });
  request.on('error', reject);
  request.end(text);
});

server.listen(0, '127.0.0.1', async () => {
  let link = 'begin';
  for (let step = 1; step <= steps && !fs.existsSync(process.env.STOP_FILE || ''); step++) {
    link = await viaWorker(await post(link));
    console.log(`step ${step} ${link} connections ${connections}`);
    await new Promise((resolve) => setTimeout(resolve, pace));
  }
  console.log(`end ${link}`);
  agent.destroy();
  server.close();
  await worker.terminate();
});
