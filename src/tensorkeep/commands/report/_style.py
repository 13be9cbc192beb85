"""The report's style sheet, for light and dark."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark;
  --page: #f9f9f7; --surface: #fcfcfb; --ink: #0b0b0b; --ink2: #52514e; --muted: #6f6e69; --line: #e1e0d9;
  --d0: #e9efe9; --d1: #cde2fb; --d2: #9ec5f4; --d3: #6da7ec; --d4: #3987e5; --d5: #1c5cab; --d6: #0d366b;
  --dx: #f3c9c9; --on-light: #0b0b0b; --on-dark: #ffffff;
  --error: #b3261e; --error-soft: #fbe4e4; --warning: #8a5a00; --warning-soft: #fdf0d5; --info: #3b5b7a;
  --info-soft: #e6eef6;
  --good: #006300; --good-soft: #e2f3e2; --bar1: #2a78d6; --bar2: #9b9a93; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0d0d0d; --surface: #1a1a19; --ink: #ffffff; --ink2: #c3c2b7; --muted: #9b9a93; --line: #2c2c2a;
  --d0: #233026; --d1: #0d2f57; --d2: #104281; --d3: #1c5cab; --d4: #3987e5; --d5: #86b6ef; --d6: #cde2fb;
  --dx: #6b2626; --on-light: #ffffff; --on-dark: #0b0b0b;
  --error: #ff8f86; --error-soft: #3d1f1e; --warning: #f2c063; --warning-soft: #38290f; --info: #a9c8e8;
  --info-soft: #1d2a37;
  --good: #6fce6f; --good-soft: #16301a; --bar1: #3987e5; --bar2: #6f6e69; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 48px; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 0 0 12px; }
h3 { font-size: 13px; margin: 18px 0 6px; color: var(--ink2); }
h3 small { font-weight: 400; color: var(--muted); }
h4 { font-size: 15px; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
h5 { font-size: 12px; margin: 0 0 4px; color: var(--muted); font-weight: 600; }
header { display: grid; grid-template-columns: auto 1fr; gap: 8px 16px; align-items: center; margin-bottom: 20px; }
header dl { grid-column: 1 / -1; display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px;
  margin: 4px 0 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; } .muted { color: var(--muted); }
.verdict { margin: 0; justify-self: start; padding: 3px 12px; border-radius: 999px; font-weight: 600; }
.verdict.ok { background: var(--good-soft); color: var(--good); }
.verdict.findings { background: var(--error-soft); color: var(--error); }
.verdict.inconclusive { background: var(--warning-soft); color: var(--warning); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 20px; }
.tiles div { background: var(--surface); border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px; }
.tiles b { display: block; font-size: 20px; } .tiles span { color: var(--ink2); font-size: 13px; }
.causes { list-style: none; margin: 0 0 20px; padding: 0; font-size: 16px; } .causes li { margin: 6px 0; }
section { background: var(--surface); border: 1px solid var(--line); border-radius: 8px; padding: 18px 20px;
  margin-bottom: 20px; }
article { padding: 14px 0; border-top: 1px solid var(--line); }
article:first-of-type { border-top: 0; padding-top: 0; } article:last-child { padding-bottom: 0; }
.part { margin: 10px 0 0; } .part ul { margin: 0; padding: 0; list-style: none; } .scroll { overflow-x: auto; }
code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 13px; } th { text-align: left; font-weight: 500; color: var(--ink2); }
th { white-space: nowrap; } td, th { padding: 2px 16px 2px 0; vertical-align: top; overflow-wrap: anywhere; }
.num { text-align: right; font-variant-numeric: tabular-nums; }
td.name { font-family: ui-monospace, Menlo, "DejaVu Sans Mono", monospace; }
.badge { display: inline-block; padding: 0 8px; border-radius: 5px;
  font: 600 13px/1.7 ui-monospace, Menlo, "DejaVu Sans Mono", monospace; }
.badge.error { background: var(--error-soft); color: var(--error); }
.badge.warning { background: var(--warning-soft); color: var(--warning); }
.badge.info { background: var(--info-soft); color: var(--info); }
.severity { color: var(--muted); font-weight: 400; }
.fix { margin: 10px 0 0; } .fix b { font-size: 12px; color: var(--muted); margin-right: 10px; }
.fix code { background: var(--page); border: 1px solid var(--line); border-radius: 5px; padding: 4px 8px;
  display: inline-block; }
.note { color: var(--ink2); font-size: 13px; margin: 8px 0 0; }
summary { cursor: pointer; color: var(--ink2); font-size: 13px; margin-top: 8px; }
footer { color: var(--muted); font-size: 12px; }
.legend { margin: 0 0 4px; font-size: 12px; color: var(--ink2); display: flex; flex-wrap: wrap; gap: 4px 14px;
  align-items: center; }
.legend span { display: inline-flex; gap: 6px; align-items: center; }
.key { width: 14px; height: 14px; border-radius: 3px; display: inline-block; }
svg text { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
svg .label { font-size: 12px; fill: var(--ink2); } svg .axis { font-size: 11px; fill: var(--muted); }
svg .value { font-size: 13px; fill: var(--ink); }
svg .code { font-size: 10px; font-weight: 600; fill: var(--on-light); } svg .code.d4 { fill: #0b0b0b; }
svg .code.d5, svg .code.d6 { fill: var(--on-dark); }
svg .bar.checkpoint { fill: var(--bar1); } svg .bar.reference { fill: var(--bar2); } svg .none { fill: none; }
.d0 { fill: var(--d0); background: var(--d0); } .d1 { fill: var(--d1); background: var(--d1); }
.d2 { fill: var(--d2); background: var(--d2); }
.d3 { fill: var(--d3); background: var(--d3); } .d4 { fill: var(--d4); background: var(--d4); }
.d5 { fill: var(--d5); background: var(--d5); }
.d6 { fill: var(--d6); background: var(--d6); } .dx { fill: var(--dx); background: var(--dx); }
.key.du { border: 1px dashed var(--muted); } svg rect.du { fill: none; stroke: var(--line); stroke-dasharray: 3 2; }
svg rect.bad { stroke: var(--error); stroke-width: 2; } svg rect.warn { stroke: var(--warning); stroke-width: 2; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
