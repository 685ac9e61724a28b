// Opens a page at a width, with everything unfolded, and prints what a person or axe-core would object to.
// node look.mjs MODULES CHROMIUM PAGE.html WIDTH SCHEME [SCREENSHOT.png]
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [modules, executablePath, file, width, colorScheme, screenshot] = process.argv.slice(2);
const require = createRequire(`${modules}/package.json`);
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const viewport = { width: Number(width), height: 900 };

// as a reader opens it, under its own policy
const page = await browser.newPage({ viewport, colorScheme });
const said = [], fetched = [];
page.on("console", (message) => said.push(message.text()));
page.on("pageerror", (error) => said.push(String(error)));
page.on("request", (request) => fetched.push(request.url().slice(0, 60)));
await page.goto(pathToFileURL(file).href);
const wider = () => document.documentElement.scrollWidth - window.innerWidth;
const folded = await page.evaluate(wider);
await page.evaluate(() => document.querySelectorAll("details").forEach((each) => (each.open = true)));
const unfolded = await page.evaluate(wider);
const broken = await page.evaluate(() => [...document.images].filter((i) => !i.naturalWidth).length);
if (screenshot) await page.screenshot({ path: screenshot, fullPage: true });

// axe-core is a script, which the page's policy refuses
const checked = await browser.newPage({ viewport, colorScheme, bypassCSP: true });
await checked.goto(pathToFileURL(file).href);
await checked.evaluate(() => document.querySelectorAll("details").forEach((each) => (each.open = true)));
await checked.evaluate(axe);
const { violations, passes } = await checked.evaluate(() => window.axe.run());
const findings = violations.map((v) => ({ id: v.id, impact: v.impact, html: v.nodes[0].html }));
await browser.close();
const elsewhere = fetched.filter((url) => !url.startsWith("file:") && !url.startsWith("data:"));
console.log(JSON.stringify({ folded, unfolded, broken, said, elsewhere, findings, rules: passes.length }));
