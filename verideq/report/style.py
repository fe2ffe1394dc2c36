"""The page's style: one column of text, the colours of Okabe and Ito, light and dark."""

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1c1c1a; --soft: #5d5d58; --rule: #dcdcd6; --panel: #f4f4f0;
  --warn: #a33a00; --c1: #0072b2; --c2: #d55e00; --c3: #6b6b66; --c4: #009e73; --c5: #b3568b; --c6: #8a6d00; }
@media (prefers-color-scheme: dark) { :root { --paper: #161718; --ink: #e8e8e4; --soft: #a3a39c; --rule: #37393b;
  --panel: #1f2123; --warn: #ff9d5c; --c1: #56b4e9; --c2: #f0904a; --c3: #b4b4ae; --c4: #3fcfa4; --c5: #e39ac4;
  --c6: #e6c229; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1rem; font-weight: 600; letter-spacing: .02em; color: var(--soft); margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p { max-width: 44rem; margin: .5rem 0; }
.claim { font-size: 1.25rem; line-height: 1.4; max-width: 46rem; }
.note, figcaption, small { color: var(--soft); font-size: .86rem; }
.warn { border-left: 4px solid var(--warn); padding: .3rem .8rem; background: var(--panel); }
.warn b, .flag { color: var(--warn); }
.flag { font-size: .86rem; white-space: nowrap; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem 1.1rem .35rem 0; border-bottom: 1px solid var(--rule); }
thead th { font-size: .86rem; font-weight: 600; color: var(--soft); vertical-align: bottom;
  border-bottom: 2px solid var(--rule); }
.numbers th, .numbers td { text-align: right; white-space: nowrap; }
.numbers th:first-child, .numbers td:first-child { text-align: left; }
td small { display: block; }
.plots { columns: 2 24rem; column-gap: 2.5rem; }
.plots figure { break-inside: avoid; padding-bottom: 1.6rem; }
figure { margin: 0; min-width: 0; }
svg { display: block; width: 100%; max-width: 34rem; height: auto; color: var(--ink); }
svg text { font-family: inherit !important; fill: currentColor !important; }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; list-style: none; margin: 0 0 .3rem; padding: 0;
  font-size: .9rem; }
.key svg { display: inline-block; width: 2.2rem; height: .8rem; margin-right: .4rem; vertical-align: baseline; }
.cards { display: flex; flex-wrap: wrap; gap: 1.1rem 1.4rem; }
.card { width: min-content; min-width: 9.5rem; }
.strip { display: flex; gap: .4rem; }
.strip span { width: 6rem; }
.strip img { width: 100%; display: block; image-rendering: pixelated; border: 1px solid var(--rule); }
.strip small { display: block; }
.pictures th, .pictures td { padding: .15rem .5rem .15rem 0; border: 0; vertical-align: middle; text-align: center; }
.pictures th:first-child, .pictures td:first-child { text-align: left; white-space: nowrap; font-size: .9rem; }
.pictures img { width: 4.6rem; display: block; image-rendering: pixelated; border: 1px solid var(--rule); }
details { margin: .6rem 0; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .15rem 1.2rem; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .84rem;
  overflow-wrap: anywhere; }
"""
