"""The report's style sheet; a Python string, since an app's bundle carries Python files only."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --ink: #1b1d21; --soft: #646a73; --line: #dfe2e6;
  --paper: #ffffff; --tint: #f5f6f8; --warn: #a8480f; --line-strong: #3d85c6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #9aa1ab; --line: #33373e;
  --paper: #16181c; --tint: #1f2227; --warn: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 58rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 650; margin: 0 0 .3rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; font-weight: 650; margin: 0 0 .6rem; }
section { margin-top: 2.75rem; }
p { margin: .4rem 0; max-width: 44rem; }
.soft, figcaption, dt { color: var(--soft); }
.warn { color: var(--warn); }
dl.facts { display: grid; gap: .75rem 1.5rem; margin: 1.5rem 0 0;
  grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr));
  border-top: 1px solid var(--line); padding-top: 1rem; }
dl.facts dt { font-size: .82rem; }
dl.facts dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; line-height: 1.3; }
dl.facts small { display: block; font-size: .8rem; color: var(--soft); }
figure { margin: 0; }
figcaption { font-size: .85rem; }
img { max-width: 100%; height: auto; image-rendering: pixelated; display: block; }
svg { width: 100%; min-width: 30rem; height: auto; display: block; color: var(--ink); }
svg text { font-family: inherit !important; }
h3 { font-size: .95rem; font-weight: 650; margin: 1.4rem 0 .3rem; }
.pair { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.classes { display: grid; gap: .5rem 1rem; max-width: 46rem; }
.classes .row, .classes .head { display: grid; gap: .25rem 1rem; align-items: center;
  grid-template-columns: 7rem minmax(0, 1fr) minmax(0, 1fr); }
.classes.alone .row, .classes.alone .head { grid-template-columns: 7rem minmax(0, 1fr); }
.classes .head { color: var(--soft); font-size: .82rem; }
.classes .name { font-weight: 600; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  th, td:first-child { white-space: normal !important; }
  .classes .row, .classes .head { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
  .classes.alone .row, .classes.alone .head { grid-template-columns: minmax(0, 1fr); }
  .classes .name, .classes .head span:first-child { grid-column: 1 / -1; }
  .classes .head span:first-child { display: none; } }
.timeline { display: flex; gap: 1rem; }
.timeline figure { flex: none; width: 11rem; }
.wide { overflow-x: auto; max-width: 100%; }
.wide:focus-visible, summary:focus-visible { outline: 2px solid var(--line-strong); }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .32rem .7rem .32rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
.shade { display: block; padding: 0 .3rem; border-radius: 3px; min-width: 2.4rem;
  background: rgb(61 133 198 / calc(var(--of) * .4)); }
details { margin-top: .8rem; }
details summary { cursor: pointer; color: var(--soft); }
code, pre { font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--tint); padding: 1rem; overflow-x: auto; border-radius: 4px; }
@media print { main { max-width: none; padding: 0; } section { break-inside: avoid; } }
"""
