"""How the page of a sweep looks."""

from __future__ import annotations

__all__ = ["PAGE_STYLE"]

PAGE_STYLE = """
:root { --ink: #1d2a35; --soft: #5d6b78; --line: #e3e8ed; --paper: #f4f6f8; --card: #ffffff; --accent: #2f6690 }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 36px 20px 60px }
.brand { margin: 0; color: var(--accent); font-weight: 700; letter-spacing: .08em;
         text-transform: uppercase; font-size: 12px }
h1 { margin: 2px 0 4px; font-size: 30px; line-height: 1.2 }
h2 { margin: 0 0 12px; font-size: 17px; display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 20px }
.lead { margin: 0 0 22px; color: var(--soft) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
         padding: 18px 20px; margin: 16px 0 }
.card img { display: block; width: 100% }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 16px }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 20px }
.tiles b { display: block; font-size: 27px; line-height: 1.3 }
.tiles span { color: var(--soft); font-size: 13px }
.failed { border-color: #d9644a; background: #fdf3f0 }
.failed ul { margin: 0; padding-left: 18px }
.legend { font-size: 12px; font-weight: 400; color: var(--soft) }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 5px 0 12px }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 7px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
thead th { color: var(--soft); font-weight: 500; font-size: 12.5px; vertical-align: bottom; white-space: normal }
tbody th, thead th:first-child { text-align: left; font-weight: 600 }
tbody tr:last-child > * { border-bottom: 0 }
td small { display: block; color: var(--soft); font-size: 11px; line-height: 1.2 }
tr.single > * { color: var(--soft) }
td.bar { width: 22%; min-width: 150px; text-align: left; font-size: 0 }
td.bar i { display: inline-block; height: 14px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 20px; margin: 0; font-size: 14px }
dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
"""
