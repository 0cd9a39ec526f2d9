#!/usr/bin/env python3
"""Curves of one or several runs: a PNG, and an HTML report in a single file that needs no network.

    python dev/plot.py runs/latest                         # RUN/report.html and RUN/report.png
    python dev/plot.py runs/a runs/b --out compare         # compare.html and compare.png
    python dev/plot.py runs/latest --html-only             # without matplotlib
    python dev/plot.py runs/a --panels exact_match,reward  # only these panels, by their names in the log

Shown: training loss (each step and a moving average), validation loss, exact match, mean reward and KL of reinforcement learning, lambda,
learning rate, gradient norm, the shares of zero weights and of codes flipped per step, tokens/s; the samples by step; and where the
options differ.
"""
import argparse
import html
import json
import os

import runlog

# name in the log, title, logarithmic axis
PANELS = [("loss", "training loss", False), ("val_loss", "validation loss (lambda = 1)", False), ("exact_match", "exact match", False),
          ("reward", "mean reward of sampled answers", False), ("kl", "KL to the model at the start", False), ("lambda", "lambda", False),
          ("lr", "learning rate", False), ("grad_norm", "gradient norm", True), ("zeros", "share of zero weights", False),
          ("flips", "share of codes flipped per step", True), ("tok_per_s", "tokens per second", False)]
COLOURS = ["#2a6fdb", "#d1495b", "#2e933c", "#b8860b", "#7b3fa0", "#008b8b", "#6b4f3a", "#888888"]
MAX_POINTS = 1500


def thin(points, limit=MAX_POINTS):
    """At most `limit` points: the mean of each stretch, at the step of its last point."""
    n = len(points)
    if n <= limit:
        return [(s, float(f"{v:.6g}")) for s, v in points]
    parts = [points[n * i // limit:n * (i + 1) // limit] for i in range(limit)]
    return [(part[-1][0], float(f"{sum(v for _, v in part) / len(part):.6g}")) for part in parts]


def load(path, window):
    run = runlog.find_run(path)
    train, evals, bad = runlog.read_log(run)
    all_series = runlog.series(train)
    all_series.update(runlog.series(evals))
    panels = {}
    for key, _, _ in PANELS:
        for name, points in all_series.items():
            if name == key or name.startswith(key + "."):
                panels[name] = thin(points)
    smooth = {}
    for name in ("loss", "reward", "grad_norm", "tok_per_s"):
        points = all_series.get(name, [])
        if len(points) > 10:
            means = runlog.moving_average([v for _, v in points], min(window, max(3, len(points) // 10)))
            smooth[name] = thin([(s, m) for (s, _), m in zip(points, means)])
    manifest = runlog.read_json(os.path.join(run, "manifest.json"))
    config = runlog.read_json(os.path.join(run, "config.json"))
    return {"name": os.path.basename(run), "path": run, "panels": panels, "smooth": smooth, "samples": runlog.read_samples(run)[-200:], "config": config,
            "bad": bad, "facts": facts(config, manifest, train, evals)}


def facts(config, manifest, train, evals):
    """The table at the top of the report."""
    out = [("status", manifest.get("status", "unknown"))]
    if train:
        out.append(("steps", f"{train[-1]['step']} of {config.get('steps', '?')}"))
        tokens = train[-1]["step"] * runlog.tokens_per_step(config)
        out.append(("tokens", f"{tokens / 1e6:.2f} M"))
        losses = [v for _, v in runlog.numbers(train, "loss")]
        out.append(("loss, last 100", f"{sum(losses[-100:]) / max(1, len(losses[-100:])):.4f}"))
        ms = [v for _, v in runlog.numbers(train, "ms")]
        out.append(("time in steps", runlog.duration(sum(ms) / 1000)))
        speed = sorted(v for _, v in runlog.numbers(train, "tok_per_s"))
        out.append(("tokens/s, median", f"{speed[len(speed) // 2]:.0f}" if speed else "-"))
    for key, title in (("val_loss", "validation loss"), ("exact_match", "exact match")):
        values = [v for _, v in runlog.numbers(evals, key)]
        if values:
            best = min(values) if key == "val_loss" else max(values)
            out.append((title, f"{values[-1]:.4f} (best {best:.4f})"))
    if manifest.get("parameters"):
        out.append(("parameters", f"{manifest['parameters'] / 1e6:.2f} M"))
    for key in ("device", "git_commit"):
        if manifest.get(key):
            out.append((key.replace("_", " "), str(manifest[key])[:12 if key == "git_commit" else 44]))
    return out


def differences(runs):
    """[(option, [value of each run])] of the options that are not the same in all runs."""
    keys = sorted({k for r in runs for k in r["config"]})
    rows = [(k, [r["config"].get(k) for r in runs]) for k in keys]
    return [(k, v) for k, v in rows if any(json.dumps(x) != json.dumps(v[0]) for x in v)]


def write_png(runs, path, dpi):
    try:
        import matplotlib
    except ImportError:
        runlog.fail("the PNG needs matplotlib (pip install matplotlib); --html-only makes the report without it")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker
    used = [p for p in PANELS if any(p[0] == n.split(".")[0] for r in runs for n in r["panels"])]
    if not used:
        runlog.fail("nothing was logged yet")
    columns = min(3, len(used))
    rows = (len(used) + columns - 1) // columns
    fig, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.2 * rows), squeeze=False)
    for ax, (key, title, log) in zip(axes.flat, used):
        for i, r in enumerate(runs):
            names = [n for n in r["panels"] if n.split(".")[0] == key]
            for k, name in enumerate(names):
                xs, ys = zip(*r["panels"][name])
                colour = COLOURS[(i if len(runs) > 1 else i + k) % len(COLOURS)]
                smooth = r["smooth"].get(name)
                label = r["name"] if len(names) == 1 else name
                marker = "o" if len(xs) < 40 else None
                ax.plot(xs, ys, color=colour, alpha=0.3 if smooth else 1, lw=0.8 if smooth else 1.4, marker=marker, ms=3, label=None if smooth else label)
                if smooth:
                    ax.plot(*zip(*smooth), color=colour, lw=1.6, label=label)
        if log and all(v > 0 for r in runs for n, pts in r["panels"].items() if n.split(".")[0] == key for _, v in pts):
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
            ax.yaxis.set_minor_locator(ticker.NullLocator())
        if key == "lambda":
            ax.set_ylim(-0.05, 1.05)
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.25)
        ax.tick_params(labelsize=8)
    for ax in list(axes.flat)[len(used):]:
        ax.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncol=min(4, max(1, len(labels))), fontsize=8, frameon=False)
    fig.tight_layout(rect=(0, 0.04, 1, 1))
    fig.savefig(path, dpi=dpi, pil_kwargs={"optimize": True})
    plt.close(fig)


STYLE = """
:root { --back: #fbfbfa; --card: #ffffff; --ink: #1d1d1f; --soft: #6b6b70; --line: #dedee2; }
@media (prefers-color-scheme: dark) { :root { --back: #17181a; --card: #202124; --ink: #ececee; --soft: #9a9aa2; --line: #3a3b40; } }
* { box-sizing: border-box; } body { margin: 0; background: var(--back); color: var(--ink); font: 14px/1.45 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 60px; } h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 32px 0 10px; }
.soft { color: var(--soft); } .cards, .charts { display: grid; gap: 14px; } .cards { grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(370px, 1fr)); } .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.card h3 { margin: 0 0 6px; font-size: 13px; font-weight: 600; overflow-wrap: anywhere; } table { border-collapse: collapse; width: 100%; } td, th { padding: 2px 8px 2px 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: var(--soft); white-space: nowrap; } .facts { display: grid; gap: 8px 18px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.facts div { overflow-wrap: anywhere; } .facts span { display: block; color: var(--soft); font-size: 12px; } .dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 6px; } label { margin-right: 16px; cursor: pointer; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 10.5px; } .grid { stroke: var(--line); stroke-width: 1; } .read { font-size: 12px; color: var(--soft); min-height: 18px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0 0; font: 13px/1.5 ui-monospace, monospace; max-height: 420px; overflow: auto; } input[type=range] { width: 260px; vertical-align: middle; }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById('data').textContent), shown = data.runs.map(() => true);
const W = 440, H = 200, L = 50, R = 18, T = 8, B = 24, svgNS = 'http://www.w3.org/2000/svg';
const el = (tag, attrs, parent) => { const e = document.createElementNS(svgNS, tag); for (const k in attrs) e.setAttribute(k, attrs[k]); if (parent) parent.append(e); return e; };
const show = v => v === 0 ? '0' : Math.abs(v) >= 1e5 || Math.abs(v) < 9.99e-5 ? v.toExponential(2) : Math.abs(v) >= 100 ? v.toFixed(0) : String(+v.toPrecision(4));
function ticks(lo, hi, n) { const raw = (hi - lo) / n, p = 10 ** Math.floor(Math.log10(raw)), s = [1, 2, 5, 10].find(m => m * p >= raw) * p, out = []; for (let t = Math.ceil(lo / s) * s; t <= hi + s * 1e-9; t += s) out.push(t); return out; }
function logTicks(lo, hi) { const out = []; for (let k = Math.floor(lo); k <= hi; k++) for (const m of [1, 2, 5]) { const t = k + Math.log10(m); if (t >= lo && t <= hi) out.push(t); } return out.length > 8 ? out.filter(t => Math.abs(t - Math.round(t)) < 1e-9) : out; }
function draw(panel) {
  const svg = panel.svg; svg.replaceChildren(); panel.lines = [];
  data.runs.forEach((run, i) => { if (!shown[i]) return; for (const name in run.panels) if (name.split('.')[0] === panel.key) {
    panel.lines.push({run, name, colour: run.colour, points: run.panels[name], smooth: run.smooth[name]}); } });
  const all = panel.lines.flatMap(l => l.points); if (!all.length) return;
  let xs = all.map(p => p[0]), x0 = Math.min(...xs), x1 = Math.max(...xs); if (x1 === x0) { x0 -= 1; x1 += 1; }
  // The axis follows the bulk of the values: single spikes are cut at the frame, not dropped.
  let ys = all.map(p => p[1]).sort((a, b) => a - b), y0 = ys[0], y1 = ys[Math.min(ys.length - 1, Math.floor(ys.length * 0.998))];
  const log = (panel.log || (panel.key === 'loss' && document.getElementById('log').checked)) && y0 > 0;
  if (panel.key === 'lambda') { y0 = 0; y1 = 1; }
  const f = log ? Math.log10 : (v => v); let a = f(y0), b = f(y1); if (b - a < 1e-12) { const d = Math.abs(a) * 0.05 || 0.5; a -= d; b += d; } const pad = (b - a) * 0.05; a -= pad; b += pad;
  const X = v => L + (v - x0) / (x1 - x0) * (W - L - R), Y = v => Math.max(T, Math.min(H - B, H - B - (f(v) - a) / (b - a) * (H - T - B)));
  panel.X = X; panel.x0 = x0; panel.x1 = x1;
  const marks = log ? logTicks(a, b) : [], use = !log ? ticks(a, b, 5) : marks.length > 1 ? marks : ticks(10 ** a, 10 ** b, 4).map(Math.log10);
  for (const t of use) { const y = H - B - (t - a) / (b - a) * (H - T - B); el('line', {x1: L, x2: W - R, y1: y, y2: y, class: 'grid'}, svg); el('text', {x: L - 6, y: y + 3.5, 'text-anchor': 'end'}, svg).textContent = show(log ? 10 ** t : t); }
  for (const t of ticks(x0, x1, 5)) { el('text', {x: X(t), y: H - 6, 'text-anchor': 'middle'}, svg).textContent = show(t); }
  for (const l of panel.lines) {
    const path = pts => 'M' + pts.map(p => X(p[0]).toFixed(1) + ' ' + Y(p[1]).toFixed(1)).join('L');
    el('path', {d: path(l.points), fill: 'none', stroke: l.colour, 'stroke-width': l.smooth ? 1 : 1.8, opacity: l.smooth ? 0.3 : 1}, svg);
    if (l.points.length < 60) for (const p of l.points) el('circle', {cx: X(p[0]), cy: Y(p[1]), r: 2.6, fill: l.colour}, svg);
    if (l.smooth) el('path', {d: path(l.smooth), fill: 'none', stroke: l.colour, 'stroke-width': 2}, svg);
  }
  panel.cross = el('line', {y1: T, y2: H - B, class: 'grid', visibility: 'hidden'}, svg);
}
const nearest = (pts, x) => pts.reduce((m, p) => Math.abs(p[0] - x) < Math.abs(m[0] - x) ? p : m, pts[0]);
const panels = data.panels.map(([key, title, log]) => {
  const card = document.createElement('div'); card.className = 'card'; const h = document.createElement('h3'); h.textContent = title; const svg = el('svg', {viewBox: `0 0 ${W} ${H}`}); const read = document.createElement('div'); read.className = 'read';
  card.append(h, svg, read); document.getElementById('charts').append(card); const panel = {key, log, svg, read};
  svg.addEventListener('mousemove', e => { if (!panel.X || !panel.lines.length) return; const r = svg.getBoundingClientRect(), x = panel.x0 + ((e.clientX - r.left) / r.width * W - L) / (W - L - R) * (panel.x1 - panel.x0);
    const at = nearest(panel.lines[0].points, x)[0]; panel.cross.setAttribute('x1', panel.X(at)); panel.cross.setAttribute('x2', panel.X(at)); panel.cross.setAttribute('visibility', 'visible');
    read.textContent = 'step ' + at + ': ' + panel.lines.map(l => (data.runs.length > 1 ? l.run.name + ' ' : l.name.includes('.') ? l.name + ' ' : '') + show(nearest(l.smooth || l.points, at)[1])).join(', '); });
  svg.addEventListener('mouseleave', () => { read.textContent = ''; if (panel.cross) panel.cross.setAttribute('visibility', 'hidden'); });
  return panel; });
const redraw = () => panels.forEach(draw);
document.getElementById('log').addEventListener('change', redraw);
document.querySelectorAll('.toggle').forEach((box, i) => box.addEventListener('change', () => { shown[i] = box.checked; redraw(); }));
data.runs.forEach((run, i) => { const slider = document.getElementById('slider' + i); if (!slider) return;
  const put = () => { const [step, text] = run.samples[+slider.value]; document.getElementById('at' + i).textContent = 'step ' + step; document.getElementById('sample' + i).textContent = text; };
  slider.addEventListener('input', put); put(); });
redraw();
"""


def write_html(runs, path):
    for i, r in enumerate(runs):
        r["colour"] = COLOURS[i % len(COLOURS)]
    used = [p for p in PANELS if any(p[0] == n.split(".")[0] for r in runs for n in r["panels"])]
    data = {"panels": used, "runs": [{k: r[k] for k in ("name", "colour", "panels", "smooth", "samples")} for r in runs]}
    e, out = html.escape, []
    title = runs[0]["name"] if len(runs) == 1 else f"{len(runs)} runs"
    out.append(f"<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\"><title>{e(title)}</title><style>{STYLE}</style></head><body><main>")
    out.append(f"<h1>{e(title)}</h1><div class=\"soft\">bitnet.c training report</div><h2>Runs</h2><div class=\"cards\">")
    for r in runs:
        rows = "".join(f"<div><span>{e(k)}</span>{e(str(v))}</div>" for k, v in r["facts"])
        note = f"<div class=\"soft\">{r['bad']} lines of the log could not be read</div>" if r["bad"] else ""
        out.append(f"<div class=\"card\"><h3><span class=\"dot\" style=\"background:{r['colour']}\"></span>{e(r['name'])}</h3><div class=\"facts\">{rows}</div>{note}</div>")
    out.append("</div><h2>Curves</h2><p><label><input type=\"checkbox\" id=\"log\"> logarithmic loss</label>")
    if len(runs) > 1:
        out += [f"<label><input type=\"checkbox\" class=\"toggle\" checked> <span class=\"dot\" style=\"background:{r['colour']}\"></span>{e(r['name'])}</label>" for r in runs]
    out.append("</p><div class=\"charts\" id=\"charts\"></div>")
    if any(r["samples"] for r in runs):
        out.append("<h2>Samples</h2><div class=\"charts\">")
        for i, r in enumerate(runs):
            if r["samples"]:
                last = len(r["samples"]) - 1
                out.append(f"<div class=\"card\"><h3><span class=\"dot\" style=\"background:{r['colour']}\"></span>{e(r['name'])}</h3><input type=\"range\" id=\"slider{i}\" min=\"0\" max=\"{last}\" value=\"{last}\"> "
                           f"<span class=\"soft\" id=\"at{i}\"></span><pre id=\"sample{i}\"></pre></div>")
        out.append("</div>")
    if len(runs) > 1:
        rows = "".join("<tr><td>" + e(k) + "</td>" + "".join(f"<td>{e(json.dumps(v))}</td>" for v in values) + "</tr>" for k, values in differences(runs))
        head = "".join(f"<th>{e(r['name'])}</th>" for r in runs)
        out.append(f"<h2>Options that differ</h2><div class=\"card\"><table><tr><th></th>{head}</tr>{rows}</table></div>")
    else:
        rows = "".join(f"<tr><td>{e(k)}</td><td>{e(json.dumps(v))}</td></tr>" for k, v in runs[0]["config"].items())
        out.append(f"<h2>Options</h2><details class=\"card\"><summary>{len(runs[0]['config'])} options</summary><table>{rows}</table></details>")
    # "</" could end the script element from inside a sample.
    out.append(f"<script type=\"application/json\" id=\"data\">{json.dumps(data).replace('</', '<' + chr(92) + '/')}</script><script>{SCRIPT}</script></main></body></html>")
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n".join(out))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="run folders, or names in runs/")
    p.add_argument("--out", help="name of the files without extension (default: report in the first run's folder)")
    p.add_argument("--window", type=int, default=100, help="steps of the moving average (default %(default)s)")
    p.add_argument("--panels", help="names in the log, separated by commas (default: all that were logged)")
    p.add_argument("--dpi", type=int, default=110, help="resolution of the PNG (default %(default)s)")
    p.add_argument("--html-only", action="store_true")
    p.add_argument("--png-only", action="store_true")
    args = p.parse_args()
    if args.panels:
        names = args.panels.split(",")
        unknown = sorted(set(names) - {key for key, _, _ in PANELS})
        if unknown:
            runlog.fail(f"--panels: unknown name {unknown[0]}; there are {', '.join(key for key, _, _ in PANELS)}")
        PANELS[:] = [panel for panel in PANELS if panel[0] in names]
    runs = [load(r, max(1, args.window)) for r in args.runs]
    if not any(r["panels"] for r in runs):
        runlog.fail("nothing was logged yet in " + ", ".join(r["path"] for r in runs))
    out = args.out or os.path.join(runs[0]["path"], "report")
    out = out[:-5] if out.endswith(".html") else out[:-4] if out.endswith(".png") else out
    if not args.png_only:
        write_html(runs, out + ".html")
        print(out + ".html")
    if not args.html_only:
        write_png(runs, out + ".png", args.dpi)
        print(out + ".png")


if __name__ == "__main__":
    main()
