"use strict";
(() => {
  const study = JSON.parse(document.getElementById("numbers").textContent);
  const phone = () => window.innerWidth < 620;
  const chosen = new Set(study.names);
  let current = 0;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const faint = (hex, part) => hex + Math.round(part * 255).toString(16).padStart(2, "0");
  const look = (name) => study.looks[name];
  const shown = (cell) => cell.methods.filter((one) => chosen.has(one.name) && one.mean !== null);

  function short(value, unit) {
    if (value === null || value === undefined) return "-";
    if (unit === "bytes") {
      for (const name of ["B", "KiB", "MiB"]) { if (value < 1024) return `${+value.toPrecision(3)} ${name}`; value /= 1024; }
      return `${+value.toPrecision(3)} GiB`;
    }
    if (unit === "s") return value < 1 ? `${+(value * 1000).toPrecision(3)} ms` : `${+value.toPrecision(3)} s`;
    for (const [bound, name] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= bound) return `${+(value / bound).toPrecision(3)} ${name}`;
    return `${+value.toPrecision(3)}`;
  }

  // Marks on a logarithmic axis that people can read: 1, 2 and 5 times powers of ten, or powers of two for bytes.
  function marks(values, unit) {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const found = [];
    if (high / low < 2.5) {
      const base = unit === "bytes" ? 1024 ** Math.floor(Math.log(high) / Math.log(1024)) : 1;
      const width = Math.max(high - low, 0.02 * high) / base, power = 10 ** Math.floor(Math.log10(width));
      const step = [1, 2, 5, 10].map((part) => part * power).find((part) => width / part <= (phone() ? 3 : 5));
      for (let value = Math.floor(low / base / step) * step; value * base <= high * 1.01; value += step)
        found.push(value * base);
      return found.filter((value) => value >= low * 0.98);
    }
    if (unit === "bytes") {
      for (let power = Math.floor(Math.log2(low)); power <= Math.ceil(Math.log2(high)); power++) found.push(2 ** power);
    } else {
      const steps = high / low > 300 ? [1] : high / low > 30 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high) + 1; power++)
        for (const step of steps) found.push(step * 10 ** power);
    }
    const kept = found.filter((value) => value >= low * 0.7 && value <= high * 1.4);
    const every = Math.ceil(kept.length / (phone() ? 4 : 6));
    return kept.filter((_, index) => index % every === 0);
  }

  function layout(across, up, more) {
    const ink = colour("--ink"), line = colour("--line");
    const axis = { gridcolor: line, linecolor: line, zeroline: false, automargin: true, tickfont: { size: 12 }, tickangle: 0 };
    return Object.assign({
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
      font: { family: "system-ui, sans-serif", size: 13, color: ink }, margin: { l: 8, r: 14, t: 10, b: 8 },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: line, font: { color: ink } },
      xaxis: Object.assign({ title: { text: across, standoff: 8 } }, axis),
      yaxis: Object.assign({ title: { text: up, standoff: 6 } }, axis),
    }, more || {});
  }

  const settings = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false, showTips: false };

  function draw(id, traces, arrangement) {
    const place = document.getElementById(id);
    if (place) Plotly.react(place, traces, arrangement, settings);
  }

  // Lines for what trains nothing, and so has no place on an axis of costs.
  function untrained(cell, arrangement, counted) {
    arrangement.shapes = []; arrangement.annotations = arrangement.annotations || [];
    for (const one of shown(cell).filter((method) => method.kind !== "tune" && !counted(method))) {
      arrangement.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: one.mean, y1: one.mean,
        line: { color: colour("--soft"), width: 1.2, dash: "dot" } });
      arrangement.annotations.push({ xref: "paper", x: 1, xanchor: "right", y: one.mean, yanchor: "bottom",
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
      arrangement.annotations = front.map((one, index) => ({ x: Math.log10(one[cost]), y: one.mean, text: one.name,
        showarrow: false, yshift: cell.lower ? -15 : 15, font: { size: 11.5 },
        xanchor: index === 0 ? "left" : index === front.length - 1 && front.length > 1 ? "right" : "center" }));
    }
    untrained(cell, arrangement, counted);
    draw(`cost-${cost}`, traces, arrangement);
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
    else Object.assign(arrangement.xaxis, { type: "category", categoryorder: "array", categoryarray: values });
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

  // Sorting: the buttons in the heads of the columns.
  document.querySelectorAll("table.sortable").forEach((table) => {
    table.querySelectorAll("thead th button").forEach((button) => button.addEventListener("click", () => {
      const head = button.closest("th"), column = [...head.parentNode.children].indexOf(head);
      const up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      const value = (row) => (row.cells[column] ? row.cells[column].dataset.value : undefined);
      const compared = (a, b) => {
        const [one, other] = [value(a), value(b)];
        if (!one || !other) return (one ? 0 : 1) - (other ? 0 : 1);
        const found = column ? Number(one) - Number(other) : one.localeCompare(other);
        return up ? found : -found;
      };
      [...body.rows].sort(compared).forEach((row) => body.append(row));
    }));
  });

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
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
  document.documentElement.dataset.drawn = "yes";
})();
