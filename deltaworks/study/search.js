"use strict";
(() => {
  const search = JSON.parse(document.getElementById("numbers").textContent);
  const { colour, short, marks, layout, draw, name: named, always } = charts;
  const done = search.trials.filter((one) => one.value !== null);
  const origins = Object.keys(search.origins).filter((origin) => done.some((one) => one.origin === origin));
  const hex = (origin) => search.colours[Object.keys(search.origins).indexOf(origin)];
  const symbols = { chance: "circle-open", model: "diamond", transfer: "square" };

  function points(across, hover) {
    return origins.map((origin) => {
      const some = done.filter((one) => one.origin === origin);
      return { type: "scatter", mode: "markers", name: search.origins[origin], x: some.map(across),
        y: some.map((one) => one.value), text: some.map(hover), hovertemplate: "%{text}<extra></extra>",
        marker: { color: hex(origin), symbol: symbols[origin], size: 8 } };
    });
  }

  const legend = { showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 } };
  const said = (one) => `<b>trial ${one.number}</b>, ${search.metric} ${+one.value.toPrecision(4)}` +
    (one.cost === null ? "" : `<br>${search.cost} ${short(one.cost, search.unit)}`) + `<br>${one.text}`;

  function front() {
    if (!search.cost) return;
    const best = search.best, ring = best.filter((one) => one.full);
    const traces = [{ type: "scatter", mode: "lines", x: best.map((one) => one.cost), y: best.map((one) => one.value),
      line: { color: colour("--soft"), width: 1.4, shape: "hv" }, hoverinfo: "skip", showlegend: false },
    ...points((one) => one.cost, said)];
    if (ring.length) traces.push({ type: "scatter", mode: "markers", name: "full runs", x: ring.map((one) => one.cost),
      y: ring.map((one) => one.full.mean), marker: { symbol: "circle-open", size: 12, color: colour("--ink") },
      error_y: { type: "data", symmetric: false, array: ring.map((one) => one.full.high - one.full.mean),
        arrayminus: ring.map((one) => one.full.mean - one.full.low), color: colour("--ink"), thickness: 1.2, width: 3 },
      text: ring.map((one) => `<b>${one.name}</b> at full length<br>${search.metric} ${+one.full.mean.toPrecision(4)}`),
      hovertemplate: "%{text}<extra></extra>" });
    const arrangement = layout(search.cost, search.metric, legend);
    const values = done.map((one) => one.cost), [low, high] = [Math.min(...values), Math.max(...values)];
    if (low > 0 && high > low) {
      arrangement.xaxis.type = "log";
      arrangement.xaxis.tickvals = marks(values, search.unit);
      arrangement.xaxis.ticktext = arrangement.xaxis.tickvals.map((value) => short(value, search.unit));
      const room = 0.08 * Math.log10(high / low);
      arrangement.xaxis.range = [Math.log10(low) - room, Math.log10(high) + room];
    }
    draw("front", traces, arrangement);
    named("front", best.map((one) => ({ x: one.cost, y: one.value, text: one.name })),
      [...done.map((one) => ({ x: one.cost, y: one.value })),
        ...ring.map((one) => ({ x: one.cost, y: one.full.mean, low: one.full.low, high: one.full.high }))]);
  }

  function order() {
    const better = search.lower ? Math.min : Math.max;
    let best = null;
    const line = done.map((one) => (best = best === null ? one.value : better(best, one.value)));
    draw("order", [{ type: "scatter", mode: "lines", x: done.map((one) => one.number), y: line, hoverinfo: "skip",
      line: { color: colour("--soft"), width: 1.4, shape: "hv" }, showlegend: false }, ...points((one) => one.number, said)],
    layout("trial", search.metric, legend));
  }

  function importance() {
    const place = document.getElementById("importance");
    if (!place) return;
    const shares = [...search.importance].reverse();
    place.style.height = `${Math.max(200, 70 + 24 * shares.length)}px`;
    const arrangement = layout("share", "");
    Object.assign(arrangement.xaxis, { tickformat: ".0%", rangemode: "tozero" });
    Object.assign(arrangement.yaxis, { type: "category", title: { text: "" } });
    draw("importance", [{ type: "bar", orientation: "h", y: shares.map((one) => one.name), x: shares.map((one) => one.share),
      marker: { color: colour("--accent") }, hovertemplate: "<b>%{y}</b> %{x:.1%}<extra></extra>" }], arrangement);
  }

  function groups() {
    if (!search.groups) return;
    const names = Object.keys(search.groups.names), every = search.best.map((one) => one.name);
    const traces = names.map((group, index) => {
      const some = search.groups.shown.filter((one) => one.group === group && one.value !== null);
      const apart = (index - (names.length - 1) / 2) * Math.min(0.18, 0.7 / names.length);
      return { type: "scatter", mode: "markers", name: `${group} (${search.groups.names[group]} rows)`,
        x: some.map((one) => every.indexOf(one.best) + apart), y: some.map((one) => one.value),
        marker: { color: search.colours[index % search.colours.length], size: 9,
          symbol: ["circle", "square", "diamond", "triangle-up", "x", "pentagon", "star"][index % 7] },
        error_y: { type: "data", symmetric: false, color: search.colours[index % search.colours.length], thickness: 1.3, width: 3,
          array: some.map((one) => (one.high === null ? 0 : one.high - one.value)),
          arrayminus: some.map((one) => (one.low === null ? 0 : one.value - one.low)) },
        text: some.map((one) => `<b>${group}</b>, recipe ${one.best}: ${+one.value.toPrecision(4)}`),
        hovertemplate: "%{text}<extra></extra>" };
    });
    const arrangement = layout("recipe", search.groups.figure, legend);
    Object.assign(arrangement.xaxis, { tickvals: every.map((_, index) => index), ticktext: every,
      range: [-0.6, every.length - 0.4] });
    draw("groups", traces, arrangement);
  }

  always(() => { front(); order(); importance(); groups(); });
})();
