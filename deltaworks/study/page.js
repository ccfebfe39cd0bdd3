"use strict";
(() => {
  const study = JSON.parse(document.getElementById("numbers").textContent);
  const { colour, faint, short, marks, layout, draw, name: named, always } = charts;
  const chosen = new Set(study.names);
  let current = 0;

  const look = (name) => study.looks[name];
  const shown = (cell) => cell.methods.filter((one) => chosen.has(one.name) && one.mean !== null);

  // Lines for what trains nothing, and so has no place on an axis of costs.
  function untrained(cell, arrangement, counted) {
    arrangement.shapes = []; arrangement.annotations = arrangement.annotations || [];
    const apart = shown(cell).filter((method) => method.kind !== "tune" && !counted(method));
    for (const [index, one] of apart.entries()) {
      arrangement.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: one.mean, y1: one.mean,
        line: { color: colour("--soft"), width: 1.2, dash: "dot" } });
      const right = index % 2 === 0;  // two that are near each other stand at the two ends
      arrangement.annotations.push({ xref: "paper", x: right ? 1 : 0, xanchor: right ? "right" : "left", y: one.mean, yanchor: "bottom",
        text: one.name, showarrow: false, font: { size: 11, color: colour("--soft") } });
    }
  }

  function pareto(cell, cost) {
    const counted = (one) => one[cost] > 0 && (one.kind === "tune" || study.always.includes(cost));
    const methods = shown(cell).filter(counted);
    const unit = study.units[cost] || "";
    const arrangement = layout(study.costs[cost], cell.metric);
    const traces = [];
    const front = cell.fronts[cost].map((name) => methods.find((one) => one.name === name)).filter(Boolean);
    if (front.length) traces.push({ type: "scatter", mode: "lines", x: front.map((one) => one[cost]),
      y: front.map((one) => one.mean), line: { color: colour("--soft"), width: 1.4, shape: "hv" }, hoverinfo: "skip" });
    for (const one of methods) {
      const { hex, symbol } = look(one.name);
      traces.push({ type: "scatter", mode: "markers", name: one.name, x: [one[cost]], y: [one.mean],
        marker: { color: hex, symbol, size: 11, line: { width: 1, color: colour("--paper") } },
        error_y: { type: "data", symmetric: false, array: [one.high - one.mean], arrayminus: [one.mean - one.low],
          color: hex, thickness: 1.3, width: 3 },
        hovertemplate: `<b>${one.name}</b><br>${cell.metric} ${+one.mean.toPrecision(4)}<br>` +
          `${study.costs[cost]} ${short(one[cost], unit)}<extra></extra>` });
    }
    arrangement.xaxis.type = "log";
    if (methods.length) {
      const values = methods.map((one) => one[cost]);
      arrangement.xaxis.tickvals = marks(values, unit);
      arrangement.xaxis.ticktext = arrangement.xaxis.tickvals.map((value) => short(value, unit));
      const [low, high] = [Math.log10(Math.min(...values)), Math.log10(Math.max(...values))];
      const room = Math.max(0.06 * (high - low), 0.04);
      arrangement.xaxis.range = [low - room, high + room];
    }
    untrained(cell, arrangement, counted);
    draw(`cost-${cost}`, traces, arrangement);
    if (methods.length && document.getElementById(`cost-${cost}`)) named(`cost-${cost}`,
      front.map((one) => ({ x: one[cost], y: one.mean, text: one.name })),
      methods.map((one) => ({ x: one[cost], y: one.mean, low: one.low, high: one.high })));
  }

  function curves(cell, id, part, up) {
    const traces = [];
    for (const one of shown(cell).filter((method) => method[part])) {
      const { hex, dash } = look(one.name), found = one[part];
      if (one.runs > 1 && found.steps.length > 1) traces.push({ type: "scatter", mode: "lines", fill: "toself",
        x: [...found.steps, ...[...found.steps].reverse()], y: [...found.high, ...[...found.low].reverse()],
        fillcolor: faint(hex, 0.1), line: { width: 0 }, hoverinfo: "skip" });
      traces.push({ type: "scatter", mode: "lines", name: one.name, x: found.steps, y: found.mean,
        line: { color: hex, width: 2, dash },
        hovertemplate: `<b>${one.name}</b>, step %{x}: %{y:.4g}<extra></extra>` });
    }
    draw(id, traces, layout("step", up));
  }

  function forgetting(cell) {
    const methods = shown(cell).filter((one) => one.forgetting && one.kind === "tune")
      .sort((a, b) => b.forgetting.after - a.forgetting.after);
    const rows = methods.map((one) => one.name);
    const traces = methods.map((one) => ({ type: "scatter", mode: "lines", hoverinfo: "skip",
      x: [one.forgetting.before, one.forgetting.after], y: [one.name, one.name],
      line: { color: look(one.name).hex, width: 3 } }));
    traces.push({ type: "scatter", mode: "markers", x: methods.map((one) => one.forgetting.before), y: rows,
      marker: { color: colour("--paper"), size: 9, line: { width: 2, color: colour("--soft") } },
      hovertemplate: "<b>%{y}</b><br>before %{x:.4g}<extra></extra>" });
    traces.push({ type: "scatter", mode: "markers", x: methods.map((one) => one.forgetting.after), y: rows,
      marker: { size: 11, color: rows.map((name) => look(name).hex) },
      hovertemplate: "<b>%{y}</b><br>after %{x:.4g}<extra></extra>" });
    const arrangement = layout("loss on the base's own domain", "");
    arrangement.yaxis.type = "category";
    const place = document.getElementById("forgetting");
    if (place) place.style.height = `${Math.max(220, 90 + 26 * rows.length)}px`;
    draw("forgetting", traces, arrangement);
  }

  // One axis across, everything else as in the chosen piece of work.
  function along(axis, number) {
    const here = study.cells[current];
    const cells = study.axes[axis].map((value) => study.cells.find((cell) =>
      Object.keys(study.axes).every((other) => cell.place[other] === (other === axis ? value : here.place[other]))));
    const kept = cells.filter((cell) => cell && cell.metric === here.metric);
    const plot = document.getElementById(`axis-${number}`);
    plot.closest("figure").hidden = kept.length < 2;
    if (kept.length < 2) return;
    const values = kept.map((cell) => cell.place[axis]);
    const numbers = values.length > 1 && values.every((value) => value !== "" && Number(value) > 0);
    const traces = [], told = [];
    for (const name of study.names.filter((one) => chosen.has(one))) {
      const points = kept.map((cell) => [cell.place[axis], cell.methods.find((one) => one.name === name)])
        .filter(([, one]) => one && one.mean !== null);
      if (!points.length) continue;
      told.push(`${name} ${points.map(([value, one]) => `${+one.mean.toPrecision(4)} at ${value}`).join(", ")}`);
      const { hex, symbol, dash } = look(name);
      traces.push({ type: "scatter", mode: "lines+markers", name,
        x: points.map(([value]) => (numbers ? Number(value) : value)), y: points.map(([, one]) => one.mean),
        marker: { color: hex, symbol, size: 9 }, line: { color: hex, width: 2, dash },
        error_y: { type: "data", symmetric: false, array: points.map(([, one]) => one.high - one.mean),
          arrayminus: points.map(([, one]) => one.mean - one.low), color: hex, thickness: 1.2, width: 3 },
        hovertemplate: `<b>${name}</b>, ${axis} %{x}: %{y:.4g}<extra></extra>` });
    }
    const arrangement = layout(axis, here.metric);
    if (numbers) Object.assign(arrangement.xaxis, { type: "log", tickvals: values.map(Number), ticktext: values });
    else Object.assign(arrangement.xaxis, { type: "category", categoryorder: "array", categoryarray: values, tickangle: "auto" });
    plot.setAttribute("aria-label", `${here.metric} by ${axis}: ${told.join("; ") || "nothing is chosen"}.`);
    draw(`axis-${number}`, traces, arrangement);
  }

  function show() {
    const cell = study.cells[current];
    document.querySelectorAll("[data-cell]").forEach((part) => { part.hidden = Number(part.dataset.cell) !== current; });
    document.querySelectorAll("tr[data-method]").forEach((row) => { row.hidden = !chosen.has(row.dataset.method); });
    for (const cost of Object.keys(study.costs)) {
      pareto(cell, cost);
      const plot = document.getElementById(`cost-${cost}`);
      if (plot) plot.setAttribute("aria-label", cell.texts[cost]);
    }
    curves(cell, "training", "curve", "training loss");
    curves(cell, "held-out", "held_out", `held-out ${cell.metric}`);
    for (const [id, part] of [["training", "curve"], ["held-out", "held_out"]]) {
      const plot = document.getElementById(id);
      if (plot) { plot.setAttribute("aria-label", cell.texts[part]);
        plot.closest("figure").hidden = !cell.methods.some((one) => one[part]); }
    }
    const section = document.getElementById("forgetting-section");
    if (section) {
      section.hidden = !cell.methods.some((one) => one.forgetting);
      if (!section.hidden) forgetting(cell);
      document.getElementById("forgetting").setAttribute("aria-label", cell.texts.forgetting);
    }
    Object.keys(study.axes).forEach(along);
  }

  const select = document.getElementById("work");
  if (select) select.addEventListener("change", () => { current = Number(select.value); show(); });
  const boxes = [...document.querySelectorAll("input[name=method]")];
  boxes.forEach((box) => box.addEventListener("change", () => {
    if (box.checked) chosen.add(box.value); else chosen.delete(box.value);
    show();
  }));
  document.querySelectorAll("button[data-all]").forEach((button) => button.addEventListener("click", () => {
    chosen.clear();
    boxes.forEach((box) => { box.checked = button.dataset.all === "yes"; if (box.checked) chosen.add(box.value); });
    show();
  }));
  always(show);
})();
